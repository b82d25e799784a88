"""The life of a worker as one table.

Owns which state follows which event, and why a worker stopped. Knows nothing of pools, keys or
time; `core.py` asks `next_state` for every step that it takes.
"""

from __future__ import annotations

from enum import Enum

from wrapper.errors import WrapperError


class WorkerState(Enum):
    __hash__ = object.__hash__  # the default is a Python function, and states are looked up for every step

    STARTING = "starting"
    """The runtime was asked for it. It counts against every limit from here on."""
    WARMING = "warming"
    """It runs; the operator's warm-up commands run too."""
    IDLE = "idle"
    RESERVED = "reserved"
    """A probe looks whether it may serve the waiter it was picked for."""
    LEASED = "leased"
    """At least one lease is on it."""
    DOOMED = "doomed"
    """Leased, takes no new lease, stops when the last one is released."""
    COOLING = "cooling"
    """Its answer is out; it is being cleaned and perhaps collects its garbage."""
    STOPPING = "stopping"
    STOPPED = "stopped"
    """Nothing is left of it. Only now is its slot free."""


class Step(Enum):
    """What can happen to a worker."""

    __hash__ = object.__hash__

    STARTED = "started"
    START_FAILED = "start failed"
    WARMED = "warmed"
    RESERVE = "reserve"
    UNRESERVE = "unreserve"
    LEASE = "lease"
    RELEASE_ONE = "release, others remain"
    RELEASE_LAST = "release of the last lease"
    RELEASE_CLEAN = "release of the last lease, nothing to clean"
    DOOM = "doom"
    CLEANED = "cleaned"
    STOP = "stop"
    GONE = "gone"


class StopReason(Enum):
    """Why a worker stopped: never one more state."""

    IDLE_TIMEOUT = "idle timeout"
    LIFETIME = "lifetime"
    MAX_JOBS = "max jobs"
    MEMORY = "memory limit"
    LEAK = "memory keeps growing"
    EVICTED = "evicted for another key"
    TOOL_CHANGED = "tool changed"
    UNHEALTHY = "unhealthy"
    UNCLEAN = "could not be cleaned"
    STRAY_OUTPUT = "stray output"
    PROTOCOL_ERROR = "protocol error"
    CRASH = "crash"
    CANCELLED = "cancelled in mid-request"
    FAILED = "its user reported it as failed"
    ABANDONED = "lease dropped without release"
    WARMUP_FAILED = "warm-up failed"
    START_FAILED = "start failed"
    RECONFIGURED = "configuration changed"
    DRAINED = "drained"


_S = WorkerState
_ENDS = {Step.STOP: _S.STOPPING}

TRANSITIONS: dict[WorkerState, dict[Step, WorkerState]] = {
    _S.STARTING: {Step.STARTED: _S.WARMING, Step.START_FAILED: _S.STOPPED, **_ENDS},
    _S.WARMING: {Step.WARMED: _S.IDLE, **_ENDS},
    _S.IDLE: {Step.RESERVE: _S.RESERVED, Step.LEASE: _S.LEASED, **_ENDS},
    _S.RESERVED: {Step.LEASE: _S.LEASED, Step.UNRESERVE: _S.IDLE, **_ENDS},
    _S.LEASED: {
        Step.LEASE: _S.LEASED,
        Step.RELEASE_ONE: _S.LEASED,
        Step.RELEASE_LAST: _S.COOLING,
        Step.RELEASE_CLEAN: _S.IDLE,
        Step.DOOM: _S.DOOMED,
        **_ENDS,
    },
    _S.DOOMED: {Step.RELEASE_ONE: _S.DOOMED, **_ENDS},
    _S.COOLING: {Step.CLEANED: _S.IDLE, **_ENDS},
    _S.STOPPING: {Step.GONE: _S.STOPPED},
    _S.STOPPED: {},
}

LIVE_STATES = frozenset(_S) - {_S.STOPPING, _S.STOPPED}
SERVING_STATES = frozenset({_S.WARMING, _S.IDLE, _S.RESERVED, _S.LEASED, _S.COOLING})
"""States from which a worker will take a lease again without anybody starting anything."""


class WarmupFailed(Exception):
    """A worker could not be made ready, and must be stopped."""

    def __init__(self, reason: StopReason, error: WrapperError) -> None:
        super().__init__(error.message)
        self.reason = reason
        self.error = error


class IllegalStep(Exception):
    """A step that the table does not allow: a bug of ours. Nothing was changed."""


def next_state(state: WorkerState, step: Step) -> WorkerState:
    """The state that follows; raises IllegalStep for a pair that is not in the table."""
    try:
        return TRANSITIONS[state][step]
    except KeyError:
        raise IllegalStep(f"{step.value!r} in state {state.value!r}") from None
