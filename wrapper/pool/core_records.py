"""What the core remembers: workers, waiters, keys and pools, and their indexes.

Keeps each index true when a worker changes state, in constant time whatever the number of workers.
Decides nothing: that is `core.py`.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from dataclasses import dataclass, field

from wrapper.pool.backoff import StartBackoff
from wrapper.pool.estimates import Estimates
from wrapper.pool.limits import PoolLimits
from wrapper.pool.start_statistics import StartRecorder
from wrapper.pool.worker_key import WorkerKey
from wrapper.pool.worker_states import (
    SERVING_STATES,
    Step,
    StopReason,
    WorkerState,
    next_state,
)

_IDLE, _LEASED = WorkerState.IDLE, WorkerState.LEASED
_RARE = frozenset(WorkerState) - {_IDLE, WorkerState.RESERVED, _LEASED, WorkerState.COOLING}
"""The states that a worker is not in while it serves one request after the other."""


@dataclass(slots=True, eq=False)
class Waiter:
    lease_id: int
    key: KeyState
    since: float
    deadline: float | None
    sequence: int
    queued: bool = False
    """False once it was answered or took itself back: the queue drops it when it comes by."""
    gone: bool = False
    """Its caller left while a probe was under way for it."""
    cold: bool = False
    """It was given a worker that was not ready when it asked."""


@dataclass(slots=True, eq=False)
class Worker:
    id: int
    key: KeyState
    state: WorkerState
    created_at: float
    expires_at: float | None
    leases: dict[int, float] = field(default_factory=dict)
    """Lease → when it was granted. A lease whose probe is not done yet counts too."""
    jobs: int = 0
    jobs_since_gc: int = 0
    dirty: bool = False
    """A request was with it since it was last cleaned."""
    closed_to_new: bool = False
    """Multiplex: cleaning or a garbage collection is due, so it takes no lease until it is empty."""
    stop_reason: StopReason | None = None
    idle_since: float = 0.0
    last_used_at: float = 0.0
    ready_at: float = 0.0
    cooling_since: float = 0.0
    replaces: Worker | None = None
    replaced_by: Worker | None = None
    replaced_for: StopReason = StopReason.LIFETIME

    def __repr__(self) -> str:
        return f"<Worker {self.id} {self.key.key.label} {self.state.name} reqs={self.jobs}>"

    @property
    def can_take_lease(self) -> bool:
        state = self.state
        if state is _IDLE:
            return True
        return (
            state is _LEASED
            and not self.closed_to_new
            and len(self.leases) < self.key.pool.limits.max_requests_per_worker_at_once
        )


@dataclass(slots=True, eq=False)
class KeyState:
    key: WorkerKey
    pool: PoolState
    workers: dict[int, Worker] = field(default_factory=dict)
    """All that hold a slot."""
    open: dict[int, Worker] = field(default_factory=dict)
    """Those that can take a lease now, in the order of their last use: the last is the most recent."""
    waiters: deque[Waiter] = field(default_factory=deque)
    waiting: int = 0
    starting: int = 0
    warming: int = 0
    serving: int = 0
    backoff: StartBackoff = field(default_factory=StartBackoff)
    estimates: Estimates = field(default_factory=Estimates)
    retry_armed_at: float = -math.inf
    """When its waiters will get a start although the runtime could do none: a timer is set for that."""
    grew_at: float = -math.inf
    """When a worker of this key was last started or became ready."""
    is_multiplex: bool = False
    """A worker can have several leases."""
    failed_starts: int = 0
    """Starts and warm-ups that failed since a worker of this key last became ready."""
    is_minimum: bool = False
    """The key of the pool's own `worker_command`, of which a minimum is kept."""

    def first_waiter(self) -> Waiter | None:
        while self.waiters:
            if self.waiters[0].queued:
                return self.waiters[0]
            self.waiters.popleft()
        return None

    def patience_ends_at(self, waiter: Waiter) -> float:
        """When a waiter has waited long enough for a busy worker, whatever the estimates say.

        Counted from the last growth: a new worker's slow first request is no reason for one more.
        """
        return max(waiter.since, self.grew_at) + self.pool.limits.start_instead_after_s

    @property
    def unused(self) -> bool:
        return not self.workers and not self.waiting and not self.is_minimum


@dataclass(slots=True, eq=False)
class PoolState:
    name: str
    limits: PoolLimits
    minimum_key: WorkerKey | None = None
    """Of what `min_warm_workers` are kept; None for a pool without a `worker_command`."""
    slots: int = 0
    stopping: int = 0
    waiting: int = 0
    draining: bool = False
    idle: dict[int, Worker] = field(default_factory=dict)
    """In the order in which they became idle: the first is the least recently used."""
    idle_timer: float | None = None
    counts: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    stops: dict[StopReason, int] = field(default_factory=dict)
    states: dict[WorkerState, int] = field(default_factory=lambda: dict.fromkeys(WorkerState, 0))
    starts: StartRecorder = field(default_factory=StartRecorder)
    unhealthy_keys: set[WorkerKey] = field(default_factory=set)
    """Keys whose last `limits.unhealthy_after` starts or more have all failed."""

    @property
    def is_healthy(self) -> bool:
        """Whether workers of all its keys can be started, as far as that was tried."""
        return not self.unhealthy_keys


class Registry:
    """All workers, keys and pools, and the one way to change a worker's state."""

    def __init__(self) -> None:
        self.pools: dict[str, PoolState] = {}
        self.keys: dict[WorkerKey, KeyState] = {}
        self.workers: dict[int, Worker] = {}
        self.slots = 0
        self.stopping = 0
        self.blocked: dict[WorkerKey, KeyState] = {}
        """Keys that want a start for a waiter and found their pool, or all pools together, full."""

    def key_state(self, key: WorkerKey) -> KeyState:
        state = self.keys.get(key)
        if state is None:
            pool = self.pools[key.pool]
            state = self.keys[key] = KeyState(
                key,
                pool,
                is_multiplex=pool.limits.max_requests_per_worker_at_once > 1,
                is_minimum=key == pool.minimum_key,
            )
        return state

    def add_worker(self, worker: Worker) -> None:
        key = worker.key
        self.workers[worker.id] = worker
        key.workers[worker.id] = worker
        key.starting += 1
        key.pool.slots += 1
        key.pool.states[worker.state] += 1
        self.slots += 1

    def step(self, worker: Worker, step: Step, now: float) -> None:
        """Take a worker to its next state and bring every index in line. Raises IllegalStep.

        Called for every step of every request, so it looks at what changed only.
        """
        old = worker.state
        new = next_state(old, step)
        key = worker.key
        worker.state = new
        if old is not new:
            states = key.pool.states
            states[old] -= 1
            states[new] += 1
            if old is _IDLE:
                del key.pool.idle[worker.id]
            elif new is _IDLE:
                worker.idle_since = now
                key.pool.idle[worker.id] = worker
            if old in _RARE or new in _RARE:
                self._born_or_ending(worker, old, new)
        if key.is_multiplex:
            self.reindex(worker)
        elif new is _IDLE:
            key.open[worker.id] = worker
        elif old is _IDLE:
            del key.open[worker.id]

    def _born_or_ending(self, worker: Worker, old: WorkerState, new: WorkerState) -> None:
        key, pool = worker.key, worker.key.pool
        key.serving += (new in SERVING_STATES) - (old in SERVING_STATES)
        key.starting -= old is WorkerState.STARTING
        key.warming += (new is WorkerState.WARMING) - (old is WorkerState.WARMING)
        if new is WorkerState.STOPPING:
            pool.stopping += 1
            self.stopping += 1
        elif old is WorkerState.STOPPING:
            pool.stopping -= 1
            self.stopping -= 1
        if new is WorkerState.STOPPED:
            self._free_slot(worker)

    def reindex(self, worker: Worker) -> None:
        """Put a worker where its key looks for one to lease, or take it away from there."""
        open_ = worker.key.open
        open_.pop(worker.id, None)
        if worker.can_take_lease:
            open_[worker.id] = worker

    def _free_slot(self, worker: Worker) -> None:
        key = worker.key
        del self.workers[worker.id]
        del key.workers[worker.id]
        key.pool.slots -= 1
        self.slots -= 1
