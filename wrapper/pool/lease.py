"""The right to one request slot of one worker."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from enum import Enum

from wrapper.errors import WorkerProtocolError, WrapperError
from wrapper.pool.execroots import Execroot
from wrapper.pool.settings import SETTLE_S
from wrapper.pool.worker_connection import OnAnswer, WorkerConnection
from wrapper.pool.worker_states import StopReason
from wrapper.worker_protocol.exchange import SentRequest
from wrapper.worker_protocol.messages import WorkRequest, WorkResponse


class WorkerOutcome(Enum):
    """What its user says of a worker when the lease ends. A request's exit code is no reason for FAILED."""

    COMPLETED = "completed"
    """It may serve again, after it was cleaned."""
    FAILED = "failed"
    """It must not serve again."""


class Lease:
    """Made by `WorkerPool.acquire`; to be ended by `release`.

    A lease that is dropped without release stops its worker, since nobody knows what state it is in.
    """

    def __init__(
        self,
        lease_id: int,
        worker_id: int,
        connection: WorkerConnection,
        execroot: Execroot | None,
        released: Callable[[int, int, bool, StopReason | None], None],
    ) -> None:
        self.lease_id = lease_id
        self.worker_id = worker_id
        self.execroot = execroot
        """The worker's own execroot, into which its action is to be staged; None: it runs in place."""
        self._connection = connection
        self._loop = connection.loop
        self._report = released
        self._sent: SentRequest | None = None
        self._used = False
        self._problem: StopReason | None = None
        self._released = False

    def __repr__(self) -> str:
        return f"<Lease {self.lease_id} of worker {self.worker_id}{' released' if self._released else ''}>"

    async def execute(self, request: WorkRequest) -> WorkResponse:
        """Send a request to the worker and wait for its answer. One at a time on one lease.

        The request's id is replaced by one of our own. Raises RequestRefused (nothing was sent, the
        worker is fine), WorkerDied or WorkerProtocolError (it is not). If this call is cancelled, the
        worker is stopped when the lease is released: it may still be at work for the request.

        A lease is one job, however many requests it sends: the worker is cleaned after it, not between.
        """
        if self._used and self._sent is None and not self._released:
            await self._until_silent()
        answered: asyncio.Future[WorkResponse | WrapperError] = self._loop.create_future()

        def on_answer(answer: WorkResponse | WrapperError) -> None:
            if not answered.done():
                answered.set_result(answer)

        self.send(request, on_answer)
        try:
            answer = await answered
        except BaseException:
            self.give_up()
            raise
        if isinstance(answer, WrapperError):
            raise answer
        return answer

    async def _until_silent(self) -> None:
        """What a tool without ids says after its answer would be taken for the next one: listen first."""
        exchange = self._connection.exchange
        if exchange.echoes_ids is False:
            await asyncio.sleep(SETTLE_S)
        # With other leases' requests in flight the worker may speak; ids tell their answers apart.
        if self._connection.lost is None and not exchange.in_flight and not self._connection.is_silent():
            self.stop_worker(StopReason.STRAY_OUTPUT)
            raise self._connection.lost or WorkerProtocolError(
                f"worker {self.worker_id} said something that nobody asked for after its last answer"
            )

    def send(self, request: WorkRequest, on_answer: OnAnswer) -> None:
        """As `execute`, with a callback. Raises what `execute` raises before anything was sent."""
        if self._released:
            raise WrapperError(f"lease {self.lease_id} was released already")
        if self._sent is not None:
            raise WrapperError(f"lease {self.lease_id} has a request in flight already")

        def answered(answer: WorkResponse | WrapperError) -> None:
            self._sent = None
            if isinstance(answer, WrapperError):
                self._problem = self._problem or StopReason.CRASH
            on_answer(answer)

        self._sent = self._connection.request(request, answered)
        self._used = True

    def kill_stragglers(self) -> None:
        """End the processes that the request left behind, before its outputs are taken."""
        self._connection.process.kill_stragglers()

    def cpu_s(self) -> float:
        """Processor time that the worker has used so far."""
        return self._connection.process.cpu_s()

    def give_up(self) -> None:
        """The answer is not wanted any more. The worker may be at work for it, so it must not go on."""
        if self._sent is not None:
            self._connection.forget(self._sent)
            self._sent = None
            self.stop_worker(StopReason.CANCELLED)

    def ask_cancel(self) -> None:
        """Ask the worker to cancel the request in flight: `execute` still returns its answer."""
        if self._sent is not None:
            self._connection.cancel(self._sent)

    def stop_worker(self, reason: StopReason) -> None:
        """Whatever `release` will say: this worker must not serve again."""
        self._problem = self._problem or reason

    def release(self, outcome: WorkerOutcome = WorkerOutcome.COMPLETED) -> None:
        """Give the worker back. A second call does nothing."""
        if self._released:
            return
        self._released = True
        if outcome is WorkerOutcome.FAILED:
            self.stop_worker(StopReason.FAILED)
        self._report(self.lease_id, self.worker_id, self._used, self._problem)

    def __del__(self) -> None:
        if not self._released and not self._loop.is_closed():
            self._released = True
            # The garbage collector may run in any thread.
            abandoned = StopReason.ABANDONED
            self._loop.call_soon_threadsafe(self._report, self.lease_id, self.worker_id, True, abandoned)
