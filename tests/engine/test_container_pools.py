"""Pools of warm containers through the public API, with real actions' directories, on a real engine."""

from __future__ import annotations

import json
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.cri import WORKERS, container_pool, engine_is_empty, leftovers_on_node
from tests.support.engine import PrivateContainerd
from tests.support.loop import run_async
from wrapper import PoolCreateOptions, WarmWorkerPoolManager, WorkRequest, load_config
from wrapper.errors import ConfigError, RequestRefused, RuntimeUnavailable, WorkerDied

pytestmark = pytest.mark.engine

ECHO = ["/usr/bin/python3", "-I", "-S", f"{WORKERS}/echo_worker.py", "--persistent_worker"]


@pytest.fixture
def manager(engine: PrivateContainerd, tmp_path: Path) -> Iterator[Callable[..., WarmWorkerPoolManager]]:
    """Makes managers of one pool; afterwards nothing of them may be left in the engine or on the node."""

    def make(**changes: object) -> WarmWorkerPoolManager:
        document = tmp_path / "pools.json5"
        document.write_text(json.dumps(container_pool(engine, tmp_path, worker_command=ECHO, **changes)))
        return WarmWorkerPoolManager(PoolCreateOptions(load_config(document)))

    yield make
    assert engine_is_empty(engine)
    assert leftovers_on_node(tmp_path) == []


@pytest.fixture
def action(tmp_path: Path) -> Callable[[str], Path]:
    """Makes directories of actions as NativeLink does: inputs are read-only hard links to blobs."""

    def make(name: str) -> Path:
        blob = tmp_path / "cas" / "blob"
        if not blob.exists():
            blob.parent.mkdir()
            blob.write_text("input of all")
            blob.chmod(0o444)
        directory = tmp_path / "work" / name
        (directory / "src").mkdir(parents=True)
        os.link(blob, directory / "src" / "input.txt")
        return directory

    return make


def words(*arguments: str) -> WorkRequest:
    return WorkRequest.of(arguments=[os.fsencode(argument) for argument in arguments])


def test_an_action_finds_its_inputs_and_its_outputs_come_back_sealed(
    manager: Callable[..., WarmWorkerPoolManager], action: Callable[[str], Path]
) -> None:
    async def main() -> None:
        async with manager() as pools:
            for name in ("one", "two", "three"):
                directory = action(name)
                request = words("--read=src/input.txt", f"--write=src/{name}.out", "--print-cwd")
                response = await pools.run("pool", request, directory=str(directory))
                output = response.pb.output.decode()
                assert response.pb.exit_code == 0, output
                assert "input of all" in output
                assert "/execroot" in output
                assert sorted(os.listdir(directory / "src")) == ["input.txt", f"{name}.out"]
                info = (directory / "src" / f"{name}.out").stat()
                assert (stat.S_IMODE(info.st_mode), info.st_uid) == (0o444, os.geteuid())
            assert pools.metrics().recycled_workers == 0

    run_async(main())


def test_one_warm_container_serves_one_action_after_the_other(
    manager: Callable[..., WarmWorkerPoolManager], action: Callable[[str], Path]
) -> None:
    async def main() -> None:
        async with manager() as pools:
            counts = []
            for number in range(5):
                directory = str(action(str(number)))
                response = await pools.run("pool", words("--count"), directory=directory)
                counts.append(response.pb.output.decode())
            assert len(set(counts)) == 5, "a worker that counts its requests is the same one"
            assert pools.metrics().prepares == 1

    run_async(main())


def test_a_worker_that_dies_gives_nothing_back_and_the_next_action_is_served(
    manager: Callable[..., WarmWorkerPoolManager], action: Callable[[str], Path]
) -> None:
    async def main() -> None:
        async with manager() as pools:
            directory = action("dying")
            with pytest.raises(WorkerDied, match="exit code 3"):
                await pools.run("pool", words("--write=src/half", "--die=3"), directory=str(directory))
            assert os.listdir(directory) == []
            response = await pools.run("pool", words("fine"), directory=str(action("next")))
            assert response.pb.output == b"echo:fine"

    run_async(main())


def test_what_a_request_leaves_in_its_container_is_gone_for_the_next(
    manager: Callable[..., WarmWorkerPoolManager], action: Callable[[str], Path]
) -> None:
    async def main() -> None:
        async with manager() as pools:
            for number in range(3):
                request = words("--leave-child", "--leave-daemon", "--leave-tmp=left")
                response = await pools.run("pool", request, directory=str(action(f"messy{number}")))
                assert response.pb.exit_code == 0
            async with pools.lease("pool") as lease:
                process = lease._connection.process
                assert not process.leftovers()

    run_async(main())


def test_memory_beyond_the_limit_ends_the_worker_with_that_reason(
    manager: Callable[..., WarmWorkerPoolManager], action: Callable[[str], Path]
) -> None:
    async def main() -> None:
        async with manager(isolation={"memory_limit_in_bytes": 64 << 20, "tmp_limit_mb": None}) as pools:
            with pytest.raises(WorkerDied) as died:
                await pools.run("pool", words(f"--big={256 << 20}"), directory=str(action("big")))
            assert "out of memory" in died.value.report()
            assert "64 MiB" in died.value.report()

    run_async(main())


def test_an_action_on_another_mount_is_refused_with_the_remedy(
    manager: Callable[..., WarmWorkerPoolManager],
) -> None:
    async def main() -> None:
        async with manager() as pools:
            with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
                Path(elsewhere, "input").write_text("stays")
                with pytest.raises(RequestRefused, match="link"):
                    await pools.run("pool", words("x"), directory=elsewhere)
                assert Path(elsewhere, "input").read_text() == "stays"
            response = await pools.run("pool", words("fine"))
            assert response.pb.output == b"echo:fine"

    run_async(main())


def test_a_pool_without_execroots_takes_no_directory(tmp_path: Path) -> None:
    document = tmp_path / "pools.json5"
    document.write_text('{pools: [{name: "p", language: "custom(x)", worker_command: ["/bin/cat"]}]}')

    async def main() -> None:
        async with WarmWorkerPoolManager(PoolCreateOptions(load_config(document))) as pools:
            with pytest.raises(ConfigError, match="work_root"):
                await pools.run("p", words("x"), directory=str(tmp_path))

    run_async(main())


def test_an_engine_that_is_not_there_is_named_with_what_to_do(tmp_path: Path) -> None:
    document = tmp_path / "pools.json5"
    pool = {
        "name": "pool",
        "language": "custom(x)",
        "runtime": "cri",
        "cri_socket": str(tmp_path / "no.sock"),
        "container_image": "x",
        "min_warm_workers": 0,
        "worker_command": ["x"],
    }
    document.write_text(json.dumps({"pools": [pool], "state_dir": str(tmp_path / "state")}))

    async def main() -> None:
        async with WarmWorkerPoolManager(PoolCreateOptions(load_config(document))) as pools:
            with pytest.raises(RuntimeUnavailable, match=r"no\.sock.*is the engine running"):
                await pools.run("pool", words("x"))

    run_async(main())
