"""One request from lease to release: lease → stage → exchange → collect → release.

Owns the order of these steps, their undoing, and what a cancel means in each of them. Knows nothing of
where the request came from: its asker answers it with what `run` returns or raises.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from wrapper.errors import RequestCancelled
from wrapper.pool.lease import Lease
from wrapper.pool.pool import WorkerPool
from wrapper.pool.worker_key import WorkerKey
from wrapper.pool.worker_states import StopReason
from wrapper.worker_protocol.messages import WorkRequest, WorkResponse


@dataclass(frozen=True, slots=True)
class ToolAbilities:
    """What a tool understands of the protocol beyond plain requests."""

    multiplex: bool = False
    sandbox: bool = False
    """It takes `sandbox_dir` for the directory to work in."""
    cancel: bool = False
    cancel_timeout_s: float = 10.0
    """A tool that was asked to cancel and has not answered by then is stopped, if it is singleplex."""


class Action:
    """One request on its way through the pool."""

    def __init__(self, pool: WorkerPool, tool: ToolAbilities, key: WorkerKey, request: WorkRequest) -> None:
        self._pool = pool
        self._tool = tool
        self._key = key
        self._request = request
        self._lease: Lease | None = None
        self._cancelled = False
        self._task: asyncio.Task[object] | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def run(self, answer: Callable[[WorkResponse], None]) -> None:
        """Call `answer` once with the worker's response, before the worker is released and cleaned.

        Raises instead RequestCancelled after `cancel`, or the WrapperError that prevented an answer.
        When it raises RequestCancelled no process is at work for the request any more.
        """
        self._task = asyncio.current_task()
        try:
            await self._run(answer)
        except asyncio.CancelledError:
            if not self._cancelled:
                raise
            # Ours, not somebody's who wants this task gone: it ends here.
            if self._task is not None:
                self._task.uncancel()
            if self._lease is not None:
                await self._pool.wait_until_stopped(self._lease.worker_id)
            raise RequestCancelled("the request was cancelled") from None
        finally:
            if self._timer is not None:
                self._timer.cancel()

    async def _run(self, answer: Callable[[WorkResponse], None]) -> None:
        request = self._request
        sandbox_dir = request.pb.sandbox_dir
        lease = await self._pool.acquire(self._key)
        self._lease = lease
        try:
            if sandbox_dir and not self._tool.sandbox:
                response = await self._execute_staged(lease, sandbox_dir)
            else:
                response = await lease.execute(request)
            answer(response)
        finally:
            lease.release()

    async def _execute_staged(self, lease: Lease, sandbox_dir: bytes) -> WorkResponse:
        """Stage, exchange, collect. A worker that leaves this way but with an answer must not go on."""
        if lease.execroot is None:
            raise AssertionError("a sandboxed request was given to a worker without an execroot of its own")
        self._request.pb.sandbox_dir = b""
        staged = lease.execroot.stage(sandbox_dir)
        try:
            response = await lease.execute(self._request)
        except BaseException:
            lease.stop_worker(StopReason.CRASH)
            staged.abandon()
            raise
        try:
            staged.collect()
        except BaseException:
            lease.stop_worker(StopReason.UNCLEAN)
            raise
        return response

    def cancel(self) -> None:
        """The asker wants no answer any more. `run` still ends in one of its ways.

        Not with a worker yet: it never will be. A tool that knows cancel is asked. A singleplex worker
        is stopped. A multiplex one is let finish, since others' requests are with it.
        """
        if self._lease is None:
            self._give_up()
        elif self._tool.cancel:
            self._lease.ask_cancel()
            if not self._tool.multiplex:
                loop = asyncio.get_running_loop()
                self._timer = loop.call_later(self._tool.cancel_timeout_s, self._give_up)
        elif not self._tool.multiplex:
            self._give_up()

    def _give_up(self) -> None:
        self._cancelled = True
        if self._task is not None:
            self._task.cancel()
