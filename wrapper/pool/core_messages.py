"""What the pool's core is told (events) and what it asks for (commands). Values only.

Leases and workers are named by numbers that are never used again. Named tuples, not dataclasses: two
dozen of those would cost a tenth of the time that a worker host waits for the first answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from wrapper.errors import WrapperError
from wrapper.pool.limits import PoolLimits, TotalLimits
from wrapper.pool.worker_key import WorkerKey
from wrapper.pool.worker_states import StopReason

# ---- events ----------------------------------------------------------------------------------------


class Acquire(NamedTuple):
    """Somebody wants a worker. Answered by exactly one Grant or Refuse, unless WaiterGone comes first.

    `probed`: the worker (`Core.candidate`) that was found fit for a lease this very moment, or 0.
    """

    lease_id: int
    key: WorkerKey
    deadline: float | None = None
    probed: int = 0


class WaiterGone(NamedTuple):
    """Whoever sent this Acquire no longer waits. A start made for it goes on: it belongs to the pool."""

    lease_id: int


class Started(NamedTuple):
    worker_id: int


class StartFailed(NamedTuple):
    """The start left nothing behind: the slot is free."""

    worker_id: int
    error: WrapperError


class Warmed(NamedTuple):
    worker_id: int


class ProbeDone(NamedTuple):
    worker_id: int
    lease_id: int
    problem: StopReason | None = None


class Released(NamedTuple):
    """The lease ended. `used`: a request was sent. `problem`: the worker must not serve again.

    `clean`: a look found nothing to clean up. `probed`: and the worker fit for the next lease.
    """

    lease_id: int
    used: bool = True
    problem: StopReason | None = None
    clean: bool = False
    probed: bool = False


class Cleaned(NamedTuple):
    worker_id: int
    problem: StopReason | None = None


class Exited(NamedTuple):
    """The worker ended by itself, or can no longer be spoken to."""

    worker_id: int
    reason: StopReason
    error: WrapperError


class Stopped(NamedTuple):
    """Nothing is left of a worker that Stop was asked for: its slot is free."""

    worker_id: int


class Retire(NamedTuple):
    """Somebody outside wants this worker gone: at once if nobody has it, else after its last lease."""

    worker_id: int
    reason: StopReason


class Drain(NamedTuple):
    """Take no new requests for this pool (None: for any), refuse the waiting ones, stop the workers."""

    pool: str | None = None


class Reconfigure(NamedTuple):
    """The configuration was read again. Pools that are not named any more end as with Drain.

    `changed`: pools whose workers are to be replaced, one after the other.
    """

    pools: Mapping[str, PoolLimits]
    total: TotalLimits
    minimum_keys: Mapping[str, WorkerKey]
    changed: frozenset[str]


class Tick(NamedTuple):
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
    | Reconfigure
    | Tick
)

# ---- commands --------------------------------------------------------------------------------------


class Start(NamedTuple):
    """Answer with Started or StartFailed."""

    worker_id: int
    key: WorkerKey


class Warm(NamedTuple):
    """Answer with Warmed or Exited."""

    worker_id: int


class Probe(NamedTuple):
    """Is the worker alive, silent, its tool unchanged? Answer with ProbeDone."""

    worker_id: int
    lease_id: int


class Grant(NamedTuple):
    lease_id: int
    worker_id: int


class Refuse(NamedTuple):
    lease_id: int
    error: WrapperError


class Clean(NamedTuple):
    """Make the worker as it was before its last request. Answer with Cleaned."""

    worker_id: int
    collect_garbage: bool


class Stop(NamedTuple):
    """End the worker in whatever it is doing (starting and cleaning too). Answer with Stopped."""

    worker_id: int
    reason: StopReason


class WakeAt(NamedTuple):
    """Send a Tick then. The newest one counts."""

    at: float


class TellHealth(NamedTuple):
    """Say that workers of this key cannot be started (`error`), or can again (None)."""

    key: WorkerKey
    failures: int
    error: WrapperError | None


class TellFirst(NamedTuple):
    """Say how long a worker's first request took."""

    worker_id: int
    latency_s: float


Command = Start | Warm | Probe | Grant | Refuse | Clean | Stop | WakeAt | TellHealth | TellFirst
