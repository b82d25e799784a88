"""Reads one worker's standard error: into a bounded tail, the operator's log file, and on to our own stderr.

Owns the descriptor. Knows nothing of the worker.
"""

from __future__ import annotations

import asyncio
import os

from wrapper.runtime.stderr_log import RotatingFile, StderrForward, StderrLogs, StderrTail

_MOST_READS = 64
"""A descendant may write for ever: whoever drains the pipe stops after so many chunks."""


class StderrReader:
    """`name` is that of the log file, which workers of one name share."""

    def __init__(
        self,
        fd: int,
        loop: asyncio.AbstractEventLoop,
        name: str,
        logs: StderrLogs | None,
        forward: StderrForward | None,
    ) -> None:
        self._fd = fd
        self._loop = loop
        self._logs = logs
        self._forward = forward
        self._tail = StderrTail()
        self._file: RotatingFile | None = logs.borrow(name) if logs is not None else None
        loop.add_reader(fd, self._read)

    def begin(self, header: str) -> None:
        """Say in the log file whose lines come now."""
        if self._file is not None:
            self._file.write(header.encode(errors="backslashreplace"))

    def note(self, text: str) -> None:
        """Add a line of our own, as if the worker had said it last."""
        self.drain()
        self._take(f"nativelink_worker_wrapper: {text}\n".encode())

    def tail(self) -> bytes:
        """The last of what came, bounded."""
        self.drain()
        return self._tail.tail()

    def drain(self) -> None:
        """Read what is there now."""
        for _ in range(_MOST_READS):
            if not self._read():
                return

    def close(self) -> None:
        """Take what is there, then let go of everything but the tail. Idempotent."""
        self.drain()
        self._close_fd()
        if self._file is not None and self._logs is not None:
            self._logs.give_back(self._file)
            self._file = None

    def _read(self) -> bool:
        """False: nothing more to read now."""
        if self._fd < 0:
            return False
        try:
            data = os.read(self._fd, 65536)
        except BlockingIOError:
            return False
        if not data:
            self._close_fd()
            return False
        self._take(data)
        return True

    def _take(self, data: bytes) -> None:
        self._tail.feed(data)
        if self._file is not None:
            self._file.write(data)
        if self._forward is not None:
            self._forward.write(data)

    def _close_fd(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            self._loop.remove_reader(fd)
            os.close(fd)
