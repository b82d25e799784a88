"""The pool's decisions: a synchronous state machine, `handle(event, now) -> commands`.

Owns who gets which worker, when one is started, cleaned, retired or evicted, who waits and who is
refused. No I/O, no clock, no await: nothing can be cancelled inside a decision, so no slot can be
lost there, and a property test runs histories through it by the thousand. `pool.py` carries the
commands out.

Rules, each with a test in `tests/core/`:

* A slot is free only when the runtime said that nothing is left of its worker (Stopped).
* Never an idle worker and a waiter for one key at the same time.
* A start belongs to the pool: if the caller that caused it is gone, the next one gets the worker.
* A key grows by one start at a time (`capacity.should_grow`).
* A caller waits in turn (FIFO) with the others of its key; keys share a full pool fairly (`capacity.yields`).
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

from wrapper.errors import PoolDraining, UnknownPool, WrapperError
from wrapper.pool import core_messages as m
from wrapper.pool.capacity import Capacity, should_grow, yields
from wrapper.pool.core_records import KeyState, PoolState, Registry, Waiter, Worker
from wrapper.pool.limits import PoolLimits, TotalLimits
from wrapper.pool.timers import Timers
from wrapper.pool.wait_queue import WaitQueue, exhausted, overdue
from wrapper.pool.warmup_queue import Urgency
from wrapper.pool.worker_key import WorkerKey
from wrapper.pool.worker_states import Step, StopReason, WorkerState

MAX_IDLE_KEYS = 1_000
"""Keys without a worker whose estimates and back-off are remembered."""

_FAILED_REPLACEMENT_RETRY_S = 60.0
_ENDED = (WorkerState.STOPPING, WorkerState.STOPPED)


def _random_unit() -> float:
    return int.from_bytes(os.urandom(4), "big") / 2**32  # `random` alone costs 5 ms to import


class Core:
    """See the module. `random_unit` gives numbers in [0, 1) for the jitter of lifetimes."""

    def __init__(
        self,
        pools: Mapping[str, PoolLimits],
        total: TotalLimits = TotalLimits(),  # noqa: B008 - frozen
        *,
        minimum_keys: Mapping[str, WorkerKey] | None = None,
        random_unit: Callable[[], float] = _random_unit,
    ) -> None:
        self.registry = Registry()
        for name, limits in pools.items():
            self.registry.pools[name] = PoolState(name, limits, (minimum_keys or {}).get(name))
        self._capacity = Capacity(self.registry, total)
        self._random_unit = random_unit
        self._queue = WaitQueue()
        self._probing: dict[int, Waiter] = {}
        self._leased: dict[int, tuple[Worker, Waiter]] = {}
        self._ids = itertools.count(1)
        self._timers = Timers()
        self._announced_wake: float | None = None
        self._commands: list[m.Command] = []
        self._handlers: dict[type, Callable[[Any, float], None]] = {
            m.Acquire: self._acquire,
            m.WaiterGone: self._waiter_gone,
            m.Started: self._started,
            m.StartFailed: self._start_failed,
            m.Warmed: self._warmed,
            m.ProbeDone: self._probe_done,
            m.Released: self._released,
            m.Cleaned: self._cleaned,
            m.Exited: self._exited,
            m.Stopped: self._stopped,
            m.Retire: self._retire_asked,
            m.Drain: self._drain,
            m.Reconfigure: self._reconfigure,
            m.Tick: self._tick,
        }

    def handle(self, event: m.Event, now: float) -> list[m.Command]:
        """Decide. The commands are to be carried out in order."""
        self._commands = []
        self._handlers[type(event)](event, now)
        wake_at = self._timers.next_at
        if wake_at is not None and wake_at != self._announced_wake:
            self._announced_wake = wake_at
            self._commands.append(m.WakeAt(wake_at))
        return self._commands

    def candidate(self, key: WorkerKey) -> int:
        """The worker that a request for this key would get now, or 0: for a probe before Acquire."""
        state = self.registry.keys.get(key)
        return next(reversed(state.open)) if state is not None and state.open else 0

    def is_waited_for(self, key: WorkerKey) -> bool:
        """Whether somebody waits for a worker of this key."""
        state = self.registry.keys.get(key)
        return state is not None and state.waiting > 0

    def urgency(self, worker_id: int) -> Urgency:
        """What this worker, which is not ready yet, is wanted for at this moment."""
        worker = self.registry.workers.get(worker_id)
        if worker is None:
            return Urgency.SPARE
        if worker.key.waiting:
            return Urgency.WAITED_FOR
        spare = worker.replaces is not None or not worker.key.is_minimum
        return Urgency.SPARE if spare else Urgency.MINIMUM

    # ---- callers -----------------------------------------------------------------------------------

    def _acquire(self, event: m.Acquire, now: float) -> None:
        pool = self.registry.pools.get(event.key.pool)
        if pool is None:
            self._refuse(event.lease_id, UnknownPool(f"there is no pool named {event.key.pool!r}"))
            return
        if pool.draining:
            self._refuse(event.lease_id, PoolDraining(f"pool {pool.name!r} is stopping"))
            return
        pool.counts["acquire"] += 1
        key = self.registry.key_state(event.key)
        waiter = self._queue.new_waiter(event.lease_id, key, now, event.deadline)
        if key.open:  # then nobody waits
            worker = next(reversed(key.open.values()))
            if worker.id == event.probed:
                self._grant(worker, waiter, now)
            else:
                self._reserve(worker, waiter, now)
            return
        self._queue.add(waiter)
        self._grow(key, now)
        if not waiter.queued:
            return
        if pool.waiting > pool.limits.max_waiting:
            self._answer_waiter(waiter, exhausted(pool))
            return
        self._arm(waiter, now)

    def _arm(self, waiter: Waiter, now: float) -> None:
        """Look at a waiter again when its patience or its time is over."""
        at = waiter.key.patience_ends_at(waiter)
        deadline = math.inf if waiter.deadline is None else waiter.deadline
        if at <= now or deadline < at:
            at = deadline
        if at < math.inf:
            self._timers.at(at, lambda now: self._waited(waiter, now), waiter)

    def _rearm(self, key: KeyState, now: float) -> None:
        """The key grew: the patience of its first waiter begins anew."""
        first = key.first_waiter()
        if first is not None:
            self._arm(first, now)

    def _waited(self, waiter: Waiter, now: float) -> None:
        if not waiter.queued:
            return
        if waiter.deadline is not None and now >= waiter.deadline:
            self._answer_waiter(waiter, overdue(waiter, now))
            self._unblock_if_satisfied(waiter.key)
            self._offer_slots(now)
            return
        self._grow(waiter.key, now)
        if waiter.queued:
            self._arm(waiter, now)

    def _requeue(self, waiter: Waiter, now: float) -> None:
        """The worker that a waiter was to get will not do: it is the first in turn again."""
        self._queue.add(waiter, first=True)
        self._arm(waiter, now)

    def _waiter_gone(self, event: m.WaiterGone, now: float) -> None:
        waiter = self._queue.waiters.get(event.lease_id)
        if waiter is not None:
            self._queue.remove(waiter)
            self._unblock_if_satisfied(waiter.key)
            self._offer_slots(now)
        else:
            waiter = self._probing.get(event.lease_id)
            if waiter is not None:
                waiter.gone = True

    def _serve(self, key: KeyState, now: float) -> None:
        """Give workers that can take a lease to the waiters of their key, first come first served."""
        while key.open:
            waiter = key.first_waiter()
            if waiter is None:
                return
            worker = next(reversed(key.open.values()))
            waiter.cold = worker.ready_at >= waiter.since
            self._queue.remove(waiter)
            self._reserve(worker, waiter, now)
        self._unblock_if_satisfied(key)

    def _reserve(self, worker: Worker, waiter: Waiter, now: float) -> None:
        """A worker for this waiter, if a probe finds that it may serve."""
        self._probing[waiter.lease_id] = waiter
        worker.leases[waiter.lease_id] = now
        if worker.state is WorkerState.IDLE:
            self.registry.step(worker, Step.RESERVE, now)
        else:
            self.registry.reindex(worker)
        self._commands.append(m.Probe(worker.id, waiter.lease_id))

    def _grant(self, worker: Worker, waiter: Waiter, now: float) -> None:
        worker.leases[waiter.lease_id] = now
        self.registry.step(worker, Step.LEASE, now)
        self._leased[waiter.lease_id] = (worker, waiter)
        worker.key.pool.counts["grant"] += 1
        self._commands.append(m.Grant(waiter.lease_id, worker.id))
        self._serve(worker.key, now)  # a multiplex worker may have room for the next one

    def _probe_done(self, event: m.ProbeDone, now: float) -> None:
        worker = self.registry.workers.get(event.worker_id)
        if worker is None or event.lease_id not in worker.leases:
            return  # it was stopped meanwhile; its waiter queued again then, and may be probed elsewhere
        waiter = self._probing.pop(event.lease_id, None)
        if waiter is None:
            return
        usable = worker.state in (WorkerState.RESERVED, WorkerState.LEASED)
        if usable and event.problem is None and not waiter.gone:
            self._grant(worker, waiter, now)
            return
        del worker.leases[event.lease_id]
        if not waiter.gone:
            self._requeue(waiter, now)
        if event.problem is not None and usable:
            self._retire(worker, event.problem, now)
        if worker.state is WorkerState.RESERVED:
            self.registry.step(worker, Step.UNRESERVE, now)
            self._became_idle(worker, now)
        elif worker.state in (WorkerState.LEASED, WorkerState.DOOMED):
            self._lease_ended(worker, now)
        self._serve(worker.key, now)
        self._grow(worker.key, now)

    def _released(self, event: m.Released, now: float) -> None:
        leased = self._leased.pop(event.lease_id, None)
        if leased is None:
            return
        worker, waiter = leased
        since = worker.leases.pop(event.lease_id)
        key, pool = worker.key, worker.key.pool
        worker.last_used_at = now
        if event.used:
            worker.jobs += 1
            worker.jobs_since_gc += 1
            worker.dirty = True
            pool.counts["jobs"] += 1
        if worker.state in _ENDED:
            return
        if event.used and event.problem is None:
            first = worker.jobs == 1
            key.estimates.served(now - since, first=first)
            pool.starts.served(waiter.cold, now - waiter.since)
            if first:
                pool.starts.first_served(now - since)
                self._commands.append(m.TellFirst(worker.id, now - since))
            key.backoff.succeeded()
            worker.closed_to_new = self._is_due(worker)
        if event.problem is not None:
            self._retire(worker, event.problem, now)
        self._lease_ended(worker, now, clean=event.clean, probed=event.probed)
        self._grow(key, now)

    def _lease_ended(self, worker: Worker, now: float, *, clean: bool = False, probed: bool = False) -> None:
        """A lease was taken off a worker: what becomes of it."""
        limits = worker.key.pool.limits
        if worker.state in _ENDED:
            return
        if worker.leases:
            if yields(worker, self._capacity, now):
                worker.closed_to_new = True
            self.registry.step(worker, Step.RELEASE_ONE, now)
            self._serve(worker.key, now)
        elif worker.state is WorkerState.DOOMED:
            self._stop(worker, worker.stop_reason or StopReason.DRAINED, now)
        elif not worker.dirty:
            self.registry.step(worker, Step.RELEASE_CLEAN, now)
            self._became_idle(worker, now)
        elif _reached(worker.jobs, limits.max_jobs_per_worker):
            self._stop(worker, StopReason.MAX_JOBS, now)
        elif clean and not worker.closed_to_new:
            worker.dirty = False
            worker.key.pool.counts["clean"] += 1
            self.registry.step(worker, Step.RELEASE_CLEAN, now)
            self._became_idle(worker, now, probed=probed)
        else:
            self.registry.step(worker, Step.RELEASE_LAST, now)
            worker.cooling_since = now
            gc_is_due = _reached(worker.jobs_since_gc, limits.gc_job_frequency)
            self._commands.append(m.Clean(worker.id, gc_is_due))

    def _cleaned(self, event: m.Cleaned, now: float) -> None:
        worker = self.registry.workers.get(event.worker_id)
        if worker is None or worker.state is not WorkerState.COOLING:
            return
        if event.problem is not None:
            self._stop(worker, event.problem, now)
            return
        worker.key.pool.counts["clean"] += 1
        worker.key.estimates.cooled(now - worker.cooling_since)
        if _reached(worker.jobs_since_gc, worker.key.pool.limits.gc_job_frequency):
            worker.jobs_since_gc = 0
        worker.closed_to_new = worker.dirty = False
        self.registry.step(worker, Step.CLEANED, now)
        self._became_idle(worker, now)

    @staticmethod
    def _is_due(worker: Worker) -> bool:
        limits = worker.key.pool.limits
        return _reached(worker.jobs_since_gc, limits.gc_job_frequency) or _reached(
            worker.jobs, limits.max_jobs_per_worker
        )

    # ---- workers -----------------------------------------------------------------------------------

    def _became_idle(self, worker: Worker, now: float, *, probed: bool = False) -> None:
        """Who gets a worker that is free now. `probed`: it was found fit for a lease this very moment."""
        key, pool = worker.key, worker.key.pool
        if worker.replaces is not None:
            old, worker.replaces = worker.replaces, None
            old.replaced_by = None
            self._retire(old, old.replaced_for, now)
        if yields(worker, self._capacity, now):
            self._stop(worker, StopReason.EVICTED, now)
            return
        waiter = key.first_waiter() if probed else None
        if waiter is not None:
            self._queue.remove(waiter)
            self._grant(worker, waiter, now)
            self._unblock_if_satisfied(key)
        self._serve(key, now)
        if worker.state is not WorkerState.IDLE:
            return
        if self.registry.blocked:
            self._offer_slots(now)
        if (
            worker.state is WorkerState.IDLE
            and pool.limits.idle_timeout_s is not None
            and pool.idle_timer is None
        ):
            pool.idle_timer = now + pool.limits.idle_timeout_s
            self._timers.at(pool.idle_timer, lambda at: self._idle_timeouts(pool, at))

    def _started(self, event: m.Started, now: float) -> None:
        worker = self.registry.workers.get(event.worker_id)
        if worker is None or worker.state is not WorkerState.STARTING:
            return
        self.registry.step(worker, Step.STARTED, now)
        self._commands.append(m.Warm(worker.id))

    def _warmed(self, event: m.Warmed, now: float) -> None:
        worker = self.registry.workers.get(event.worker_id)
        if worker is None or worker.state is not WorkerState.WARMING:
            return
        key, pool = worker.key, worker.key.pool
        key.estimates.started(now - worker.created_at)
        pool.starts.started(now - worker.created_at)
        self._started_well(key)
        worker.ready_at = worker.last_used_at = now
        if worker.expires_at is not None:
            self._timers.at(worker.expires_at, lambda at: self._lifetime_over(worker, at))
        pool.counts["ready"] += 1
        self.registry.step(worker, Step.WARMED, now)
        self._became_idle(worker, now)
        key.grew_at = now
        self._grow(key, now)
        self._rearm(key, now)
        self._refill(pool, now)

    def _start_failed(self, event: m.StartFailed, now: float) -> None:
        worker = self.registry.workers.get(event.worker_id)
        if worker is None or worker.state is not WorkerState.STARTING:
            return
        key = worker.key
        key.pool.counts["start_failed"] += 1
        self._started_badly(key, event.error, now)
        self.registry.step(worker, Step.START_FAILED, now)
        self._count_stop(worker, StopReason.START_FAILED)
        self._replacement_lost(worker, now)
        self._after_failure(key, now)
        self._slot_freed(worker, now)

    def _exited(self, event: m.Exited, now: float) -> None:
        worker = self.registry.workers.get(event.worker_id)
        if worker is None or worker.state is WorkerState.STOPPING:
            return
        key = worker.key
        if worker.state is WorkerState.WARMING:
            self._started_badly(key, event.error, now)
        elif worker.jobs == 0:
            key.backoff.died_before_first_answer(now, event.error)
        self._stop(worker, event.reason, now)
        self._after_failure(key, now)

    def _started_badly(self, key: KeyState, error: WrapperError, now: float) -> None:
        """A start or a warm-up failed. The pool is unhealthy after some in a row."""
        key.backoff.start_failed(now, error)
        key.failed_starts += 1
        if key.failed_starts == key.pool.limits.unhealthy_after:
            key.pool.unhealthy_keys.add(key.key)
            self._commands.append(m.TellHealth(key.key, key.failed_starts, error))

    def _started_well(self, key: KeyState) -> None:
        failures, key.failed_starts = key.failed_starts, 0
        if key.key in key.pool.unhealthy_keys:
            key.pool.unhealthy_keys.discard(key.key)
            self._commands.append(m.TellHealth(key.key, failures, None))

    def _after_failure(self, key: KeyState, now: float) -> None:
        refusal = key.backoff.refusal(now)
        if refusal is not None and not key.serving and not key.starting:
            self._refuse_all(key, lambda _waiter: refusal)
        self._serve(key, now)
        self._grow(key, now)
        if key.backoff.delays(now) and (key.is_minimum or key.waiting):
            self._timers.at(key.backoff.retry_at, lambda now: self._try_again(key, now))

    def _try_again(self, key: KeyState, now: float) -> None:
        """The back-off of a key is over."""
        self._grow(key, now)
        self._refill(key.pool, now)

    def _replacement_lost(self, worker: Worker, now: float) -> None:
        """A worker that should have replaced an old one never served: the old one goes on for a while."""
        old, worker.replaces = worker.replaces, None
        if old is not None:
            old.replaced_by = None
            self._timers.at(now + _FAILED_REPLACEMENT_RETRY_S, lambda at: self._lifetime_over(old, at))

    def _stopped(self, event: m.Stopped, now: float) -> None:
        worker = self.registry.workers.get(event.worker_id)
        if worker is None or worker.state is not WorkerState.STOPPING:
            return
        self.registry.step(worker, Step.GONE, now)
        self._slot_freed(worker, now)

    def _slot_freed(self, worker: Worker, now: float) -> None:
        key = worker.key
        self._offer_slots(now, key)
        self._refill(key.pool, now)
        if key.unused:
            self._forget_keys()

    def _retire_asked(self, event: m.Retire, now: float) -> None:
        worker = self.registry.workers.get(event.worker_id)
        if worker is not None and worker.state not in _ENDED:
            self._retire(worker, event.reason, now)
            self._serve(worker.key, now)
            self._grow(worker.key, now)

    def _retire(self, worker: Worker, reason: StopReason, now: float) -> None:
        """Stop a worker as soon as no lease is on it."""
        if worker.state in _ENDED:
            return
        if worker.state in (WorkerState.LEASED, WorkerState.DOOMED) and worker.leases:
            if worker.state is WorkerState.LEASED:
                worker.stop_reason = reason
                self.registry.step(worker, Step.DOOM, now)
            return
        self._stop(worker, reason, now)

    def _stop(self, worker: Worker, reason: StopReason, now: float) -> None:
        """Stop a worker now, whatever it does. Leases on it stay their callers' until released."""
        for lease_id in list(worker.leases):
            waiter = self._probing.pop(lease_id, None)
            if waiter is not None:
                del worker.leases[lease_id]
                if not waiter.gone:
                    self._requeue(waiter, now)
        worker.stop_reason = reason
        self._replacement_lost(worker, now)
        self.registry.step(worker, Step.STOP, now)
        self._count_stop(worker, reason)
        self._commands.append(m.Stop(worker.id, reason))

    @staticmethod
    def _count_stop(worker: Worker, reason: StopReason) -> None:
        stops = worker.key.pool.stops
        stops[reason] = stops.get(reason, 0) + 1

    # ---- growth ------------------------------------------------------------------------------------

    def _grow(self, key: KeyState, now: float) -> None:
        """Start one more worker for a key with waiters, if that is worth it and there is room."""
        if not key.waiting or key.starting or key.pool.draining:
            return
        if key.backoff.holds(now):
            if key.retry_armed_at != key.backoff.retry_at:
                key.retry_armed_at = key.backoff.retry_at
                self._timers.at(key.backoff.retry_at, lambda now: self._try_again(key, now))
            return
        if key.waiting <= key.warming * key.pool.limits.max_requests_per_worker_at_once:
            return  # a long warm-up must not make one request start worker after worker
        if not key.serving:
            refusal = key.backoff.refusal(now)
            if refusal is not None:
                self._refuse_all(key, lambda _waiter: refusal)
                return
        elif key.backoff.delays(now) or not should_grow(key, now):
            return
        if not self._capacity.has_room_in_key(key):
            return
        if self._capacity.has_room_in_pool(key.pool):
            self._unblock(key)
            self._start(key, now)
            return
        self.registry.blocked[key.key] = key
        self._make_room(key, now)

    def _make_room(self, key: KeyState, now: float) -> None:
        """At a limit the least recently used idle worker of another key makes room."""
        victim = self._capacity.victim_for(key)
        if victim is not None:
            self._stop(victim, StopReason.EVICTED, now)

    def _offer_slots(self, now: float, also: KeyState | None = None) -> None:
        """Let the keys that want a slot look again, the one that has waited longest first."""
        keys = list(self.registry.blocked.values())
        if also is not None and also.key not in self.registry.blocked:
            keys.append(also)
        waiting = [(first.sequence, key) for key in keys if (first := key.first_waiter())]
        self.registry.blocked.clear()
        for _, key in sorted(waiting, key=lambda pair: pair[0]):
            self._grow(key, now)

    def _unblock_if_satisfied(self, key: KeyState) -> None:
        if self.registry.blocked and not key.waiting:
            self._unblock(key)

    def _unblock(self, key: KeyState) -> None:
        self.registry.blocked.pop(key.key, None)

    def _refill(self, pool: PoolState, now: float) -> None:
        """Keep the minimum of warm workers, one start at a time, never before a waiting request."""
        if pool.minimum_key is None or pool.draining or self._capacity.blocked_with(pool):
            return
        key = self.registry.key_state(pool.minimum_key)
        if (
            key.serving + key.starting < pool.limits.min_warm_workers
            and not key.starting
            and not key.backoff.delays(now)
            and self._capacity.has_room(key)
        ):
            self._start(key, now)

    def _start(self, key: KeyState, now: float, *, replaces: Worker | None = None) -> Worker:
        limits = key.pool.limits
        expires_at = None
        if limits.worker_ttl_s is not None:
            expires_at = now + limits.worker_ttl_s * (1 - limits.worker_ttl_jitter * self._random_unit())
        worker = Worker(next(self._ids), key, WorkerState.STARTING, now, expires_at, replaces=replaces)
        self.registry.add_worker(worker)
        key.grew_at = now
        key.pool.counts["start"] += 1
        self._commands.append(m.Start(worker.id, key.key))
        return worker

    # ---- time --------------------------------------------------------------------------------------

    def _tick(self, _event: m.Tick, now: float) -> None:
        self._timers.tick(now)
        self._announced_wake = None
        for pool in self.registry.pools.values():
            self._refill(pool, now)

    def _idle_timeouts(self, pool: PoolState, now: float) -> None:
        timeout = pool.limits.idle_timeout_s
        assert timeout is not None  # noqa: S101 - only armed with one
        pool.idle_timer = None
        kept = 0
        for worker in list(pool.idle.values()):
            due = worker.idle_since + timeout
            if due > now:
                pool.idle_timer = due
                self._timers.at(due, lambda at: self._idle_timeouts(pool, at))
                return
            if worker.key.is_minimum and worker.key.serving <= pool.limits.min_warm_workers:
                kept += 1
            else:
                self._stop(worker, StopReason.IDLE_TIMEOUT, now)
        if kept:
            pool.idle_timer = now + timeout
            self._timers.at(pool.idle_timer, lambda at: self._idle_timeouts(pool, at))

    def _lifetime_over(self, worker: Worker, now: float) -> None:
        """Retire a worker, after its replacement is ready if it is still wanted and there is room."""
        if worker.id not in self.registry.workers or worker.state is WorkerState.STOPPING:
            return
        if worker.replaced_by is not None:
            return
        key, pool = worker.key, worker.key.pool
        timeout = pool.limits.idle_timeout_s
        wanted = key.is_minimum or worker.leases or timeout is None or now - worker.last_used_at < timeout
        room = self._capacity.has_room(key) and not self._capacity.blocked_with(pool)
        if wanted and room and not pool.draining and worker.state is not WorkerState.DOOMED:
            if key.starting or key.backoff.delays(now):
                self._timers.at(now + 1.0, lambda at: self._lifetime_over(worker, at))
                return
            worker.replaced_by = self._start(key, now, replaces=worker)
        else:
            self._retire(worker, worker.replaced_for, now)
            self._grow(key, now)

    def _reconfigure(self, event: m.Reconfigure, now: float) -> None:
        for name in self.registry.pools.keys() - event.pools.keys():
            self._drain(m.Drain(name), now)
        self._capacity.set_total(event.total)
        for name, limits in event.pools.items():
            pool = self.registry.pools.setdefault(name, PoolState(name, limits))
            pool.limits, pool.minimum_key, pool.draining = limits, event.minimum_keys.get(name), False
            for key in self.registry.keys.values():
                if key.pool is pool:
                    key.is_minimum = key.key == pool.minimum_key
        for worker in list(self.registry.workers.values()):
            if worker.key.pool.name in event.changed and worker.state not in _ENDED:
                worker.replaced_for = StopReason.RECONFIGURED
                if worker.state in (WorkerState.STARTING, WorkerState.WARMING):
                    self._stop(worker, StopReason.RECONFIGURED, now)  # nobody has it yet
                elif _has_another_command(worker.key):
                    self._retire(worker, StopReason.RECONFIGURED, now)
                else:
                    self._lifetime_over(worker, now)
        for pool in self.registry.pools.values():
            self._refill(pool, now)
        self._offer_slots(now)

    # ---- the end -----------------------------------------------------------------------------------

    def _drain(self, event: m.Drain, now: float) -> None:
        for pool in self.registry.pools.values():
            if event.pool in (None, pool.name):
                pool.draining = True
                for key in self.registry.keys.values():
                    if key.pool is pool:
                        self._refuse_all(
                            key, lambda waiter: PoolDraining(f"pool {waiter.key.pool.name!r} is stopping")
                        )
        for worker in list(self.registry.workers.values()):
            if worker.key.pool.draining and worker.state is not WorkerState.STOPPING:
                self._retire(worker, StopReason.DRAINED, now)
        for waiter in list(self._queue.waiters.values()):
            if waiter.key.pool.draining:  # put back by a probe that was under way
                self._answer_waiter(waiter, PoolDraining(f"pool {waiter.key.pool.name!r} is stopping"))

    # ---- queue -------------------------------------------------------------------------------------

    def _answer_waiter(self, waiter: Waiter, error: WrapperError) -> None:
        self._queue.remove(waiter)
        self._refuse(waiter.lease_id, error)
        waiter.key.pool.counts["refused"] += 1

    def _refuse_all(self, key: KeyState, error: Callable[[Waiter], WrapperError]) -> None:
        while (waiter := key.first_waiter()) is not None:
            self._answer_waiter(waiter, error(waiter))
        self._unblock(key)

    def _refuse(self, lease_id: int, error: WrapperError) -> None:
        self._commands.append(m.Refuse(lease_id, error))

    def _forget_keys(self) -> None:
        """Bound what is remembered of keys that have no worker any more, the oldest first."""
        if len(self.registry.keys) <= MAX_IDLE_KEYS:
            return
        for key, state in list(self.registry.keys.items()):
            if state.unused and not state.waiters:
                del self.registry.keys[key]
                state.pool.unhealthy_keys.discard(key)
                if len(self.registry.keys) <= MAX_IDLE_KEYS:
                    return


def _has_another_command(key: KeyState) -> bool:
    """Whether nobody will ask for this key again, since its pool has a command of its own now."""
    minimum = key.pool.minimum_key
    return minimum is not None and (key.key.argv, key.key.env) != (minimum.argv, minimum.env)


def _reached(count: int, limit: int | None) -> bool:
    return limit is not None and count >= limit
