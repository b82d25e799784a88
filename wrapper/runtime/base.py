"""What the pool asks of whatever runs workers: plain processes, containers, a fake in the tests.

Owns the seam only. `tests/contract/` is one suite that every implementation passes.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol

NOBODY_IN_PARTICULAR = 65532
"""The user of workers in containers if none is named: a number that nobody on a machine usually has."""


class Language(Enum):
    """What a worker's program is written in: decides how its garbage is collected."""

    JVM = "jvm"
    NODEJS = "nodejs"
    CUSTOM = "custom"


@dataclass(frozen=True, slots=True)
class CommandSpec:
    """A command of the operator's that runs beside a worker, such as `post_job_cleanup`."""

    argv: tuple[str, ...]
    timeout_s: float


@dataclass(frozen=True, slots=True)
class CommandResult:
    """How a command ended. `returncode` is negative for a signal; None: the time-out ended it."""

    returncode: int | None
    output: bytes

    @property
    def ok(self) -> bool:
        return self.returncode == 0


@dataclass(frozen=True, slots=True)
class Mount:
    """Something of the node that a worker in a container sees. A plain process sees everything anyway."""

    host_path: str
    path: str
    """Where the worker sees it."""
    read_only: bool = True


class User(NamedTuple):
    """Whom a plain process runs as, without any other groups."""

    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """All that is needed to start one worker.

    `argv[0]` is the program; without a slash it is looked up on PATH of `env`, else of our own
    environment, else on a default path (Bazel gives workers no PATH). `env` is the worker's whole
    environment, to which the runtime adds TMPDIR and what garbage collection needs. `cwd` is an
    absolute path, as the worker sees it. `gc_command`, if given, replaces the built-in way to collect
    garbage. `user` is for plain processes, None: ours; a container's is its isolation's.
    """

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    cwd: str
    language: Language = Language.CUSTOM
    gc_command: CommandSpec | None = None
    mounts: tuple[Mount, ...] = ()
    user: User | None = None


@dataclass(frozen=True, slots=True)
class ExitStatus:
    """How a worker's main process ended, as `subprocess` counts: negative for a signal."""

    returncode: int

    def __str__(self) -> str:
        if self.returncode >= 0:
            return f"exit code {self.returncode}"
        try:
            name = signal.Signals(-self.returncode).name
        except ValueError:
            name = f"signal {-self.returncode}"
        return f"killed by {name}"


@dataclass(frozen=True, slots=True)
class Leftovers:
    """What a request left behind in its worker."""

    processes: tuple[int, ...] = ()
    files: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.processes or self.files)


@dataclass(frozen=True, slots=True)
class GcReport:
    """Resident memory of a worker's processes around one garbage collection, in bytes."""

    before_bytes: int
    after_bytes: int
    duration_s: float

    @property
    def reclaimed_bytes(self) -> int:
        return max(0, self.before_bytes - self.after_bytes)


class WorkerProcess(Protocol):
    """One started worker. All methods are called from the event loop's thread."""

    spec: WorkerSpec
    pid: int
    has_garbage: bool
    """Whether there is any way to make this worker collect garbage; False: `collect_garbage` gives None."""
    exited: asyncio.Future[ExitStatus]
    """Done when the main process is dead, however it died; never cancelled by the runtime."""

    @property
    def stdin_fd(self) -> int:
        """Non-blocking; the pool writes frames to it. The runtime closes it in `stop`; then it is -1."""

    @property
    def stdout_fd(self) -> int:
        """Non-blocking; the pool reads frames from it. The runtime closes it in `stop`; then it is -1."""

    def first_request_sent(self) -> None:
        """The first bytes of the first request are in the pipe.

        The runtime takes what exists when the worker begins to read them (processes, files in
        TMPDIR) as the worker's own: a shell that starts the real tool as its child is a worker too.
        """

    def first_answer_seen(self) -> None:
        """The worker has answered: it certainly is ready, whatever `first_request_sent` has seen."""

    def leftovers(self) -> Leftovers:
        """What is there now that was not when the worker became ready. Quick; changes nothing."""

    def kill_stragglers(self) -> None:
        """SIGKILL the leftover processes, without waiting for their end: they do nothing more."""

    async def remove_leftovers(self) -> Leftovers:
        """Kill and delete what `leftovers` finds; returns what it removed.

        Raises RuntimeUnavailable if something could not be removed.
        """

    async def run(self, command: CommandSpec) -> CommandResult:
        """Run a command in the worker's environment, cwd and (if it has one) container."""

    def memory_bytes(self) -> int:
        """Resident memory of the worker's whole process tree; 0 if it is gone."""

    def cpu_s(self) -> float:
        """Processor time that the worker's processes, those that live, have used; 0 if it is gone."""

    async def collect_garbage(self) -> GcReport | None:
        """Make the worker collect its garbage. None: this worker has no way to do so.

        Raises RuntimeUnavailable if it has a way and that failed.
        """

    def stderr_tail(self) -> bytes:
        """The last of what the worker wrote to its standard error, bounded."""

    async def stop(self, grace_s: float) -> ExitStatus:
        """End the worker: close its stdin, SIGTERM, after `grace_s` SIGKILL; the whole tree.

        Idempotent, and safe on a dead worker. When it returns (also by cancellation, then without
        the grace) no process, descriptor or file of the worker is left. Only log files stay.
        """


class Runtime(Protocol):
    """Starts workers."""

    async def prepare(self) -> None:
        """Remove what dead processes of ours have left; called before each start. Idempotent, then quick.

        Raises RuntimeUnavailable.
        """

    async def start(self, spec: WorkerSpec) -> WorkerProcess:
        """Start one worker.

        Raises WorkerStartFailed if its program cannot run (with its stderr, if there was any),
        RuntimeUnavailable if the runtime itself cannot start anything now. A cancelled or failed
        start leaves nothing behind.
        """

    async def close(self) -> None:
        """Free what the runtime itself holds. Every worker was stopped before."""
