"""What a worker sees in its execroot while no action is there: the files of its tool.

A tool that comes with an action's inputs (`external/jdk/bin/java -jar tools/builder.jar`) must be there when
the worker starts, and stay there: runtimes open files of theirs late. So the first action of a kind of
worker leaves a seed, hard links of all its inputs, and each worker gets links of its own: they make way for
an action's tree and come back after it, by renaming the topmost entries. A link keeps its content: an input
that was evicted meanwhile is still there, and its inode is nobody else's.

The seed's directories are ours and the files not the worker's: it can change nothing but the topmost
entries, which are looked at before each action.
"""

from __future__ import annotations

import errno
import os

from wrapper.execroot.handover import Directory, Handover, Ids
from wrapper.execroot.mirror import Mirror
from wrapper.files import DIRECTORY, remove_tree


class SeedTree:
    """The seed of one kind of worker, in a folder that only we may enter. Never changes."""

    def __init__(self, path: str) -> None:
        self.path = path

    @classmethod
    def make(cls, path: str, source_fd: int) -> SeedTree:
        """Of the tree in this directory. Takes 20 µs a file. Raises OSError, and leaves nothing then."""
        os.mkdir(path, 0o700)
        try:
            _link_tree(source_fd, path)
        except BaseException:
            remove_tree(path)
            raise
        return cls(path)

    def remove(self) -> None:
        """Delete it; workers keep their own links. Idempotent. Raises RuntimeUnavailable if it stays."""
        remove_tree(self.path)


class WorkersSeed:
    """One worker's links: in its execroot, or parked beside it while an action is there."""

    def __init__(self, seed: SeedTree, path: str, kept: list[str]) -> None:
        """Parked at `path`. `kept`: the way to the worker's working directory. Raises OSError."""
        self._path = path
        self._levels: list[tuple[int, list[tuple[str, int]]]] = []
        """Level by level, where entries are parked, and their names and inodes."""
        self._is_parked = True
        os.mkdir(path, 0o700)
        try:
            source = os.open(seed.path, DIRECTORY)
            try:
                _link_tree(source, path)
            finally:
                os.close(source)
            self._open_levels(kept)
        except BaseException:
            self.remove()
            raise

    def _open_levels(self, kept: list[str]) -> None:
        fd = os.open(self._path, DIRECTORY)
        for name in [*kept, None]:
            self._levels.append((fd, []))
            with os.scandir(fd) as listing:
                self._levels[-1][1].extend((e.name, e.inode()) for e in listing if e.name != name)
            if name is not None:
                if not os.path.isdir(f"/proc/self/fd/{fd}/{name}"):
                    os.mkdir(name, 0o700, dir_fd=fd)
                fd = os.open(name, DIRECTORY, dir_fd=fd)

    def park(self, level_fds: list[int]) -> None:
        """Take the entries out of the locked execroot. Raises OSError if one is not what it was."""
        if self._is_parked:
            return
        for level, (fd, entries) in zip(level_fds, self._levels, strict=True):
            for name, inode in entries:
                if os.stat(name, dir_fd=level, follow_symlinks=False).st_ino != inode:
                    raise OSError(errno.ESTALE, "the worker has replaced a file of its own tool", name)
                os.rename(name, name, src_dir_fd=level, dst_dir_fd=fd)
        self._is_parked = True

    def put_in(self, level_fds: list[int]) -> None:
        """Put the entries into the locked execroot, which is empty. Raises OSError."""
        if not self._is_parked:
            return
        for level, (fd, entries) in zip(level_fds, self._levels, strict=True):
            for name, _ in entries:
                os.rename(name, name, src_dir_fd=fd, dst_dir_fd=level)
        self._is_parked = False

    def remove(self) -> None:
        """Delete what is parked. Idempotent. Raises RuntimeUnavailable if it stays."""
        for fd, _ in self._levels:
            os.close(fd)
        self._levels = []
        remove_tree(self._path)


def _link_tree(source_fd: int, target: str) -> None:
    ours = Ids(os.geteuid(), os.getegid())
    handover = Handover(ours, ours, now_ns=0, counts_links=False, keeps_names=True)
    target_fd = os.open(target, DIRECTORY)
    try:
        top = Directory("", 0, 0, 0, False, None)
        Mirror(handover, closed_to_others=True).make(source_fd, target_fd, None, top)
    finally:
        os.close(target_fd)
