"""A pool daemon that says to one client after the other what a test wants, and remembers what they sent."""

from __future__ import annotations

import array
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self


def frame(kind: bytes, payload: bytes = b"") -> bytes:
    """As `client_protocol.py` describes it, but written here: the tests are no copy of the product."""
    return kind + struct.pack("<I", len(payload)) + payload


TAKEN, WAITING = frame(b"T"), frame(b"W")


def end(code: int) -> bytes:
    return frame(b"E", struct.pack("<i", code))


def failure(kind: bytes, message: bytes = b"", code: int = 0) -> bytes:
    return frame(b"F", kind + bytes([code]) + message)


class Asked:
    """What one client has sent, and its connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        connection.settimeout(30)
        data, fds = b"", array.array("i")
        while len(data) < 8 or len(data) < 8 + struct.unpack_from("<I", data, 4)[0]:
            part, ancillary, _, _ = connection.recvmsg(1 << 20, socket.CMSG_SPACE(64))
            for _, _, rights in ancillary:
                fds.frombytes(rights)
            if not part:
                raise EOFError("the client has closed in the middle of its request")
            data += part
        self.raw = data
        self.descriptors = list(fds)
        self.cwd = os.readlink(f"/proc/self/fd/{fds[0]}") if fds else ""
        for fd in fds:
            os.close(fd)
        self.timeout_ms, argc, envc = struct.unpack_from("<QII", data, 8)
        strings = data[24:].split(b"\0")
        assert strings.pop() == b""
        assert len(strings) == 3 + argc + envc
        self.key, self.tool, self.protocol = strings[:3]
        self.argv, self.env = strings[3 : 3 + argc], strings[3 + argc :]

    def say(self, data: bytes, *, piece: int | None = None) -> None:
        """Send; in pieces of so many bytes, one after the other."""
        for at in range(0, len(data), piece or len(data) or 1):
            self.connection.sendall(data[at : at + (piece or len(data))])
            if piece:
                time.sleep(0)

    def wait_for_end(self) -> bytes:
        """What else the client sends, until it sends no more."""
        rest = b""
        try:
            while part := self.connection.recv(65536):
                rest += part
        except ConnectionResetError:
            pass  # it ended without having read all that was said
        return rest


Behaviour = Callable[[Asked], None]


class ScriptedDaemon:
    """Each client meets the next behaviour; the last one is met by all that follow."""

    def __init__(self, path: Path, *behaviours: Behaviour) -> None:
        self.path = path
        self.asked: list[Asked] = []
        self._behaviours = list(behaviours)
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._thread = threading.Thread(target=self._serve, name="scripted daemon")
        self.error: BaseException | None = None

    def __enter__(self) -> Self:
        self.path.unlink(missing_ok=True)
        self._listening.bind(str(self.path))
        self.path.chmod(0o777)
        self._listening.listen(64)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._listening.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._listening.close()
        self._thread.join(30)
        assert not self._thread.is_alive()
        self.path.unlink(missing_ok=True)
        if kind is None and self.error is not None:
            raise self.error

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            with connection:
                try:
                    asked = Asked(connection)
                    self.asked.append(asked)
                    behaviour = self._behaviours[0]
                    if len(self._behaviours) > 1:
                        del self._behaviours[0]
                    behaviour(asked)
                except (EOFError, BrokenPipeError, ConnectionResetError):
                    pass
                except BaseException as error:  # noqa: BLE001 - told in the test's thread
                    self.error = error


def saying(*data: bytes) -> Behaviour:
    """Say this and close."""
    return lambda asked: asked.say(b"".join(data))
