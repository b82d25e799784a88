"""Finds, kills and reaps the processes that descend from one worker. Linux's /proc, no psutil.

A daemonised descendant (double fork, setsid, cleaned environment) leaves the tree below the
worker's main process, but not our sight: we are a sub-reaper, so it becomes a child of our own
process, and it still carries the worker's tag (`linux.set_tag`). Children of our process without
the tag belong to somebody else in it and are never touched.

Knows nothing of protocols, pipes or temporary files.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable
from dataclasses import dataclass

from wrapper.errors import RuntimeUnavailable
from wrapper.runtime import linux

KILL_TIMEOUT_S = 10.0
"""After a SIGKILL; only a process in uninterruptible sleep (a hung network file system) takes longer."""

_ROUNDS = 200
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class ProcStat:
    """Some fields of /proc/PID/stat. `start_ticks` and the pid together identify a process."""

    state: str
    parent: int
    session: int
    threads: int
    start_ticks: int

    @property
    def is_dead(self) -> bool:
        """Dead as a whole: a main thread may be a zombie while others still run and hold files."""
        return self.state in "ZXx" and self.threads <= 1


def _read(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        chunks = [os.read(fd, 65536)]
        while len(chunks[-1]) == 65536:
            chunks.append(os.read(fd, 65536))
        return b"".join(chunks)
    finally:
        os.close(fd)


def parse_stat(text: bytes) -> ProcStat:
    """Parse /proc/PID/stat. The name in parentheses may itself hold blanks and parentheses."""
    fields = text[text.rindex(b")") + 2 :].split()
    return ProcStat(
        state=fields[0].decode("ascii"),
        parent=int(fields[1]),
        session=int(fields[3]),
        threads=int(fields[17]),
        start_ticks=int(fields[19]),
    )


def read_stat(pid: int) -> ProcStat | None:
    """None if there is no such process."""
    try:
        return parse_stat(_read(f"/proc/{pid}/stat"))
    except (OSError, ValueError, IndexError):
        return None


def is_dead(pid: int) -> bool:
    """Whether it is gone, or a zombie."""
    stat = read_stat(pid)
    return stat is None or stat.is_dead


def children_by_scan(parent: int) -> list[int]:
    """Children of a process found by looking at every process: for kernels without PROC_CHILDREN."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            stat = read_stat(int(name))
            if stat is not None and stat.parent == parent:
                found.append(int(name))
    return found


def _has_children_files() -> bool:
    return os.path.exists(f"/proc/self/task/{os.getpid()}/children")


_children_files = _has_children_files()


def children(pid: int) -> list[int]:
    """Direct children of a process, zombies included; empty if it is gone."""
    if not _children_files:
        return children_by_scan(pid)
    tasks = f"/proc/{pid}/task"
    try:
        threads = os.listdir(tasks)
    except OSError:
        return []
    found = []
    for thread in threads:
        try:
            text = _read(f"{tasks}/{thread}/children")
        except OSError:
            continue
        if text:
            found += [int(child) for child in text.split()]
    return found


def _own_adopted() -> list[int]:
    """Children of our process among which orphans are: the kernel gives those to the main thread."""
    own = os.getpid()
    if not _children_files:
        return children_by_scan(own)
    try:
        return [int(child) for child in _read(f"/proc/{own}/task/{own}/children").split()]
    except OSError:
        return []


def resident_bytes(pid: int) -> int:
    """Resident memory of one process; 0 if it is gone."""
    import psutil  # 20 ms that only a worker whose memory is looked at has to pay

    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


def cpu_s(pid: int) -> float:
    """Processor time that one process has used, without its children's; 0 if it is gone."""
    try:
        fields = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
    except (OSError, ValueError, IndexError):
        return 0.0


def namespace_pid(pid: int) -> int:
    """The pid that a process itself believes to have: it may live in a pid namespace."""
    value = status_field(pid, "NSpid")
    return int(value.split()[-1]) if value else pid


def status_field(pid: int, field: str) -> str | None:
    """One line's value of /proc/PID/status; None if there is no such process or line."""
    try:
        text = _read(f"/proc/{pid}/status")
    except OSError:
        return None
    for line in text.decode("utf-8", "replace").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return value.strip()
    return None


def catches_signal(pid: int, signum: int) -> bool:
    """Whether a process has a handler for a signal (else, most would kill it)."""
    mask = status_field(pid, "SigCgt")
    return mask is not None and bool(int(mask, 16) >> (signum - 1) & 1)


def send_signal(pid: int, start_ticks: int, signum: int) -> bool:
    """Signal exactly the process that was seen, never one that got its pid later."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        stat = read_stat(pid)
        if stat is None or stat.start_ticks != start_ticks:
            return False
        signal.pidfd_send_signal(fd, signum)
        return True
    except ProcessLookupError:
        return False
    except PermissionError as error:
        raise RuntimeUnavailable(f"cannot signal process {pid}, which a worker started: {error}") from error
    finally:
        os.close(fd)


def unmark_strangers(tag: int) -> None:
    """Take a worker's mark off processes that other threads of ours started while it was in force."""
    threads = os.listdir("/proc/self/task")
    if len(threads) == 1 or not _children_files:
        return
    own_thread = str(threading.get_native_id())
    for thread in threads:
        # Children of this thread: the worker itself and, if it is the main thread, adopted orphans.
        if thread == own_thread:
            continue
        try:
            started = [int(pid) for pid in _read(f"/proc/self/task/{thread}/children").split()]
        except OSError:
            continue
        for pid in started:
            if linux.tag_of(pid) == tag:
                found: dict[int, int] = {}
                ProcessTree.walk([pid], set(), found)
                for stranger in found:
                    linux.remove_inherited_tag(stranger)


class ProcessTree:
    """All processes that descend from one worker.

    Made right after the main process was started under `linux.inherited_tag(tag)`. `not_orphans`
    are children of our process that the runtime itself has started (other workers, running
    commands); the runtime keeps that set up to date.
    """

    def __init__(self, main_pid: int, tag: int, not_orphans: set[int]) -> None:
        self.main_pid: int | None = main_pid
        self._session = main_pid
        self._tag = tag
        self._not_orphans = not_orphans
        self._seen: dict[int, int] = {}
        linux.set_tag(main_pid, tag)
        unmark_strangers(tag)
        self.has_tag = linux.tag_of(main_pid) == tag
        """False: a descendant in a session of its own may be lost when its parent ends."""

    def main_is_reaped(self) -> None:
        """The main process's pid may belong to a stranger from now on."""
        self.main_pid = None

    def descendants(self) -> list[int]:
        """Pids of all live descendants, without the main process. Reaps the dead among our own children."""
        # First the tree, then the orphans until there are no new ones: a process whose parent ends
        # meanwhile moves from the first to the second, never back, so none is missed.
        found: dict[int, int] = {}
        known: set[int] = set()
        if self.main_pid is not None:
            known.add(self.main_pid)
            self.walk(children(self.main_pid), known, found)
        while orphans := [pid for pid in _own_adopted() if pid not in known and pid not in self._not_orphans]:
            known.update(orphans)
            for pid in orphans:
                stat = read_stat(pid)
                if stat is None or not self._is_mine(pid, stat):
                    continue
                if stat.is_dead:
                    _reap(pid)
                    continue
                found[pid] = stat.start_ticks
                self.walk(children(pid), known, found)
        self._seen = found
        return list(found)

    @staticmethod
    def walk(todo: list[int], known: set[int], found: dict[int, int]) -> None:
        """Add the live processes of `todo` and all their descendants to `found`, with their start times."""
        while todo:
            pid = todo.pop()
            if pid in known:
                continue
            known.add(pid)
            stat = read_stat(pid)
            if stat is not None and not stat.is_dead:
                found[pid] = stat.start_ticks
                todo += children(pid)

    def _is_mine(self, pid: int, stat: ProcStat) -> bool:
        return (
            linux.tag_of(pid) == self._tag
            or stat.session == self._session
            or self._seen.get(pid) == stat.start_ticks
        )

    def memory_bytes(self) -> int:
        """Resident memory of the main process and all its descendants."""
        main = [] if self.main_pid is None else [self.main_pid]
        return sum(resident_bytes(pid) for pid in [*main, *self.descendants()])

    def signal_descendants(self, signum: int, keep: frozenset[int]) -> list[int]:
        """Signal each live descendant but those in `keep`; returns whom it found."""
        found = [pid for pid in self.descendants() if pid not in keep]
        for pid in found:
            send_signal(pid, self._seen[pid], signum)
        return found

    async def kill_descendants(self, keep: frozenset[int] = frozenset()) -> list[int]:
        """SIGKILL all descendants but `keep`, again until there are none; returns whom it killed.

        Raises RuntimeUnavailable if some cannot be killed.
        """
        killed: list[int] = []
        for _ in range(_ROUNDS):  # a fork between our look and the kill shows up in the next round
            living = self.signal_descendants(signal.SIGKILL, keep)
            if not living:
                return killed
            killed += living
            await linux.wait_until_dead(living, KILL_TIMEOUT_S)
            if stuck := _still_alive(living):
                raise _cannot_kill(stuck)
        raise _cannot_kill(living)

    def kill_descendants_now(self) -> None:
        """`kill_descendants` without an await, blocking until they are dead."""
        for _ in range(_ROUNDS):
            living = self.signal_descendants(signal.SIGKILL, frozenset())
            if not living:
                return
            linux.block_until_dead(living, KILL_TIMEOUT_S)
            if stuck := _still_alive(living):
                raise _cannot_kill(stuck)
        raise _cannot_kill(living)


def _reap(pid: int) -> None:
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        pass


def _still_alive(pids: Iterable[int]) -> list[int]:
    return [pid for pid in pids if (stat := read_stat(pid)) is not None and not stat.is_dead]


def _cannot_kill(pids: list[int]) -> RuntimeUnavailable:
    return RuntimeUnavailable(
        f"processes {pids}, started by a worker, are still there after SIGKILL and {KILL_TIMEOUT_S:g} s; "
        "see their state with `ps -o pid,stat,wchan,cmd` (D: waiting for a device or a network file system)"
    )
