"""Frames between the per-action client and the pool daemon, sans-IO.

A request is one message: magic, length, time-out, numbers of strings, then the strings, each ended by a
zero byte; the working directory's descriptor comes with its first byte. An answer is a row of frames: kind,
length, payload. Numbers are little-endian. `native/client.c` and `wrapper/client.py` speak the same, which
`tests/client/` holds them to.

Knows nothing of sockets, nor of what an action is.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from wrapper.errors import ProtocolError

MAGIC = b"NLA1"
MAX_BODY_BYTES = 8 << 20
MAX_STRINGS = 65536
"""Arguments, and environment variables, each."""
MAX_FIELD_BYTES = 4096
"""Of key, tool and protocol each."""
MAX_FRAME_BYTES = 65536
MAX_REASON_BYTES = 4096
MAX_MESSAGE_BYTES = 16384

_HEAD = struct.Struct("<4sI")
_NUMBERS = struct.Struct("<QII")
_FRAME = struct.Struct("<cI")


@dataclass(frozen=True, slots=True)
class ActionRequest:
    """What a client asks for. Strings are decoded as file names are: any bytes survive."""

    argv: tuple[str, ...]
    env: tuple[tuple[str, str], ...]
    key: str
    """persistentWorkerKey."""
    tool: str
    """persistentWorkerTool."""
    protocol: str
    """persistentWorkerProtocol."""
    timeout_s: float | None
    """The action's own; None: it has none."""


class FrameKind(Enum):
    WAITING = b"W"
    """The daemon lives, and the action waits or is being served."""
    TAKEN = b"T"
    """The action's files are the daemon's from here on."""
    ONE_SHOT = b"O"
    """The client shall run the action itself; its files are as they came."""
    BUSY = b"B"
    """No worker can take it now; its files are as they came."""
    OUTPUT = b"D"
    END = b"E"
    FAILURE = b"F"


class FailureKind(Enum):
    TIMEOUT = b"t"
    LOST = b"l"
    """What runs the workers failed, not the action: it may be run again from its inputs."""
    CANCELLED = b"c"
    REFUSED = b"r"
    """The action itself is wrong."""


class RequestDecoder:
    """Bytes in any pieces; the request when it is whole."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._done = False

    def feed(self, data: bytes) -> ActionRequest | None:
        """Raises ProtocolError; after that, and after the request, nothing more may come."""
        if self._done and data:
            raise ProtocolError(offset=len(self._data), expected="nothing after the request", seen=data)
        self._data += data
        if len(self._data) < _HEAD.size:
            if not MAGIC.startswith(self._data[: len(MAGIC)]):
                raise self._wrong(f"a request, which begins with {MAGIC!r}")
            return None
        magic, length = _HEAD.unpack_from(self._data)
        if magic != MAGIC:
            raise self._wrong(f"a request, which begins with {MAGIC!r}")
        if not _NUMBERS.size <= length <= MAX_BODY_BYTES:
            raise self._wrong(f"a length of {_NUMBERS.size} to {MAX_BODY_BYTES} bytes", 4)
        if len(self._data) < _HEAD.size + length:
            return None
        self._done = True
        if len(self._data) > _HEAD.size + length:
            raise self._wrong("nothing after the request", _HEAD.size + length)
        return self._request()

    def _request(self) -> ActionRequest:
        timeout_ms, argc, envc = _NUMBERS.unpack_from(self._data, _HEAD.size)
        if not 1 <= argc <= MAX_STRINGS or envc > MAX_STRINGS:
            raise self._wrong(f"1 to {MAX_STRINGS} arguments and at most as many variables", 16)
        text = bytes(self._data[_HEAD.size + _NUMBERS.size :])
        parts = text.decode("utf-8", "surrogateescape").split("\0")
        if len(parts) != 3 + argc + envc + 1 or parts[-1]:
            raise self._wrong(f"{3 + argc + envc} strings, each ended by a zero byte", 24)
        key, tool, protocol = parts[:3]
        if any(len(field.encode("utf-8", "surrogateescape")) > MAX_FIELD_BYTES for field in parts[:3]):
            raise self._wrong(f"key, tool and protocol of at most {MAX_FIELD_BYTES} bytes each", 24)
        env = []
        for variable in parts[3 + argc : -1]:
            name, equals, value = variable.partition("=")
            if not equals:
                raise self._wrong("NAME=VALUE", 24)
            env.append((name, value))
        timeout_s = timeout_ms / 1000 if timeout_ms else None
        return ActionRequest(tuple(parts[3 : 3 + argc]), tuple(env), key, tool, protocol, timeout_s)

    def _wrong(self, expected: str, offset: int = 0) -> ProtocolError:
        return ProtocolError(offset=offset, expected=expected, seen=bytes(self._data[offset : offset + 64]))


def encode_request(request: ActionRequest) -> bytes:
    """As a client sends it. Raises ValueError if it is too large or has a zero byte in a string."""
    strings = [request.key, request.tool, request.protocol, *request.argv]
    strings += [f"{name}={value}" for name, value in request.env]
    if any("\0" in text for text in strings):
        raise ValueError("a string with a zero byte")
    text = "".join(f"{one}\0" for one in strings).encode("utf-8", "surrogateescape")
    timeout_ms = 0 if request.timeout_s is None else max(1, round(request.timeout_s * 1000))
    body = _NUMBERS.pack(timeout_ms, len(request.argv), len(request.env)) + text
    if len(body) > MAX_BODY_BYTES or max(len(request.argv), len(request.env)) > MAX_STRINGS:
        raise ValueError("the request is too large")
    return _HEAD.pack(MAGIC, len(body)) + body


def taken() -> bytes:
    return _frame(FrameKind.TAKEN)


def waiting() -> bytes:
    return _frame(FrameKind.WAITING)


def one_shot(reason: str) -> bytes:
    return _frame(FrameKind.ONE_SHOT, _bounded(reason, MAX_REASON_BYTES))


def busy(reason: str) -> bytes:
    return _frame(FrameKind.BUSY, _bounded(reason, MAX_REASON_BYTES))


def output(data: bytes) -> bytes:
    """As many frames as it takes; none for nothing."""
    return b"".join(
        _frame(FrameKind.OUTPUT, data[at : at + MAX_FRAME_BYTES])
        for at in range(0, len(data), MAX_FRAME_BYTES)
    )


def end(exit_code: int) -> bytes:
    return _frame(FrameKind.END, struct.pack("<i", exit_code))


def failure(kind: FailureKind, message: str, exit_code: int = 0) -> bytes:
    """`exit_code`: for REFUSED, 0 to 255."""
    return _frame(
        FrameKind.FAILURE, kind.value + bytes([exit_code & 255]) + _bounded(message, MAX_MESSAGE_BYTES)
    )


def _frame(kind: FrameKind, payload: bytes = b"") -> bytes:
    return _FRAME.pack(kind.value, len(payload)) + payload


def _bounded(text: str, most: int) -> bytes:
    """Of a text that is too long, the begin and the end: what was wrong, and the last lines of a stderr."""
    data = text.replace("\0", "?").encode("utf-8", "replace")
    if len(data) <= most:
        return data
    cut = b"\n...\n"
    first = most // 4
    kept = data[:first] + cut + data[len(data) - (most - first - len(cut)) :]
    return kept.decode("utf-8", "ignore").encode()


class ReplyDecoder:
    """A client's side, for Python: bytes in any pieces, whole frames out. Raises ProtocolError."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> Iterable[tuple[FrameKind, bytes]]:
        self._data += data
        frames = []
        while len(self._data) >= _FRAME.size:
            kind, length = _FRAME.unpack_from(self._data)
            if length > MAX_FRAME_BYTES or kind not in _KINDS:
                raise ProtocolError(offset=0, expected="a frame", seen=bytes(self._data[:64]))
            if len(self._data) < _FRAME.size + length:
                break
            frames.append((_KINDS[kind], bytes(self._data[_FRAME.size : _FRAME.size + length])))
            del self._data[: _FRAME.size + length]
        return frames


_KINDS = {kind.value: kind for kind in FrameKind}
