"""Workers as plain processes of this machine: the default runtime, which needs nothing installed.

Each worker has a session of its own, pipes of its own, a clean environment and a private TMPDIR.
We are a sub-reaper and mark each worker with a tag that all its descendants inherit, so that
nothing it starts can hide (see `process_tree`). The worker itself is *not* made a sub-reaper: that
would need code between fork and exec, and a tool that waits for all its children would suddenly
wait for its daemons too.

Knows nothing of the worker protocol, of pools, or of time-outs other than those it is given.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import signal
from typing import TYPE_CHECKING

from wrapper.clock import monotonic_s
from wrapper.errors import RuntimeUnavailable
from wrapper.files import remove_tree
from wrapper.runtime import linux, spawn
from wrapper.runtime.base import (
    CommandResult,
    CommandSpec,
    ExitStatus,
    GcReport,
    Leftovers,
    WorkerSpec,
)
from wrapper.runtime.child import Child
from wrapper.runtime.command import run_command
from wrapper.runtime.first_read import FirstRead
from wrapper.runtime.private_tmpdir import PrivateTmpdir, is_quick_to_remove
from wrapper.runtime.process_tree import KILL_TIMEOUT_S, ProcessTree, cpu_s, read_stat
from wrapper.runtime.stderr_log import StderrForward, StderrLogs
from wrapper.runtime.stderr_reader import StderrReader
from wrapper.runtime.worker_gc import WorkerGc

if TYPE_CHECKING:
    from wrapper.runtime.process_generations import ProcessGenerations

_CLEAN_ATTEMPTS = 5

_log = logging.getLogger(__name__)


class LocalProcessRuntime:
    """Starts workers as child processes.

    `log_dir`: where the workers' stderr goes, one rotating file for each WorkerSpec.name; None:
    only the bounded tail in memory is kept. `forward_stderr_to`: a descriptor that the workers' stderr is
    passed on to, without ever waiting for its reader. `tmp_base`: where the private temporary directories
    are made; None: the system's place for them. `generations`: a folder for them from which the next of us
    removes them, and whoever works there, should we be killed.
    """

    def __init__(
        self,
        *,
        log_dir: str | None = None,
        forward_stderr_to: int | None = None,
        tmp_base: str | None = None,
        generations: str | None = None,
    ) -> None:
        self.own_children: set[int] = set()
        """Pids that this runtime has started and not reaped."""
        self.logs = StderrLogs(log_dir) if log_dir is not None else None
        self.forward = StderrForward(forward_stderr_to) if forward_stderr_to is not None else None
        self.cursor = linux.PidCursor()
        self._tmp_base = tmp_base
        self._base: str | None = None
        self._generations: ProcessGenerations | None = None
        if generations is not None:
            from wrapper.runtime.process_generations import ProcessGenerations  # not in worker mode

            self._generations = ProcessGenerations(generations)
        self._was_subreaper: bool | None = None
        self._serials = itertools.count(1)
        self._warned_of_tag = False

    def __repr__(self) -> str:
        return f"<LocalProcessRuntime children={len(self.own_children)}>"

    async def prepare(self) -> None:
        """See Runtime."""
        if self._generations is not None:
            await self._generations.remove_dead()

    async def start(self, spec: WorkerSpec) -> LocalWorker:
        """See Runtime. Never awaits, so a cancelled start has either not begun or is complete."""
        directory = self._new_directory()
        try:
            return LocalWorker(spec, self, directory)
        except BaseException:
            remove_tree(directory)
            raise

    def _new_directory(self) -> str:
        try:
            if self._was_subreaper is None:
                self._was_subreaper = linux.set_child_subreaper(True)
            if self._base is None:
                # `tempfile` would do the same after 10 ms of imports.
                parent = self._tmp_base or os.environ.get("TMPDIR") or "/tmp"  # noqa: S108 - unguessable
                if self._generations is not None:
                    parent = self._generations.path()
                base = os.path.join(parent, f"nlww-{os.urandom(8).hex()}")
                os.mkdir(base, 0o711)  # to be entered by workers of other users, if they know what is in it
                self._base = base
            directory = os.path.join(self._base, str(next(self._serials)))
            os.mkdir(directory, 0o711)
        except OSError as error:
            raise RuntimeUnavailable(f"cannot make a private directory for a worker: {error}") from error
        return directory

    def check_tag(self, tree: ProcessTree) -> None:
        """Warn, once, if this system does not let us mark workers."""
        if not tree.has_tag and not self._warned_of_tag:
            self._warned_of_tag = True
            _log.warning(
                "this system does not let us mark workers (prlimit): "
                "a process that a worker starts in a new session may not be found when its parent ends"
            )

    async def close(self) -> None:
        """See Runtime. Idempotent."""
        self.cursor.close()
        base, self._base = self._base, None
        if base is not None:
            remove_tree(base)
        if self._generations is not None:
            self._generations.close()
        if self._was_subreaper is False:
            linux.set_child_subreaper(False)
        self._was_subreaper = None


class LocalWorker:
    """One worker process. Made only by LocalProcessRuntime.start; see WorkerProcess."""

    def __init__(self, spec: WorkerSpec, runtime: LocalProcessRuntime, directory: str) -> None:
        self.spec = spec
        self._loop = asyncio.get_running_loop()
        self._runtime = runtime
        self._directory = directory
        self._tmpdir = PrivateTmpdir(os.path.join(directory, "tmp"), owner=spec.user)
        self._env = {**spec.env, "TMPDIR": self._tmpdir.path}
        self._gc = WorkerGc(spec, directory, self._loop)
        self.has_garbage = self._gc.has_a_way
        self._baseline: frozenset[int] | None = None
        self._clean_at: bytes | None = None
        self._first_read = FirstRead(self._loop, self._take_baseline)
        self._ending = False
        self._stopped: asyncio.Future[None] = self._loop.create_future()
        self._hurry: asyncio.Future[None] = self._loop.create_future()
        self._closed = False
        tag = linux.new_tag()
        try:
            spawned = spawn.spawn(spec.argv, {**self._env, **self._gc.environment}, spec.cwd, tag, spec.user)
        except BaseException:
            self._gc.close()
            raise
        self.stdin_fd, self.stdout_fd = spawned.stdin_fd, spawned.stdout_fd
        try:
            self._tree = ProcessTree(spawned.process.pid, tag, runtime.own_children)
            self._child = Child(spawned.process, self._loop, runtime.own_children, self._before_reap)
        except BaseException:
            linux.close_all((self.stdin_fd, self.stdout_fd, spawned.stderr_fd))
            self._gc.close()
            raise
        runtime.check_tag(self._tree)
        self.pid = self._child.pid
        self.exited = self._child.exited
        self._stderr = StderrReader(spawned.stderr_fd, self._loop, spec.name, runtime.logs, runtime.forward)
        self._stderr.begin(f"=== worker {self.pid}: {spec.argv!r} ===\n")

    @property
    def tmpdir(self) -> str:
        """The worker's private temporary directory."""
        return self._tmpdir.path

    def __repr__(self) -> str:
        status = self._child.status
        return f"<LocalWorker {self.pid} {self.spec.name} {'alive' if status is None else status}>"

    # Standard error and death.

    def stderr_tail(self) -> bytes:
        """See WorkerProcess."""
        return self._stderr.tail()

    def _before_reap(self) -> None:
        self._stderr.drain()  # whoever waits for `exited` wants the last words too
        self._gc.remove_traces((self.pid,))
        self._tree.descendants()  # remembers those that are ours, while the pid still is
        self._tree.main_is_reaped()

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
            self._baseline = frozenset(self._tree.descendants())
            self._tmpdir.take_as_own()
            self._first_read.is_over(self.stdin_fd)

    def leftovers(self) -> Leftovers:
        """See WorkerProcess. 15 µs if no process was created meanwhile, else some 10 µs a thread."""
        if self._baseline is None or self._closed:
            return Leftovers()
        files = self._tmpdir.added()
        position = self._runtime.cursor.read()
        if position is not None and position == self._clean_at:
            return Leftovers((), tuple(files))
        processes = [pid for pid in self._tree.descendants() if pid not in self._baseline]
        self._clean_at = None if processes else position
        return Leftovers(tuple(processes), tuple(files))

    def kill_stragglers(self) -> None:
        """See WorkerProcess."""
        if self._baseline is not None and self.leftovers().processes:
            self._tree.signal_descendants(signal.SIGKILL, self._baseline)

    async def remove_leftovers(self) -> Leftovers:
        """See WorkerProcess."""
        processes: list[int] = []
        files: list[str] = []
        for _ in range(_CLEAN_ATTEMPTS):
            found = self.leftovers()
            if not found:
                return Leftovers(tuple(processes), tuple(files))
            if found.processes and self._baseline is not None:
                processes += await self._tree.kill_descendants(self._baseline)
            new = self._tmpdir.added()
            if is_quick_to_remove(self._tmpdir.path, new):
                self._tmpdir.remove(new)
            else:
                await self._loop.run_in_executor(None, self._tmpdir.remove, new)
            files += new
        raise RuntimeUnavailable(
            f"worker {self.spec.name} ({self.pid}) makes files or processes faster than they can be removed: "
            f"{self.leftovers()}"
        )

    # The operator's commands, memory, garbage.

    async def run(self, command: CommandSpec) -> CommandResult:
        """See WorkerProcess. NLWW_WORKER_PID is in the command's environment.

        A command that cannot be started returns as a shell would have it: code 127, and why. Raises
        RuntimeUnavailable if the worker is dead.
        """
        if self._child.status is not None:
            raise RuntimeUnavailable(f"worker {self.spec.name} is dead ({self._child.status})")
        env = {**self._env, "NLWW_WORKER_PID": str(self.pid)}
        return await run_command(command, env, self.spec.cwd, self._runtime.own_children, self.spec.user)

    def memory_bytes(self) -> int:
        """See WorkerProcess."""
        return 0 if self._closed else self._tree.memory_bytes()

    def cpu_s(self) -> float:
        """See WorkerProcess."""
        return 0.0 if self._closed else sum(map(cpu_s, (self.pid, *self._tree.descendants())))

    async def collect_garbage(self) -> GcReport | None:
        """See WorkerProcess."""
        if self._child.status is not None or self._closed:
            raise RuntimeUnavailable(f"worker {self.spec.name} is dead, it has no garbage to collect")
        if not self.has_garbage:
            return None
        before, start_s = self.memory_bytes(), monotonic_s()
        if not await self._gc.collect([self.pid, *self._tree.descendants()], self.run):
            return None
        return GcReport(before, self.memory_bytes(), monotonic_s() - start_s)

    # The end.

    async def stop(self, grace_s: float) -> ExitStatus:
        """See WorkerProcess. Of several calls at once, the shortest grace counts.

        Raises RuntimeUnavailable if a process outlives its SIGKILL.
        """
        if self._closed and self._child.status is not None:
            return self._child.status
        timer = self._loop.call_later(grace_s, self._grace_is_over)
        try:
            if not self._ending:
                self._ending = True
                await self._end()
            else:
                await asyncio.shield(self._stopped)
        except asyncio.CancelledError:
            self._end_now()
            raise
        finally:
            timer.cancel()
            if self._closed and not self._stopped.done():
                self._stopped.set_result(None)
        if self._child.status is None:
            raise RuntimeUnavailable(f"worker {self.spec.name} ({self.pid}) does not die of SIGKILL")
        return self._child.status

    def _grace_is_over(self) -> None:
        if not self._hurry.done():
            self._hurry.set_result(None)

    async def _end(self) -> None:
        try:
            self._close_stdin()
            self._child.signal_group(signal.SIGTERM)
            await asyncio.wait((self.exited, self._hurry), return_when=asyncio.FIRST_COMPLETED)
            await self._wait_for_group()
            pids = self._tree.signal_descendants(signal.SIGKILL, frozenset())
            self._child.kill()
            await self._child.wait(KILL_TIMEOUT_S)
            pids += await self._tree.kill_descendants()
            self._gc.remove_traces({*pids, *(self._baseline or ())})
            if not self._closed and not is_quick_to_remove(self._directory, ["tmp", *self._tmpdir.added()]):
                await self._loop.run_in_executor(None, self._tmpdir.destroy)
        except Exception:  # not a cancellation: after that, `_end_now` goes on from here
            self._close()
            raise
        self._close()

    async def _wait_for_group(self) -> None:
        """The main process may be a shell that dies of the SIGTERM before the tool has tidied up."""
        while not self._hurry.done():
            group = [
                pid
                for pid in self._tree.descendants()
                if (stat := read_stat(pid)) is not None and stat.session == self.pid
            ]
            if not group:
                return
            dead = asyncio.ensure_future(linux.wait_until_dead(group, KILL_TIMEOUT_S))
            try:
                await asyncio.wait((dead, self._hurry), return_when=asyncio.FIRST_COMPLETED)
            finally:
                dead.cancel()
                await asyncio.wait((dead,))

    def _end_now(self) -> None:
        """The rest of `_end` at once and without an await: the caller was cancelled."""
        if self._closed:
            return
        try:
            pids = self._tree.signal_descendants(signal.SIGKILL, frozenset())
            self._child.kill_and_reap_now(KILL_TIMEOUT_S)
            self._tree.kill_descendants_now()
            self._gc.remove_traces({*pids, *(self._baseline or ())})
        finally:
            self._close()

    def close_stdin(self) -> None:
        """The worker reads the end of its input. Idempotent."""
        self._close_stdin()

    def _close_stdin(self) -> None:
        self._first_read.close()
        fd, self.stdin_fd = self.stdin_fd, -1
        self._close_data_fd(fd)

    def _close_data_fd(self, fd: int) -> None:
        if fd >= 0:
            self._loop.remove_reader(fd)  # a registration that outlives its descriptor breaks the loop
            self._loop.remove_writer(fd)
            os.close(fd)

    def _close(self) -> None:
        """Free everything that is left: descriptors and files. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._close_stdin()
        fd, self.stdout_fd = self.stdout_fd, -1
        self._close_data_fd(fd)
        self._stderr.close()
        self._gc.close()
        remove_tree(self._directory)
