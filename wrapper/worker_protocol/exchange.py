"""Which answer belongs to which request. Sans-IO, like the framing below it.

Owns the two ends of that question: `WorkerExchange` is the conversation with one worker (ids of our
own, unasked answers), `UpstreamLedger` what a build tool asked and has not been told yet (its ids,
cancels, exactly one answer each). Knows nothing of processes, pools or time.

Rules, from what Bazel and real tools do:

* Upstream ids are echoed and otherwise ignored. They are 0 for singleplex, begin at 1 again with each
  build on the same process, and so may repeat even while the first request is in flight.
* A worker is sent ids of our own. Non-zero and never repeated for a tool that echoes them, so that an
  answer that comes late or twice can never be taken for the next request's. Whether it does is learnt
  from its first answer; a tool that answers 0 is sent 0 from then on, one request at a time, and the
  caller has to check that it is silent before each `send`.
* `was_cancelled` is allowed only after a cancel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from wrapper.errors import ProtocolError
from wrapper.worker_protocol.messages import WorkRequest, WorkResponse
from wrapper.worker_protocol.proto_framing import DEFAULT_MAX_FRAME_BYTES
from wrapper.worker_protocol.wire_format import WireFormat, request_encoder, response_decoder

_LAST_ID = 2**31 - 1
_ID_STEP = 11
"""More than 1: a multiplex tool that is off by one then answers nobody, not somebody else."""


@dataclass(slots=True, eq=False)
class SentRequest:
    """A request that a worker has and has not answered."""

    wire_id: int
    """What our books call it; also the id on the wire, but for tools that do not echo ids."""
    cancel_sent: bool = False


class Answered(NamedTuple):
    """The one answer to a request."""

    sent: SentRequest
    response: WorkResponse


class Stray(NamedTuple):
    """An answer that nobody asked for. It is shown, and never given to anybody.

    `repeats`: it has the id of a request that was answered before, so those in flight may still be.
    """

    description: str
    repeats: bool = False


class Broken(NamedTuple):
    """The worker broke the protocol: nothing after this can be trusted."""

    description: str


Received = Answered | Stray | Broken


class WorkerExchange:
    """The conversation with one worker.

    `multiplex`: the worker may have several requests at a time, and must echo their ids.
    """

    def __init__(
        self,
        wire_format: WireFormat,
        *,
        multiplex: bool = False,
        max_frame_bytes: int = DEFAULT_MAX_FRAME_BYTES,
    ) -> None:
        self._decoder = response_decoder(wire_format, max_frame_bytes)
        self._encode = request_encoder(wire_format)
        self._multiplex = multiplex
        self._last_id = 0
        self._in_flight: dict[int, SentRequest] = {}
        self.echoes_ids: bool | None = None
        """None until the first answer."""
        self.answers = 0

    @property
    def in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def mid_frame(self) -> bool:
        """Whether an answer has begun and not ended."""
        return self._decoder.mid_frame

    def send(self, request: WorkRequest) -> tuple[SentRequest, bytes]:
        """Take a request on; the frame is to be written whole. Sets the request's id.

        Raises RequestRefused, and changes nothing, if the request cannot be put into the tool's format.
        """
        if self._in_flight and not self._multiplex:
            raise AssertionError("a singleplex worker was given a second request")
        wire_id = self._next_id()
        request.pb.request_id = 0 if self.echoes_ids is False else wire_id
        frame = self._encode(request)
        sent = SentRequest(wire_id)
        self._in_flight[wire_id] = sent
        return sent, frame

    def cancel(self, sent: SentRequest) -> bytes:
        """The frame that asks the worker to cancel a request; it still is to be answered."""
        sent.cancel_sent = True
        wire_id = 0 if self.echoes_ids is False else sent.wire_id
        return self._encode(WorkRequest.of(request_id=wire_id, cancel=True))

    def receive(self, data: bytes) -> list[Received]:
        """What the next bytes from the worker mean. After Broken nothing more comes."""
        received: list[Received] = []
        try:
            self._decoder.feed(data)
            while (response := self._decoder.next_message()) is not None:
                received.append(self._match(response))
        except ProtocolError as error:
            received.append(_not_the_protocol(error))
        return received

    def frame_overdue(self, timeout_s: float) -> Broken:
        """The answer that has begun did not end in time."""
        return _not_the_protocol(self._decoder.frame_overdue(timeout_s))

    def cut(self) -> ProtocolError | None:
        """The worker's stream has ended: the error if that was in the middle of an answer."""
        try:
            self._decoder.end_of_stream()
        except ProtocolError as error:
            return error
        return None

    def _match(self, response: WorkResponse) -> Received:
        self.answers += 1
        wire_id = response.pb.request_id
        if self.echoes_ids is None and self._in_flight:
            self.echoes_ids = wire_id != 0 or self._multiplex
        if self.echoes_ids:
            sent = self._in_flight.pop(wire_id, None)
        elif wire_id == 0 and self._in_flight:
            _, sent = self._in_flight.popitem()
        else:
            sent = None
        if sent is None:
            waiting = ", ".join(map(str, self._in_flight)) or "no request"
            repeats = self.echoes_ids is True and 0 < wire_id <= self._last_id and wire_id % _ID_STEP == 0
            return Stray(
                f"an answer with request id {wire_id} ({response!r}) while {waiting} is waited for", repeats
            )
        if response.pb.was_cancelled and not sent.cancel_sent:
            # Its request has no answer now and will get none: the worker cannot be trusted any further.
            return Broken(f"it answered was_cancelled to request {sent.wire_id}, which nobody cancelled")
        return Answered(sent, response)

    def _next_id(self) -> int:
        self._last_id += _ID_STEP
        if self._last_id > _LAST_ID:
            self._last_id = _ID_STEP
        while self._last_id in self._in_flight:
            self._last_id += _ID_STEP
        return self._last_id


def _not_the_protocol(error: ProtocolError) -> Broken:
    return Broken(
        f"it wrote something to its stdout that is not a WorkResponse: {error.message}. "
        "A tool must not print to stdout while it is a persistent worker."
    )


@dataclass(slots=True, eq=False)
class Ticket:
    """A request that a build tool sent and that is owed exactly one answer."""

    upstream_id: int
    cancel_asked: bool = False
    answered: bool = False


class UpstreamLedger:
    """What a build tool asked and has not been told yet."""

    def __init__(self) -> None:
        self._open: dict[int, list[Ticket]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def accept(self, request: WorkRequest) -> Ticket:
        """Take on a request that is not a cancel."""
        ticket = Ticket(request.pb.request_id)
        self._open.setdefault(ticket.upstream_id, []).append(ticket)
        self._count += 1
        return ticket

    def cancel(self, upstream_id: int) -> Ticket | None:
        """The request that a cancel means: the newest of that id that is not cancelled yet.

        None if there is none: it was answered already, which is no error.
        """
        for ticket in reversed(self._open.get(upstream_id, ())):
            if not ticket.cancel_asked:
                ticket.cancel_asked = True
                return ticket
        return None

    def answer(self, ticket: Ticket, response: WorkResponse) -> WorkResponse:
        """Close a request: returns the response with the id that its asker gave it.

        Raises AssertionError for a second answer, and for `was_cancelled` without a cancel: both are
        errors of ours, which would hang or break the asker's build.
        """
        if ticket.answered:
            raise AssertionError(f"request {ticket.upstream_id} was answered already")
        if response.pb.was_cancelled and not ticket.cancel_asked:
            raise AssertionError(f"request {ticket.upstream_id} was never cancelled")
        ticket.answered = True
        tickets = self._open[ticket.upstream_id]
        tickets.remove(ticket)
        if not tickets:
            del self._open[ticket.upstream_id]
        self._count -= 1
        response.pb.request_id = ticket.upstream_id
        return response
