"""One worker in a container: what it leaves behind, its memory and garbage, commands beside it, its end.

Owns the running container. How one is started is `cri_container.py`'s, what has to be removed in the end
`cri_belongings.py`'s. Requests and answers never touch the engine: they go over pipes.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING

from wrapper.clock import monotonic_s
from wrapper.errors import RuntimeUnavailable
from wrapper.runtime import jvm_attach, linux, process_tree
from wrapper.runtime.base import (
    CommandResult,
    CommandSpec,
    ExitStatus,
    GcReport,
    Leftovers,
    WorkerSpec,
)
from wrapper.runtime.cgroups import ContainerGroup
from wrapper.runtime.cri_belongings import Belongings
from wrapper.runtime.cri_engine import EngineError
from wrapper.runtime.cri_stdio import ShimLink, StartedPids
from wrapper.runtime.first_read import FirstRead
from wrapper.runtime.private_tmpdir import PrivateTmpdir, is_quick_to_remove
from wrapper.runtime.stderr_reader import StderrReader

if TYPE_CHECKING:
    from wrapper.runtime.cri_container import CriRuntime
    from wrapper.runtime.worker_gc import WorkerGc

WORKER_PID = "{worker_pid}"
"""In the words of a command that runs beside a worker: the worker's pid, as its container counts."""

MAX_OUTPUT_BYTES = 64 * 1024
COULD_NOT_START = 127
KILL_TIMEOUT_S = 10.0
_ROUNDS = 50
"""Of killing what is left: more are made meanwhile only by something that means to."""
_NO_SUCH_PROGRAM = ("not found", "no such file", "permission denied", "not a directory")


class ContainerWorker:
    """See WorkerProcess. Made only by CriRuntime.start."""

    def __init__(
        self,
        spec: WorkerSpec,
        runtime: CriRuntime,
        belongings: Belongings,
        link: ShimLink,
        pids: StartedPids,
        group: ContainerGroup,
        gc: WorkerGc,
        stderr: StderrReader,
    ) -> None:
        self.spec = spec
        self.pid = pids.worker
        self._runtime = runtime
        self._loop = asyncio.get_running_loop()
        self._belongings = belongings
        self._container_id = belongings.container_id
        self._link = link
        self._group = group
        self._gc = gc
        self._stderr = stderr
        self.has_garbage = gc.has_a_way
        self._tmpdir = PrivateTmpdir(belongings.tmp or os.path.join(belongings.folder, "tmp"), exists=True)
        self._shim_pid = pids.shim
        self._baseline: frozenset[int] | None = None
        self._clean_at: bytes | None = None
        self._first_read = FirstRead(self._loop, self._take_baseline)
        self._closed = False
        self._hurry: asyncio.Future[None] = self._loop.create_future()
        self._stopped: asyncio.Future[None] = self._loop.create_future()
        self._ending: asyncio.Task[None] | None = None
        self.exited = link.exited
        self._pidfds = linux.open_pidfds([pids.shim])
        try:
            self._pidfds += linux.open_pidfds([pids.worker])
            self._inner_pid = process_tree.namespace_pid(pids.worker)
        except BaseException:
            linux.close_all(self._pidfds)
            raise
        self.exited.add_done_callback(self._has_exited)

    @property
    def stdin_fd(self) -> int:
        """See WorkerProcess."""
        return self._link.stdin_fd

    @property
    def stdout_fd(self) -> int:
        """See WorkerProcess."""
        return self._link.stdout_fd

    @property
    def container_id(self) -> str:
        """The engine's name for it."""
        return self._container_id

    def __repr__(self) -> str:
        status = self.exited.result() if self.exited.done() else "alive"
        return f"<ContainerWorker {self._container_id[:12]} {self.spec.name} {status}>"

    # Standard error and death.

    def stderr_tail(self) -> bytes:
        """See WorkerProcess."""
        return self._stderr.tail()

    def _has_exited(self, exited: asyncio.Future[ExitStatus]) -> None:
        """Called before whoever else waits for it: the last words include why the kernel has killed it."""
        self._stderr.drain()
        if exited.result().returncode in (-signal.SIGKILL, 128 + signal.SIGKILL) and self._group.oom_kills():
            limit = self._group.memory_limit_bytes()
            self._stderr.note(
                "out of memory: the kernel killed a process of the worker, whose container may use "
                f"{(limit or 0) >> 20} MiB (isolation.memory_limit_in_bytes)"
            )

    # What a request has left behind.

    def first_request_sent(self) -> None:
        """See WorkerProcess."""
        if self._baseline is None and not self._closed:
            self._first_read.watch(self.stdin_fd)

    def first_answer_seen(self) -> None:
        """See WorkerProcess."""
        self._take_baseline()

    def _take_baseline(self) -> None:
        if self._baseline is None and not self._closed:
            self._clean_at = self._runtime.cursor.read()
            self._baseline = frozenset(self._group.processes())
            self._tmpdir.take_as_own()
            self._first_read.is_over(self.stdin_fd)

    def leftovers(self) -> Leftovers:
        """See WorkerProcess."""
        if self._baseline is None or self._closed or self.exited.done():
            return Leftovers()
        files = tuple(self._tmpdir.added())
        position = self._runtime.cursor.read()
        if position is not None and position == self._clean_at:
            return Leftovers((), files)
        processes = tuple(self._strangers())
        self._clean_at = None if processes else position
        return Leftovers(processes, files)

    def _strangers(self) -> list[int]:
        own = self._baseline or frozenset()
        return [pid for pid in self._group.processes() if pid not in own and not process_tree.is_dead(pid)]

    def kill_stragglers(self) -> None:
        """See WorkerProcess."""
        if self._baseline is not None and not self._closed:
            position = self._runtime.cursor.read()
            if position is not None and position == self._clean_at:
                return
            for _ in range(_ROUNDS):
                if not self._kill(self._strangers()):
                    return

    def _kill(self, pids: list[int]) -> bool:
        """SIGKILL, for those that are in the container; False: there were none."""
        for pid in pids:
            try:
                pidfd = os.pidfd_open(pid)
            except ProcessLookupError:
                continue
            try:
                # Looked at again with the process pinned: the pid may have gone to somebody else's.
                if pid in self._group.processes():
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            except ProcessLookupError:
                continue
            finally:
                os.close(pidfd)
        return bool(pids)

    async def remove_leftovers(self) -> Leftovers:
        """See WorkerProcess."""
        processes: dict[int, None] = {}
        files: list[str] = []
        for _ in range(_ROUNDS):
            found = self.leftovers()
            if not found:
                return Leftovers(tuple(processes), tuple(files))
            if found.processes:
                self._kill(list(found.processes))
                await linux.wait_until_dead(found.processes, KILL_TIMEOUT_S)
                processes |= dict.fromkeys(found.processes)
            new = self._tmpdir.added()
            if is_quick_to_remove(self._tmpdir.path, new):
                self._tmpdir.remove(new)
            else:
                await self._loop.run_in_executor(None, self._tmpdir.remove, new)
            files += new
        raise RuntimeUnavailable(
            f"{self!r} makes files or processes faster than they can be removed: {self.leftovers()}"
        )

    # The operator's commands, memory, garbage.

    async def run(self, command: CommandSpec) -> CommandResult:
        """See WorkerProcess. `{worker_pid}` in its words is the worker's pid in the container.

        A command that cannot be started returns as a shell would have it: code 127, and why. Raises
        RuntimeUnavailable if the worker is dead or the engine away.
        """
        if self.exited.done():
            raise RuntimeUnavailable(f"worker {self.spec.name} is dead ({self.exited.result()})")
        argv = tuple(word.replace(WORKER_PID, str(self._inner_pid)) for word in command.argv)
        try:
            result = await self._runtime.engine.execute(self._container_id, argv, command.timeout_s)
        except EngineError as error:
            if any(reason in error.details.lower() for reason in _NO_SUCH_PROGRAM) and not error.is_gone:
                return CommandResult(COULD_NOT_START, error.details.encode()[:MAX_OUTPUT_BYTES])
            raise
        return CommandResult(result.exit_code, result.output[:MAX_OUTPUT_BYTES])

    def memory_bytes(self) -> int:
        """See WorkerProcess. What the kernel counts for the container: files it has mapped are not in it."""
        return 0 if self._closed or self.exited.done() else self._group.resident_bytes()

    def cpu_s(self) -> float:
        """See WorkerProcess."""
        if self._closed or self.exited.done():
            return 0.0
        return sum(map(process_tree.cpu_s, self._group.processes()))

    async def collect_garbage(self) -> GcReport | None:
        """See WorkerProcess."""
        if self._closed or self.exited.done():
            raise RuntimeUnavailable(f"worker {self.spec.name} is dead, it has no garbage to collect")
        if not self.has_garbage:
            return None
        before, start_s = self.memory_bytes(), monotonic_s()
        if not await self._gc.collect(self._group.processes(), self.run):
            return None
        # A JVM makes its attach socket in /tmp, which here is the worker's own. It is no request's.
        self._tmpdir.adopt(name for name in self._tmpdir.added() if jvm_attach.is_socket(name))
        return GcReport(before, self.memory_bytes(), monotonic_s() - start_s)

    # The end.

    async def stop(self, grace_s: float) -> ExitStatus:
        """See WorkerProcess. Of several calls at once, the shortest grace counts.

        If the engine is away, the processes are dead all the same, and the removal goes on behind.
        """
        timer = self._loop.call_later(grace_s, self._grace_is_over)
        try:
            if self._ending is None:
                self._ending = self._loop.create_task(self._end(), name=f"end {self!r}")
            await asyncio.shield(self._stopped)
        except asyncio.CancelledError:
            self._kill_now()
            await asyncio.wait([self._stopped], timeout=self._runtime.engine.deadlines.removal_s)
            raise
        finally:
            timer.cancel()
        return self.exited.result()

    def _grace_is_over(self) -> None:
        if not self._hurry.done():
            self._hurry.set_result(None)

    async def _end(self) -> None:
        try:
            self._first_read.close()
            self._link.close_stdin()
            self._signal(signal.SIGTERM, self._pidfds[-1:])
            await asyncio.wait((self.exited, self._hurry), return_when=asyncio.FIRST_COMPLETED)
            self._kill_now()
            removal = self._runtime.removal.begin(self._belongings)
            await asyncio.wait([removal], timeout=self._runtime.engine.deadlines.removal_s)
        finally:
            self._close()
            if not self._stopped.done():
                self._stopped.set_result(None)

    def _kill_now(self) -> None:
        """The container's first process, and with it all of them: the kernel sees to that."""
        self._grace_is_over()
        self._signal(signal.SIGKILL, self._pidfds)
        if not self.exited.done() and self._pidfds:
            linux.block_until_dead((self._shim_pid,), KILL_TIMEOUT_S)
            self._link.shim_is_dead()

    @staticmethod
    def _signal(number: signal.Signals, pidfds: list[int]) -> None:
        for pidfd in pidfds:
            try:
                signal.pidfd_send_signal(pidfd, number)
            except ProcessLookupError:
                continue

    def _close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._first_read.close()
        self._stderr.close()
        self._link.close()
        self._gc.close()
        pidfds, self._pidfds = self._pidfds, []
        linux.close_all(pidfds)


def pid_inside(link: ShimLink) -> Callable[[int], int | None]:
    """From a pid as a process of this shim's container knows it to the one that we see."""

    def pid_of(inner: int) -> int | None:
        for pid in ContainerGroup(link.shim_pid).processes():
            if process_tree.namespace_pid(pid) == inner:
                return pid
        return None

    return pid_of
