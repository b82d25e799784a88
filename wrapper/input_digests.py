"""SHA-256 of an action's inputs, computed once for each file however often it is an input.

Owns the cache and the walk. An input is a hard link to an immutable blob, so device, inode, size and
modification time say that the content is the same. Whoever runs actions can make a file with any modification
time, though, and the inode of a file that was deleted is given out again: so what was modified just now, or
will have been, is not remembered. A file that is made later is never as old as what is.

Everything is reached by descriptor and through no link. Knows nothing of workers.
"""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from threading import Lock

from wrapper.errors import RequestRefused
from wrapper.files import DIRECTORY, REGULAR_FILE, Descent, open_beneath

MAX_ENTRIES = 1_000_000
"""Files and directories of one action."""
MAX_LINKS = 8
"""How many symbolic links in a row may lead to a file."""

_SETTLED_NS = 2_000_000_000
_CHUNK_BYTES = 1 << 20
_PIN = os.O_PATH | os.O_NOFOLLOW
_Identity = tuple[int, int, int, int]


class InputDigests:
    """A cache of digests, of at most `max_entries` files: the one not used for longest goes first.

    Several threads may use it.
    """

    def __init__(self, max_entries: int = 200_000, *, now_ns: Callable[[], int] = time.time_ns) -> None:
        self._max_entries = max_entries
        self._now_ns = now_ns
        self._known: OrderedDict[_Identity, bytes] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._known)

    def inputs_of(self, directory_fd: int) -> list[tuple[str, bytes]]:
        """Path and digest of every file in a directory and below, in the paths' order.

        Digests are in hexadecimal, as ASCII, as Bazel sends them. A symbolic link is the file that it leads
        to, if that lies in the directory too; links to other things, what is neither file nor link, what
        cannot be read and names that are not UTF-8, which the worker protocol cannot express, are left out.
        Raises RequestRefused if there are more than MAX_ENTRIES.
        """
        found: list[tuple[str, bytes]] = []
        for path, parent, name in _entries(directory_fd):
            digest = self._digest_of(directory_fd, path, parent, name)
            if digest is not None:
                found.append((path, digest))
        found.sort()
        return found

    def _digest_of(self, top: int, path: str, parent: int, name: str) -> bytes | None:
        try:
            info = os.stat(name, dir_fd=parent, follow_symlinks=False)
            if stat.S_ISREG(info.st_mode):
                known = self._recall(_identity(info))
                return known or self._digest(os.open(name, REGULAR_FILE, dir_fd=parent))
            if stat.S_ISLNK(info.st_mode):
                fd = _open_through_links(top, path)
                return None if fd is None else self._digest(fd)
        except OSError:
            pass  # it is gone, or not what it was a moment ago
        return None

    def _digest(self, fd: int) -> bytes | None:
        """The digest of an open file, which is closed."""
        try:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode):
                return None
            identity = _identity(info)
            known = self._recall(identity)
            if known is not None:
                return known
            digest = self._hash(fd, info.st_size)
            if _identity(os.fstat(fd)) == identity:
                self._remember(identity, digest)
            return digest
        finally:
            os.close(fd)

    @staticmethod
    def _hash(fd: int, size: int) -> bytes:
        """Of as much as the file had; no more is read, if it grows."""
        digest = hashlib.sha256()
        while size > 0 and (data := os.read(fd, min(size, _CHUNK_BYTES))):
            digest.update(data)
            size -= len(data)
        return digest.hexdigest().encode()

    def _recall(self, identity: _Identity) -> bytes | None:
        with self._lock:
            known = self._known.get(identity)
            if known is not None:
                self._known.move_to_end(identity)
            return known

    def _remember(self, identity: _Identity, digest: bytes) -> None:
        if identity[3] > self._now_ns() - _SETTLED_NS:
            return
        with self._lock:
            self._known[identity] = digest
            if len(self._known) > self._max_entries:
                self._known.popitem(last=False)


def _identity(info: os.stat_result) -> _Identity:
    return (info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns)


def _entries(top: int) -> Iterator[tuple[str, int, str]]:
    """All but directories in a directory and below: path, descriptor of the directory it is in, name."""
    way = Descent(top)
    count = 0
    try:
        levels: list[tuple[str, Iterator[os.DirEntry[str]]]] = [("", _listed(top))]
        while levels:
            prefix, entries = levels[-1]
            entry = next(entries, None)
            if entry is None:
                levels.pop()
                if levels:
                    way.leave()
                continue
            count += 1
            if count > MAX_ENTRIES:
                raise RequestRefused(f"the action has more than {MAX_ENTRIES} inputs, too many for digests")
            if not _is_utf8(entry.name):
                continue
            path = prefix + entry.name
            if not entry.is_dir(follow_symlinks=False):
                yield path, way.fd, entry.name
                continue
            try:
                way.enter(os.open(entry.name, DIRECTORY, dir_fd=way.fd))
            except OSError:
                continue  # it is gone, or not a directory any more
            levels.append((f"{path}/", _listed(way.fd)))
    finally:
        way.close()


def _listed(fd: int) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(fd) as entries:
            return iter(list(entries))
    except OSError:
        return iter(())


def _open_through_links(top: int, path: str) -> int | None:
    """Open the file that a symbolic link leads to beneath the top directory; None: it leads elsewhere."""
    for _ in range(MAX_LINKS):
        fd = open_beneath(top, path, _PIN)
        try:
            if not stat.S_ISLNK(os.fstat(fd).st_mode):
                return open_beneath(top, path, REGULAR_FILE)
            target = os.readlink("", dir_fd=fd)
        finally:
            os.close(fd)
        if target.startswith("/"):
            return None
        path = f"{path.rpartition('/')[0] or '.'}/{target}"
    return None


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
