"""The two wire formats behind one face, and how to tell which of them a stream speaks.

Owns the contract of a decoder and the choice of a format; the formats themselves are
`proto_framing.py` and `json_framing.py`. The latter is imported when first needed: most streams are
protobuf, and a worker host waits for our first answer.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Protocol, TypeVar

from wrapper.errors import ProtocolError
from wrapper.worker_protocol import proto_framing
from wrapper.worker_protocol.messages import WorkRequest, WorkResponse
from wrapper.worker_protocol.proto_framing import DEFAULT_MAX_FRAME_BYTES

M_co = TypeVar("M_co", covariant=True)


class WireFormat(Enum):
    """How messages travel. The values are Bazel's words (`requires-worker-protocol`)."""

    PROTO = "proto"
    JSON = "json"


class MessageDecoder(Protocol[M_co]):
    """Bytes of one stream in, messages out. Never blocks, never reads.

    After each `feed`, call `next_message` until it returns None.
    """

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the stream, any number of them."""

    def next_message(self) -> M_co | None:
        """The next whole message; None if there is none yet.

        Raises ProtocolError at the first frame that is wrong, after all messages before it; the
        decoder stays broken, and every later call raises the same error again.
        """

    @property
    def mid_frame(self) -> bool:
        """Whether a frame has begun and not ended. To be asked after `next_message` returned None."""

    def frame_overdue(self, timeout_s: float) -> ProtocolError:
        """What to report if the frame that is open has not ended `timeout_s` after it began."""

    def end_of_stream(self) -> None:
        """The stream has ended: raises ProtocolError if that cuts a frame, or the decoder's own error."""


def request_decoder(
    wire_format: WireFormat, max_frame_bytes: int = DEFAULT_MAX_FRAME_BYTES
) -> MessageDecoder[WorkRequest]:
    """A decoder for what a build tool sends. A longer frame than `max_frame_bytes` is an error."""
    if wire_format is WireFormat.PROTO:
        return proto_framing.request_decoder(max_frame_bytes)
    from wrapper.worker_protocol import json_framing

    return json_framing.request_decoder(max_frame_bytes)


def response_decoder(
    wire_format: WireFormat, max_frame_bytes: int = DEFAULT_MAX_FRAME_BYTES
) -> MessageDecoder[WorkResponse]:
    """A decoder for what a worker sends. A longer frame than `max_frame_bytes` is an error."""
    if wire_format is WireFormat.PROTO:
        return proto_framing.response_decoder(max_frame_bytes)
    from wrapper.worker_protocol import json_framing

    return json_framing.response_decoder(max_frame_bytes)


def request_encoder(wire_format: WireFormat) -> Callable[[WorkRequest], bytes]:
    """The function that encodes requests in this format, for whoever encodes many."""
    if wire_format is WireFormat.PROTO:
        return proto_framing.encode_request
    from wrapper.worker_protocol import json_framing

    return json_framing.encode_request


def response_encoder(wire_format: WireFormat) -> Callable[[WorkResponse], bytes]:
    """The function that encodes responses in this format, for whoever encodes many."""
    if wire_format is WireFormat.PROTO:
        return proto_framing.encode_response
    from wrapper.worker_protocol import json_framing

    return json_framing.encode_response


def encode_request(wire_format: WireFormat, request: WorkRequest) -> bytes:
    """One frame, whole: write it in one call if the reader is a tool of unknown quality.

    Raises RequestRefused for a request with text that is not UTF-8, which JSON cannot carry.
    """
    return request_encoder(wire_format)(request)


def encode_response(wire_format: WireFormat, response: WorkResponse) -> bytes:
    """One frame, whole. In JSON, output that is not UTF-8 has U+FFFD in place of what is not."""
    return response_encoder(wire_format)(response)


_SPACE = b" \t\r\n"
_MAX_UNDECIDED_BYTES = 256


def detect(first_bytes: bytes, *, at_eof: bool = False) -> WireFormat | None:
    """Which format a stream that begins with `first_bytes` speaks; None: more bytes are needed.

    A JSON stream begins with `{`, but so does a protobuf frame of 123 bytes. What follows there is
    the tag of the message's first field, and that of `arguments`, the usual one, is a newline, which
    may well follow the brace in JSON too. So the stream is JSON if and only if it begins with

        { }    or    { white-space } and white space or { behind it    or
        { white-space* " name " white-space* :

    where a name is an ASCII identifier. For a frame of protobuf to begin so, its first argument
    would have to be text like `"name":` or `} {`, and just as long as the character before it says.

    The head of a stream may stay undecided until the rest of it comes; if it has not come within
    256 bytes, or the stream ends, it is JSON if the name has begun and protobuf if not. The bytes
    given here are to be fed to the decoder, which says what is wrong with them.
    """
    if not first_bytes:
        return WireFormat.PROTO if at_eof else None
    if first_bytes[0] != 0x7B:
        return WireFormat.PROTO
    head = first_bytes[1 : _MAX_UNDECIDED_BYTES + 1].lstrip(_SPACE)
    if head.startswith(b"}"):
        if first_bytes[1:2] == b"}":
            return WireFormat.JSON  # no field of a WorkRequest has this tag
        follows = head[1:2]
        if not follows:
            return WireFormat.JSON if at_eof else None
        return WireFormat.JSON if follows in b" \t\r\n{" else WireFormat.PROTO
    if head and not head.startswith(b'"'):
        return WireFormat.PROTO
    name, quote, rest = head[1:].partition(b'"')
    if not _is_identifier(name, whole=bool(quote)):
        return WireFormat.PROTO
    rest = rest.lstrip(_SPACE)
    if rest:
        return WireFormat.JSON if rest.startswith(b":") else WireFormat.PROTO
    if at_eof or len(first_bytes) > _MAX_UNDECIDED_BYTES:
        return WireFormat.JSON if name else WireFormat.PROTO
    return None


def _is_identifier(name: bytes, *, whole: bool) -> bool:
    if not name:
        return not whole
    return name.isascii() and name.decode("ascii").isidentifier()
