"""What the per-action client and the daemon say to each other: bytes to messages and back, no I/O.

Owns the two formats and every bound. Knows nothing of sockets, of the descriptor that comes with the
first byte of a request, or of what a message makes anybody do. Integers are little-endian.

The client sends one request and nothing after it: the magic `NLA1`, the length of the body as u32, and
the body: the time-out in milliseconds as u64 (0: none), the numbers of arguments and of variables as u32
each, then as many NUL-terminated strings: key, tool, protocol, the arguments, the variables as `NAME=value`.

The daemon sends frames: a letter, the length of the payload as u32, the payload.

| letter | payload | says | when |
|---|---|---|---|
| W | none | it is alive, and the action waits or runs | at any time |
| T | none | TAKEN: from now on nobody else may run this action | once, before the tree is touched |
| O | reason | ONE_SHOT: run it yourself; the tree is as it was | last |
| B | reason | BUSY: it cannot be served now | last, before T |
| D | bytes | to be written to the client's stderr | after T |
| E | i32 | END: the action's exit code | last, after T |
| F | kind, exit code, message | FAILURE: see `FailureKind` | last |

`native/client.c` and `wrapper/client.py` speak it too; `tests/client/vectors.json` holds the three
together.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from wrapper.errors import SHOWN_BYTES, ProtocolError

MAGIC: Final = b"NLA1"
MAX_BODY_BYTES: Final = 8 << 20
MAX_STRINGS: Final = 65536
"""At most so many arguments, and as many variables."""
MAX_NAME_BYTES: Final = 4096
"""Of key, tool and protocol, each."""
MAX_TIMEOUT_MS: Final = 7 * 24 * 3600 * 1000

MAX_REASON_BYTES: Final = 4096
MAX_OUTPUT_BYTES: Final = 65536
MAX_MESSAGE_BYTES: Final = 16384

WAITING_EVERY_S: Final = 10.0
"""How often the daemon sends `waiting`. After a much longer silence (`silence_s`) it counts as dead."""

_HEADER = struct.Struct("<4sI")
_COUNTS = struct.Struct("<QII")
_FRAME = struct.Struct("<cI")
_END = struct.Struct("<i")


@dataclass(frozen=True, slots=True)
class ActionRequest:
    """One action as the client was started with it. Strings that are not UTF-8 hold surrogate escapes."""

    argv: tuple[str, ...]
    env: tuple[tuple[str, str], ...]
    key: str = ""
    tool: str = ""
    protocol: str = ""
    timeout_s: float | None = None


class FailureKind(Enum):
    """Why an action has no exit code of its own. The value is what stands in the frame."""

    TIMEOUT = "t"
    """The action's own time-out has expired."""
    LOST = "l"
    """The worker or what it runs on was lost: nobody knows how far the action came."""
    CANCELLED = "c"
    """The client asked for that."""
    REFUSED = "r"
    """The action is wrong as it stands; the client exits with the code that comes along."""


# ---- the request ---------------------------------------------------------------------------------------


class RequestDecoder:
    """Of one connection. The first error stays: every later call raises it again."""

    __slots__ = ("_broken", "_buffer", "_needed", "_offset")

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._needed = _HEADER.size
        """How many bytes there must be for a look to be worth while; 0 once the request has come."""
        self._offset = 0
        self._broken: ProtocolError | None = None

    def feed(self, data: bytes) -> ActionRequest | None:
        """Take what has come; returns the request once it is whole. Raises ProtocolError.

        The buffer grows with what has come, never with what was announced.
        """
        if self._broken is not None:
            raise self._broken.with_traceback(None)
        if not data:
            return None
        if not self._needed:
            self._buffer += data[:SHOWN_BYTES]
            raise self._break("nothing after the request")
        self._buffer += data
        if self._needed == _HEADER.size and not self._read_header():
            return None
        if len(self._buffer) < self._needed:
            return None
        if len(self._buffer) > self._needed:
            self._offset = self._needed
            del self._buffer[: self._needed]
            raise self._break("nothing after the request")
        body = bytes(memoryview(self._buffer)[_HEADER.size :])
        request = self._read_body(body)
        self._offset = self._needed
        self._needed = 0
        self._buffer.clear()
        return request

    @property
    def is_complete(self) -> bool:
        """Whether the request has come, so that an end of the stream is no error."""
        return self._needed == 0

    def end_of_stream(self) -> None:
        """No more bytes come. Raises ProtocolError unless the request is complete."""
        if self._broken is not None:
            raise self._broken.with_traceback(None)
        if not self.is_complete:
            raise self._break(
                f"a whole request, of which {len(self._buffer)} of at least {self._needed} bytes have come"
            )

    def _read_header(self) -> bool:
        """Whether it is whole."""
        come = len(self._buffer)
        if not MAGIC.startswith(self._buffer[:4]):
            raise self._break(f"a request, which begins with {MAGIC!r}")
        if come < _HEADER.size:
            return False
        length = _HEADER.unpack_from(self._buffer)[1]
        if not _COUNTS.size <= length <= MAX_BODY_BYTES:
            raise self._break(
                f"the length of a request, {_COUNTS.size} to {MAX_BODY_BYTES} bytes, not {length}"
            )
        self._needed = _HEADER.size + length
        return True

    def _read_body(self, body: bytes) -> ActionRequest:
        timeout_ms, argc, envc = _COUNTS.unpack_from(body)
        if timeout_ms > MAX_TIMEOUT_MS:
            raise self._break(f"a time-out of at most {MAX_TIMEOUT_MS} ms, not {timeout_ms}")
        if not (1 <= argc <= MAX_STRINGS and envc <= MAX_STRINGS):
            raise self._break(f"1 to {MAX_STRINGS} arguments and at most {MAX_STRINGS} variables")
        # Counted before they are cut apart: eight million empty strings are not worth a list.
        if body.count(0, _COUNTS.size) != 3 + argc + envc or body[-1]:
            raise self._break(f"{3 + argc + envc} strings that fill the body, each with a NUL at its end")
        texts = [text.decode("utf-8", "surrogateescape") for text in body[_COUNTS.size : -1].split(b"\0")]
        if any(len(text.encode("utf-8", "surrogateescape")) > MAX_NAME_BYTES for text in texts[:3]):
            raise self._break(f"a key, a tool and a protocol of at most {MAX_NAME_BYTES} bytes each")
        env = []
        for text in texts[3 + argc :]:
            name, equals, value = text.partition("=")
            if not name or not equals:
                raise self._break("a variable as NAME=value")
            env.append((name, value))
        return ActionRequest(
            argv=tuple(texts[3 : 3 + argc]),
            env=tuple(env),
            key=texts[0],
            tool=texts[1],
            protocol=texts[2],
            timeout_s=timeout_ms / 1000 if timeout_ms else None,
        )

    def _break(self, expected: str) -> ProtocolError:
        self._broken = ProtocolError(
            offset=self._offset, expected=expected, seen=bytes(self._buffer[:SHOWN_BYTES])
        )
        self._buffer.clear()
        return self._broken


def encode_request(request: ActionRequest) -> bytes:
    """What a client sends, the descriptor apart. Raises ValueError for what is out of bounds."""
    timeout_ms = 0 if request.timeout_s is None else round(request.timeout_s * 1000)
    names = [_bytes(text) for text in (request.key, request.tool, request.protocol)]
    texts = [*names, *map(_bytes, request.argv)]
    for name, value in request.env:
        if not name or "=" in name:
            raise ValueError(f"{name!r} is no name of a variable")
        texts.append(_bytes(f"{name}={value}"))
    if any(b"\0" in text for text in texts):
        raise ValueError("no string may hold a NUL")
    body = _COUNTS.pack(timeout_ms, len(request.argv), len(request.env)) + b"".join(t + b"\0" for t in texts)
    if (
        max(map(len, names)) > MAX_NAME_BYTES
        or not 1 <= len(request.argv) <= MAX_STRINGS
        or len(request.env) > MAX_STRINGS
        or len(body) > MAX_BODY_BYTES
        or timeout_ms > MAX_TIMEOUT_MS
    ):
        raise ValueError("the request is too large")
    return _HEADER.pack(MAGIC, len(body)) + body


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


# ---- the daemon's frames -------------------------------------------------------------------------------


def waiting() -> bytes:
    return _frame(b"W", b"")


def taken() -> bytes:
    """To be sent, whole, before the tree is touched: a client that gave up makes the sending fail."""
    return _frame(b"T", b"")


def one_shot(reason: str) -> bytes:
    return _frame(b"O", _cut(reason, MAX_REASON_BYTES))


def busy(reason: str) -> bytes:
    return _frame(b"B", _cut(reason, MAX_REASON_BYTES))


def output(data: bytes) -> bytes:
    """Any number of bytes, in as many frames as it takes."""
    view = memoryview(data)
    return b"".join(
        _frame(b"D", view[at : at + MAX_OUTPUT_BYTES]) for at in range(0, len(view), MAX_OUTPUT_BYTES)
    )


def end(exit_code: int) -> bytes:
    return _frame(b"E", _END.pack(exit_code))


def failure(kind: FailureKind, message: str, exit_code: int = 0) -> bytes:
    """`exit_code`: that of REFUSED, 1 to 255."""
    if not (1 if kind is FailureKind.REFUSED else 0) <= exit_code <= 255:
        raise ValueError(f"{exit_code} is no exit code of {kind}")
    return _frame(b"F", kind.value.encode() + bytes((exit_code,)) + _cut(message, MAX_MESSAGE_BYTES))


def _frame(letter: bytes, payload: bytes | memoryview) -> bytes:
    return _FRAME.pack(letter, len(payload)) + payload


def _cut(text: str, max_bytes: int) -> bytes:
    """As UTF-8, without half a character at the end."""
    data = text.encode("utf-8", "replace")
    return data if len(data) <= max_bytes else data[:max_bytes].decode("utf-8", "ignore").encode()


# ---- and their decoder: for tests, and for clients in Python that need not start fast ------------------


@dataclass(frozen=True, slots=True)
class Waiting:
    pass


@dataclass(frozen=True, slots=True)
class Taken:
    pass


@dataclass(frozen=True, slots=True)
class OneShotReply:
    reason: str


@dataclass(frozen=True, slots=True)
class Busy:
    reason: str


@dataclass(frozen=True, slots=True)
class Output:
    data: bytes


@dataclass(frozen=True, slots=True)
class End:
    exit_code: int


@dataclass(frozen=True, slots=True)
class Failure:
    kind: FailureKind
    message: str
    exit_code: int = 0


Reply = Waiting | Taken | OneShotReply | Busy | Output | End | Failure

_LENGTHS = {
    "W": (0, 0),
    "T": (0, 0),
    "O": (0, MAX_REASON_BYTES),
    "B": (0, MAX_REASON_BYTES),
    "D": (1, MAX_OUTPUT_BYTES),
    "E": (_END.size, _END.size),
    "F": (2, 2 + MAX_MESSAGE_BYTES),
}


class ReplyDecoder:
    """Of one connection. What came before a malformed frame is returned first; then the error stays."""

    __slots__ = ("_broken", "_buffer", "_offset", "is_over", "is_taken")

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._offset = 0
        self._broken: ProtocolError | None = None
        self.is_taken = False
        self.is_over = False
        """The last frame has come."""

    def feed(self, data: bytes) -> None:
        if self._broken is None:
            self._buffer += data

    def next_reply(self) -> Reply | None:
        """The next whole frame, or None. Raises ProtocolError."""
        if self._broken is not None:
            raise self._broken.with_traceback(None)
        buffer = self._buffer
        if not buffer:
            return None
        letter = chr(buffer[0])
        if self.is_over:
            raise self._break("nothing after the last frame")
        if letter not in _LENGTHS:
            raise self._break(f"one of the frames {' '.join(_LENGTHS)}")
        if letter in ("TB" if self.is_taken else "DE"):
            raise self._break(f"no {letter} {'after' if self.is_taken else 'before'} TAKEN")
        if len(buffer) < _FRAME.size:
            return None
        length = _FRAME.unpack_from(buffer)[1]
        least, most = _LENGTHS[letter]
        if not least <= length <= most:
            raise self._break(f"{least} to {most} bytes in a frame {letter}, not {length}")
        if letter == "F" and len(buffer) > _FRAME.size and chr(buffer[_FRAME.size]) not in "tlcr":
            raise self._break("the kind of a failure")
        whole = _FRAME.size + length
        if len(buffer) < whole:
            return None
        payload = bytes(memoryview(buffer)[_FRAME.size : whole])
        del buffer[:whole]
        self._offset += whole
        self.is_taken |= letter == "T"
        self.is_over = letter in "OBEF"
        return _reply(letter, payload)

    def _break(self, expected: str) -> ProtocolError:
        self._broken = ProtocolError(
            offset=self._offset, expected=expected, seen=bytes(self._buffer[:SHOWN_BYTES])
        )
        self._buffer.clear()
        return self._broken


def _reply(letter: str, payload: bytes) -> Reply:
    match letter:
        case "W":
            return Waiting()
        case "T":
            return Taken()
        case "O":
            return OneShotReply(payload.decode("utf-8", "replace"))
        case "B":
            return Busy(payload.decode("utf-8", "replace"))
        case "D":
            return Output(payload)
        case "E":
            return End(_END.unpack(payload)[0])
    return Failure(FailureKind(chr(payload[0])), payload[2:].decode("utf-8", "replace"), payload[1])


def replies(decoder: ReplyDecoder, chunks: Iterable[bytes]) -> Sequence[Reply]:
    """All that is whole in these chunks. Raises ProtocolError."""
    found = []
    for chunk in chunks:
        decoder.feed(chunk)
        while (reply := decoder.next_reply()) is not None:
            found.append(reply)
    return found
