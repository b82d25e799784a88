"""The moment when a worker begins to read its first request: what exists then is its own.

Its stdin is a pipe that holds one page until then, so that the write end becomes writable exactly when the
worker has taken the first bytes out. Knows nothing of what is there at that moment.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

from wrapper.runtime import linux


class FirstRead:
    """Calls `begun` then; what the worker does until the loop's next turn counts as before it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, begun: Callable[[], None]) -> None:
        self._loop = loop
        self._begun = begun
        self._fd = -1

    def watch(self, stdin_fd: int) -> None:
        """The first bytes are in the pipe. On a duplicate: the pool may wait on the descriptor itself."""
        if self._fd < 0 and stdin_fd >= 0:
            self._fd = os.dup(stdin_fd)
            self._loop.add_writer(self._fd, self._begun)

    def is_over(self, stdin_fd: int) -> None:
        """It has happened: from now on the pipe holds as much as it may."""
        self.close()
        if stdin_fd >= 0:
            linux.set_pipe_size(stdin_fd, linux.PIPE_BYTES)

    def close(self) -> None:
        """Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            self._loop.remove_writer(fd)
            os.close(fd)
