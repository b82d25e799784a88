"""WarmWorkerPoolManager on the fake runtime, in virtual time: start, health check, cleaning, close."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest

from tests.fakes.fake_runtime import Script
from tests.support.loop import run_virtual
from tests.support.manager_world import World, make, pool, world
from tests.support.tools import proto_tool
from wrapper.errors import PoolDraining, PoolTimeout, RuntimeUnavailable, WorkerDied, WorkerStartFailed
from wrapper.events import Event, EventKind
from wrapper.pool.housekeeping import CLEANING_ATTEMPTS, CLEANING_BACKOFF_S
from wrapper.runtime.base import CommandResult, Leftovers, WorkerSpec

JAVA = pool("java", language="jvm", worker_command=["/bin/java"], keys=["java-*"])
TOOLS = pool("tools", worker_command=[], keys=["*"])


# ---- the health check ------------------------------------------------------------------------------


def test_with_check_health_nobody_gets_a_lease_before_the_pool_has_proven_itself() -> None:
    async def main() -> None:
        async with world(lambda _: Script(tool=proto_tool(), start_delay_s=2.0), check_health=True) as w:
            assert [event.kind for event in w.events][-1] is EventKind.HEALTH_CHECKED
            assert w.manager.metrics().recycled_workers == 1  # the worker of the proof
            assert not w.runtime.alive
        w = make(check_health=True)
        assert await w.ask() == b"hello"  # started by the lease: the proof came first all the same
        assert [worker.is_stopped for worker in w.runtime.workers] == [True, False]
        await w.manager.close()

    run_virtual(main())


@pytest.mark.parametrize(
    ("script", "error", "words"),
    [
        (Script(start_delay_s=1e3), PoolTimeout, "became free within 60|did not start within 60 s"),
        (Script(tool=lambda _: b""), PoolTimeout, "did not serve within 60 s"),
        (
            Script(tool=proto_tool(), leftovers=[Leftovers((1,))], clean_delay_s=1e3),
            PoolTimeout,
            "be cleaned",
        ),
        (Script(start_error=WorkerStartFailed("no such jar")), WorkerStartFailed, "no such jar"),
        (Script(tool=lambda _: None, stderr=b"OutOfMemoryError"), WorkerDied, "in the middle of a request"),
    ],
    ids=["start", "serve", "clean", "broken", "dies"],
)
def test_a_pool_that_cannot_prove_itself_within_60_seconds_fails_the_start_with_the_step(
    script: Script, error: type[Exception], words: str
) -> None:
    async def main() -> None:
        w = make(lambda _: script, check_health=True)
        began = asyncio.get_running_loop().time()
        with pytest.raises(error, match=words):
            await w.manager.start()
        assert asyncio.get_running_loop().time() - began < 75  # and then it was stopped
        assert not w.runtime.alive
        for _ in range(2):
            with pytest.raises(error, match=words):
                await w.manager.acquire("p")
        await w.manager.close()

    run_virtual(main())


def test_a_worker_that_cannot_be_cleaned_fails_the_proof_with_what_the_cleaning_said() -> None:
    async def main() -> None:
        def fails(_: WorkerSpec) -> Script:
            return Script(tool=proto_tool(), run=lambda _: CommandResult(3, b"rm: cannot remove"))

        cleanup = {"post_job_cleanup": [{"argv": ["rm", "cache"]}]}
        w = make(fails, check_health=True, warmup=cleanup)
        with pytest.raises(WorkerDied, match=r"could not be cleaned.*exit code 3: rm: cannot remove"):
            await w.manager.start()
        assert [event.kind for event in w.events].count(EventKind.CLEANING_FAILED) == CLEANING_ATTEMPTS
        await w.manager.close()

    run_virtual(main())


def test_a_worker_that_serves_once_only_is_healthy_although_it_is_never_cleaned() -> None:
    async def main() -> None:
        async with world(check_health=True, lifecycle={"max_jobs_per_worker": 1}) as w:
            assert await w.ask() == b"hello"

    run_virtual(main())


def test_a_pool_without_a_worker_command_is_left_out_of_the_proofs() -> None:
    async def main() -> None:
        async with world(pools=[JAVA, {**TOOLS, "check_health": True}]) as w:
            assert await w.ask("java") == b"hello"

    run_virtual(main())


def test_cleaning_is_tried_five_times_with_quadratic_back_off_and_then_the_slot_is_freed() -> None:
    async def main() -> None:
        tried_at: list[float] = []

        def stubborn(_: WorkerSpec) -> Script:
            return Script(
                tool=proto_tool(),
                leftovers=[Leftovers((1,))] * 99,
                clean_errors=[RuntimeUnavailable("device busy")] * 99,
            )

        async with world(stubborn, max_workers=1) as w:

            def note(event: Event) -> None:
                if event.kind is EventKind.CLEANING_FAILED and event.worker_id == 1:
                    tried_at.append(asyncio.get_running_loop().time())

            w.manager.events.subscribe(note)
            await w.ask()
            assert await w.ask() == b"hello"  # by another worker, in the only slot
            gaps = [later - earlier for earlier, later in pairwise(tried_at)]
            assert gaps == pytest.approx([CLEANING_BACKOFF_S * n * n for n in (1, 2, 3, 4)])
            assert w.stop_reasons()[0] == "could not be cleaned"

    run_virtual(main())


# ---- start and close -------------------------------------------------------------------------------


def test_a_manager_that_was_closed_takes_nobody_any_more() -> None:
    async def main() -> None:
        for started in (True, False):
            w = make()
            if started:
                await w.ask()
            await w.manager.close()
            await w.manager.close()
            with pytest.raises(PoolDraining):
                await w.manager.acquire("p")
            assert not w.runtime.alive

    run_virtual(main())


def test_closing_during_the_proof_ends_it_at_once_and_tells_those_who_wait() -> None:
    async def main() -> None:
        w = make(lambda _: Script(tool=lambda _: b""), check_health=True)
        waiting = asyncio.create_task(w.ask())
        await asyncio.sleep(5)
        await w.manager.close()
        assert asyncio.get_running_loop().time() < 11  # it did not wait for the proof's 60 s
        with pytest.raises(PoolDraining, match="closed while it started"):
            await waiting
        assert not w.runtime.alive

    run_virtual(main())


def test_closing_lets_a_running_request_end() -> None:
    async def main() -> None:
        async with world(lambda _: Script(tool=proto_tool(), answer_delay_s=20.0)) as w:
            running = asyncio.create_task(w.ask())
            await asyncio.sleep(1)
        assert await running == b"hello"

    run_virtual(main())


def test_entering_and_leaving_cancelled_at_any_turn_leaves_no_worker() -> None:
    def slow(_: WorkerSpec) -> Script:
        return Script(tool=proto_tool(), start_delay_s=0.01, answer_delay_s=0.01, stop_delay_s=0.01)

    async def main() -> None:
        for turns in range(200):
            w = make(slow, check_health=True)

            async def use(w: World = w) -> None:
                async with w.manager:
                    await w.ask()

            task = asyncio.create_task(use())
            for turn in range(turns):
                await asyncio.sleep(0.002 if turn % 4 == 3 else 0)
            late = task.done()
            task.cancel()
            await asyncio.wait([task])
            assert not w.runtime.alive
            assert not w.runtime.starting
            if late:
                assert turns > 5
                return
        raise AssertionError("never through")

    run_virtual(main())
