"""A start removes what dead processes have left staged, before anybody asks for a worker."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.loop import eventually, run_async
from wrapper import PoolCreateOptions, WarmWorkerPoolManager, load_config
from wrapper.config_containers import EXECROOTS
from wrapper.generation import Generation


def test_what_a_dead_process_left_staged_goes_at_the_start_and_a_living_ones_stays(tmp_path: Path) -> None:
    base = tmp_path / EXECROOTS
    dead, living = Generation.begin(str(base)), Generation.begin(str(base))
    for generation in (dead, living):
        staged = Path(generation.path, "1", "src")
        staged.mkdir(parents=True)
        (staged / "input").write_text("of an action")
    dead.leave()
    document = tmp_path / "pools.json5"
    pool = {
        "name": "p",
        "language": "custom(x)",
        "worker_command": ["/bin/cat"],
        "min_warm_workers": 0,
        "execroot": {"work_root": str(tmp_path)},
    }
    document.write_text(json.dumps({"pools": [pool]}))

    async def main() -> None:
        async with WarmWorkerPoolManager(PoolCreateOptions(load_config(document))):
            await eventually(lambda: not Path(dead.path).exists())
            assert Path(living.path, "1", "src", "input").read_text() == "of an action"

    try:
        run_async(main())
    finally:
        living.wipe()


def test_a_pool_without_execroots_of_its_own_makes_no_folder(tmp_path: Path) -> None:
    document = tmp_path / "pools.json5"
    document.write_text('{pools: [{name: "p", language: "custom(x)", worker_command: ["/bin/cat"]}]}')
    [pool] = load_config(document).pools
    assert pool.settings(str(tmp_path)).execroot.base == ""
    assert pool.model_copy(update={"runtime": "cri"}).settings("/s").execroot.base == "/s/execroots"
