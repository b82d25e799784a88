"""A Runtime without processes: each worker is a coroutine behind real pipes, and fails as scripted.

For tests of whatever uses a Runtime; works under virtual time. `tests/contract` holds it to the same
promises as the real ones.

A test scripts it through `FakeRuntime.script`, a function from WorkerSpec to Script that is asked
at each start, or through the attributes of the FakeWorker that it got (`runtime.workers[-1]`).
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass, field

from wrapper.errors import RuntimeUnavailable, WorkerStartFailed
from wrapper.runtime.base import (
    CommandResult,
    CommandSpec,
    ExitStatus,
    GcReport,
    Leftovers,
    WorkerSpec,
)

SIGTERM_STATUS = ExitStatus(-15)
SIGKILL_STATUS = ExitStatus(-9)


def echo(data: bytes) -> bytes:
    """The tool of a fake worker that was told nothing else: what it reads is what it writes."""
    return data


@dataclass(slots=True)
class Script:
    """How one fake worker behaves. Times in seconds of the loop's clock."""

    start_delay_s: float = 0.0
    start_error: Exception | None = None
    """Raised by `start`, after the delay."""
    tool: Callable[[bytes], bytes | None] = echo
    """From bytes on stdin to bytes on stdout (as many as came at once); None: die, as `die()`."""
    answer_delay_s: float = 0.0
    leftovers: list[Leftovers] = field(default_factory=list)
    """What `leftovers` finds, one for each call of `remove_leftovers` in turn; then nothing."""
    clean_delay_s: float = 0.0
    clean_errors: list[Exception] = field(default_factory=list)
    """Raised by the next calls of `remove_leftovers`, one each."""
    run: Callable[[CommandSpec], CommandResult] = lambda _: CommandResult(0, b"")
    run_delay_s: float = 0.0
    memory_bytes: Callable[[], int] = lambda: 100 << 20
    cpu_s: Callable[[], float] = lambda: 0.0
    gc: Callable[[], GcReport | None] = lambda: None
    """May raise, as `collect_garbage` may."""
    gc_delay_s: float = 0.0
    stop_delay_s: float = 0.0
    """How long the worker takes to end after SIGTERM; longer than the grace: it is killed then."""
    stop_status: ExitStatus = SIGTERM_STATUS
    stop_error: Exception | None = None
    """Raised by `stop` once the worker is gone: something of it could not be removed."""
    stderr: bytes = b""


class FakeRuntime:
    """Keeps count of everything, so that a test can check that nothing is left."""

    def __init__(self, script: Callable[[WorkerSpec], Script] | None = None) -> None:
        self.script = script or (lambda _: Script())
        self.starting = 0
        self.workers: list[FakeWorker] = []
        """All that were ever started, in order."""
        self.closed = False
        self._pids = itertools.count(1_000_000_001)  # no such process can exist

    @property
    def alive(self) -> list[FakeWorker]:
        """Those that hold something: not stopped, whether their process is dead or not."""
        return [worker for worker in self.workers if not worker.is_stopped]

    async def prepare(self) -> None:
        """See Runtime."""

    async def start(self, spec: WorkerSpec) -> FakeWorker:
        """See Runtime. An empty argv or a program called `missing` cannot be started."""
        script = self.script(spec)
        self.starting += 1
        try:
            await asyncio.sleep(script.start_delay_s)
            if script.start_error is not None:
                raise script.start_error
            if not spec.argv or os.path.basename(spec.argv[0]) == "missing":
                raise WorkerStartFailed(f"there is no program {spec.argv[:1]!r}", stderr_tail=script.stderr)
            worker = FakeWorker(spec, script, next(self._pids))
        finally:
            self.starting -= 1
        self.workers.append(worker)
        return worker

    async def close(self) -> None:
        """See Runtime."""
        self.closed = True


class FakeWorker:
    """See WorkerProcess. What a test may read: `calls`, the names of the methods called, in order."""

    def __init__(self, spec: WorkerSpec, script: Script, pid: int) -> None:
        self.spec = spec
        self.script = script
        self.pid = pid
        self.has_garbage = True
        self.calls: list[str] = []
        self.is_stopped = False
        self._loop = asyncio.get_running_loop()
        self.exited: asyncio.Future[ExitStatus] = self._loop.create_future()
        self._tool_in, self.stdin_fd = os.pipe()
        self.stdout_fd, self._tool_out = os.pipe()
        for fd in (self._tool_in, self.stdin_fd, self.stdout_fd, self._tool_out):
            os.set_blocking(fd, False)
        self._unsent = bytearray()
        self._stderr = bytearray(script.stderr)
        self._timers: set[asyncio.TimerHandle] = set()
        self._end_requested = False
        self._done_stopping: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_reader(self._tool_in, self._readable)

    def __repr__(self) -> str:
        return f"<FakeWorker {self.pid} {self.spec.name} {'dead' if self.exited.done() else 'alive'}>"

    # The tool's side.

    def _readable(self) -> None:
        try:
            data = os.read(self._tool_in, 1 << 20)
        except BlockingIOError:
            return
        if not data:
            self.die(ExitStatus(0))
        elif self.script.answer_delay_s:
            self._later(self.script.answer_delay_s, lambda: self._answer(data))
        else:
            self._answer(data)

    def _later(self, delay_s: float, action: Callable[[], None]) -> None:
        def run() -> None:
            self._timers.discard(timer)
            action()

        timer = self._loop.call_later(delay_s, run)
        self._timers.add(timer)

    def _answer(self, data: bytes) -> None:
        answer = self.script.tool(data)
        if answer is None:
            self.die()
        else:
            self.say(answer)

    def say(self, data: bytes) -> None:
        """Write to stdout: an answer, an unexpected one, or garbage."""
        if self.exited.done():
            return
        if not self._unsent:
            self._loop.add_writer(self._tool_out, self._writable)
        self._unsent += data
        self._writable()

    def _writable(self) -> None:
        try:
            del self._unsent[: os.write(self._tool_out, self._unsent)]
        except BlockingIOError:
            return
        except BrokenPipeError:
            self._unsent.clear()
        if not self._unsent:
            self._loop.remove_writer(self._tool_out)

    def complain(self, data: bytes) -> None:
        """Write to stderr."""
        self._stderr += data

    def die(self, status: ExitStatus = SIGKILL_STATUS) -> None:
        """The main process ends now."""
        if self.exited.done():
            return
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()
        self._loop.remove_reader(self._tool_in)
        self._loop.remove_writer(self._tool_out)
        os.close(self._tool_in)
        os.close(self._tool_out)
        self.exited.set_result(status)
        if self._end_requested:
            self._end(status)

    # The pool's side.

    def first_request_sent(self) -> None:
        """See WorkerProcess."""
        self.calls.append("first_request_sent")

    def first_answer_seen(self) -> None:
        """See WorkerProcess."""
        self.calls.append("first_answer_seen")

    def kill_stragglers(self) -> None:
        """See WorkerProcess."""
        self.calls.append("kill_stragglers")

    def leftovers(self) -> Leftovers:
        """See WorkerProcess."""
        return self.script.leftovers[0] if self.script.leftovers and not self.is_stopped else Leftovers()

    async def remove_leftovers(self) -> Leftovers:
        """See WorkerProcess."""
        self.calls.append("remove_leftovers")
        await asyncio.sleep(self.script.clean_delay_s)
        if self.script.clean_errors:
            raise self.script.clean_errors.pop(0)
        return self.script.leftovers.pop(0) if self.script.leftovers else Leftovers()

    async def run(self, command: CommandSpec) -> CommandResult:
        """See WorkerProcess."""
        self.calls.append(f"run {' '.join(command.argv)}")
        if self.exited.done():
            raise RuntimeUnavailable(f"{self!r} is dead")
        if self.script.run_delay_s > command.timeout_s:
            await asyncio.sleep(command.timeout_s)
            return CommandResult(None, b"")
        await asyncio.sleep(self.script.run_delay_s)
        return self.script.run(command)

    def memory_bytes(self) -> int:
        """See WorkerProcess."""
        return 0 if self.exited.done() else self.script.memory_bytes()

    def cpu_s(self) -> float:
        """See WorkerProcess."""
        return 0.0 if self.exited.done() else self.script.cpu_s()

    async def collect_garbage(self) -> GcReport | None:
        """See WorkerProcess."""
        self.calls.append("collect_garbage")
        if self.exited.done():
            raise RuntimeUnavailable(f"{self!r} is dead")
        await asyncio.sleep(self.script.gc_delay_s)
        return self.script.gc()

    def stderr_tail(self) -> bytes:
        """See WorkerProcess."""
        return bytes(self._stderr[-65536:])

    async def stop(self, grace_s: float) -> ExitStatus:
        """See WorkerProcess."""
        self.calls.append(f"stop {grace_s:g}")
        if not self.is_stopped:
            self._later_end(grace_s)
            try:
                await asyncio.shield(self._done_stopping)
            except asyncio.CancelledError:
                self._end(SIGKILL_STATUS)
                raise
            if self.script.stop_error is not None:
                raise self.script.stop_error
        return self.exited.result()

    def _later_end(self, grace_s: float) -> None:
        if self.exited.done():
            self._end(SIGTERM_STATUS)
            return
        if not self._end_requested:
            self._end_requested = True
            self._loop.remove_reader(self._tool_in)
            own_delay_s = self.script.stop_delay_s
            if own_delay_s <= grace_s:
                self._later_stop(own_delay_s, self.script.stop_status)
        if self.script.stop_delay_s > grace_s:
            self._later_stop(grace_s, SIGKILL_STATUS)

    def _later_stop(self, delay_s: float, status: ExitStatus) -> None:
        if delay_s <= 0:
            self._end(status)
        else:
            self._later(delay_s, lambda: self._end(status))

    def _end(self, status: ExitStatus) -> None:
        self.die(status)
        if self.is_stopped:
            return
        self.is_stopped = True
        for fd in (self.stdin_fd, self.stdout_fd):
            self._loop.remove_reader(fd)
            self._loop.remove_writer(fd)
            os.close(fd)
        self.stdin_fd = self.stdout_fd = -1
        if not self._done_stopping.done():
            self._done_stopping.set_result(None)
