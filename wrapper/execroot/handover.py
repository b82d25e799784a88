"""Handing the directories of an action's tree to a worker, and taking them back.

Owns what is remembered of each directory meanwhile, and the two ways to hand one over:

- *shared*: a directory in which input files lie keeps its owner and becomes writable for all; only the
  worker reaches the execroot. It adds and removes entries, but the modification
  time, which every such change sets, it cannot set back: only an owner can. So an untouched directory is
  recognised by one `fstat`, after the lock, with no race and no list of names. That is what makes a
  thousand inputs cheap. (Had the worker owned it, only the change time could not be forged, and the lock
  itself sets that.)
- *own*: a directory without files (the parents of outputs, as a rule) becomes the worker's. A tool may do
  there what it likes: set times and modes. It is listed when it is taken back.

On the way there the topmost directories are gates: closed to the worker until all that is below every one
of them has been handed over, since it runs, and can look into its execroot at any time.

Locking a directory is to make it one that the worker cannot change any more, by path or by a descriptor
that it kept: the action's owner, and nobody else may write. From the top down, each step looks only at
what is locked already. Where the worker has the owner's uid (*trusted*) nothing is changed or locked.

Knows nothing of outputs. Directories are reached by descriptor, one component at a time, never through links.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from wrapper.files import DIRECTORY, Descent, open_mine

_SENTINEL_NS = 1_000_000_000 * 1_000_000_000  # 2001-09-09: no change of a directory happens then
_OTHERS_MAY_WRITE = 0o022
_ALL_MAY_ALL = 0o777
_CLOSED = 0o700


@dataclass(frozen=True, slots=True)
class Ids:
    uid: int
    gid: int


Identity = tuple[int, ...]
"""Inode and, of what was copied, modification time: an inode that was freed may be given out again.

Where the worker has the owner's uid and nothing was copied, a new file that got the inode of an input is
taken for that: it is given back as the worker left it, and there is nothing to be sealed there.
"""


class Directory:
    """What is remembered of a directory that was handed over.

    `mode`: that it is given back with; what it had, less the right of others to write. `names`: what
    tells each entry from another (see `Identity`), or None where whose a file is tells what it is.
    """

    __slots__ = ("below", "changed_ns", "inode", "is_shared", "mode", "name", "names")

    def __init__(
        self,
        name: str,
        inode: int,
        mode: int,
        changed_ns: int,
        is_shared: bool,
        names: dict[str, Identity] | None,
    ) -> None:
        self.name = name
        self.inode = inode
        self.mode = mode
        self.changed_ns = changed_ns
        self.is_shared = is_shared
        self.below: list[Directory] = []
        self.names = names


class Handover:
    """The two sides of one action, and how directories pass between them."""

    def __init__(
        self, owner: Ids, worker: Ids, *, now_ns: int, counts_links: bool, keeps_names: bool = False
    ) -> None:
        self.owner = owner
        self.worker = worker
        self.is_trusted = owner.uid == worker.uid
        self._keeps_names = keeps_names or self.is_trusted
        # A directory changed in the present tick of the file system's clock could be changed once more
        # without any difference (before Linux 6.13, a tick is some milliseconds).
        self._now_ns = now_ns
        self._counts_links = counts_links and not self._keeps_names

    # ---- there -----------------------------------------------------------------------------------------

    def hand_over(self, parent: int, names: Iterable[str], found: list[Directory]) -> None:
        """Hand over all that is below these subdirectories, and close them to the worker.

        `found` tells which they are, whatever happens; `open_gates` hands over these themselves.
        """
        descent = Descent(parent)
        todo: list[tuple[Iterator[str], list[Directory]]] = [(iter(names), found)]
        try:
            while todo:
                rest, found = todo[-1]
                parent = descent.fd
                for name in rest:
                    fd = os.open(name, DIRECTORY, dir_fd=parent)
                    try:
                        below = self._hand_over_one(fd, name, found, is_gate=len(todo) == 1)
                    except BaseException:
                        os.close(fd)
                        raise
                    if below:
                        descent.enter(fd)
                        todo.append((iter(below), found[-1].below))
                        break
                    os.close(fd)
                else:
                    todo.pop()
                    if todo:
                        descent.leave()
        finally:
            descent.close()

    def open_gates(self, parent: int, gates: Iterable[Directory]) -> None:
        """The last step there. `parent` is locked, so a name is as good as a descriptor. Raises OSError."""
        if self.is_trusted:
            return
        for gate in gates:
            os.chmod(gate.name, gate.mode | (_ALL_MAY_ALL if gate.is_shared else 0), dir_fd=parent)
            if not gate.is_shared:
                os.chown(gate.name, self.worker.uid, self.worker.gid, dir_fd=parent, follow_symlinks=False)

    def _hand_over_one(
        self, fd: int, name: str, found: list[Directory], *, is_gate: bool
    ) -> list[str] | None:
        full_mode, links, inode, changed_ns, born_ns = look_at(fd)
        below: list[str] | None = None
        names: dict[str, Identity] | None = None
        if self._counts_links and links == 2:
            # Something came into it after it was made. (If that is gone again, it is as if it had files.)
            has_files = changed_ns != born_ns or has_entries(fd)
        else:
            with os.scandir(fd) as listing:
                every = list(listing)
            below = [entry.name for entry in every if entry.is_dir(follow_symlinks=False)]
            has_files = len(below) < len(every)
            if self._keeps_names:
                names = identities(every)
        mode = stat.S_IMODE(full_mode)
        returned_mode = mode if self.is_trusted else mode & ~_OTHERS_MAY_WRITE
        directory = Directory(name, inode, returned_mode, changed_ns, has_files, names)
        found.append(directory)
        if has_files and changed_ns >= self._now_ns:
            os.utime(fd, ns=(_SENTINEL_NS, _SENTINEL_NS))
            directory.changed_ns = _SENTINEL_NS
        if self.is_trusted:
            return below
        if is_gate:
            os.fchmod(fd, _CLOSED)
        elif has_files:
            os.fchmod(fd, mode | _ALL_MAY_ALL)
        else:
            os.fchown(fd, self.worker.uid, self.worker.gid)
        return below

    # ---- and back --------------------------------------------------------------------------------------

    def open_and_lock(self, parent: int, name: str, known: Directory | None) -> tuple[int, bool]:
        """Descriptor of a subdirectory that the worker can change no more, and whether it did before."""
        try:
            fd = os.open(name, DIRECTORY, dir_fd=parent)
        except PermissionError:  # the worker's modes; only a daemon that is not root gets here
            fd = open_mine(parent, name)
        try:
            if known is not None and known.is_shared:
                if not self.is_trusted:
                    os.fchmod(fd, known.mode)
                info = os.fstat(fd)
                if info.st_ino == known.inode and info.st_uid == self.owner.uid:
                    # What is not its own has the mode that we gave it: the worker cannot change that.
                    if self.is_trusted and stat.S_IMODE(info.st_mode) != known.mode:
                        os.fchmod(fd, known.mode)
                    return fd, info.st_mtime_ns != known.changed_ns
            self.lock(fd, 0o755 if known is None else known.mode)
            return fd, True
        except BaseException:
            os.close(fd)
            raise

    def lock(self, fd: int, mode: int) -> None:
        """Make a directory the owner's, with this mode."""
        # In this order: until it is not the worker's any more, the worker can undo the mode.
        if not self.is_trusted:
            os.fchown(fd, self.owner.uid, self.owner.gid)
        os.fchmod(fd, mode)

    def make_directory(self, parent: int, name: str) -> int:
        """A new one of the owner's, opened. After an error there is none."""
        os.mkdir(name, 0o700, dir_fd=parent)
        try:
            fd = os.open(name, DIRECTORY, dir_fd=parent)
            try:
                self.lock(fd, 0o755)
            except BaseException:
                os.close(fd)
                raise
        except BaseException:
            os.rmdir(name, dir_fd=parent)
            raise
        return fd

    def take_back(self, parent: int, directories: list[Directory]) -> OSError | None:
        """Undo `hand_over`, before the gates are open. Goes on after an error, and returns the first."""
        if self.is_trusted:
            return None
        first: OSError | None = None
        descent = Descent(parent)
        todo = [iter(directories)]
        try:
            while todo:
                for directory in todo[-1]:
                    try:
                        fd, _ = self.open_and_lock(descent.fd, directory.name, directory)
                    except OSError as error:
                        first = first or error
                        continue
                    if directory.below:
                        descent.enter(fd)
                        todo.append(iter(directory.below))
                        break
                    os.close(fd)
                else:
                    todo.pop()
                    if todo:
                        descent.leave()
        except OSError as error:
            first = first or error
        finally:
            descent.close()
        return first


def _with_getdents() -> Callable[[int], bool]:
    import ctypes

    # Keeps the interpreter's lock: to give it away and take it back costs more than the call.
    call = ctypes.PyDLL(None).getdents64
    call.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
    call.restype = ctypes.c_ssize_t
    # Each entry takes 19 bytes and its name, rounded up to eight: "." and ".." take 24 each, and the
    # longest 280. So one more entry finds room here, whatever it is called.
    buffer = ctypes.create_string_buffer(24 + 24 + 280)
    size = len(buffer)

    def has_entries(fd: int) -> bool:
        return bool(call(fd, buffer, size) > 24 + 24)

    return has_entries


def _with_scandir(fd: int) -> bool:
    with os.scandir(fd) as entries:
        return next(entries, None) is not None


try:
    has_entries = _with_getdents()  # less than half of what `scandir` costs
except (ImportError, OSError, AttributeError):  # a C library that does not export it
    has_entries = _with_scandir


_AT_EMPTY_PATH, _STATX_ALL, _STATX_BTIME = 0x1000, 0xFFF, 0x800  # linux/stat.h
Look = tuple[int, int, int, int, int]
"""Mode, links, inode, and modification and birth time in ns, which are alike if the latter is unknown."""


def _with_statx() -> Callable[[int], Look]:
    import ctypes
    import struct

    call = ctypes.PyDLL(None).statx
    call.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p)
    buffer = ctypes.create_string_buffer(256)
    address = ctypes.addressof(buffer)
    # stx_mask, stx_nlink, stx_mode, stx_ino, then stx_btime and stx_mtime: seconds and nanoseconds.
    fields = struct.Struct("=I12xI8xH2xQ40xqI20xqI").unpack_from

    def look(fd: int) -> Look:
        if call(fd, b"", _AT_EMPTY_PATH, _STATX_ALL, address):
            return _with_fstat(fd)
        mask, links, mode, inode, born_s, born_ns, changed_s, changed_ns = fields(buffer)
        changed = changed_s * 1_000_000_000 + changed_ns
        born = born_s * 1_000_000_000 + born_ns if mask & _STATX_BTIME else changed
        return mode, links, inode, changed, born

    return look


def _with_fstat(fd: int) -> Look:
    info = os.fstat(fd)
    return info.st_mode, info.st_nlink, info.st_ino, info.st_mtime_ns, info.st_mtime_ns


try:
    look_at = _with_statx()  # a listing takes four times as long: the kernel sorts it first
except (ImportError, OSError, AttributeError):
    look_at = _with_fstat


def identities(entries: list[os.DirEntry[str]]) -> dict[str, Identity]:
    """Of the files and links among these."""
    return {entry.name: (entry.inode(),) for entry in entries if not entry.is_dir(follow_symlinks=False)}


def file_system_clock_ns(fd: int) -> int:
    """The time that a change now would leave on this directory, which is ours."""
    os.utime(fd)
    return os.fstat(fd).st_mtime_ns
