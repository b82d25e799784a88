"""One request from lease to release: lease → stage → exchange → collect → release.

Owns the order of these steps, their undoing, and what a cancel means in each of them. Knows nothing of
where the request came from: its asker is told the outcome once.

Driven by callbacks from the pool and the worker, without a task of its own: see
`worker_connection.py`. Each step is synchronous, so nothing can be cancelled inside one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from wrapper.errors import (
    ActionLost,
    ActionTimedOut,
    NotAWorker,
    RequestCancelled,
    RuntimeUnavailable,
    WrapperError,
)
from wrapper.execroot.scratch import Staged
from wrapper.pool.lease import Lease
from wrapper.pool.pool import WorkerPool
from wrapper.pool.worker_key import WorkerKey
from wrapper.pool.worker_states import StopReason
from wrapper.worker_protocol.messages import WorkRequest, WorkResponse

_IDLE_LOOKS_EVERY_S = 0.5
_IDLE_LOOKS = 6

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ToolAbilities:
    """What a tool understands of the protocol beyond plain requests."""

    multiplex: bool = False
    sandbox: bool = False
    """It takes `sandbox_dir` for the directory to work in."""
    cancel: bool = False
    cancel_timeout_s: float = 10.0
    """A tool that was asked to cancel and has not answered by then is stopped, if it is singleplex."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What an action with a directory of its own is run under."""

    taken: Callable[[], bool] = lambda: True
    """Called when a worker has been found, before the action's files are touched. False: leave them."""
    timeout_s: float | None = None
    """From when the worker gets the request; then its worker is stopped. None: for ever."""
    answered: Callable[[WorkResponse], None] = lambda _response: None
    """Called with the worker's response as soon as the files are back, before anybody who awaits it runs."""
    is_trial: bool = False
    """Nobody knows yet whether the tool is a worker. If it is none, the tree goes back as it was."""


async def run_action(
    pool: WorkerPool,
    key: WorkerKey,
    request: WorkRequest,
    *,
    directory_fd: int | None = None,
    terms: Terms | None = None,
) -> WorkResponse:
    """One action from lease to release; raises the WrapperError that prevented an answer.

    Cancelled, it returns when no process is at work for it any more.
    """
    ended: asyncio.Future[WorkResponse | WrapperError] = asyncio.get_running_loop().create_future()
    action = Action(
        pool,
        ToolAbilities(multiplex=key.multiplex),
        key,
        request,
        ended.set_result,
        directory_fd=directory_fd,
        terms=terms or Terms(),
    )
    action.start()
    try:
        outcome = await asyncio.shield(ended)
    except asyncio.CancelledError:
        action.abort()
        await asyncio.wait([ended])
        raise
    if isinstance(outcome, WrapperError):
        raise outcome
    return outcome


class Action:
    """One request on its way through the pool.

    `on_outcome` is called exactly once: with the worker's response, before the worker is cleaned; with
    RequestCancelled after a cancel, or ActionTimedOut, when no process is at work for the request any more;
    or with the WrapperError that prevented an answer.
    """

    __slots__ = (
        "_cancelled",
        "_directory_fd",
        "_idle_timer",
        "_key",
        "_lease",
        "_lease_id",
        "_on_outcome",
        "_pool",
        "_request",
        "_staged",
        "_terms",
        "_timer",
        "_tool",
    )

    def __init__(
        self,
        pool: WorkerPool,
        tool: ToolAbilities,
        key: WorkerKey,
        request: WorkRequest,
        on_outcome: Callable[[WorkResponse | WrapperError], None],
        *,
        directory_fd: int | None = None,
        terms: Terms = Terms(),
    ) -> None:
        self._terms = terms
        self._pool = pool
        self._tool = tool
        self._key = key
        self._request = request
        self._on_outcome: Callable[[WorkResponse | WrapperError], None] | None = on_outcome
        self._lease_id = 0
        self._lease: Lease | None = None
        self._directory_fd = directory_fd
        self._staged: Staged | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._idle_timer: asyncio.TimerHandle | None = None
        self._cancelled = False

    def start(self) -> None:
        """Ask the pool for a worker. The outcome may be known before this returns."""
        self._lease_id = self._pool.ask(self._key, self._leased)

    def cancel(self) -> None:
        """The asker wants no answer any more; there still will be an outcome.

        Not with a worker yet: it never will be. A tool that knows cancel is asked. A singleplex worker
        is stopped. A multiplex one is let finish, since others' requests are with it.
        """
        if self._on_outcome is None or self._cancelled:
            return
        if self._lease is None:
            self._pool.take_back(self._lease_id)
            self._end(RequestCancelled("the request was cancelled while it waited for a worker"))
        elif self._tool.cancel:
            self._lease.ask_cancel()
            if not self._tool.multiplex:
                loop = asyncio.get_running_loop()
                self._timer = loop.call_later(self._tool.cancel_timeout_s, self.abort)
        elif not self._tool.multiplex:
            self.abort()

    def abort(self, why: WrapperError | None = None) -> None:
        """End it now, whatever the tool can: a worker that has the request is stopped.

        `why`: what `on_outcome` is told; None: RequestCancelled.
        """
        if self._on_outcome is None or self._cancelled:
            return
        self._cancelled = True
        lease = self._lease
        if lease is None:
            self._pool.take_back(self._lease_id)
            self._end(RequestCancelled("the request was cancelled while it waited for a worker"))
            return
        lease.give_up()
        self._abandon()
        lease.release()
        gone = why or RequestCancelled("the request was cancelled; its worker was stopped")
        self._pool.when_stopped(lease.worker_id, lambda: self._end(gone))

    def _leased(self, lease: Lease | WrapperError) -> None:
        if isinstance(lease, WrapperError):
            self._end(lease)
            return
        self._lease = lease
        if not self._terms.taken():
            self._end(RequestCancelled("whoever asked is gone"))
            lease.release()
            return
        try:
            self._stage(lease)
            lease.send(self._request, self._answered)
            self._set_timer()
        except WrapperError as error:
            if isinstance(error, RuntimeUnavailable):
                lease.stop_worker(StopReason.UNCLEAN)
            self._give_back()
            self._end(error)
            lease.release()
        except Exception as error:  # noqa: BLE001 - the slot must not be lost, nor the asker left waiting
            _log.exception("an error of the wrapper's own")
            self._abandon()
            self._end(WrapperError(f"an error of the wrapper's own: {error!r}"))
            lease.stop_worker(StopReason.FAILED)
            lease.release()

    def _answered(self, answer: WorkResponse | WrapperError) -> None:
        lease = self._lease
        if lease is None or self._cancelled:
            return
        if isinstance(answer, WrapperError):
            if self._terms.is_trial and self._put_back_as_it_was():
                answer = NotAWorker(f"it is no persistent worker: {answer.report()}")
            else:
                self._abandon()
        else:
            problem = self._give_back()
            answer = answer if problem is None else problem
        try:
            if isinstance(answer, WorkResponse):
                self._terms.answered(answer)
            self._end(answer)
        finally:
            lease.release()

    def _set_timer(self) -> None:
        terms, loop = self._terms, asyncio.get_running_loop()
        if terms.is_trial:
            self._idle_timer = loop.call_later(_IDLE_LOOKS_EVERY_S, self._look_whether_idle, -1.0, 0)
        if terms.timeout_s is not None:
            message = f"the action took longer than its {terms.timeout_s:g} s; its worker was stopped"
            self._timer = loop.call_later(terms.timeout_s, lambda: self.abort(ActionTimedOut(message)))

    def _look_whether_idle(self, cpu_s: float, idle_looks: int) -> None:
        """On trial: a tool that reads its input in the wrong format may wait for more of it for ever."""
        lease = self._lease
        if lease is None or self._on_outcome is None or self._cancelled:
            return
        now_s = lease.cpu_s()
        idle_looks = idle_looks + 1 if now_s == cpu_s else 0
        if idle_looks < _IDLE_LOOKS:
            loop = asyncio.get_running_loop()
            self._idle_timer = loop.call_later(
                _IDLE_LOOKS_EVERY_S, self._look_whether_idle, now_s, idle_looks
            )
            return
        self._cancelled = True
        lease.give_up()
        silent = f"it has the request and has done nothing for {_IDLE_LOOKS * _IDLE_LOOKS_EVERY_S:g} s"
        if self._put_back_as_it_was():
            self._end(NotAWorker(f"it is no persistent worker: {silent}"))
        else:
            self._abandon()
            self._end(
                ActionLost(f"it is no persistent worker ({silent}), and has changed the action's inputs")
            )
        lease.release()

    def _put_back_as_it_was(self) -> bool:
        """Whether all inputs are there again, and nothing else. The worker may be alive still."""
        if self._staged is None or self._lease is None:
            return False
        self._lease.kill_stragglers()
        return self._staged.undo()

    def _stage(self, lease: Lease) -> None:
        """Show the worker the files of this request, if they are not where it works anyway."""
        sandbox_dir = self._request.pb.sandbox_dir
        is_sandboxed = sandbox_dir and not self._tool.sandbox
        if self._directory_fd is None and not is_sandboxed:
            return
        if lease.execroot is None:
            raise AssertionError("a request with files of its own was given to a worker without an execroot")
        if self._directory_fd is not None:
            self._staged = lease.execroot.stage_action(self._directory_fd)
        else:
            self._request.pb.sandbox_dir = b""
            self._staged = lease.execroot.stage_sandbox(sandbox_dir)

    def _give_back(self) -> WrapperError | None:
        if self._staged is not None and self._lease is not None:
            try:
                self._lease.kill_stragglers()
                self._staged.collect()
            except WrapperError as error:
                self._lease.stop_worker(StopReason.UNCLEAN)
                return error
        return None

    def _abandon(self) -> None:
        """The worker may still write there: its execroot goes with it, nothing is given back."""
        if self._staged is not None:
            self._staged.abandon()

    def _end(self, outcome: WorkResponse | WrapperError) -> None:
        on_outcome, self._on_outcome = self._on_outcome, None
        for timer in (self._timer, self._idle_timer):
            if timer is not None:
                timer.cancel()
        if on_outcome is not None:
            on_outcome(outcome)
