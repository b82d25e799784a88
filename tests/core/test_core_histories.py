"""Random histories through the pool's core: whatever happens in whatever order, its invariants hold.

The machine below plays every part around the core: callers, the runtime, the clock. It answers each
command late, in any order, well or badly, and checks the core's books against its own after every step.
"""

from __future__ import annotations

import os
from collections import Counter

import hypothesis.strategies as st
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from wrapper.errors import WorkerDied, WorkerStartFailed
from wrapper.pool import core_messages as m
from wrapper.pool.core import Core
from wrapper.pool.limits import PoolLimits, TotalLimits
from wrapper.pool.worker_key import WorkerKey
from wrapper.pool.worker_states import SERVING_STATES, StopReason, WorkerState

HISTORIES = int(os.environ.get("CORE_HISTORIES", "2000"))
SHRINK = "CORE_HISTORIES_SHRINK" in os.environ
"""Shrinking a failing history takes minutes: asked for by hand."""

POOLS = {
    "single": PoolLimits(
        max_workers=3, max_instances_per_key=2, max_waiting=6, gc_job_frequency=2, max_jobs_per_worker=4
    ),
    "multi": PoolLimits(
        max_workers=2,
        max_instances_per_key=2,
        max_requests_per_worker_at_once=3,
        gc_job_frequency=3,
        max_jobs_per_worker=7,
        idle_timeout_s=20.0,
        worker_ttl_s=60.0,
    ),
    "kept": PoolLimits(max_workers=4, min_warm_workers=2, worker_ttl_s=50.0, idle_timeout_s=15.0),
}
TOTAL = TotalLimits(max_workers=6)
KEYS = [
    *(WorkerKey("single", (f"tool{n}",), "/") for n in range(3)),
    *(WorkerKey("multi", (f"tool{n}",), "/", multiplex=True) for n in range(2)),
    *(WorkerKey("kept", (f"tool{n}",), "/") for n in range(2)),
]
PROBLEMS = st.sampled_from([None, None, None, StopReason.CRASH, StopReason.UNCLEAN])


class CoreHistory(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.core = Core(POOLS, TOTAL, minimum_keys={"kept": KEYS[5]}, random_unit=lambda: 0.5)
        self.next_lease = 0
        self.waiting: dict[int, WorkerKey] = {}
        self.granted: dict[int, int] = {}
        self.finished: set[int] = set()
        self.slots: dict[int, WorkerKey] = {}
        self.starting: list[int] = []
        self.warming: list[int] = []
        self.probes: list[tuple[int, int]] = []
        self.cleaning: list[int] = []
        self.stopping: list[int] = []
        self.drained = False
        self.send(m.Tick())

    # ---- the world ---------------------------------------------------------------------------------

    def send(self, event: m.Event) -> None:
        for command in self.core.handle(event, self.now):
            self.obey(command)

    def obey(self, command: m.Command) -> None:
        match command:
            case m.Start(worker_id, key):
                assert worker_id not in self.slots
                assert not self.drained
                self.slots[worker_id] = key
                self.starting.append(worker_id)
            case m.Warm(worker_id):
                assert worker_id in self.slots
                self.warming.append(worker_id)
            case m.Probe(worker_id, lease_id):
                assert self.slots[worker_id] == self.waiting[lease_id]
                assert worker_id not in self.stopping
                self.probes.append((worker_id, lease_id))
            case m.Grant(lease_id, worker_id):
                key = self.waiting.pop(lease_id)
                assert self.slots[worker_id] == key
                assert worker_id not in [*self.stopping, *self.cleaning, *self.starting, *self.warming]
                self.granted[lease_id] = worker_id
                at_once = POOLS[key.pool].max_requests_per_worker_at_once
                assert Counter(self.granted.values())[worker_id] <= at_once
            case m.Refuse(lease_id, _):
                del self.waiting[lease_id]
                self.finished.add(lease_id)
            case m.Clean(worker_id, _):
                assert worker_id not in self.granted.values()
                assert worker_id not in self.stopping
                self.cleaning.append(worker_id)
            case m.Stop(worker_id, _):
                assert worker_id in self.slots
                assert worker_id not in self.stopping
                self.stopping.append(worker_id)
                for doing in (self.starting, self.warming, self.cleaning):
                    if worker_id in doing:
                        doing.remove(worker_id)
            case m.WakeAt(at):
                assert at == self.core._timers.next_at

    def pick(self, data: st.DataObject, among: list[int]) -> int:
        return data.draw(st.sampled_from(among))

    @rule(key=st.sampled_from(KEYS), patience=st.sampled_from([None, 0.5, 30.0]), probed=st.booleans())
    def acquire(self, key: WorkerKey, patience: float | None, probed: bool) -> None:
        self.next_lease += 1
        self.waiting[self.next_lease] = key
        deadline = None if patience is None else self.now + patience
        candidate = self.core.candidate(key) if probed else 0
        self.send(m.Acquire(self.next_lease, key, deadline, candidate))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def waiter_goes(self, data: st.DataObject) -> None:
        lease_id = self.pick(data, list(self.waiting))
        del self.waiting[lease_id]
        self.finished.add(lease_id)
        self.probes_of_gone = lease_id
        self.send_gone(lease_id)

    def send_gone(self, lease_id: int) -> None:
        self.send(m.WaiterGone(lease_id))

    @precondition(lambda self: self.starting)
    @rule(data=st.data(), fails=st.sampled_from([False, False, False, True]))
    def start_ends(self, data: st.DataObject, fails: bool) -> None:
        worker_id = self.pick(data, self.starting)
        self.starting.remove(worker_id)
        if fails:
            del self.slots[worker_id]
            self.send(m.StartFailed(worker_id, WorkerStartFailed("no such program")))
        else:
            self.send(m.Started(worker_id))

    @precondition(lambda self: self.warming)
    @rule(data=st.data())
    def warmed(self, data: st.DataObject) -> None:
        worker_id = self.pick(data, self.warming)
        self.warming.remove(worker_id)
        self.send(m.Warmed(worker_id))

    @precondition(lambda self: self.probes)
    @rule(data=st.data(), problem=PROBLEMS)
    def probed(self, data: st.DataObject, problem: StopReason | None) -> None:
        probe = data.draw(st.sampled_from(self.probes))
        self.probes.remove(probe)
        self.send(m.ProbeDone(*probe, problem))

    @precondition(lambda self: self.granted)
    @rule(data=st.data(), used=st.booleans(), problem=PROBLEMS, clean=st.booleans(), probed=st.booleans())
    def release(
        self, data: st.DataObject, used: bool, problem: StopReason | None, clean: bool, probed: bool
    ) -> None:
        lease_id = self.pick(data, list(self.granted))
        del self.granted[lease_id]
        self.finished.add(lease_id)
        self.send(m.Released(lease_id, used, problem, clean, clean and probed))

    @precondition(lambda self: self.cleaning)
    @rule(data=st.data(), problem=PROBLEMS)
    def cleaned(self, data: st.DataObject, problem: StopReason | None) -> None:
        worker_id = self.pick(data, self.cleaning)
        self.cleaning.remove(worker_id)
        self.send(m.Cleaned(worker_id, problem))

    @precondition(lambda self: bool(set(self.slots) - set(self.starting)))
    @rule(data=st.data())
    def exits(self, data: st.DataObject) -> None:
        worker_id = self.pick(data, sorted(set(self.slots) - set(self.starting)))
        self.send(m.Exited(worker_id, StopReason.CRASH, WorkerDied("it died")))

    @precondition(lambda self: self.stopping)
    @rule(data=st.data())
    def stopped(self, data: st.DataObject) -> None:
        worker_id = self.pick(data, self.stopping)
        self.stopping.remove(worker_id)
        del self.slots[worker_id]
        self.send(m.Stopped(worker_id))

    @precondition(lambda self: self.slots)
    @rule(data=st.data())
    def retire(self, data: st.DataObject) -> None:
        self.send(m.Retire(self.pick(data, list(self.slots)), StopReason.UNHEALTHY))

    @rule(seconds=st.sampled_from([0.01, 0.3, 2.0, 16.0, 70.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.send(m.Tick())
        for waiter in self.core._queue.waiters.values():
            assert waiter.deadline is None or waiter.deadline > self.now, "overdue, and not told"

    # ---- what must hold ----------------------------------------------------------------------------

    @invariant()
    def limits_are_kept(self) -> None:
        assert len(self.slots) <= (TOTAL.max_workers or 0)
        by_key = Counter(self.slots.values())
        for name, limits in POOLS.items():
            assert sum(n for key, n in by_key.items() if key.pool == name) <= limits.max_workers
        for key, n in by_key.items():
            assert n <= POOLS[key.pool].max_instances_per_key

    @invariant()
    def a_key_grows_by_one_start_at_a_time(self) -> None:
        for key, n in Counter(self.slots[worker_id] for worker_id in self.starting).items():
            assert n == 1, key

    @invariant()
    def no_idle_worker_beside_a_waiter_of_its_key(self) -> None:
        for key in self.core.registry.keys.values():
            assert not (key.open and key.waiting), (key.open, key.waiting)

    @invariant()
    def the_books_agree_with_the_workers(self) -> None:
        registry = self.core.registry
        assert set(registry.workers) == set(self.slots)
        assert registry.slots == len(self.slots)
        assert registry.stopping == len(self.stopping)
        probing = {lease_id for _, lease_id in self.probes}
        assert set(self.waiting) - probing <= set(self.core._queue.waiters)
        assert set(self.core._queue.waiters) <= set(self.waiting)
        for key in registry.keys.values():
            workers = list(key.workers.values())
            assert key.starting == sum(w.state is WorkerState.STARTING for w in workers)
            assert key.warming == sum(w.state is WorkerState.WARMING for w in workers)
            assert key.serving == sum(w.state in SERVING_STATES for w in workers)
            assert key.waiting == sum(w.queued for w in key.waiters)
            assert set(key.open) == {w.id for w in workers if w.can_take_lease}
        for pool in registry.pools.values():
            mine = [w for w in registry.workers.values() if w.key.pool is pool]
            assert pool.slots == len(mine)
            assert set(pool.idle) == {w.id for w in mine if w.state is WorkerState.IDLE}
            for state, n in pool.states.items():
                assert state is WorkerState.STOPPED or n == sum(w.state is state for w in mine)
        for worker in registry.workers.values():
            if worker.state in (WorkerState.LEASED, WorkerState.DOOMED, WorkerState.RESERVED):
                assert worker.leases
            elif worker.state is not WorkerState.STOPPING:
                assert not worker.leases

    def settle(self) -> None:
        """Let everybody do their part, well and at once, until nothing is under way."""
        for _ in range(1000):
            if self.starting:
                self.send(m.Started(self.starting.pop()))
            elif self.warming:
                self.send(m.Warmed(self.warming.pop()))
            elif self.probes:
                self.send(m.ProbeDone(*self.probes.pop()))
            elif self.granted:
                lease_id, _ = self.granted.popitem()
                self.finished.add(lease_id)
                self.send(m.Released(lease_id))
            elif self.cleaning:
                self.send(m.Cleaned(self.cleaning.pop()))
            elif self.stopping:
                worker_id = self.stopping.pop()
                del self.slots[worker_id]
                self.send(m.Stopped(worker_id))
            else:
                return
        raise AssertionError("it never settles")

    def teardown(self) -> None:
        for _ in range(12):
            self.settle()
            if not self.waiting:
                break
            self.now += 40.0
            self.send(m.Tick())
        assert not self.waiting, "a waiter was forgotten"
        self.drained = True
        self.send(m.Drain())
        self.settle()
        assert not self.slots
        assert not self.core.registry.workers
        assert self.core.registry.slots == self.core.registry.stopping == 0
        self.the_books_agree_with_the_workers()


TestCoreHistory = CoreHistory.TestCase
TestCoreHistory.settings = settings(
    max_examples=HISTORIES,
    stateful_step_count=40,
    deadline=None,
    phases=[Phase.generate, *([Phase.shrink] if SHRINK else [])],
    suppress_health_check=list(HealthCheck),
)
