"""JSON objects in a stream of bytes: where each one ends, without any I/O.

A stream is objects one after another, with or without white space between them (Bazel 4.2.3 sends
none), so where an object ends must be found before it can be parsed: only then, and once, does
`json_messages.py` look at it. Knows nothing of processes, pipes, or of which request a response
belongs to.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Generic, TypeVar

from wrapper.errors import SHOWN_BYTES, ProtocolError
from wrapper.worker_protocol.json_messages import (
    Unacceptable,
    encode_request,
    encode_response,
    parse_request,
    parse_response,
)
from wrapper.worker_protocol.messages import WorkRequest, WorkResponse
from wrapper.worker_protocol.proto_framing import DEFAULT_MAX_FRAME_BYTES

__all__ = ["JsonDecoder", "encode_request", "encode_response", "request_decoder", "response_decoder"]

M = TypeVar("M")

# Finding the end of an object. Each pattern matches as far as it can and never fails, and only runs
# of single characters are repeated without a bound: so the work is linear and the matcher's stack
# small. A whole string, or a whole object without another in it (an input), is skipped in C.
_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+){0,100}"'
_FLAT_OBJECT = rb'\{[^{}"]*+(?:' + _STRING + rb'[^{}"]*+){0,20}\}'
_OUTSIDE_STRINGS = re.compile(
    rb'[^{}"]*+(?:(?:' + _STRING + rb"|" + _FLAT_OBJECT + rb')[^{}"]*+){0,500}', re.DOTALL
)
_INSIDE_STRING = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+){0,500}', re.DOTALL)
_WHITE_SPACE = re.compile(rb"[ \t\r\n]*+")

_QUOTE, _BACKSLASH, _OPEN, _CLOSE = b'"\\{}'


class JsonDecoder(Generic[M]):
    """A decoder of one stream; the contract is `wire_format.MessageDecoder`'s."""

    __slots__ = (
        "_broken",
        "_buffer",
        "_depth",
        "_in_string",
        "_max_frame_bytes",
        "_offset",
        "_parse",
        "_scanned",
    )

    def __init__(self, parse: Callable[[bytes], M], max_frame_bytes: int) -> None:
        self._parse = parse
        self._max_frame_bytes = max_frame_bytes
        self._buffer = bytearray()
        self._offset = 0
        """Where in the stream the buffer begins: at the open object, or between two."""
        self._scanned = 0
        """How much of the buffer has been looked at."""
        self._depth = 0
        """How many braces are open where `_scanned` stands; 0: between objects."""
        self._in_string = False
        self._broken: ProtocolError | None = None

    def feed(self, data: bytes) -> None:
        if self._broken is None:
            self._buffer += data

    def next_message(self) -> M | None:
        if self._broken is not None:
            raise self._broken.with_traceback(None)
        buffer = self._buffer
        if not self._depth and not self._open_object():
            return None
        end = self._find_end()
        if (end or len(buffer)) > self._max_frame_bytes:
            raise self._break(f"a JSON object of at most {self._max_frame_bytes} bytes")
        if not end:
            return None
        try:
            message = self._parse(bytes(buffer[:end]))
        except Unacceptable as error:
            raise self._break(error.expected) from None
        self._drop(end)
        self._depth = self._scanned = 0
        return message

    @property
    def mid_frame(self) -> bool:
        return self._depth > 0

    def frame_overdue(self, timeout_s: float) -> ProtocolError:
        if self._broken is not None:
            return self._broken
        return self._error(
            f"the rest of a JSON object, of which {len(self._buffer)} bytes have come, within {timeout_s:g} s"
        )

    def end_of_stream(self) -> None:
        if self._broken is not None:
            raise self._broken.with_traceback(None)
        if self._depth:
            raise self._break(
                f"a whole JSON object, not the end of the stream after {len(self._buffer)} bytes of it"
            )

    def _open_object(self) -> bool:
        """Skip white space, and enter the next object if its first byte has come."""
        space = _WHITE_SPACE.match(self._buffer)
        if space is not None and space.end():
            self._drop(space.end())
        if not self._buffer:
            return False
        if self._buffer[0] != _OPEN:
            raise self._break("a JSON object")
        self._depth = self._scanned = 1
        self._in_string = False
        return True

    def _find_end(self) -> int:
        """Where the open object ends; 0 if that has not come yet. Looks at each byte once or twice."""
        buffer = self._buffer
        size = len(buffer)
        at = self._scanned
        while at < size:
            pattern = _INSIDE_STRING if self._in_string else _OUTSIDE_STRINGS
            match = pattern.match(buffer, at)
            at = match.end() if match is not None else at
            if at == size:
                break
            byte = buffer[at]
            if byte == _BACKSLASH and at + 1 == size:
                break  # what it escapes has not come yet
            if byte == _QUOTE:
                self._in_string = not self._in_string
                at += 1
            elif self._in_string:
                continue  # the pattern stopped at its bound
            elif byte == _OPEN:
                self._depth += 1
                at += 1
            elif byte == _CLOSE:
                self._depth -= 1
                at += 1
                if not self._depth:
                    return at
        self._scanned = at
        return 0

    def _drop(self, count: int) -> None:
        # Cutting off the front of a bytearray moves no bytes until half of it is free, so this is
        # linear in the length of the stream.
        del self._buffer[:count]
        self._offset += count

    def _error(self, expected: str) -> ProtocolError:
        return ProtocolError(offset=self._offset, expected=expected, seen=bytes(self._buffer[:SHOWN_BYTES]))

    def _break(self, expected: str) -> ProtocolError:
        self._broken = self._error(expected)
        self._buffer.clear()
        self._depth = 0
        return self._broken


def request_decoder(max_frame_bytes: int = DEFAULT_MAX_FRAME_BYTES) -> JsonDecoder[WorkRequest]:
    """A decoder for what a build tool sends."""
    return JsonDecoder(parse_request, max_frame_bytes)


def response_decoder(max_frame_bytes: int = DEFAULT_MAX_FRAME_BYTES) -> JsonDecoder[WorkResponse]:
    """A decoder for what a worker sends."""
    return JsonDecoder(parse_response, max_frame_bytes)
