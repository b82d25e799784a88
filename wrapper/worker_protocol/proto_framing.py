"""Length-delimited protobuf: bytes to messages and back, without any I/O.

A frame is the length of the message as a varint, then the message. Knows nothing of processes,
pipes, or of which request a response belongs to.

The length: any varint of at most five bytes, which is what 32 bits need. One padded with zero bits
(`85 80 00` for 5) is accepted within that, because every protobuf runtime accepts it; a sixth byte
is an error whatever its value. A length above the limit is an error at once, before anything is
buffered for it. Length 0 is an ordinary frame: a message with every field at its default, which is
how Bazel's own workers say "success" to a singleplex request.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Generic, TypeVar

from google.protobuf.message import DecodeError

from wrapper.errors import SHOWN_BYTES, ProtocolError
from wrapper.worker_protocol import worker_protocol_pb2
from wrapper.worker_protocol.messages import WorkRequest, WorkResponse

M = TypeVar("M")

DEFAULT_MAX_FRAME_BYTES = 64 * 1024 * 1024

_MAX_VARINT_BYTES = 5
_MAX_LENGTH = (1 << 32) - 1
_TEXT = string.printable.encode("ascii")


class ProtoDecoder(Generic[M]):
    """A decoder of one stream; the contract is `wire_format.MessageDecoder`'s."""

    __slots__ = ("_broken", "_buffer", "_max_frame_bytes", "_needed", "_offset", "_parse")

    def __init__(self, parse: Callable[[bytearray], M], max_frame_bytes: int) -> None:
        self._parse = parse
        self._max_frame_bytes = max_frame_bytes
        self._buffer = bytearray()
        self._offset = 0
        """Where in the stream the buffer begins, which is always at the start of a frame."""
        self._needed = 1
        """How many bytes there must be in the buffer for a look at it to be worth while."""
        self._broken: ProtocolError | None = None

    def feed(self, data: bytes) -> None:
        if self._broken is None:
            self._buffer += data

    def next_message(self) -> M | None:
        buffer = self._buffer
        if len(buffer) < self._needed:
            return None
        if self._broken is not None:
            raise self._broken.with_traceback(None)
        length = buffer[0]
        begin = 1
        if length >= 0x80:
            header = self._read_long_length()
            if header is None:
                return None
            length, begin = header
        if length > self._max_frame_bytes:
            raise self._break(
                f"the length of a frame of at most {self._max_frame_bytes} bytes "
                f"(these bytes announce {length})"
            )
        end = begin + length
        if len(buffer) < end:
            self._needed = end
            return None
        try:
            message = self._parse(buffer[begin:end])
        except DecodeError:
            raise self._break(f"a protobuf message of {length} bytes") from None
        except _TextInsteadOfMessage:
            raise self._break(f"a protobuf message of {length} bytes, not text") from None
        # Cutting off the front of a bytearray moves no bytes until half of it is free, so this is
        # linear in the length of the stream.
        del buffer[:end]
        self._offset += end
        self._needed = 1
        return message

    @property
    def mid_frame(self) -> bool:
        return self._broken is None and bool(self._buffer)

    def frame_overdue(self, timeout_s: float) -> ProtocolError:
        if self._broken is not None:
            return self._broken
        come = len(self._buffer)
        if self._needed > 1:
            expected = f"the rest of a frame of {self._needed} bytes, of which {come} have come"
        else:
            expected = "the rest of the length of a frame"
        return self._error(f"{expected}, within {timeout_s:g} s{self._hint()}")

    def end_of_stream(self) -> None:
        if self._broken is not None:
            raise self._broken.with_traceback(None)
        come = len(self._buffer)
        if not come:
            return
        if self._needed > 1:
            expected = f"a whole frame of {self._needed} bytes, not the end of the stream after {come}"
        else:
            expected = "the length of a frame, not the end of the stream in the middle of it"
        raise self._break(expected + self._hint())

    def _read_long_length(self) -> tuple[int, int] | None:
        """The length and how many bytes it takes; None if its last byte has not come yet."""
        length = 0
        for position, byte in enumerate(self._buffer[:_MAX_VARINT_BYTES]):
            length |= (byte & 0x7F) << (7 * position)
            if byte < 0x80:
                if length > _MAX_LENGTH:
                    break
                return length, position + 1
        else:
            if len(self._buffer) < _MAX_VARINT_BYTES:
                return None
        raise self._break(f"the length of a frame, a varint of at most {_MAX_VARINT_BYTES} bytes and 32 bits")

    def _hint(self) -> str:
        seen = self._buffer[:SHOWN_BYTES]
        return " (this looks like text where a message should be)" if _is_text(seen) else ""

    def _error(self, expected: str) -> ProtocolError:
        return ProtocolError(offset=self._offset, expected=expected, seen=bytes(self._buffer[:SHOWN_BYTES]))

    def _break(self, expected: str) -> ProtocolError:
        self._broken = self._error(expected)
        self._buffer.clear()
        self._needed = 0
        return self._broken


class _TextInsteadOfMessage(Exception):
    pass


def _is_text(data: bytes | bytearray) -> bool:
    return not data.translate(None, _TEXT)


def _parse_request(
    data: bytearray,
    # Bound once: looking these up is a tenth of the time of a small message.
    parse: Callable[[bytearray], worker_protocol_pb2.WorkRequest] = (
        worker_protocol_pb2.WorkRequest.FromString  # type: ignore[assignment]
    ),
) -> WorkRequest:
    return WorkRequest(parse(data))


def _parse_response(
    data: bytearray,
    parse: Callable[[bytearray], worker_protocol_pb2.WorkResponse] = (
        worker_protocol_pb2.WorkResponse.FromString  # type: ignore[assignment]
    ),
) -> WorkResponse:
    pb = parse(data)
    # What a tool prints to its stdout can by bad luck parse as a message with nothing but unknown
    # fields, and would be a success that never happened. A message with any known field in it has
    # bytes that are not text, its tags (08, 12, 18) or the value of was_cancelled.
    if data and not pb.ListFields() and _is_text(data):
        raise _TextInsteadOfMessage
    return WorkResponse(pb)


def request_decoder(max_frame_bytes: int = DEFAULT_MAX_FRAME_BYTES) -> ProtoDecoder[WorkRequest]:
    """A decoder for what a build tool sends."""
    return ProtoDecoder(_parse_request, max_frame_bytes)


def response_decoder(max_frame_bytes: int = DEFAULT_MAX_FRAME_BYTES) -> ProtoDecoder[WorkResponse]:
    """A decoder for what a worker sends."""
    return ProtoDecoder(_parse_response, max_frame_bytes)


def encode_request(request: WorkRequest) -> bytes:
    """One frame. Unknown JSON fields are left out."""
    return _frame(request.pb.SerializeToString())


def encode_response(response: WorkResponse) -> bytes:
    """One frame. Unknown JSON fields are left out."""
    return _frame(response.pb.SerializeToString())


def _frame(body: bytes) -> bytes:
    length = len(body)
    if length < 0x80:
        return b"%c%b" % (length, body)
    if length < 0x4000:
        return b"%c%c%b" % (length & 0x7F | 0x80, length >> 7, body)
    header = bytearray()
    while length >= 0x80:
        header.append(length & 0x7F | 0x80)
        length >>= 7
    header.append(length)
    return bytes(header) + body
