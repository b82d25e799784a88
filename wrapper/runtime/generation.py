"""Folders of one daemon process, and of those that died before it.

Everything that a process keeps on the node lies below `BASE/GENERATION`, with a lock file that is locked
while the process lives: the kernel lets go of it however the process ends. So a new one knows which of its
predecessors are dead, removes what carries their label elsewhere first (containers), and then their folder.
Several processes may share a base. Knows nothing of what is in the folders.
"""

from __future__ import annotations

import fcntl
import os
from typing import Self

from wrapper.errors import RuntimeUnavailable
from wrapper.runtime.private_tmpdir import remove_tree

_LOCK = "lock"
_NAME_BYTES = 4


class Generation:
    """One of them. Holds its lock: as the living process's own, or to remove what a dead one has left."""

    def __init__(self, base: str, name: str, lock_fd: int) -> None:
        self.name = name
        self.path = os.path.join(base, name)
        self._lock_fd = lock_fd

    def __repr__(self) -> str:
        return f"<Generation {self.path}>"

    @classmethod
    def begin(cls, base: str) -> Self:
        """A new one, of this process. Raises RuntimeUnavailable."""
        name = os.urandom(_NAME_BYTES).hex()
        path = os.path.join(base, name)
        try:
            os.makedirs(base, mode=0o700, exist_ok=True)
            os.mkdir(path, 0o700)
            fd = os.open(os.path.join(path, _LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise RuntimeUnavailable(
                f"cannot make a folder for this process in {base}: {error} (state_dir of the pool)"
            ) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:  # another process has looked at it between the two calls
            os.close(fd)
            raise RuntimeUnavailable(f"{path} was taken for a dead process's: {error}; try again") from error
        return cls(base, name, fd)

    @classmethod
    def dead(cls, base: str) -> list[Self]:
        """Those whose process is dead, each locked for us: to be ended by `remove` or `let_go`."""
        try:
            names = os.listdir(base)
        except FileNotFoundError:
            return []
        found = []
        for name in sorted(names):
            try:
                fd = os.open(os.path.join(base, name, _LOCK), os.O_RDWR | os.O_CLOEXEC)
            except OSError:
                continue  # being made, or being removed
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(fd)
                continue
            found.append(cls(base, name, fd))
        return found

    def remove(self) -> None:
        """Delete the folder; the lock goes last. Raises RuntimeUnavailable if something stays."""
        for name in os.listdir(self.path):
            if name != _LOCK:
                remove_tree(os.path.join(self.path, name))
        remove_tree(self.path)
        self.let_go()

    def let_go(self) -> None:
        """Unlock it and leave it as it is. Idempotent."""
        fd, self._lock_fd = self._lock_fd, -1
        if fd >= 0:
            os.close(fd)
