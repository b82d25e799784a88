"""The begin and the end of pools of containers: priming from recorded requests, and a graceful drain."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.driver import QUICK_JVM, WorkerHost, request
from tests.support.cri import WORKERS, container_pool, engine_is_empty, leftovers_on_node
from tests.support.engine import PrivateContainerd
from tests.support.loop import eventually, run_async
from tests.support.oci_image import host_mounts
from wrapper import PoolCreateOptions, WarmWorkerPoolManager, load_config
from wrapper.config_containers import EXECROOTS
from wrapper.errors import PoolDraining, WorkerDied
from wrapper.events import Event, EventKind

import demo_input  # isort: skip  # the driver has put the example on sys.path

pytestmark = pytest.mark.engine

ECHO = ["/usr/bin/python3", "-I", "-S", f"{WORKERS}/echo_worker.py", "--persistent_worker"]
RECORDED = 5


@pytest.fixture
def manager(engine: PrivateContainerd, tmp_path: Path) -> Iterator[Callable[..., WarmWorkerPoolManager]]:
    """Makes managers of one pool; afterwards nothing of them may be left in the engine or on the node."""

    def make(*, drain_timeout_s: float = 10.0, **changes: object) -> WarmWorkerPoolManager:
        document = container_pool(engine, tmp_path, **{"worker_command": ECHO, "max_workers": 1, **changes})
        file = tmp_path / "pools.json5"
        file.write_text(json.dumps({**document, "drain_timeout_s": drain_timeout_s}))
        return WarmWorkerPoolManager(PoolCreateOptions(load_config(file)))

    yield make
    assert engine_is_empty(engine)
    assert leftovers_on_node(tmp_path) == []


def action(folder: Path, name: str, **files: str) -> Path:
    directory = folder / "work" / name
    directory.mkdir()
    for file, text in files.items():
        blob = folder / f"blob-{name}-{file}"
        blob.write_text(text)
        blob.chmod(0o444)
        os.link(blob, directory / f"{file}.java")
    return directory


def test_a_drain_lets_the_request_in_flight_finish_and_refuses_the_one_that_waits(
    manager: Callable[..., WarmWorkerPoolManager], engine: PrivateContainerd, tmp_path: Path
) -> None:
    async def main() -> None:
        pools = manager()
        await pools.start()
        directory = action(tmp_path, "slow")
        slow = asyncio.create_task(
            pools.run("pool", request("--sleep-ms=700", "--write=out"), directory=str(directory))
        )
        await eventually(lambda: pools.metrics().active_workers == 1)
        waiting = asyncio.create_task(pools.run("pool", request("late")))
        await asyncio.sleep(0)  # it has asked
        assert not waiting.done()
        assert not slow.done()
        await pools.close()
        with pytest.raises(PoolDraining) as refused:
            await waiting
        assert refused.value.retry_helps
        assert (await slow).pb.exit_code == 0
        assert (directory / "out").exists()
        assert engine_is_empty(engine)
        with pytest.raises(PoolDraining):
            await pools.run("pool", request("later still"))

    run_async(main())


def test_a_request_that_outlasts_the_drain_is_ended_with_its_container(
    manager: Callable[..., WarmWorkerPoolManager], engine: PrivateContainerd, tmp_path: Path
) -> None:
    async def main() -> None:
        pools = manager(drain_timeout_s=0.3)
        await pools.start()
        directory = action(tmp_path, "endless", Input="text")
        endless = asyncio.create_task(pools.run("pool", request("--hang"), directory=str(directory)))
        await eventually(lambda: pools.metrics().active_workers == 1)
        await pools.close()
        with pytest.raises(WorkerDied, match="stopped while a request was with it"):
            await endless
        assert os.listdir(directory) == []  # whatever the worker has made of it is not given back
        assert engine_is_empty(engine)

    run_async(main())


def test_a_drain_does_not_wait_for_containers_that_are_still_starting(
    manager: Callable[..., WarmWorkerPoolManager], engine: PrivateContainerd
) -> None:
    async def main() -> None:
        pools = manager(max_workers=4, min_warm_workers=4)
        await pools.start()
        await eventually(lambda: pools.metrics().warmups_active)
        await pools.close()
        assert engine_is_empty(engine)

    run_async(main())


def java_worker(jar: str) -> list[str]:
    return [demo_input.find_jdk().java, *QUICK_JVM, "-jar", jar, "--persistent_worker"]


def test_a_jvm_in_a_container_is_primed_with_what_another_has_recorded_and_nothing_of_it_stays(
    manager: Callable[..., WarmWorkerPoolManager], tmp_path: Path
) -> None:
    demo_input.CACHE.mkdir(parents=True, exist_ok=True)
    jar = demo_input.worker_jar(demo_input.find_jdk())
    there, record = tmp_path / "there", tmp_path / "javac.rec"
    there.mkdir()
    argv = [sys.executable, "-m", "wrapper", "record", "--output", str(record), "--", *java_worker(str(jar))]
    with WorkerHost(argv, cwd=there) as host:
        for number in range(RECORDED):
            (there / f"C{number}.java").write_text(f"class C{number} {{ int x = {number}; }}\n")
            assert host.exchange([request("-d", "out", f"C{number}.java")])[0].response.pb.exit_code == 0
        assert host.close() == 0

    async def main() -> None:
        events: list[Event] = []
        pools = manager(
            worker_command=java_worker("/opt/java-worker.jar"),
            language="jvm",
            warmup={"requests": [str(record)], "max_warmup_ms": 60_000},
            isolation={
                "mounts": [
                    *({"host_path": path} for path in host_mounts()),
                    {"host_path": str(jar), "path": "/opt/java-worker.jar"},
                ]
            },
        )
        pools.events.subscribe(events.append)
        async with pools:
            directory = action(tmp_path, "real", Real="class Real { }\n")
            answer = await pools.run("pool", request("-d", "out", "Real.java"), directory=str(directory))
            assert (answer.pb.exit_code, answer.pb.output) == (0, b"")
            (done,) = [event for event in events if event.kind is EventKind.WARMUP_DONE]
            assert (done.numbers["primed"], done.numbers["primed_failed"]) == (RECORDED, 0)
            assert done.numbers["gc_s"] > 0
            assert not done.numbers["cut_short"]
            # Its own output and input, and nothing of the requests that primed its worker.
            names = sorted(path.name for path in directory.rglob("*"))
            assert names == ["Real.class", "Real.java", "out"]
            (generation,) = (tmp_path / "work" / EXECROOTS).iterdir()
            assert [path.name for path in generation.rglob("*prime*")] == []
            (execroot,) = [path for path in generation.iterdir() if path.is_dir()]
            assert list(execroot.iterdir()) == []

    run_async(main())
