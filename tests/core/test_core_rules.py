"""The rules of the pool's core one by one, in examples. Their interplay: test_core_histories.py."""

from __future__ import annotations

from tests.support.core_world import Times, World, tool
from wrapper.errors import (
    PoolDraining,
    PoolExhausted,
    PoolTimeout,
    UnknownPool,
    WorkerDied,
    WorkerStartFailed,
)
from wrapper.pool import core_messages as m
from wrapper.pool.core import Core
from wrapper.pool.limits import PoolLimits
from wrapper.pool.warmup_queue import Urgency
from wrapper.pool.worker_key import WorkerKey
from wrapper.pool.worker_states import StopReason, WorkerState

BY_HAND = Times(request_s=None)
"""Leases last until the test ends them."""


# ---- who gets which worker -------------------------------------------------------------------------


def test_the_worker_that_was_used_last_is_used_next() -> None:
    world = World(BY_HAND, start_instead_after_s=0.0)
    leases = [world.ask() for _ in range(3)]
    world.wait()
    second = world.granted[leases[1]]
    for lease in (leases[0], leases[2], leases[1]):
        world.release(lease)
        world.wait()
    lease = world.ask()
    world.wait()
    assert world.granted[lease] == second


def test_waiters_of_a_key_are_served_in_the_order_of_their_coming() -> None:
    world = World(Times(first_request_s=1.0, request_s=1.0), max_instances_per_key=1)
    leases = [world.ask() for _ in range(5)]
    world.wait(10)
    assert world.order == leases


def test_a_worker_that_fails_its_probe_is_stopped_and_its_waiter_stays_the_first() -> None:
    world = World(BY_HAND, max_instances_per_key=1)
    used = world.ask()
    world.wait()
    (worker,) = world.workers
    world.release(used)
    world.wait()
    world.problems[worker.id] = StopReason.TOOL_CHANGED
    leases = [world.ask(), world.ask()]
    world.wait()
    assert world.stopped == [StopReason.TOOL_CHANGED]
    assert leases[0] in world.granted
    assert world.granted[leases[0]] != worker.id


def test_a_start_serves_the_next_caller_if_the_one_who_caused_it_has_gone() -> None:
    world = World(Times(start_s=5.0, request_s=None))
    first = world.ask()
    world.tell(m.WaiterGone(first))
    world.wait(1)
    second = world.ask()
    world.wait(10)
    assert list(world.granted) == [second]
    assert len(world.started) == 1


def test_an_unknown_pool_a_full_queue_and_a_passed_deadline_are_refusals() -> None:
    world = World(BY_HAND, max_instances_per_key=1, max_waiting=1, start_instead_after_s=60.0)
    world.ask()
    world.wait()
    unknown = world.ask(tool(pool="nowhere"))
    late = world.ask(within_s=2.0)
    surplus = world.ask()
    world.wait(1.9)
    assert {lease: type(error) for lease, error in world.refused.items()} == {
        unknown: UnknownPool,
        surplus: PoolExhausted,
    }
    world.wait(0.1)  # not a moment later, however patient the pool is
    assert isinstance(world.refused[late], PoolTimeout)


# ---- growth: numbers measured on two cores -----------------------------------------------------------

JVM = Times(start_s=0.01, first_request_s=0.6, request_s=0.06)
SLOW_COMPILER = Times(start_s=0.01, first_request_s=30.0, request_s=30.0)


def keep_busy(world: World, in_flight: int, requests: int) -> None:
    """So many callers, each of which asks again as soon as it has its answer."""
    left = requests - in_flight

    def again(_lease: int) -> None:
        nonlocal left
        if left > 0:
            left -= 1
            world.ask()

    world.after = again
    for _ in range(in_flight):
        world.ask()


def test_eight_quick_compiles_at_a_time_stay_with_one_or_two_jvms() -> None:
    world = World(JVM)
    keep_busy(world, in_flight=8, requests=400)
    world.wait(120)
    assert len(world.order) == 400
    assert len(world.started) <= 2


def test_a_warm_jvm_takes_a_burst_of_eight_alone() -> None:
    """The last of them waits 0.4 s, and a cold JVM would cost 0.55 s more than a warm one."""
    world = World(JVM)
    for _ in range(3):
        world.ask()
        world.wait(5)
    keep_busy(world, in_flight=8, requests=8)
    world.wait(5)
    assert len(world.started) == 1


def test_a_burst_that_one_jvm_would_need_seconds_for_starts_more_at_once() -> None:
    world = World(JVM)
    for _ in range(3):
        world.ask()
        world.wait(5)
    keep_busy(world, in_flight=40, requests=40)
    assert len(world.started) == 2  # without waiting for anybody's patience, and one at a time
    world.wait(5)
    assert 2 <= len(world.started) <= 4


def test_slow_compiles_grow_when_the_first_waiter_has_waited_long_enough() -> None:
    world = World(SLOW_COMPILER, start_instead_after_s=1.0)
    keep_busy(world, in_flight=8, requests=8)
    start_s = SLOW_COMPILER.start_s or 0.0
    world.wait(start_s + 0.99)
    assert len(world.started) == 1
    world.wait(0.02)
    assert len(world.started) == 2
    world.wait(7 * (start_s + 1.1))
    assert len(world.started) == 8  # one start after the other, each a patience after the last
    assert len(world.granted) == 8


def test_jvms_that_take_longer_to_warm_up_than_anybody_waits_do_not_all_start_at_once() -> None:
    """Nearly all of a JVM's cost is its first request, and several that warm up slow each other down."""
    world = World(Times(start_s=0.01, first_request_s=1.5, request_s=0.06))
    keep_busy(world, in_flight=8, requests=400)
    world.wait(120)
    assert len(world.started) <= 3


def test_slow_compiles_that_were_measured_grow_without_that_wait() -> None:
    world = World(SLOW_COMPILER, max_instances_per_key=3)
    for _ in range(2):
        world.ask()
        world.wait(40)
    keep_busy(world, in_flight=2, requests=2)
    world.wait(0.5)
    assert len(world.granted) == 2


def test_a_key_never_starts_two_workers_at_a_time_nor_more_than_its_limit() -> None:
    world = World(Times(start_s=None, request_s=None), max_instances_per_key=2, start_instead_after_s=0.0)
    for _ in range(10):
        world.ask()
    world.wait(100)
    assert len(world.started) == 1
    world.tell(m.Started(1))
    world.wait()
    assert len(world.started) == 2
    world.tell(m.Started(2))
    world.wait(100)
    assert len(world.started) == 2


# ---- a full pool -----------------------------------------------------------------------------------


def test_at_the_limit_the_least_recently_used_idle_worker_of_another_key_makes_room() -> None:
    world = World(max_workers=3)
    for name in ("a", "b", "c", "a"):
        world.ask(tool(name))
        world.wait(1)
    world.ask(tool("d"))
    world.wait(1)
    assert world.stopped == [StopReason.EVICTED]
    assert sorted(key.argv[0] for key in world.keys_alive()) == ["a", "c", "d"]


def test_a_slot_is_free_only_when_nothing_is_left_of_its_worker() -> None:
    world = World(Times(stop_s=None), max_workers=1)
    world.ask(tool("a"))
    world.wait(1)
    world.ask(tool("b"))
    world.wait(100)
    assert world.stopped == [StopReason.EVICTED]
    assert len(world.started) == 1
    world.tell(m.Stopped(1))
    world.wait()
    assert len(world.started) == 2


def test_idle_workers_of_other_pools_make_room_under_a_total_limit() -> None:
    world = World(pools={"p": PoolLimits(), "q": PoolLimits()}, total=1)
    for pool in ("p", "q", "p"):
        lease = world.ask(tool(pool=pool))
        world.wait(1)
        assert lease in world.order
        assert len(world.workers) == 1


def test_a_busy_key_yields_to_one_that_has_waited_longer_than_a_cold_worker_costs() -> None:
    world = World(Times(first_request_s=0.1, request_s=0.1), max_workers=1, start_instead_after_s=1.0)
    keep_busy(world, in_flight=3, requests=200)
    world.wait(2)
    other = world.ask(tool("other"))
    served_before = len(world.order)
    world.wait(0.9)
    assert other not in world.order  # two keys in turns would start a worker for every request
    world.wait(1.0)
    assert other in world.order
    assert world.order.index(other) - served_before < 15


# ---- the life of a worker --------------------------------------------------------------------------


def test_idle_workers_end_after_their_timeout_and_the_minimum_stays() -> None:
    world = World(minimum=tool("own"), min_warm_workers=2, idle_timeout_s=300.0, worker_ttl_s=None)
    world.wait(1)
    assert [key.argv[0] for key in world.keys_alive()] == ["own", "own"]
    world.ask()
    world.wait(298)
    assert len(world.workers) == 3
    world.wait(600)
    assert [key.argv[0] for key in world.keys_alive()] == ["own", "own"]
    assert world.stopped == [StopReason.IDLE_TIMEOUT]


def test_a_lifetime_ends_when_the_replacement_is_ready_and_not_before() -> None:
    world = World(Times(start_s=20.0), minimum=tool(), min_warm_workers=1, worker_ttl_s=1000.0)
    world.wait(955)  # with the jitter in the middle: it lives 950 s
    assert [worker.state for worker in world.workers] == [WorkerState.IDLE, WorkerState.STARTING]
    world.wait(20)
    assert [worker.id for worker in world.workers] == [2]
    assert world.stopped == [StopReason.LIFETIME]


def test_a_replacement_that_cannot_start_leaves_the_old_worker_alone_for_a_while() -> None:
    world = World(Times(start_s=None, request_s=None), minimum=tool(), min_warm_workers=1, worker_ttl_s=100.0)
    world.tell(m.Started(1))
    world.wait(96)
    assert len(world.started) == 2
    world.tell(m.StartFailed(2, WorkerStartFailed("no memory")))
    world.wait(30)
    assert [worker.state for worker in world.workers] == [WorkerState.IDLE]
    world.wait(60)
    assert len(world.started) == 3


def test_max_jobs_and_garbage_collection_come_after_so_many_requests() -> None:
    world = World(max_jobs_per_worker=10, gc_job_frequency=4)
    for _ in range(20):
        world.ask()
        world.wait(1)
    assert world.stopped == [StopReason.MAX_JOBS] * 2
    assert world.cleaned_with_gc == 4  # after the 4th and the 8th of each


def test_a_lease_without_a_request_costs_no_cleaning_and_is_no_job() -> None:
    world = World(BY_HAND, max_jobs_per_worker=1)
    for _ in range(3):
        lease = world.ask()
        world.wait()
        world.release(lease, used=False)
        world.wait()
    assert len(world.started) == 1
    assert world.pool().counts["clean"] == 0


def test_a_worker_with_a_problem_stops_when_its_last_lease_ends() -> None:
    world = World(BY_HAND, max_requests_per_worker_at_once=2, start_instead_after_s=60.0)
    leases = [world.ask(), world.ask()]
    world.wait()
    world.release(leases[0], StopReason.PROTOCOL_ERROR)
    assert world.workers[0].state is WorkerState.DOOMED
    world.ask()
    world.wait()
    assert world.stopped == []
    world.release(leases[1])
    assert world.stopped == [StopReason.PROTOCOL_ERROR]


def test_a_multiplex_worker_that_is_due_takes_no_lease_until_it_is_empty_and_clean() -> None:
    world = World(BY_HAND, max_requests_per_worker_at_once=2, gc_job_frequency=3, max_instances_per_key=1)
    leases = [world.ask() for _ in range(6)]
    world.wait()
    assert list(world.granted) == leases[:2]
    world.release(leases[0])
    world.wait()
    world.release(leases[1])
    world.wait()
    assert list(world.granted) == leases[2:4]
    world.release(leases[2])  # the third job: a collection is due
    world.wait()
    assert list(world.granted) == [leases[3]]
    world.release(leases[3])
    assert world.workers[0].state is WorkerState.COOLING
    world.wait()
    assert world.cleaned_with_gc == 1
    assert list(world.granted) == leases[4:]


# ---- failures and the end --------------------------------------------------------------------------


def test_a_program_that_cannot_start_refuses_all_who_wait_and_those_who_come_soon() -> None:
    world = World(Times(start_s=None))
    first, second = world.ask(), world.ask()
    world.tell(m.StartFailed(1, WorkerStartFailed("no such program")))
    third = world.ask()
    assert set(world.refused) == {first, second, third}
    world.wait(10)
    world.ask()
    assert len(world.started) == 2  # now it is worth another try


def test_a_start_that_fails_beside_a_working_worker_refuses_nobody() -> None:
    world = World(Times(start_s=None, request_s=None), start_instead_after_s=0.0)
    first = world.ask()
    world.tell(m.Started(1))
    world.wait()
    second = world.ask()
    world.tell(m.StartFailed(2, WorkerStartFailed("no memory")))
    assert world.refused == {}
    world.release(first)
    world.wait()
    assert second in world.granted


def test_who_waits_for_a_busy_worker_gets_another_start_after_one_that_failed() -> None:
    world = World(Times(start_s=None, request_s=None), start_instead_after_s=1.0)
    world.ask()
    world.tell(m.Started(1))
    world.wait()
    world.ask(within_s=300.0)
    world.wait(1)
    world.tell(m.StartFailed(2, WorkerStartFailed("no memory, just now")))
    world.wait(60)
    assert len(world.started) == 3


def test_the_death_of_an_idle_worker_brings_back_the_minimum() -> None:
    world = World(minimum=tool(), min_warm_workers=2)
    world.wait(1)
    world.tell(m.Exited(1, StopReason.CRASH, WorkerDied("killed")))
    world.wait(10)
    assert sorted(worker.id for worker in world.workers) == [2, 3]


def test_drain_refuses_who_waits_and_comes_stops_the_idle_and_lets_leases_end() -> None:
    world = World(BY_HAND, max_instances_per_key=1)
    running = world.ask()
    world.ask(tool("idle"))
    world.wait()
    world.release(2)
    world.wait()
    waiting = world.ask()
    world.tell(m.Drain())
    coming = world.ask()
    assert {type(world.refused[lease]) for lease in (waiting, coming)} == {PoolDraining}
    world.wait(100)
    assert [worker.state for worker in world.workers] == [WorkerState.DOOMED]
    world.release(running)
    world.wait()
    assert world.workers == []
    assert world.stopped == [StopReason.DRAINED] * 2


def test_a_late_answer_to_a_probe_of_a_stopped_worker_loses_nobody() -> None:
    """Found by the histories: the waiter was by then being probed on another worker."""
    core = Core({"p": PoolLimits()})
    key = WorkerKey("p", ("tool",), "/")
    core.handle(m.Acquire(1, key), 0.0)
    for event in (m.Started(1), m.Warmed(1)):
        commands = core.handle(event, 0.1)
    assert m.Probe(1, 1) in commands
    assert m.Start(2, key) in core.handle(m.Retire(1, StopReason.UNHEALTHY), 0.2)
    for event in (m.Started(2), m.Warmed(2)):
        commands = core.handle(event, 0.3)
    assert m.Probe(2, 1) in commands
    assert not core.handle(m.ProbeDone(1, 1), 0.4)
    assert m.Grant(1, 2) in core.handle(m.ProbeDone(2, 1), 0.5)


def test_a_request_that_waits_through_a_long_warm_up_starts_no_second_worker() -> None:
    world = World(Times(start_s=None), max_instances_per_key=5)
    world.ask()
    world.wait(10.0)
    world.core.handle(m.Started(1), world.now)  # and now it is warmed up, for a long time
    world.wait(10.0)
    assert len(world.started) == 1
    world.ask()  # but for one request more, one worker more may come
    world.wait(10.0)
    assert len(world.started) == 2


def test_a_multiplex_worker_in_its_warm_up_is_on_its_way_for_as_many_requests_as_it_takes() -> None:
    world = World(Times(start_s=None), max_instances_per_key=5, max_requests_per_worker_at_once=3)
    world.ask()
    world.core.handle(m.Started(1), world.now)
    world.ask()
    world.ask()
    world.wait(10.0)
    assert len(world.started) == 1
    world.ask()
    world.wait(10.0)
    assert len(world.started) == 2


def failing_warm_up(world: World, worker_id: int) -> list[m.Command]:
    world.core.handle(m.Started(worker_id), world.now)
    commands = world.core.handle(
        m.Exited(worker_id, StopReason.WARMUP_FAILED, WorkerStartFailed("no compiler")), world.now
    )
    world.core.handle(m.Stopped(worker_id), world.now)
    return commands


def test_each_failed_warm_up_doubles_the_pause_before_the_next_start() -> None:
    world = World(Times(start_s=None), minimum=tool(), min_warm_workers=1)
    for worker_id in range(1, 12):
        failing_warm_up(world, worker_id)
        pause_s = min(30.0, 0.2 * 2 ** (worker_id - 1))
        world.wait(pause_s * 0.99)
        world.tell(m.Tick())
        assert len(world.started) == worker_id
        world.wait(pause_s * 0.02)
        world.tell(m.Tick())
        assert len(world.started) == worker_id + 1


def test_health_is_told_when_it_changes_and_by_key() -> None:
    world = World(Times(start_s=None), unhealthy_after=2)
    for lease, key in ((1, tool("a")), (2, tool("b"))):
        assert world.ask(key) == lease

    def told(commands: list[m.Command]) -> list[tuple[int, bool]]:
        return [(c.failures, c.error is None) for c in commands if isinstance(c, m.TellHealth)]

    assert told(failing_warm_up(world, 1)) == []
    assert told(failing_warm_up(world, 2)) == []
    assert world.pool().is_healthy  # one failure of each
    world.wait(60.0)
    world.ask(tool("a"))
    assert told(failing_warm_up(world, 3)) == [(2, False)]
    assert not world.pool().is_healthy
    world.wait(60.0)
    world.ask(tool("a"))
    assert told(failing_warm_up(world, 4)) == []  # it was said already
    world.wait(60.0)
    world.ask(tool("a"))
    world.core.handle(m.Started(5), world.now)
    assert told(world.core.handle(m.Warmed(5), world.now)) == [(3, True)]
    assert world.pool().is_healthy


def test_what_a_start_is_wanted_for() -> None:
    world = World(Times(start_s=None), minimum=tool("own"), min_warm_workers=1, worker_ttl_s=100.0)
    assert world.core.urgency(1) is Urgency.MINIMUM
    lease = world.ask(tool("other"))
    assert world.core.urgency(2) is Urgency.WAITED_FOR
    world.tell(m.WaiterGone(lease))
    assert world.core.urgency(2) is Urgency.SPARE
    world.ask(tool("own"))
    assert world.core.urgency(1) is Urgency.WAITED_FOR
    assert world.core.urgency(99) is Urgency.SPARE


def test_the_replacement_of_a_worker_that_still_serves_is_a_spare() -> None:
    world = World(Times(start_s=None), minimum=tool(), min_warm_workers=1, worker_ttl_s=100.0)
    for event in (m.Started(1), m.Warmed(1)):
        world.core.handle(event, world.now)
    world.wait(96.0)
    world.tell(m.Tick())
    assert len(world.started) == 2
    assert world.core.urgency(2) is Urgency.SPARE
