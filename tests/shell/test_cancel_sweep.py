"""Every public coroutine, cancelled after k turns of the loop, for every k: nothing is lost.

Whatever the turn, afterwards the pool serves the next caller, its books are in order, and closing it
leaves no worker, descriptor or task (the fixtures and `run_virtual` check those).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from tests.fakes.fake_runtime import FakeRuntime, Script
from tests.support.loop import run_virtual
from tests.support.tools import proto_tool, request
from wrapper.action_runner import Action, ToolAbilities
from wrapper.config import parse_config
from wrapper.errors import RequestCancelled, WrapperError
from wrapper.manager import PoolCreateOptions, WarmWorkerPoolManager
from wrapper.pool.health import prove_pool
from wrapper.pool.limits import PoolLimits
from wrapper.pool.pool import WorkerPool
from wrapper.pool.settings import PoolSettings
from wrapper.pool.worker_key import WorkerKey
from wrapper.runtime.base import CommandSpec, GcReport, Leftovers, WorkerSpec
from wrapper.worker_protocol.messages import WorkResponse

KEY = WorkerKey("p", ("/bin/tool",), "/")
MAX_TURNS = 200


def slow(_: WorkerSpec) -> Script:
    """Every step takes some turns of the loop, so that a cancel can fall into each."""
    return Script(
        start_delay_s=0.01,
        tool=proto_tool(),
        answer_delay_s=0.01,
        leftovers=[Leftovers((1,))],
        clean_delay_s=0.01,
        run_delay_s=0.01,
        gc=lambda: GcReport(2, 1, 0.01),
        gc_delay_s=0.01,
        stop_delay_s=0.01,
    )


def make() -> tuple[WorkerPool, FakeRuntime]:
    runtime = FakeRuntime(slow)
    limits = PoolLimits(max_workers=1, max_instances_per_key=1, gc_job_frequency=1)
    cleanup = (CommandSpec(("clean",), 1.0),)
    settings = PoolSettings("p", limits, warmup=cleanup, post_job_cleanup=cleanup)
    return WorkerPool({"p": settings}, {"p": runtime}), runtime


async def some_turns(turns: int) -> None:
    """Turns of the loop; every fourth lets virtual time pass, or no timer would ever fire."""
    for turn in range(turns):
        await asyncio.sleep(0.002 if turn % 4 == 3 else 0)


async def serve_one(pool: WorkerPool) -> None:
    lease = await pool.acquire(KEY, timeout_s=100.0)
    try:
        answer = await lease.execute(request(b"still here"))
        assert answer.pb.output == b"still here"
    finally:
        lease.release()


async def lease_execute_release(pool: WorkerPool) -> None:
    await serve_one(pool)


async def two_callers(pool: WorkerPool) -> None:
    await asyncio.gather(serve_one(pool), serve_one(pool))


async def prove(pool: WorkerPool) -> None:
    await prove_pool(pool, KEY)


async def close(pool: WorkerPool) -> None:
    await serve_one(pool)
    await pool.close(drain_timeout_s=1.0)


async def close_with_a_lease(pool: WorkerPool) -> None:
    lease = await pool.acquire(KEY)
    try:
        await pool.close(drain_timeout_s=0.05)
    finally:
        lease.release()


@pytest.mark.parametrize("coroutine", [lease_execute_release, two_callers, prove, close, close_with_a_lease])
def test_cancelled_after_any_number_of_turns_nothing_is_lost(
    coroutine: Callable[[WorkerPool], Awaitable[None]],
) -> None:
    async def once(turns: int) -> bool:
        """Whether the cancel came too late to matter."""
        pool, runtime = make()
        pool.start()
        task = asyncio.ensure_future(coroutine(pool))
        await some_turns(turns)
        late = task.done()
        task.cancel()
        await asyncio.wait([task])
        if not coroutine.__name__.startswith("close"):
            await serve_one(pool)
            state = pool.pool_states()["p"]
            assert state.waiting == 0
            assert state.slots <= 1
        await pool.close()
        assert not runtime.alive
        assert not pool._waiters
        assert not pool._workers
        return late

    async def main() -> None:
        for turns in range(MAX_TURNS):
            if await once(turns):
                break
        else:
            raise AssertionError(f"{coroutine} was never through after {MAX_TURNS} turns")
        assert turns > 5

    run_virtual(main())


@pytest.mark.parametrize("knows_cancel", [False, True])
@pytest.mark.parametrize("multiplex", [False, True])
def test_an_action_cancelled_at_any_turn_has_exactly_one_outcome(knows_cancel: bool, multiplex: bool) -> None:
    async def once(turns: int) -> bool:
        runtime = FakeRuntime(slow)
        limits = PoolLimits(max_workers=1, max_requests_per_worker_at_once=4 if multiplex else 1)
        pool = WorkerPool({"p": PoolSettings("p", limits)}, {"p": runtime})
        outcomes: list[WorkResponse | WrapperError] = []
        tool = ToolAbilities(multiplex=multiplex, cancel=knows_cancel, cancel_timeout_s=0.5)
        key = WorkerKey("p", ("/bin/tool",), "/", multiplex=multiplex)
        action = Action(pool, tool, key, request(b"x"), outcomes.append)
        action.start()
        await some_turns(turns)
        late = bool(outcomes)
        action.cancel()
        action.cancel()
        while not outcomes:
            await asyncio.sleep(0.01)
        await asyncio.sleep(1)
        assert len(outcomes) == 1
        assert isinstance(outcomes[0], WorkResponse | RequestCancelled)
        if isinstance(outcomes[0], WorkResponse):
            assert outcomes[0].pb.output == b"x"
        lease = await pool.acquire(key)
        lease.release()
        await pool.close()
        assert not runtime.alive
        return late

    async def main() -> None:
        for turns in range(MAX_TURNS):
            if await once(turns):
                return
        raise AssertionError("never through")

    run_virtual(main())


def test_the_manager_survives_a_cancel_at_any_turn() -> None:
    document = '{pools: [{name: "p", language: "jvm", worker_command: ["/bin/tool"], check_health: true}]}'

    async def once(turns: int) -> bool:
        runtime = FakeRuntime(slow)
        manager = WarmWorkerPoolManager(
            PoolCreateOptions(parse_config(document, "test"), make_runtime=lambda _: runtime)
        )

        async def use() -> None:
            async with manager.lease("p") as lease:
                await lease.execute(request(b"x"))

        task = asyncio.ensure_future(use())
        await some_turns(turns)
        late = task.done()
        task.cancel()
        await asyncio.wait([task])
        await use()
        await manager.close()
        assert not runtime.alive
        return late

    async def main() -> None:
        for turns in range(MAX_TURNS):
            if await once(turns):
                return
        raise AssertionError("never through")

    run_virtual(main())
