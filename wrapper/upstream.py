"""The stdin and stdout that a worker host gave us, made safe and non-blocking.

Owns the two descriptors: nothing else in this process, and no child, can write into the protocol by
accident. Knows bytes only.
"""

from __future__ import annotations

import asyncio
import os
import select
from collections.abc import Callable

READ_BYTES = 64 * 1024
"""Above 128 KiB each read would map and unmap its buffer: 18 µs, ten times the read itself."""
WRITE_HIGH_WATER_BYTES = 8 * 1024 * 1024


def claim_stdio() -> tuple[int, int]:
    """Take the protocol's descriptors away from everybody else: (to read, to write).

    Descriptor 0 is /dev/null from then on, and descriptor 1 is stderr, so that whatever prints does not
    break the protocol.
    """
    stdin_fd = os.dup(0)
    stdout_fd = os.dup(1)
    devnull = os.open(os.devnull, os.O_RDONLY)
    os.dup2(devnull, 0)
    os.close(devnull)
    os.dup2(2, 1)
    return stdin_fd, stdout_fd


class UpstreamReader:
    """Calls `on_data` for each chunk, and once with b"" at the end of the stream."""

    def __init__(self, fd: int, on_data: Callable[[bytes], None]) -> None:
        self._fd = fd
        self._on_data = on_data
        self._loop = asyncio.get_running_loop()
        self._is_always_ready = not _can_be_waited_for(fd)
        self._reading = False
        os.set_blocking(fd, False)

    def resume(self) -> None:
        if not self._reading and self._fd >= 0:
            self._reading = True
            if self._is_always_ready:
                self._loop.call_soon(self._readable)
            else:
                self._loop.add_reader(self._fd, self._readable)

    def pause(self) -> None:
        if self._reading:
            self._reading = False
            if not self._is_always_ready:
                self._loop.remove_reader(self._fd)

    def close(self) -> None:
        self.pause()
        if self._fd >= 0:
            os.set_blocking(self._fd, True)  # the flag is shared with whoever gave us the descriptor
            os.close(self._fd)
            self._fd = -1

    def _readable(self) -> None:
        if not self._reading:
            return
        try:
            data = os.read(self._fd, READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.pause()
        elif self._is_always_ready:
            self._loop.call_soon(self._readable)
        self._on_data(data)


class UpstreamWriter:
    """Writes frames in order and never blocks.

    `on_gone` is called once when nobody reads any more, `on_drained` each time when a congestion is over.
    """

    def __init__(self, fd: int, on_gone: Callable[[], None], on_drained: Callable[[], None]) -> None:
        self._fd = fd
        self._on_gone = on_gone
        self._on_drained = on_drained
        self._loop = asyncio.get_running_loop()
        self._unsent = bytearray()
        self._flushed = asyncio.Event()
        self._flushed.set()
        self._is_always_ready = not _can_be_waited_for(fd)
        os.set_blocking(fd, False)

    @property
    def is_congested(self) -> bool:
        """Whether more than WRITE_HIGH_WATER_BYTES wait for the reader."""
        return len(self._unsent) > WRITE_HIGH_WATER_BYTES

    def write(self, frame: bytes) -> None:
        if self._fd < 0:
            return
        if self._unsent:
            self._unsent += frame
            return
        written = self._write_some(frame)
        if written < len(frame) and self._fd >= 0:
            self._unsent += memoryview(frame)[written:]
            self._flushed.clear()
            self._loop.add_writer(self._fd, self._writable)

    async def flush(self) -> None:
        """Until the reader has taken everything, or is gone."""
        await self._flushed.wait()

    def close(self) -> None:
        if self._fd >= 0:
            if not self._is_always_ready:
                self._loop.remove_writer(self._fd)
            os.set_blocking(self._fd, True)
            os.close(self._fd)
            self._fd = -1
        self._unsent.clear()
        self._flushed.set()

    def _writable(self) -> None:
        was_congested = self.is_congested
        written = self._write_some(self._unsent)
        if self._fd < 0:
            return
        del self._unsent[:written]
        if not self._unsent:
            self._loop.remove_writer(self._fd)
            self._flushed.set()
        if was_congested and not self.is_congested:
            self._on_drained()

    def _write_some(self, data: bytes | bytearray) -> int:
        try:
            return os.write(self._fd, data)
        except BlockingIOError:
            return 0
        except OSError:
            self.close()
            self._loop.call_soon(self._on_gone)
            return len(data)


def _can_be_waited_for(fd: int) -> bool:
    """False for what epoll does not take, since it is always ready: a regular file, /dev/null."""
    poll = select.epoll()
    try:
        poll.register(fd, select.EPOLLIN)
    except PermissionError:
        return False
    finally:
        poll.close()
    return True
