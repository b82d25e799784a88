"""What every Runtime promises to the pool, checked on each implementation with the same tests."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any, Protocol

import pytest

from tests.fakes.fake_runtime import FakeRuntime, Script
from tests.support.cri import cri_settings
from tests.support.engine import PrivateContainerd
from tests.support.loop import eventually, run_async, run_virtual
from wrapper.errors import RuntimeUnavailable, WorkerStartFailed
from wrapper.runtime.base import (
    CommandResult,
    CommandSpec,
    ExitStatus,
    Language,
    Leftovers,
    Runtime,
    WorkerProcess,
    WorkerSpec,
)
from wrapper.runtime.cri_container import CriRuntime
from wrapper.runtime.local_process import LocalProcessRuntime

# A tool that repeats its input; each line of its input may ask for something else.
TOOL = """
import os, sys, subprocess, signal
os.write(2, b"tool is up\\n")
if "stubborn" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
while line := os.read(0, 65536):
    if b"leave" in line:
        with open(os.path.join(os.environ["TMPDIR"], "left"), "w") as f: f.write("x")
        subprocess.Popen(["/bin/sleep", "1000"], stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    if b"die" in line:
        os._exit(3)
    if b"name" in line:
        with open("/dev/stderr", "wb") as f: f.write(b"by name\\n")
    os.write(1, line)
if "stubborn" in sys.argv:
    while True: signal.pause()
"""


class Kind(Protocol):
    """How the suite makes and drives one implementation."""

    def run(self, main: Coroutine[Any, Any, None]) -> None: ...
    def runtime(self) -> Runtime: ...
    def spec(self, *flags: str) -> WorkerSpec: ...


class FakeKind:
    def run(self, main: Coroutine[Any, Any, None]) -> None:
        run_virtual(main)

    def runtime(self) -> Runtime:
        def script(spec: WorkerSpec) -> Script:
            def tool(data: bytes) -> bytes | None:
                if b"leave" in data:
                    made.leftovers.append(Leftovers((4711,), ("left",)))
                if b"die" in data:
                    runtime.workers[-1].die(ExitStatus(3))
                return data

            def command(asked: CommandSpec) -> CommandResult:
                return (
                    CommandResult(127, b"missing") if asked.argv[0] == "missing" else CommandResult(0, b"out")
                )

            made = Script(tool=tool, stderr=b"tool is up\n", run=command)
            if "stubborn" in spec.argv:
                made.stop_delay_s = 1e9
            return made

        runtime = FakeRuntime(script)
        return runtime

    def spec(self, *flags: str) -> WorkerSpec:
        return WorkerSpec("fake", ("tool", *flags), {}, "/")


class ProcessKind:
    def __init__(self, tmp_path: Path) -> None:
        self._tmp_path = tmp_path

    def run(self, main: Coroutine[Any, Any, None]) -> None:
        run_async(main)

    def runtime(self) -> Runtime:
        return LocalProcessRuntime(tmp_base=str(self._tmp_path))

    def spec(self, *flags: str) -> WorkerSpec:
        argv = (sys.executable, "-I", "-S", "-c", TOOL, *flags)
        if "missing" in flags:
            argv = ("/nowhere/missing",)
        return WorkerSpec("process", argv, {}, str(self._tmp_path), Language.CUSTOM)


class CriKind:
    def __init__(self, engine: PrivateContainerd, tmp_path: Path) -> None:
        self._engine = engine
        self._tmp_path = tmp_path

    def run(self, main: Coroutine[Any, Any, None]) -> None:
        run_async(main)

    def runtime(self) -> Runtime:
        return CriRuntime(cri_settings(self._engine, self._tmp_path))

    def spec(self, *flags: str) -> WorkerSpec:
        argv = ("/usr/bin/python3", "-I", "-S", "-c", TOOL, *flags)
        if "missing" in flags:
            argv = ("/nowhere/missing",)
        return WorkerSpec("cri", argv, {}, "/")


@pytest.fixture(params=["fake", "process", pytest.param("cri", marks=pytest.mark.engine)])
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> Kind:
    if request.param == "cri":
        return CriKind(request.getfixturevalue("engine"), tmp_path)
    return FakeKind() if request.param == "fake" else ProcessKind(tmp_path)


@contextlib.asynccontextmanager
async def started(kind: Kind, *flags: str) -> AsyncIterator[WorkerProcess]:
    runtime = kind.runtime()
    try:
        worker = await runtime.start(kind.spec(*flags))
        try:
            yield worker
        finally:
            await worker.stop(0)
    finally:
        await runtime.close()


async def ask(worker: WorkerProcess, data: bytes = b"hello") -> bytes:
    """One exchange, as the pool does it."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[bytes] = loop.create_future()

    def read() -> None:
        if not answer.done():
            answer.set_result(os.read(worker.stdout_fd, 1 << 20))

    os.write(worker.stdin_fd, data)
    worker.first_request_sent()
    loop.add_reader(worker.stdout_fd, read)
    try:
        return await answer
    finally:
        loop.remove_reader(worker.stdout_fd)
        worker.first_answer_seen()


def test_a_worker_answers_on_its_pipes(kind: Kind) -> None:
    async def main() -> None:
        async with started(kind) as worker:
            assert worker.pid > 0
            assert not os.get_blocking(worker.stdin_fd)
            assert not os.get_blocking(worker.stdout_fd)
            assert await ask(worker) == b"hello"
            assert await ask(worker, b"again") == b"again"
            assert not worker.exited.done()

    kind.run(main())


def test_a_missing_program_is_a_failed_start_that_leaves_nothing(kind: Kind) -> None:
    async def main() -> None:
        runtime = kind.runtime()
        with pytest.raises(WorkerStartFailed, match="missing"):
            await runtime.start(
                kind.spec("missing")
                if not isinstance(kind, FakeKind)
                else WorkerSpec("x", ("missing",), {}, "/")
            )
        await runtime.close()

    kind.run(main())


def test_the_death_of_a_worker_is_reported_with_its_exit_code(kind: Kind) -> None:
    async def main() -> None:
        async with started(kind) as worker:
            await ask(worker)
            os.write(worker.stdin_fd, b"die")
            assert await asyncio.shield(worker.exited) == ExitStatus(3)
            assert worker.memory_bytes() == 0
            assert worker.cpu_s() == 0
            assert await worker.stop(10) == ExitStatus(3)

    kind.run(main())


def test_the_tail_of_stderr_is_there_even_after_the_end(kind: Kind) -> None:
    async def main() -> None:
        async with started(kind) as worker:
            await ask(worker)
            assert b"tool is up" in worker.stderr_tail()
        assert b"tool is up" in worker.stderr_tail()

    kind.run(main())


@pytest.mark.parametrize(
    "kind", ["process", pytest.param("cri", marks=pytest.mark.engine)], indirect=True
)  # a fake one has no streams of the kernel's
def test_a_worker_may_open_its_streams_again_by_their_names(kind: Kind) -> None:
    async def main() -> None:
        async with started(kind) as worker:
            await ask(worker, b"name\n")
            await eventually(lambda: b"by name" in worker.stderr_tail())

    kind.run(main())


def test_a_worker_that_left_nothing_is_clean(kind: Kind) -> None:
    async def main() -> None:
        async with started(kind) as worker:
            await ask(worker)
            assert not worker.leftovers()
            assert await worker.remove_leftovers() == Leftovers()

    kind.run(main())


def test_before_the_first_answer_nothing_counts_as_left_behind(kind: Kind) -> None:
    async def main() -> None:
        async with started(kind) as worker:
            assert not worker.leftovers()

    kind.run(main())


def test_what_a_request_leaves_is_seen_and_removed(kind: Kind) -> None:
    async def main() -> None:
        async with started(kind) as worker:
            await ask(worker)
            for _ in range(2):
                await ask(worker, b"leave")
                found = worker.leftovers()
                assert len(found.processes) == 1
                assert found.files == ("left",)
                assert await worker.remove_leftovers() == found
                assert not worker.leftovers()
            assert await ask(worker) == b"hello"

    kind.run(main())


def test_stop_is_idempotent_and_closes_the_pipes(kind: Kind) -> None:
    async def main() -> None:
        runtime = kind.runtime()
        worker = await runtime.start(kind.spec())
        await ask(worker)
        first = await worker.stop(10)
        assert await worker.stop(10) == first == worker.exited.result()
        assert worker.stdin_fd == worker.stdout_fd == -1
        assert not worker.leftovers()
        worker.first_request_sent()
        worker.first_answer_seen()
        await runtime.close()

    kind.run(main())


def test_several_stops_at_once_share_one_result(kind: Kind) -> None:
    async def main() -> None:
        runtime = kind.runtime()
        worker = await runtime.start(kind.spec("stubborn"))
        await ask(worker)
        results = await asyncio.gather(worker.stop(1e6), worker.stop(0.01), worker.stop(1e6))
        assert set(results) == {ExitStatus(-9)}
        await runtime.close()

    kind.run(main())


def test_a_worker_that_ignores_everything_is_killed_after_the_grace(kind: Kind) -> None:
    async def main() -> None:
        runtime = kind.runtime()
        worker = await runtime.start(kind.spec("stubborn"))
        await ask(worker)
        assert await worker.stop(0.02) == ExitStatus(-9)
        await runtime.close()

    kind.run(main())


@pytest.mark.parametrize("turns", [1, 2, 3, 5, 8])
def test_a_cancelled_stop_has_still_ended_the_worker(kind: Kind, turns: int) -> None:
    async def main() -> None:
        runtime = kind.runtime()
        worker = await runtime.start(kind.spec("stubborn"))
        await ask(worker)
        stopping = asyncio.create_task(worker.stop(1e6))
        other = asyncio.create_task(worker.stop(1e6))
        for _ in range(turns):
            await asyncio.sleep(0)
        stopping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stopping
        assert await other == ExitStatus(-9)
        assert await worker.stop(1e6) == ExitStatus(-9)
        assert worker.stdin_fd == -1
        await runtime.close()

    kind.run(main())


def test_a_command_runs_beside_the_worker(kind: Kind) -> None:
    async def main() -> None:
        async with started(kind) as worker:
            result = await worker.run(CommandSpec(("/bin/echo", "-n", "out"), 20.0))
            assert result == CommandResult(0, b"out")
            assert result.ok
            missing = await worker.run(CommandSpec(("missing",), 20.0))
            assert missing.returncode == 127
            assert b"missing" in missing.output

    kind.run(main())


def test_a_dead_worker_has_no_memory_and_collects_no_garbage(kind: Kind) -> None:
    async def main() -> None:
        async with started(kind) as worker:
            assert worker.memory_bytes() > 0
            assert 0 <= worker.cpu_s() < 60
            assert await worker.collect_garbage() is None
            os.write(worker.stdin_fd, b"die")
            await asyncio.shield(worker.exited)
            with pytest.raises(RuntimeUnavailable):
                await worker.collect_garbage()
            with pytest.raises(RuntimeUnavailable):
                await worker.run(CommandSpec(("true",), 1.0))

    kind.run(main())


def test_a_start_cancelled_at_any_turn_leaves_nothing(kind: Kind) -> None:
    async def main() -> None:
        for turns in range(4):
            runtime = kind.runtime()
            starting = asyncio.create_task(runtime.start(kind.spec()))
            for _ in range(turns):
                await asyncio.sleep(0)
            starting.cancel()
            try:
                worker = await starting
            except asyncio.CancelledError:
                pass
            else:
                await worker.stop(0)
            await runtime.close()

    kind.run(main())


def test_a_worker_killed_from_outside_is_seen_at_once(tmp_path: Path) -> None:
    async def main() -> None:
        async with started(ProcessKind(tmp_path)) as worker:
            os.kill(worker.pid, 9)
            assert await asyncio.shield(worker.exited) == ExitStatus(-9)
            await eventually(lambda: not os.path.exists(f"/proc/{worker.pid}"))

    run_async(main())
