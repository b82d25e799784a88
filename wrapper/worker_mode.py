"""The stdin/stdout face: a persistent worker to its host, a pool of them behind.

Composition root of that face: builds the pool on the process runtime, reads WorkRequests, answers each
of them exactly once whatever happens, and ends on EOF (after finishing what it accepted) and on SIGTERM
or SIGINT (cancelling it). The rules of the protocol that it keeps are `worker_protocol/exchange.py`'s.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from dataclasses import dataclass, replace
from typing import Protocol

from wrapper.action_runner import Action, ToolAbilities
from wrapper.errors import ProtocolError, RequestCancelled, WrapperError
from wrapper.events import EventBus, log_events
from wrapper.pool.health import prove_pool
from wrapper.pool.limits import TotalLimits
from wrapper.pool.pool import WorkerPool
from wrapper.pool.settings import PoolSettings
from wrapper.pool.worker_key import WorkerKey
from wrapper.runtime.base import Runtime
from wrapper.upstream import UpstreamReader, UpstreamWriter, claim_stdio
from wrapper.worker_protocol.exchange import Ticket, UpstreamLedger
from wrapper.worker_protocol.messages import WorkRequest, WorkResponse
from wrapper.worker_protocol.wire_format import (
    MessageDecoder,
    WireFormat,
    detect,
    encode_response,
    request_decoder,
)

MAX_IN_FLIGHT = 1_000
"""Requests accepted at a time; beyond that the host is not read until some are answered."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WorkerModeOptions:
    """What the command line and the configuration say."""

    argv: tuple[str, ...]
    """The tool with its startup arguments."""
    settings: PoolSettings
    env: dict[str, str]
    cwd: str
    persistent_worker_key: str = ""
    upstream_format: WireFormat | None = None
    """None: found out from the first bytes."""
    tool_format: WireFormat = WireFormat.PROTO
    tool: ToolAbilities = ToolAbilities()  # noqa: RUF009 - frozen
    total: TotalLimits = TotalLimits()  # noqa: RUF009 - frozen
    check_health: bool = False

    def key(self) -> WorkerKey:
        """What all workers of this wrapper share."""
        return WorkerKey(
            pool=self.settings.name,
            argv=self.argv,
            cwd=self.cwd,
            env=tuple(sorted(self.env.items())),
            persistent_worker_key=self.persistent_worker_key,
            protocol=self.tool_format.value,
            multiplex=self.tool.multiplex,
        )


class RequestListener(Protocol):
    """Who wants to see the requests."""

    def accepted(self, request: WorkRequest) -> None:
        """A request has come, and nothing was done with it yet. Quick; must not raise."""

    def ended(self) -> None:
        """No more will come, and no worker is left."""


class WorkerMode:
    """One conversation with a worker host. `run` returns the exit code of the process."""

    def __init__(
        self,
        options: WorkerModeOptions,
        key: WorkerKey,
        pool: WorkerPool,
        stdin_fd: int,
        stdout_fd: int,
        listener: RequestListener | None = None,
    ) -> None:
        self._options = options
        self._listener = listener
        self._pool = pool
        self._key = key
        self._sandboxed_key = replace(self._key, own_execroot=True)
        self._reader = UpstreamReader(stdin_fd, self._received)
        self._writer = UpstreamWriter(stdout_fd, self._host_gone, self._go_on)
        self._format = options.upstream_format
        self._decoder: MessageDecoder[WorkRequest] | None = None
        self._head = b""
        self._at_eof = False
        self._held_back = False
        """Not reading, and requests that have come may wait in the decoder: there is no room for more."""
        self._ledger = UpstreamLedger()
        self._actions: dict[Ticket, Action] = {}
        self._ended = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._stopping: str | None = None
        self._exit_code = 0

    async def run(self) -> int:
        """Serve until the host ends it."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop, f"the wrapper received {number.name}")
        try:
            self._pool.start()
            if self._options.check_health and not await self._is_healthy():
                return self._exit_code
            self._reader.resume()
            await self._ended.wait()
            self._reader.close()
            if self._stopping is None:
                await self._until_answered_or_stopped()
            for action in list(self._actions.values()):
                action.abort()
            await self._pool.close()
            await self._flush()
        finally:
            self._reader.close()
            await self._pool.close()
            self._writer.close()
        return self._exit_code

    async def _is_healthy(self) -> bool:
        """Prove that the pool works before anything is accepted; False: it does not, or we are to stop."""
        proof = asyncio.create_task(prove_pool(self._pool, self._key), name="health check")
        ended = asyncio.create_task(self._ended.wait(), name="health check interrupted")
        await asyncio.wait((proof, ended), return_when=asyncio.FIRST_COMPLETED)
        for task in (proof, ended):
            task.cancel()
        await asyncio.wait((proof, ended))
        if proof.cancelled():
            return False
        error = proof.exception()
        if isinstance(error, WrapperError):
            _log.error("the pool is not healthy: %s", error.report())
            self._exit_code = error.exit_code
        elif error is not None:
            raise error
        return error is None

    # ---- from the host -----------------------------------------------------------------------------

    def _received(self, data: bytes) -> None:
        try:
            self._decode(data)
        except ProtocolError as error:
            self._not_understood(error)

    def _not_understood(self, error: ProtocolError) -> None:
        """Nothing after this can be understood; what was understood before it is still answered."""
        _log.error("the worker host's requests: %s", error.message)
        self._exit_code = error.exit_code
        self._reader.pause()
        self._ended.set()

    def _decode(self, data: bytes) -> None:
        self._at_eof = not data
        if self._decoder is None:
            self._head += data
            self._format = self._format or detect(self._head, at_eof=not data)
            if self._format is None:
                return
            max_frame_bytes = self._options.settings.max_frame_bytes
            self._decoder = request_decoder(self._format, max_frame_bytes)
            self._decoder.feed(self._head)
            self._head = b""
        else:
            self._decoder.feed(data)
        self._accept_what_has_come()

    def _accept_what_has_come(self) -> None:
        """Take on requests as long as there is room. Raises ProtocolError."""
        decoder = self._decoder
        if decoder is None:
            return
        while self._has_room():
            request = decoder.next_message()
            if request is None:
                if self._at_eof:
                    decoder.end_of_stream()
                    self._ended.set()
                return
            self._accept(request)
        self._held_back = True
        self._reader.pause()

    def _has_room(self) -> bool:
        return len(self._ledger) < MAX_IN_FLIGHT and not self._writer.is_congested

    def _go_on(self) -> None:
        """There may be room again."""
        if self._held_back and not self._ended.is_set() and self._has_room():
            self._held_back = False
            # Not at once: a request that is answered in the course of its acceptance comes by here.
            asyncio.get_running_loop().call_soon(self._take_up_again)

    def _take_up_again(self) -> None:
        if self._ended.is_set():
            return
        try:
            self._accept_what_has_come()
        except ProtocolError as error:
            self._not_understood(error)
        if not self._held_back and not self._ended.is_set():
            self._reader.resume()

    def _accept(self, request: WorkRequest) -> None:
        if request.pb.cancel:
            ticket = self._ledger.cancel(request.pb.request_id)
            if ticket is not None:
                self._actions[ticket].cancel()
            return
        if self._listener is not None:
            self._listener.accepted(request)
        ticket = self._ledger.accept(request)
        sandboxed = request.pb.sandbox_dir and not self._options.tool.sandbox
        if sandboxed and self._options.tool.multiplex:
            self._answer(ticket, _refusal(request))
            return
        key = self._sandboxed_key if sandboxed else self._key
        action = Action(
            self._pool, self._options.tool, key, request, lambda outcome: self._outcome(ticket, outcome)
        )
        self._actions[ticket] = action
        action.start()

    # ---- to the host -------------------------------------------------------------------------------

    def _outcome(self, ticket: Ticket, outcome: WorkResponse | WrapperError) -> None:
        """One request ended: it is answered, exactly once, whatever it ended with."""
        if isinstance(outcome, WorkResponse):
            self._answer(ticket, outcome)
        elif isinstance(outcome, RequestCancelled) and ticket.cancel_asked:
            self._answer(ticket, WorkResponse.of(was_cancelled=True))
        elif isinstance(outcome, RequestCancelled):
            self._answer(ticket, _failure(outcome.exit_code, f"cancelled: {self._stopping}"))
        else:
            _log.warning("request %d failed: %s", ticket.upstream_id, outcome.message)
            self._answer(ticket, _failure(outcome.exit_code, outcome.report()))

    def _answer(self, ticket: Ticket, response: WorkResponse) -> None:
        response = self._ledger.answer(ticket, response)
        self._actions.pop(ticket, None)
        self._writer.write(encode_response(self._format or WireFormat.PROTO, response))
        if not len(self._ledger):
            self._idle.set()
        if self._held_back:
            self._go_on()

    async def _flush(self) -> None:
        if self._stopping is not None:
            return  # the host that sent SIGTERM does not read any more: what the pipe took is what it gets
        flush = asyncio.ensure_future(self._writer.flush())
        stopped = asyncio.ensure_future(self._until_stopped())
        await asyncio.wait((flush, stopped), return_when=asyncio.FIRST_COMPLETED)
        for waiter in (flush, stopped):
            waiter.cancel()
        await asyncio.wait((flush, stopped))

    # ---- the end -----------------------------------------------------------------------------------

    def _stop(self, why: str) -> None:
        if self._stopping is None:
            _log.info("stopping: %s", why)
            self._stopping = why
        self._ended.set()
        self._idle.set()

    def _host_gone(self) -> None:
        self._stop("the worker host closed our stdout")

    async def _until_answered_or_stopped(self) -> None:
        while len(self._ledger) and self._stopping is None:
            self._idle.clear()
            await self._idle.wait()

    async def _until_stopped(self) -> None:
        while self._stopping is None:
            self._idle.clear()
            await self._idle.wait()


def _failure(exit_code: int, text: str) -> WorkResponse:
    return WorkResponse.of(exit_code=exit_code, output=f"nativelink_worker_wrapper: {text}\n".encode())


def _refusal(request: WorkRequest) -> WorkResponse:
    sandbox_dir = os.fsdecode(request.pb.sandbox_dir)
    return _failure(
        64,
        f"the request is to run in the sandbox {sandbox_dir!r}, but this multiplex tool is not known to "
        "support that, and it would read outside of it. Give the wrapper --tool-sandbox if the tool does, "
        "leave --tool-multiplex away, or remove supports-multiplex-sandboxing from the action.",
    )


async def serve(options: WorkerModeOptions, runtime: Runtime, listener: RequestListener | None = None) -> int:
    """Speak with the host on our stdin and stdout until it ends that; returns our exit code.

    `listener` is told of each request before it is served, and of the end.
    """
    try:
        stdin_fd, stdout_fd = claim_stdio()
        events = EventBus()
        events.subscribe(log_events)
        key = options.key()
        pool = WorkerPool(
            {options.settings.name: options.settings},
            {options.settings.name: runtime},
            total=options.total,
            minimum_keys={options.settings.name: key},
            events=events,
        )
        return await WorkerMode(options, key, pool, stdin_fd, stdout_fd, listener).run()
    finally:
        if listener is not None:
            listener.ended()
