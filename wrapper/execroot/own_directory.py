"""The directory in which one worker lives: that it keeps its inodes, who may change it when, and emptying it.

The worker can read it and enter it at any time, by its group while it is locked: a starting JVM opens its
working directory to come back to it, and never comes back if it may not.

It has levels: the execroot itself and, if the worker's working directory is below it, the directories on
the way there, which are never moved or renamed over. Knows nothing of actions.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass

from wrapper.errors import RuntimeUnavailable
from wrapper.execroot.handover import Ids, file_system_clock_ns, has_entries
from wrapper.execroot.seed import SeedTree, WorkersSeed
from wrapper.files import DIRECTORY, remove_entry, remove_tree

_MODE = 0o750  # of the locked directory: no less, see above; no more, or it is not locked


@dataclass(slots=True)
class Level:
    """The execroot, or a directory on the way from there to the working directory."""

    fd: int
    path: list[str]
    inode: int
    kept: str | None = None
    """The entry that leads to the next level."""


class OwnDirectory:
    """The worker's own whenever it is not locked. Raises OSError.

    Empty while no action is there, but for the links of `seed`.
    """

    def __init__(
        self, path: str, worker: Ids, components: list[str], seen_as: str, seed: SeedTree | None = None
    ) -> None:
        self.path = path
        self.worker = worker
        self.seen_as = seen_as
        self.levels: list[Level] = []
        self.counts_links = False
        """Whether a directory here tells by its number of links that it has no subdirectories."""
        self.unusable = ""
        """Why it takes no more actions; empty if it does."""
        self._is_ours = worker.uid == os.geteuid()
        """We run as the worker does: nothing can be kept from it, and nothing is."""
        self._seed: WorkersSeed | None = None
        os.mkdir(path, _MODE)
        try:
            self._furnish(components)
            if seed is not None:
                self._seed = WorkersSeed(seed, f"{path}.seed", components)
            self.give_back()
        except BaseException:
            self.remove()
            raise

    def _furnish(self, components: list[str]) -> None:
        fd = os.open(self.path, DIRECTORY)
        self._add_level(fd, [])
        os.mkdir("probe", dir_fd=fd)
        self.counts_links = os.fstat(fd).st_nlink == 3
        os.rmdir("probe", dir_fd=fd)
        for component in components:
            above = self.levels[-1]
            os.mkdir(component, _MODE, dir_fd=above.fd)
            above.kept = component
            self._add_level(os.open(component, DIRECTORY, dir_fd=above.fd), [*above.path, component])

    def _add_level(self, fd: int, path: list[str]) -> None:
        try:
            os.fchmod(fd, _MODE)  # whatever the umask is
            self.levels.append(Level(fd, path, os.fstat(fd).st_ino))
        except BaseException:
            os.close(fd)
            raise

    def lock(self) -> None:
        """From here on the worker moves nothing into the execroot or out of it. Raises OSError."""
        above: Level | None = None
        for level in self.levels:
            if above is not None and above.kept is not None:
                info = os.stat(above.kept, dir_fd=above.fd, follow_symlinks=False)
                if info.st_ino != level.inode:
                    raise OSError(errno.ESTALE, "the worker has replaced its working directory", above.kept)
            if not self._is_ours:
                os.fchown(level.fd, os.geteuid(), self.worker.gid)
            os.fchmod(level.fd, _MODE)  # after the owner: the worker could have given rights to all
            above = level

    def give_back(self) -> None:
        """It is empty and the worker is idle: its tool's files come back, and it is the worker's again."""
        if self._seed is not None:
            self._seed.put_in([level.fd for level in self.levels])
        self.unlock()

    def unlock(self) -> None:
        """It is the worker's again. Raises OSError."""
        if not self._is_ours:
            for level in self.levels:
                os.fchown(level.fd, self.worker.uid, self.worker.gid)

    def empty(self) -> int:
        """Lock it and remove all that is in it; the seed is parked. Returns the file system's time.

        Raises RuntimeUnavailable, and takes no more actions then.
        """
        try:
            self.lock()
            if self._seed is not None:
                self._seed.park([level.fd for level in self.levels])
            for level in self.levels:
                is_empty = not has_entries(level.fd)  # as it is most often: less than half of a listing
                os.lseek(level.fd, 0, os.SEEK_SET)  # where a listing begins
                if is_empty:
                    continue
                for name in os.listdir(level.fd):
                    if name != level.kept:
                        remove_entry(level.fd, name)
            return file_system_clock_ns(self.levels[0].fd)
        except OSError as error:
            self.unusable = "unusable"
            raise RuntimeUnavailable(
                f"the worker's execroot {self.path} cannot be emptied: {error}"
            ) from error

    def remove(self) -> None:
        """Delete it with all that is in it. Idempotent. Raises RuntimeUnavailable if it stays."""
        for level in self.levels:
            os.close(level.fd)
        self.levels = []
        self.unusable = "removed"
        if self._seed is not None:
            self._seed.remove()
        remove_tree(self.path)
