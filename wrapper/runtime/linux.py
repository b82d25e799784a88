"""The few Linux facilities that the process runtime stands on, each behind one plain function.

Owns system calls and /proc formats that have nothing to do with workers as such; knows nothing of
pools, protocols or policies.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import random
import resource
import select
from collections.abc import Iterable, Iterator

PIPE_BYTES = 1 << 20
"""What data pipes are enlarged to: a request of ordinary size then fits in one write."""

_PR_SET_CHILD_SUBREAPER = 36  # prctl(2); sys/prctl.h
_PR_GET_CHILD_SUBREAPER = 37
_RLIMIT_LOCKS = 10  # setrlimit(2): has had no effect since Linux 2.4.25, but is inherited like any limit
_MAX_TAG = 1 << 62


def set_child_subreaper(on: bool) -> bool:
    """Make orphaned descendants of this process its own children; returns the state before.

    Raises OSError if the kernel refuses.
    """
    import ctypes  # 5 ms that only a process which starts workers has to pay

    libc = ctypes.CDLL(None, use_errno=True)
    before = ctypes.c_int(0)
    if libc.prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(before), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_GET_CHILD_SUBREAPER)")
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, int(on), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
    return bool(before.value)


def new_tag() -> int:
    """A number to mark a process and all its future descendants with (see `set_tag`)."""
    _, hard = resource.getrlimit(_RLIMIT_LOCKS)
    highest = _MAX_TAG if hard == resource.RLIM_INFINITY else min(hard, _MAX_TAG)
    return random.SystemRandom().randrange(1, max(2, highest))


@contextlib.contextmanager
def inherited_tag(tag: int) -> Iterator[None]:
    """Whatever this process starts meanwhile is born with the mark, so is all that it starts.

    To set it on a child that runs already would be too late: it may be forking at that moment.
    Other threads of ours may start processes meanwhile too: see `process_tree.unmark_strangers`.
    """
    soft, hard = resource.getrlimit(_RLIMIT_LOCKS)
    try:
        resource.setrlimit(_RLIMIT_LOCKS, (tag, hard))
    except (OSError, ValueError):
        yield
        return
    try:
        yield
    finally:
        resource.setrlimit(_RLIMIT_LOCKS, (soft, hard))


def set_tag(pid: int, tag: int) -> None:
    """Make the mark of a process permanent, if it exists and the system allows it.

    The mark is the resource limit RLIMIT_LOCKS, which the kernel no longer looks at: it survives
    fork, exec, setsid and an emptied environment, and a zombie still has it. Nothing else on Linux
    has all of that and needs no privilege. Here the hard limit is lowered as well, so that an
    unprivileged process cannot take the mark off.
    """
    try:
        resource.prlimit(pid, _RLIMIT_LOCKS, (tag, tag))
    except (OSError, ValueError):
        pass


def remove_inherited_tag(pid: int) -> None:
    """Give a process the limit that we have ourselves, if it exists and the system allows it."""
    try:
        resource.prlimit(pid, _RLIMIT_LOCKS, resource.getrlimit(_RLIMIT_LOCKS))
    except (OSError, ValueError):
        pass


def tag_of(pid: int) -> int | None:
    """The mark of a process; None if it has none or is gone."""
    try:
        with open(f"/proc/{pid}/limits", "rb", buffering=0) as limits:
            text = limits.read(8192)
    except OSError:
        return None
    _, found, rest = text.partition(b"Max file locks")
    word = rest.split(None, 1)[0] if found else b""
    return int(word) if word.isdigit() else None


def set_pipe_size(fd: int, size: int) -> int:
    """Ask for a pipe buffer of `size` bytes, then for less; returns what the pipe has.

    Above /proc/sys/fs/pipe-user-pages-soft an unprivileged user is refused: then a smaller pipe
    must do, it only costs more turns.
    """
    while size >= 4096:
        try:
            return fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, size)
        except OSError:
            size //= 4
    return fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ)


class PidCursor:
    """Tells cheaply whether any process or thread was created on the system since the last look.

    It is the last field of /proc/loadavg: the last pid that the kernel has given out. A faked
    /proc/loadavg (lxcfs puts one over the real one) lags behind, so it is not believed.
    """

    def __init__(self) -> None:
        self._fd = -1
        try:
            self._fd = os.open("/proc/loadavg", os.O_RDONLY | os.O_CLOEXEC)
            if os.fstat(self._fd).st_dev != os.stat("/proc/self").st_dev:
                self.close()
        except OSError:
            self.close()

    def read(self) -> bytes | None:
        """The current position, to be compared for equality; None: cannot be told."""
        if self._fd < 0:
            return None
        try:
            return os.pread(self._fd, 128, 0).rsplit(b" ", 1)[-1]
        except OSError:
            return None

    def close(self) -> None:
        """Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def open_pidfds(pids: Iterable[int]) -> list[int]:
    """One pidfd for each of the processes that still exist."""
    fds: list[int] = []
    for pid in pids:
        try:
            fds.append(os.pidfd_open(pid))
        except ProcessLookupError:
            continue
        except OSError:
            close_all(fds)
            raise
    return fds


def close_all(fds: Iterable[int]) -> None:
    """Close every descriptor of a list that we own."""
    for fd in fds:
        os.close(fd)


async def wait_until_dead(pids: Iterable[int], timeout_s: float) -> None:
    """Return when all processes are dead (zombies are), or after `timeout_s`."""
    loop = asyncio.get_running_loop()
    waiting = set(open_pidfds(pids))
    if not waiting:
        return
    all_dead: asyncio.Future[None] = loop.create_future()

    def dead(fd: int) -> None:
        loop.remove_reader(fd)
        os.close(fd)
        waiting.discard(fd)
        if not waiting and not all_dead.done():
            all_dead.set_result(None)

    for fd in waiting:
        loop.add_reader(fd, dead, fd)
    try:
        async with asyncio.timeout(timeout_s):
            await all_dead
    except TimeoutError:
        pass
    finally:
        for fd in waiting:
            loop.remove_reader(fd)
            os.close(fd)


def block_until_dead(pids: Iterable[int], timeout_s: float) -> None:
    """`wait_until_dead` for the one moment when there may be no more awaits: a cancelled stop."""
    fds = open_pidfds(pids)
    try:
        for fd in fds:
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            poll.poll(timeout_s * 1000)
    finally:
        close_all(fds)
