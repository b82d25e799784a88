"""The pool's shell on the fake runtime, in virtual time: what its users see."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from tests.fakes.fake_runtime import FakeRuntime, Script
from tests.support.loop import eventually, run_virtual
from tests.support.tools import proto_tool, request, response
from wrapper.errors import (
    PoolDraining,
    PoolExhausted,
    PoolTimeout,
    RuntimeUnavailable,
    UnknownPool,
    WorkerDied,
    WorkerProtocolError,
    WorkerStartFailed,
)
from wrapper.events import Event, EventKind
from wrapper.pool.health import prove_pool
from wrapper.pool.housekeeping import CLEANING_ATTEMPTS
from wrapper.pool.lease import WorkerOutcome
from wrapper.pool.limits import PoolLimits, TotalLimits
from wrapper.pool.pool import WorkerPool
from wrapper.pool.settings import PoolSettings
from wrapper.pool.worker_key import WorkerKey
from wrapper.pool.worker_states import StopReason, WorkerState
from wrapper.runtime.base import CommandResult, CommandSpec, GcReport, Leftovers, WorkerSpec

KEY = WorkerKey("p", ("/bin/tool",), "/")
OTHER = WorkerKey("p", ("/bin/other",), "/")


class World:
    def __init__(self, pool: WorkerPool, runtime: FakeRuntime) -> None:
        self.pool = pool
        self.runtime = runtime
        self.events: list[Event] = []
        pool.events.subscribe(self.events.append)

    def happened(self, kind: EventKind) -> list[Event]:
        return [event for event in self.events if event.kind is kind]

    @property
    def stops(self) -> dict[StopReason, int]:
        return self.pool.pool_states()["p"].stops

    def count(self, state: WorkerState) -> int:
        return self.pool.pool_states()["p"].states[state]

    async def ask(self, text: bytes = b"hello", key: WorkerKey = KEY) -> bytes:
        lease = await self.pool.acquire(key)
        try:
            answer = await lease.execute(request(text))
        finally:
            lease.release()
        return answer.pb.output


@asynccontextmanager
async def world(
    script: Callable[[WorkerSpec], Script] | None = None,
    *,
    total: TotalLimits | None = None,
    minimum: WorkerKey | None = None,
    settings: PoolSettings | None = None,
    **limits: object,
) -> AsyncIterator[World]:
    runtime = FakeRuntime(script or (lambda _: Script(tool=proto_tool())))
    settings = settings or PoolSettings("p", PoolLimits(**limits))  # type: ignore[arg-type]
    keys = {"p": minimum} if minimum is not None else {}
    pool = WorkerPool({"p": settings}, {"p": runtime}, total=total, minimum_keys=keys)
    pool.start()
    there = World(pool, runtime)
    try:
        yield there
    finally:
        await pool.close()
        assert not runtime.alive
        assert runtime.closed
        assert not pool._workers
        assert not pool._waiters


def test_a_worker_serves_one_request_after_the_other() -> None:
    async def main() -> None:
        async with world() as w:
            assert [await w.ask(b"%d" % n) for n in range(5)] == [b"0", b"1", b"2", b"3", b"4"]
            assert len(w.runtime.workers) == 1

    run_virtual(main())


def test_acquire_does_not_suspend_when_a_worker_is_idle() -> None:
    async def main() -> None:
        async with world() as w:
            await w.ask()
            coroutine = w.pool.acquire(KEY)
            with pytest.raises(StopIteration) as done:
                coroutine.send(None)
            done.value.value.release()

    run_virtual(main())


def test_a_program_that_cannot_start_is_reported_at_once_with_its_stderr() -> None:
    async def main() -> None:
        async with world(lambda _: Script(stderr=b"no such jar")) as w:
            key = WorkerKey("p", ("missing",), "/")
            for _ in range(5):  # those after the first within the back-off, without another start
                with pytest.raises(WorkerStartFailed) as failed:
                    await w.pool.acquire(key)
                assert failed.value.stderr_tail == b"no such jar"
            assert w.pool.pool_states()["p"].counts["start"] == 1
            await asyncio.sleep(60)
            with pytest.raises(WorkerStartFailed):
                await w.pool.acquire(key)
            assert w.pool.pool_states()["p"].counts["start"] == 2

    run_virtual(main())


def test_a_cancelled_callers_start_serves_the_next_one() -> None:
    async def main() -> None:
        async with world(lambda _: Script(start_delay_s=5.0, tool=proto_tool())) as w:
            first = asyncio.create_task(w.pool.acquire(KEY))
            await asyncio.sleep(1)
            first.cancel()
            await asyncio.wait([first])
            assert await w.ask() == b"hello"
            assert len(w.runtime.workers) == 1

    run_virtual(main())


def test_waiters_are_served_in_turn_and_leave_after_their_deadline() -> None:
    async def main() -> None:
        async with world(max_instances_per_key=1) as w:
            lease = await w.pool.acquire(KEY)
            order: list[int] = []

            async def wait(number: int) -> None:
                mine = await w.pool.acquire(KEY)
                order.append(number)
                mine.release()

            tasks = [asyncio.create_task(wait(n)) for n in range(4)]
            with pytest.raises(PoolTimeout, match=r"no worker for 'tool' became free within 2\.0 s"):
                await w.pool.acquire(KEY, timeout_s=2.0)
            lease.release()
            await asyncio.gather(*tasks)
            assert order == [0, 1, 2, 3]

    run_virtual(main())


def test_a_full_queue_refuses_at_once() -> None:
    async def main() -> None:
        async with world(max_instances_per_key=1, max_waiting=1) as w:
            lease = await w.pool.acquire(KEY)
            waiting = asyncio.create_task(w.pool.acquire(KEY))
            await asyncio.sleep(0)
            with pytest.raises(PoolExhausted, match="max_waiting"):
                await w.pool.acquire(KEY)
            lease.release()
            (await waiting).release()

    run_virtual(main())


def test_an_unknown_pool_is_an_error_that_names_it() -> None:
    async def main() -> None:
        async with world() as w:
            with pytest.raises(UnknownPool, match="nowhere"):
                await w.pool.acquire(WorkerKey("nowhere", ("x",), "/"))

    run_virtual(main())


def test_idle_workers_stop_after_their_timeout_but_the_minimum_stays() -> None:
    async def main() -> None:
        async with world(minimum=KEY, min_warm_workers=2, idle_timeout_s=100.0, worker_ttl_s=None) as w:
            await asyncio.sleep(1)
            assert w.count(WorkerState.IDLE) == 2
            await w.ask(key=OTHER)
            assert w.count(WorkerState.IDLE) == 3
            await asyncio.sleep(250)
            assert w.count(WorkerState.IDLE) == 2
            assert w.stops == {StopReason.IDLE_TIMEOUT: 1}

    run_virtual(main())


def test_the_minimum_is_refilled_when_a_worker_dies() -> None:
    async def main() -> None:
        async with world(minimum=KEY, min_warm_workers=2) as w:
            await asyncio.sleep(1)
            w.runtime.alive[0].die()
            await asyncio.sleep(30)
            assert w.count(WorkerState.IDLE) == 2
            assert len(w.runtime.workers) == 3

    run_virtual(main())


def test_a_minimum_that_cannot_start_is_tried_again_ever_more_seldom() -> None:
    async def main() -> None:
        missing = WorkerKey("p", ("missing",), "/")
        async with world(minimum=missing, min_warm_workers=1) as w:
            await asyncio.sleep(300)
            assert 5 < w.pool.pool_states()["p"].counts["start"] < 25

    run_virtual(main())


def test_lifetime_ends_with_the_replacement_ready_first() -> None:
    async def main() -> None:
        def script(_: WorkerSpec) -> Script:
            return Script(start_delay_s=10.0, tool=proto_tool())

        async with world(script, minimum=KEY, min_warm_workers=1, worker_ttl_s=1000.0) as w:
            await asyncio.sleep(20)
            while w.stops.get(StopReason.LIFETIME, 0) == 0:
                await asyncio.sleep(1)
                assert w.count(WorkerState.IDLE) >= 1  # never a moment without a warm worker
            assert 910 <= asyncio.get_running_loop().time() <= 1030

    run_virtual(main())


def test_max_jobs_retires_a_worker() -> None:
    async def main() -> None:
        async with world(max_jobs_per_worker=3) as w:
            for _ in range(7):
                await w.ask()
            assert w.stops == {StopReason.MAX_JOBS: 2}

    run_virtual(main())


def test_at_the_pools_limit_the_least_recently_used_idle_worker_of_another_key_makes_room() -> None:
    async def main() -> None:
        async with world(max_workers=2) as w:
            third = WorkerKey("p", ("/bin/third",), "/")
            await w.ask(key=OTHER)
            await w.ask(key=third)
            await w.ask(key=KEY)
            assert w.stops == {StopReason.EVICTED: 1}
            assert {worker.spec.argv for worker in w.runtime.alive} == {third.argv, KEY.argv}

    run_virtual(main())


def test_a_busy_key_does_not_starve_the_other_in_a_full_pool() -> None:
    async def main() -> None:
        async with world(max_workers=1, start_instead_after_s=1.0) as w:
            served = 0
            stop = False

            async def hog() -> None:
                nonlocal served
                while not stop:
                    lease = await w.pool.acquire(KEY)
                    await asyncio.sleep(0.2)
                    served += 1
                    lease.release()

            hogs = [asyncio.create_task(hog()) for _ in range(3)]
            await asyncio.sleep(2)
            before = served
            assert await w.ask(key=OTHER) == b"hello"
            assert served - before < 15  # it had its turn after about its patience
            stop = True
            await asyncio.gather(*hogs)

    run_virtual(main())


def test_a_key_does_not_grow_while_waiting_is_cheaper_than_a_cold_worker() -> None:
    async def main() -> None:
        def script(_: WorkerSpec) -> Script:
            return Script(start_delay_s=0.9, tool=proto_tool(), answer_delay_s=0.01)

        async with world(script, start_instead_after_s=2.0) as w:
            for _ in range(3):
                await w.ask()
            await asyncio.gather(*(w.ask() for _ in range(30)))
            assert len(w.runtime.workers) == 1
            await asyncio.gather(*(w.ask() for _ in range(300)))  # three seconds of work: now it pays
            assert 2 <= len(w.runtime.workers) <= 4

    run_virtual(main())


def test_what_was_never_measured_waits_for_the_patience_of_the_first_waiter() -> None:
    async def main() -> None:
        async with world(start_instead_after_s=3.0) as w:
            lease = await w.pool.acquire(KEY)
            began = asyncio.get_running_loop().time()
            second = await w.pool.acquire(KEY)
            assert asyncio.get_running_loop().time() - began == pytest.approx(3.0)
            lease.release()
            second.release()

    run_virtual(main())


@pytest.mark.parametrize(
    ("answer", "error", "reason"),
    [
        (
            lambda _: b"hello world, this is not the protocol\n",
            WorkerProtocolError,
            StopReason.PROTOCOL_ERROR,
        ),
        (lambda _: b"\x7e and then nothing more", WorkerProtocolError, StopReason.PROTOCOL_ERROR),
        (lambda r: response(r, was_cancelled=True), WorkerProtocolError, StopReason.PROTOCOL_ERROR),
    ],
)
def test_a_tool_that_talks_nonsense_fails_its_request_with_a_diagnosis_and_is_stopped(
    answer: Callable[..., bytes], error: type[Exception], reason: StopReason
) -> None:
    async def main() -> None:
        async with world(lambda _: Script(tool=proto_tool(answer), stderr=b"its stderr")) as w:
            with pytest.raises(error) as raised:
                await w.ask()
            assert raised.value.stderr_tail == b"its stderr"  # type: ignore[attr-defined]
            assert w.stops == {reason: 1}

    run_virtual(main())


def test_a_worker_that_dies_in_mid_request_fails_it_with_its_status_and_stderr() -> None:
    async def main() -> None:
        def script(_: WorkerSpec) -> Script:
            return Script(tool=lambda _data: None, stderr=b"java.lang.OutOfMemoryError")

        async with world(script) as w:
            with pytest.raises(
                WorkerDied, match="died in the middle of a request: killed by SIGKILL"
            ) as died:
                await w.ask()
            assert b"OutOfMemoryError" in died.value.stderr_tail

    run_virtual(main())


def test_callers_are_refused_only_after_several_workers_died_before_their_first_answer() -> None:
    async def main() -> None:
        async with world(lambda _: Script(tool=lambda _data: None, stderr=b"bad jar")) as w:
            for _ in range(3):
                with pytest.raises(WorkerDied):
                    await w.ask()
            starts = w.pool.pool_states()["p"].counts["start"]
            with pytest.raises(WorkerDied, match="died") as refused:
                await w.ask()
            assert refused.value.stderr_tail == b"bad jar"
            assert w.pool.pool_states()["p"].counts["start"] == starts

    run_virtual(main())


def test_an_answer_that_comes_twice_reaches_nobody_else() -> None:
    async def main() -> None:
        async with world(lambda _: Script(tool=proto_tool(lambda r: response(r) * 2))) as w:
            assert [await w.ask(b"%d" % n) for n in range(4)] == [b"0", b"1", b"2", b"3"]
            assert w.stops == {StopReason.STRAY_OUTPUT: 3} or w.stops == {StopReason.STRAY_OUTPUT: 4}
            assert w.happened(EventKind.STRAY_OUTPUT)

    run_virtual(main())


def test_a_late_second_answer_of_a_tool_without_ids_is_not_the_next_ones() -> None:
    async def main() -> None:
        def answer(r: object) -> bytes:
            frame = response(request(*r.pb.arguments))  # type: ignore[attr-defined]
            loop = asyncio.get_running_loop()
            loop.call_later(0.001, w.runtime.alive[-1].say, frame)  # once more, a little later
            return frame

        async with world(lambda _: Script(tool=proto_tool(answer))) as w:
            assert [await w.ask(b"%d" % n) for n in range(4)] == [b"0", b"1", b"2", b"3"]
            await asyncio.sleep(1)

    run_virtual(main())


def test_output_of_an_idle_worker_retires_it_before_the_next_request() -> None:
    async def main() -> None:
        async with world() as w:
            await w.ask()
            w.runtime.workers[0].say(b"\x02\x10\x01")
            assert await w.ask(b"next") == b"next"
            assert len(w.runtime.workers) == 2

    run_virtual(main())


def test_leftovers_are_removed_and_told() -> None:
    async def main() -> None:
        leftovers = [Leftovers((4711,), ("junk",))]
        async with world(lambda _: Script(tool=proto_tool(), leftovers=leftovers)) as w:
            await w.ask()
            await eventually(lambda: w.happened(EventKind.LEFTOVERS_REMOVED))
            assert await w.ask() == b"hello"
            assert len(w.runtime.workers) == 1

    run_virtual(main())


def test_cleaning_is_tried_five_times_and_then_the_slot_is_freed_by_stopping_the_worker() -> None:
    async def main() -> None:
        def script(_: WorkerSpec) -> Script:
            errors: list[Exception] = [RuntimeUnavailable("busy")] * 99
            return Script(tool=proto_tool(), leftovers=[Leftovers((1,))] * 99, clean_errors=errors)

        async with world(script, max_workers=1) as w:
            await w.ask()
            assert await w.ask() == b"hello"  # the only slot is free again
            assert w.runtime.workers[0].calls.count("remove_leftovers") == CLEANING_ATTEMPTS
            assert w.stops[StopReason.UNCLEAN] >= 1
            assert len(w.happened(EventKind.CLEANING_FAILED)) >= CLEANING_ATTEMPTS

    run_virtual(main())


def test_post_job_cleanup_runs_after_the_answer_and_its_failure_is_tried_again() -> None:
    async def main() -> None:
        outcomes = [CommandResult(1, b"not yet"), CommandResult(0, b"")]

        def script(_: WorkerSpec) -> Script:
            return Script(tool=proto_tool(), run=lambda _c: outcomes.pop(0), run_delay_s=0.1)

        settings = PoolSettings("p", post_job_cleanup=(CommandSpec(("clean",), 5.0),))
        async with world(script, settings=settings) as w:
            lease = await w.pool.acquire(KEY)
            await lease.execute(request(b"x"))
            assert "run clean" not in w.runtime.workers[0].calls
            lease.release()
            assert w.count(WorkerState.COOLING) == 1
            again = await w.pool.acquire(KEY)
            assert w.runtime.workers[0].calls.count("run clean") == 2
            again.release()

    run_virtual(main())


def test_warm_up_commands_run_before_the_first_lease_and_a_failing_one_is_shown() -> None:
    async def main() -> None:
        settings = PoolSettings(
            "p", warmup=(CommandSpec(("warm",), 5.0),), verification=(CommandSpec(("verify",), 5.0),)
        )
        async with world(settings=settings) as w:
            await w.ask()
            assert [c for c in w.runtime.workers[0].calls if c.startswith("run")] == [
                "run warm",
                "run verify",
            ]

        def broken(_: WorkerSpec) -> Script:
            return Script(tool=proto_tool(), run=lambda _c: CommandResult(3, b"no compiler"))

        async with world(broken, settings=settings) as w:
            with pytest.raises(WorkerStartFailed, match="exit code 3") as failed:
                await w.ask()
            assert failed.value.stderr_tail == b"no compiler"

    run_virtual(main())


def test_garbage_is_collected_at_its_cadence_and_the_bytes_are_told() -> None:
    async def main() -> None:
        def script(_: WorkerSpec) -> Script:
            return Script(tool=proto_tool(), gc=lambda: GcReport(300, 100, 0.05))

        async with world(script, gc_job_frequency=3) as w:
            for _ in range(7):
                await w.ask()
            await eventually(lambda: len(w.happened(EventKind.GARBAGE_COLLECTED)) == 2)
            numbers = w.happened(EventKind.GARBAGE_COLLECTED)[0].numbers
            assert numbers["reclaimed_bytes"] == 200

    run_virtual(main())


def test_too_much_memory_after_a_collection_retires_the_worker() -> None:
    async def main() -> None:
        def script(_: WorkerSpec) -> Script:
            return Script(tool=proto_tool(), memory_bytes=lambda: 900, gc=lambda: GcReport(950, 900, 0.01))

        async with world(script, max_memory_bytes=800) as w:
            await w.ask()
            await eventually(lambda: w.stops == {StopReason.MEMORY: 1})
            assert "collect_garbage" in w.runtime.workers[0].calls

    run_virtual(main())


def test_memory_that_keeps_growing_after_each_collection_is_a_leak() -> None:
    async def main() -> None:
        sizes = iter(range(100, 10_000, 20))

        def script(_: WorkerSpec) -> Script:
            return Script(tool=proto_tool(), gc=lambda: GcReport(0, next(sizes), 0.01))

        async with world(script, gc_job_frequency=1, max_instances_per_key=1) as w:
            for _ in range(8):
                await w.ask()
            assert w.stops == {StopReason.LEAK: 1}

    run_virtual(main())


def test_a_changed_tool_retires_its_workers_on_lease(tmp_path: object) -> None:
    async def main() -> None:
        tool = tmp_path / "tool.jar"  # type: ignore[operator]
        tool.write_bytes(b"one")
        key = WorkerKey("p", ("/bin/java", "-jar", "tool.jar"), str(tmp_path))
        async with world() as w:
            await w.ask(key=key)
            await w.ask(key=key)
            assert len(w.runtime.workers) == 1
            tool.write_bytes(b"two!")
            await w.ask(key=key)
            assert w.stops == {StopReason.TOOL_CHANGED: 1}

    run_virtual(main())


def test_different_tools_under_one_persistent_worker_key_never_share_a_worker() -> None:
    async def main() -> None:
        async with world() as w:
            for argv in (("/bin/a",), ("/bin/b",), ("/bin/a", "--flag")):
                await w.ask(key=WorkerKey("p", argv, "/", persistent_worker_key="everything"))
            assert len(w.runtime.workers) == 3

    run_virtual(main())


def test_a_lease_dropped_without_release_stops_its_worker() -> None:
    async def main() -> None:
        async with world() as w:
            lease = await w.pool.acquire(KEY)
            await lease.execute(request(b"x"))
            del lease
            gc.collect()
            await eventually(lambda: w.stops == {StopReason.ABANDONED: 1})
            assert await w.ask() == b"hello"

    run_virtual(main())


def test_a_failed_outcome_stops_the_worker_and_an_exit_code_does_not() -> None:
    async def main() -> None:
        async with world(lambda _: Script(tool=proto_tool(lambda r: response(r, exit_code=1)))) as w:
            await w.ask()
            await w.ask()
            assert len(w.runtime.workers) == 1
            lease = await w.pool.acquire(KEY)
            lease.release(WorkerOutcome.FAILED)
            await eventually(lambda: w.stops == {StopReason.FAILED: 1})

    run_virtual(main())


def test_a_multiplex_worker_has_several_leases_and_is_cleaned_when_it_is_due() -> None:
    async def main() -> None:
        key = WorkerKey("p", ("/bin/tool",), "/", multiplex=True)

        def script(_: WorkerSpec) -> Script:
            return Script(tool=proto_tool(), answer_delay_s=0.5, gc=lambda: GcReport(2, 1, 0.1))

        async with world(script, max_requests_per_worker_at_once=4, max_workers=1, gc_job_frequency=10) as w:
            answers = await asyncio.gather(*(w.ask(b"%d" % n, key) for n in range(40)))
            assert answers == [b"%d" % n for n in range(40)]
            assert len(w.runtime.workers) == 1
            await eventually(lambda: len(w.happened(EventKind.GARBAGE_COLLECTED)) >= 3)

    run_virtual(main())


def test_drain_refuses_the_waiting_and_lets_leases_end() -> None:
    async def main() -> None:
        async with world(lambda _: Script(tool=proto_tool(), answer_delay_s=5.0), max_workers=1) as w:
            running = asyncio.create_task(w.ask())
            await asyncio.sleep(1)
            waiting = asyncio.create_task(w.ask())
            await asyncio.sleep(1)
            closing = asyncio.create_task(w.pool.close(drain_timeout_s=60.0))
            with pytest.raises(PoolDraining):
                await waiting
            assert await running == b"hello"
            await closing
            with pytest.raises(PoolDraining):
                await w.ask()

    run_virtual(main())


def test_the_health_check_proves_start_serve_clean_and_stop() -> None:
    async def main() -> None:
        async with world() as w:
            await prove_pool(w.pool, KEY)
            assert w.stops == {StopReason.DRAINED: 1}
            assert w.happened(EventKind.HEALTH_CHECKED)
        async with world(lambda _: Script(tool=lambda _d: b"")) as w:  # never answers
            with pytest.raises(PoolTimeout, match="did not serve within 60 s"):
                await prove_pool(w.pool, KEY)
        async with world(lambda _: Script(start_delay_s=1000)) as w:
            with pytest.raises(PoolTimeout):
                await prove_pool(w.pool, KEY)

    run_virtual(main())


def test_a_total_limit_holds_over_pools() -> None:
    async def main() -> None:
        runtime = FakeRuntime(lambda _: Script(tool=proto_tool()))
        pools = {name: PoolSettings(name) for name in ("a", "b")}
        pool = WorkerPool(pools, dict.fromkeys(pools, runtime), total=TotalLimits(max_workers=1))
        for name in ("a", "b", "a"):
            lease = await pool.acquire(WorkerKey(name, ("/bin/tool",), "/"))
            assert len(runtime.alive) == 1
            lease.release()
        await pool.close()
        assert not runtime.alive

    run_virtual(main())
