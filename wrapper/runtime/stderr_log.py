"""A worker's standard error: a bounded tail in memory for error messages, a rotating file for the operator.

Knows nothing of processes or event loops: whoever reads the pipe feeds the bytes in.
"""

from __future__ import annotations

import logging
import os
import re
import select

TAIL_BYTES = 64 * 1024

_log = logging.getLogger(__name__)


class StderrTail:
    """The last `limit` bytes that were fed in."""

    def __init__(self, limit: int = TAIL_BYTES) -> None:
        self._limit = limit
        self._data = bytearray()

    def feed(self, data: bytes) -> None:
        """Keep the newest bytes."""
        self._data += data
        if len(self._data) > 2 * self._limit:  # cut seldom: cutting copies
            del self._data[: -self._limit]

    def tail(self) -> bytes:
        """At most `limit` bytes."""
        return bytes(self._data[-self._limit :])


class RotatingFile:
    """Appends to `path`; at `max_bytes` it becomes `path.1`, that `path.2`, up to `backups`.

    A full disk or a vanished directory never disturbs the worker: the bytes are dropped and one
    warning is logged, until writing works again.
    """

    def __init__(self, path: str, *, max_bytes: int, backups: int) -> None:
        self.path = path
        self._max_bytes = max_bytes
        self._backups = backups
        self._fd = -1
        self._size = 0
        self._complained = False

    def write(self, data: bytes) -> None:
        """Append; rotates before the file would grow above its limit."""
        try:
            if self._fd < 0:
                self._open()
            if self._size and self._size + len(data) > self._max_bytes:
                self._rotate()
            view = memoryview(data)
            while view:
                written = os.write(self._fd, view)
                self._size += written
                view = view[written:]
            self._complained = False
        except OSError as error:
            if not self._complained:
                self._complained = True
                _log.warning("cannot write a worker's stderr to %s: %s", self.path, error)
            self.close()

    def _open(self) -> None:
        os.makedirs(os.path.dirname(self.path), mode=0o755, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        self._fd = os.open(self.path, flags, 0o644)
        self._size = os.fstat(self._fd).st_size

    def _rotate(self) -> None:
        self.close()
        if self._backups == 0:
            os.unlink(self.path)
        for number in range(self._backups, 0, -1):
            source = self.path if number == 1 else f"{self.path}.{number - 1}"
            try:
                os.replace(source, f"{self.path}.{number}")
            except FileNotFoundError:
                continue
        self._open()

    def close(self) -> None:
        """Idempotent; a later write opens the file again."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class StderrForward:
    """Passes workers' stderr on to a descriptor of ours, and never waits for whoever reads that.

    What does not fit into a pipe that nobody empties is dropped, and counted in the next line that fits.
    """

    _PIECE_BYTES = 4096
    """PIPE_BUF: a pipe that is writable at all takes so much without blocking (pipe(7))."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)
        self._dropped = 0

    def write(self, data: bytes) -> None:
        """Pass on what can be passed on now."""
        if self._dropped:
            data = f"\n[{self._dropped} bytes of a worker's stderr were dropped]\n".encode() + data
            self._dropped = 0
        for begin in range(0, len(data), self._PIECE_BYTES):
            if not self._write_piece(data[begin : begin + self._PIECE_BYTES]):
                self._dropped += len(data) - begin
                return

    def _write_piece(self, piece: bytes) -> bool:
        try:
            ready = self._poll.poll(0)
            return bool(ready) and bool(ready[0][1] & select.POLLOUT) and os.write(self._fd, piece) > 0
        except OSError:
            return False


class StderrLogs:
    """The log files of one directory, one for each name; workers of one name share the file."""

    def __init__(self, directory: str, *, max_bytes: int = 8 << 20, backups: int = 3) -> None:
        self._directory = directory
        self._max_bytes = max_bytes
        self._backups = backups
        self._files: dict[str, tuple[RotatingFile, int]] = {}

    def borrow(self, name: str) -> RotatingFile:
        """The file of a name; give it back with `give_back`."""
        safe = re.sub(r"[^A-Za-z0-9._+-]", "_", name).lstrip(".")[:100] or "worker"
        path = os.path.join(self._directory, f"{safe}.stderr.log")
        file, users = self._files.get(path, (None, 0))
        if file is None:
            file = RotatingFile(path, max_bytes=self._max_bytes, backups=self._backups)
        self._files[path] = (file, users + 1)
        return file

    def give_back(self, file: RotatingFile) -> None:
        """The last one to give a file back closes it."""
        _, users = self._files[file.path]
        if users > 1:
            self._files[file.path] = (file, users - 1)
        else:
            del self._files[file.path]
            file.close()
