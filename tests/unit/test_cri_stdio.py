"""The host's side of the shim, against the real shim as a process."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.support.loop import eventually, run_async
from wrapper.errors import RuntimeUnavailable, WorkerStartFailed
from wrapper.runtime import process_tree
from wrapper.runtime.cri_stdio import SOCKET_NAME, ShimLink
from wrapper.runtime.native import shim_path

Start = Callable[..., "subprocess.Popen[bytes]"]


@asynccontextmanager
async def link_in(folder: Path, *, uid: int | None = None) -> AsyncIterator[tuple[ShimLink, Start]]:
    """A link, and what starts shims for it; all of them are dead afterwards."""
    link = ShimLink(str(folder), os.geteuid() if uid is None else uid, os.getegid())
    shims: list[subprocess.Popen[bytes]] = []

    def start(*worker: str) -> subprocess.Popen[bytes]:
        argv = [shim_path(), str(folder / SOCKET_NAME), *worker]
        shim = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        shims.append(shim)
        return shim

    try:
        yield link, start
    finally:
        for shim in shims:
            for worker in process_tree.children(shim.pid):
                os.kill(worker, signal.SIGKILL)
            shim.kill()
            shim.wait()
        link.close()
        link.close()
    assert os.listdir(folder) == []


async def read(fd: int, size: int) -> bytes:
    data = b""

    def has_come() -> bool:
        nonlocal data
        try:
            data += os.read(fd, size)
        except BlockingIOError:
            pass
        return len(data) >= size

    await eventually(has_come)
    return data


def test_a_worker_gets_three_pipes_and_its_pids_and_end_are_told(tmp_path: Path) -> None:
    async def main() -> None:
        async with link_in(tmp_path) as (link, start):
            shim = start("/bin/sh", "-c", "echo up >&2; cat; exit 7")
            pids = await link.started
            assert pids.shim == shim.pid
            assert pids.worker in process_tree.children(shim.pid)
            assert os.listdir(tmp_path) == [], "nobody connects a second time"
            os.write(link.stdin_fd, b"hello")
            assert await read(link.stdout_fd, 5) == b"hello"
            assert await read(link.stderr_fd, 3) == b"up\n"
            link.close_stdin()
            assert (await link.exited).returncode == 7

    run_async(main())


def test_a_program_that_cannot_run_is_the_start_s_error(tmp_path: Path) -> None:
    async def main() -> None:
        async with link_in(tmp_path) as (link, start):
            start("/nowhere/tool")
            with pytest.raises(WorkerStartFailed, match="No such file or directory"):
                await link.started
            assert link.exited.done()

    run_async(main())


def test_a_process_of_another_user_gets_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with link_in(tmp_path) as (link, start):
            link._uid += 1
            shim = start("/bin/cat")
            with pytest.raises(
                WorkerStartFailed, match=r"a process of user \d+ connected in the place of user"
            ):
                await link.started
            await eventually(lambda: shim.poll() is not None)
            assert shim.returncode == 125

    run_async(main())


def test_a_shim_that_dies_before_the_program_runs_is_a_failed_start(tmp_path: Path) -> None:
    async def main() -> None:
        async with link_in(tmp_path) as (link, _):
            with socket.socket(socket.AF_UNIX) as impostor:
                impostor.connect(str(tmp_path / SOCKET_NAME))
            with pytest.raises(WorkerStartFailed, match="ended before"):
                await link.started
            assert (await link.exited).returncode == -signal.SIGKILL

    run_async(main())


def test_a_shim_that_is_killed_is_the_worker_s_end(tmp_path: Path) -> None:
    async def main() -> None:
        async with link_in(tmp_path) as (link, start):
            shim = start("/bin/cat")
            pids = await link.started
            shim.kill()
            assert (await link.exited).returncode == -signal.SIGKILL
            os.kill(pids.worker, signal.SIGKILL)

    run_async(main())


def test_a_signal_is_told_as_such(tmp_path: Path) -> None:
    async def main() -> None:
        async with link_in(tmp_path) as (link, start):
            start("/bin/cat")
            os.kill((await link.started).worker, signal.SIGSEGV)
            assert str(await link.exited) == "killed by SIGSEGV"

    run_async(main())


def test_what_a_dead_shim_told_last_is_taken_when_its_death_is_seen(tmp_path: Path) -> None:
    async def main() -> None:
        async with link_in(tmp_path) as (link, start):
            shim = start("/bin/sh", "-c", "exec cat")
            await link.started
            link.close_stdin()
            shim.wait()
            link.shim_is_dead()
            assert link.exited.result().returncode == 0

    run_async(main())


def test_only_the_first_connection_counts(tmp_path: Path) -> None:
    async def main() -> None:
        async with link_in(tmp_path) as (link, start):
            start("/bin/cat")
            await link.started
            with socket.socket(socket.AF_UNIX) as second, pytest.raises(OSError, match="No such file"):
                second.connect(str(tmp_path / SOCKET_NAME))

    run_async(main())


def test_closing_while_nobody_has_connected_yet_leaves_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with link_in(tmp_path) as (link, _):
            pass
        assert not link.started.done()

    run_async(main())


def test_a_wait_that_is_given_up_says_why(tmp_path: Path) -> None:
    async def main() -> None:
        async with link_in(tmp_path) as (link, _):
            link.give_up_waiting("nobody came")
            with pytest.raises(WorkerStartFailed, match="nobody came"):
                await link.started
            link.give_up_waiting("twice")
            await asyncio.sleep(0)

    run_async(main())


def test_a_folder_that_is_not_there_is_said_and_no_pipe_stays(tmp_path: Path) -> None:
    async def main() -> None:
        with pytest.raises(RuntimeUnavailable, match="cannot make the streams of a worker in"):
            ShimLink(str(tmp_path / "missing"), 0, 0)

    run_async(main())


def test_a_path_longer_than_a_socket_may_have_is_no_problem(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 120)
    deep.mkdir()

    async def main() -> None:
        async with link_in(deep) as (link, _):
            assert os.listdir(deep) == [SOCKET_NAME]
            assert not link.started.done()

    run_async(main())
