"""Event loops for tests: `run_async` on a real one, `run_virtual` on one whose time jumps when it is idle."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

REAL_TIME_LIMIT_S = 60.0
"""No test of ours takes longer; one that would hang fails instead."""

_DEADLOCK_AFTER_S = 3.0


class _IdleJump(selectors.DefaultSelector):
    """A selector that never waits for a timer: it moves the clock there instead."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.waiting_elsewhere: Callable[[], bool] = lambda: False

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if ready or (timeout is not None and timeout <= 0):
            return ready
        if timeout is None or self.waiting_elsewhere():
            # No timer will ever wake us, or a thread is at work: that is real time, wait for it.
            ready = super().select(0.05 if timeout is not None else _DEADLOCK_AFTER_S)
            if not ready and timeout is None:
                raise RuntimeError("deadlock: no timer is set, and no descriptor became ready")
            return ready
        self.now_s += timeout
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Timers take no real time; descriptors are real, and what is ready comes before time moves.

    Time moves only when nothing can be done at once, so do not let processes or other machines act
    behind its back: their answers would come "later" than every timer. Work in executor threads
    is waited for in real time. A loop that could only wait for ever raises RuntimeError.
    """

    def __init__(self) -> None:
        self._jump = _IdleJump()
        self._in_threads = 0
        super().__init__(self._jump)
        self._jump.waiting_elsewhere = lambda: self._in_threads > 0
        # asyncio sleeps in select() for `resolution` less than the timer asks: with jumps that would
        # be an endless approach to the timer.
        self._clock_resolution = 1e-9

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._jump.now_s

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Any, *args: Any
    ) -> asyncio.Future[Any]:
        """As asyncio's; time stands still meanwhile."""
        self._in_threads += 1
        future = super().run_in_executor(executor, func, *args)
        future.add_done_callback(self._thread_done)
        return future

    def _thread_done(self, _: asyncio.Future[Any]) -> None:
        self._in_threads -= 1


def _run(factory: Callable[[], asyncio.AbstractEventLoop], main: Coroutine[Any, Any, T]) -> T:
    failures: list[dict[str, Any]] = []

    async def checked() -> T:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: failures.append(context))
        try:
            return await main
        finally:
            current = asyncio.current_task()
            left = [task for task in asyncio.all_tasks() if task is not current and not task.done()]
            if left:  # one more turn: a task that was cancelled in a finally clause may still be ending
                await asyncio.sleep(0)
                left = [task for task in left if not task.done()]
            assert not left, f"the test leaves tasks behind: {left}"

    with asyncio.Runner(loop_factory=factory) as runner:
        result = runner.run(checked())
    assert not failures, f"errors that nobody handled: {failures}"
    return result


def run_async(main: Coroutine[Any, Any, T], *, timeout_s: float = REAL_TIME_LIMIT_S) -> T:
    """Run a test's coroutine; fails if it leaves a task, an unhandled error, or takes too long."""

    async def limited() -> T:
        async with asyncio.timeout(timeout_s):
            return await main

    return _run(asyncio.SelectorEventLoop, limited())


def run_virtual(main: Coroutine[Any, Any, T]) -> T:
    """`run_async` on a VirtualTimeLoop."""
    return _run(VirtualTimeLoop, main)


async def eventually(condition: Callable[[], object], *, within_s: float = 20.0) -> None:
    """Wait until a condition holds, which nothing announces; fails when it does not in time."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + within_s
    while not condition():
        assert loop.time() < deadline, f"not within {within_s} s: {condition}"
        await asyncio.sleep(0.002)
