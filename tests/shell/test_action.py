"""One request's way through the pool, in virtual time: what a cancel means to each kind of tool."""

from __future__ import annotations

import asyncio

from tests.fakes.fake_runtime import FakeRuntime, Script
from tests.support.loop import run_virtual
from tests.support.tools import proto_tool, request
from wrapper.action_runner import Action, ToolAbilities
from wrapper.errors import RequestCancelled, WrapperError
from wrapper.pool.limits import PoolLimits
from wrapper.pool.pool import WorkerPool
from wrapper.pool.settings import PoolSettings
from wrapper.pool.worker_key import WorkerKey
from wrapper.pool.worker_states import StopReason, WorkerState
from wrapper.worker_protocol.messages import WorkResponse

KEY = WorkerKey("p", ("/bin/tool",), "/")
Outcome = WorkResponse | WrapperError


def silent(data: bytes) -> bytes:
    """A tool that takes everything and never answers."""
    return b""


async def cancelled(tool: ToolAbilities) -> tuple[float, list[Outcome], dict[StopReason, int]]:
    """A silent tool's request, cancelled: after how long it ended, with what, and what was stopped."""
    runtime = FakeRuntime(lambda _: Script(tool=silent))
    pool = WorkerPool({"p": PoolSettings("p", PoolLimits())}, {"p": runtime})
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    outcomes: list[Outcome] = []

    def on_outcome(outcome: Outcome) -> None:
        outcomes.append(outcome)
        ended.set()

    action = Action(pool, tool, KEY, request(b"x"), on_outcome)
    action.start()
    while not pool.pool_states()["p"].states[WorkerState.LEASED]:
        await asyncio.sleep(0)
    began = loop.time()
    action.cancel()
    action.cancel()
    try:
        async with asyncio.timeout(1_000):
            await ended.wait()
    except TimeoutError:
        pass
    took = loop.time() - began
    action.abort()
    await pool.close()
    assert not runtime.alive
    return took, outcomes, pool.pool_states()["p"].stops


def test_a_tool_that_ignores_the_cancel_it_promised_is_stopped_after_the_timeout() -> None:
    took, outcomes, stops = run_virtual(cancelled(ToolAbilities(cancel=True, cancel_timeout_s=10)))
    assert [type(outcome) for outcome in outcomes] == [RequestCancelled]
    assert 10 <= took < 12
    assert stops == {StopReason.CANCELLED: 1}


def test_a_tool_that_knows_no_cancel_is_stopped_at_once() -> None:
    took, outcomes, stops = run_virtual(cancelled(ToolAbilities()))
    assert [type(outcome) for outcome in outcomes] == [RequestCancelled]
    assert took < 2
    assert stops == {StopReason.CANCELLED: 1}


def test_a_multiplex_tool_is_never_stopped_for_the_cancel_of_one_request() -> None:
    for abilities in (ToolAbilities(multiplex=True), ToolAbilities(multiplex=True, cancel=True)):
        took, outcomes, _ = run_virtual(cancelled(abilities))
        assert took >= 1_000
        assert len(outcomes) == 1  # the abort at the end


def test_a_cancel_while_waiting_ends_the_request_and_leaves_the_start_to_the_pool() -> None:
    async def main() -> None:
        runtime = FakeRuntime(lambda _: Script(tool=proto_tool()))
        pool = WorkerPool({"p": PoolSettings("p", PoolLimits())}, {"p": runtime})
        outcomes: list[Outcome] = []
        action = Action(pool, ToolAbilities(), KEY, request(b"x"), outcomes.append)
        action.start()
        action.cancel()
        action.abort()
        assert [type(outcome) for outcome in outcomes] == [RequestCancelled]
        lease = await pool.acquire(KEY)
        assert (await lease.execute(request(b"next"))).pb.output == b"next"
        lease.release()
        assert pool.pool_states()["p"].counts["start"] == 1
        await pool.close()

    run_virtual(main())
