"""What the pool's core is told (events) and what it asks for (commands). Values only.

Leases and workers are named by numbers that are never used again.
"""

from __future__ import annotations

from dataclasses import dataclass

from wrapper.errors import WrapperError
from wrapper.pool.worker_key import WorkerKey
from wrapper.pool.worker_states import StopReason

# ---- events ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Acquire:
    """Somebody wants a worker. Answered by exactly one Grant or Refuse, unless WaiterGone comes first."""

    lease_id: int
    key: WorkerKey
    deadline: float | None = None


@dataclass(frozen=True, slots=True)
class WaiterGone:
    """Whoever sent this Acquire no longer waits. A start made for it goes on: it belongs to the pool."""

    lease_id: int


@dataclass(frozen=True, slots=True)
class Started:
    worker_id: int


@dataclass(frozen=True, slots=True)
class StartFailed:
    """The start left nothing behind: the slot is free."""

    worker_id: int
    error: WrapperError


@dataclass(frozen=True, slots=True)
class Warmed:
    worker_id: int


@dataclass(frozen=True, slots=True)
class ProbeDone:
    worker_id: int
    lease_id: int
    problem: StopReason | None = None


@dataclass(frozen=True, slots=True)
class Released:
    """The lease ended. `used`: a request was sent. `problem`: the worker must not serve again."""

    lease_id: int
    used: bool = True
    problem: StopReason | None = None


@dataclass(frozen=True, slots=True)
class Cleaned:
    worker_id: int
    problem: StopReason | None = None


@dataclass(frozen=True, slots=True)
class Exited:
    """The worker ended by itself, or can no longer be spoken to."""

    worker_id: int
    reason: StopReason
    error: WrapperError


@dataclass(frozen=True, slots=True)
class Stopped:
    """Nothing is left of a worker that Stop was asked for: its slot is free."""

    worker_id: int


@dataclass(frozen=True, slots=True)
class Retire:
    """Somebody outside wants this worker gone: at once if nobody has it, else after its last lease."""

    worker_id: int
    reason: StopReason


@dataclass(frozen=True, slots=True)
class Drain:
    """Take no new requests for this pool (None: for any), refuse the waiting ones, stop the workers."""

    pool: str | None = None


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed; also the first event of all."""


Event = (
    Acquire
    | WaiterGone
    | Started
    | StartFailed
    | Warmed
    | ProbeDone
    | Released
    | Cleaned
    | Exited
    | Stopped
    | Retire
    | Drain
    | Tick
)

# ---- commands --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Start:
    """Answer with Started or StartFailed."""

    worker_id: int
    key: WorkerKey


@dataclass(frozen=True, slots=True)
class Warm:
    """Answer with Warmed or Exited."""

    worker_id: int


@dataclass(frozen=True, slots=True)
class Probe:
    """Is the worker alive, silent, its tool unchanged? Answer with ProbeDone."""

    worker_id: int
    lease_id: int


@dataclass(frozen=True, slots=True)
class Grant:
    lease_id: int
    worker_id: int


@dataclass(frozen=True, slots=True)
class Refuse:
    lease_id: int
    error: WrapperError


@dataclass(frozen=True, slots=True)
class Clean:
    """Make the worker as it was before its last request. Answer with Cleaned."""

    worker_id: int
    collect_garbage: bool


@dataclass(frozen=True, slots=True)
class Stop:
    """End the worker in whatever it is doing (starting and cleaning too). Answer with Stopped."""

    worker_id: int
    reason: StopReason


@dataclass(frozen=True, slots=True)
class WakeAt:
    """Send a Tick then. The newest one counts."""

    at: float


Command = Start | Warm | Probe | Grant | Refuse | Clean | Stop | WakeAt
