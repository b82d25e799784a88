"""What a killed process has left in the engine and on the node, the next one removes: that and no more."""

from __future__ import annotations

import asyncio
import glob
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.cri import WORKERS, container_pool, cri_settings, engine_is_empty
from tests.support.engine import PrivateContainerd
from tests.support.loop import run_async
from tests.support.raw_cri import RawCri
from wrapper import PoolCreateOptions, WarmWorkerPoolManager, WorkRequest, load_config
from wrapper.runtime.base import WorkerSpec
from wrapper.runtime.cri_container import CriRuntime

pytestmark = pytest.mark.engine

ECHO = ["/usr/bin/python3", "-I", "-S", f"{WORKERS}/echo_worker.py", "--persistent_worker"]
CAT = WorkerSpec("cat", ("/usr/bin/cat",), {}, "/")

# A process that has two warm workers, says so, and does nothing more.
KEEPER = """
import asyncio, sys
from wrapper import PoolCreateOptions, WarmWorkerPoolManager, load_config
async def main():
    async with WarmWorkerPoolManager(PoolCreateOptions(load_config(sys.argv[1]))) as pools:
        async with pools.lease("pool"), pools.lease("pool"):
            print("ready", flush=True)
            await asyncio.Event().wait()
asyncio.run(main())
"""


@pytest.fixture
def document(engine: PrivateContainerd, tmp_path: Path) -> Path:
    path = tmp_path / "pools.json5"
    path.write_text(json.dumps(container_pool(engine, tmp_path, worker_command=ECHO)))
    return path


@contextmanager
def keeper(document: Path) -> Iterator[subprocess.Popen[str]]:
    """A process of ours with two running workers, which is killed at the end if the test has not done it."""
    argv = [sys.executable, "-c", KEEPER, str(document)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def left_by(process: subprocess.Popen[str], folder: Path) -> dict[str, list[str]]:
    """Folders, mounts and control groups that carry the name of its generation."""
    name = f"generation-{process.pid}-"
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return {
        "folders": [str(path) for path in folder.rglob(f"{name}*")],
        "mounts": [point for point in mounts if name in point],
        "groups": glob.glob(f"/sys/fs/cgroup/*/nlww-*{name}*"),
    }


NOTHING: dict[str, list[str]] = {"folders": [], "mounts": [], "groups": []}


def pods(engine: PrivateContainerd) -> list[str]:
    with RawCri(engine.socket) as cri:
        return cri.pods()


def test_a_killed_process_s_containers_mounts_groups_and_folders_are_gone_with_the_next_start(
    engine: PrivateContainerd, document: Path, tmp_path: Path
) -> None:
    with keeper(document) as dead:
        assert all(left_by(dead, tmp_path).values())
        dead.send_signal(signal.SIGKILL)
        dead.wait()
    assert len(pods(engine)) == 2
    assert all(left_by(dead, tmp_path).values())

    async def main() -> None:
        async with WarmWorkerPoolManager(PoolCreateOptions(load_config(document))) as pools:
            response = await pools.run("pool", WorkRequest.of(arguments=[b"hello"]))
            assert response.pb.output == b"echo:hello"
            assert len(pods(engine)) == 1
            assert left_by(dead, tmp_path) == NOTHING

    run_async(main())
    assert engine_is_empty(engine)


def test_a_living_process_and_another_owner_s_workers_are_never_touched(
    engine: PrivateContainerd, document: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    state = tmp_path / "state"

    async def main() -> None:
        others, ours = (
            CriRuntime(cri_settings(engine, elsewhere)),
            CriRuntime(cri_settings(engine, tmp_path)),
        )
        foreign = await others.start(CAT)
        try:
            with keeper(document) as living:
                its = left_by(living, state)
                with keeper(document) as dead:
                    dead.send_signal(signal.SIGKILL)
                    dead.wait()
                assert len(pods(engine)) == 5
                await ours.prepare()
                assert left_by(dead, state) == NOTHING
                assert left_by(living, state) == its
                assert len(pods(engine)) == 3
                assert not foreign.exited.done()
                await ours.close()
                assert len(pods(engine)) == 3
        finally:
            await foreign.stop(0)
            await others.close()
        successor = CriRuntime(cri_settings(engine, tmp_path))
        await successor.prepare()
        assert left_by(living, state) == NOTHING
        await successor.close()

    run_async(main())
    assert engine_is_empty(engine)


def test_several_processes_that_start_at_once_remove_it_together(
    engine: PrivateContainerd, document: Path, tmp_path: Path
) -> None:
    with keeper(document) as dead:
        dead.send_signal(signal.SIGKILL)
        dead.wait()

    async def main() -> None:
        runtimes = [CriRuntime(cri_settings(engine, tmp_path)) for _ in range(3)]
        try:
            workers = await asyncio.gather(*(runtime.start(CAT) for runtime in runtimes))
            assert not any(worker.exited.done() for worker in workers)
            assert len(pods(engine)) == 3
            for worker in workers:
                await worker.stop(0)
        finally:
            for runtime in runtimes:
                await runtime.close()
        assert left_by(dead, tmp_path / "state") == NOTHING

    run_async(main())
    assert engine_is_empty(engine)
    assert os.listdir(tmp_path / "state") == []
