"""Everything of one daemon process lies below one folder: its generation. What a dead process left is found.

A process holds a lock (flock) on its generation's folder while it lives, however it ends. Whoever starts
next takes the locks of the dead over, kills what still carries their names (containers, processes), and only
then wipes them. Several may start at once: of each dead generation exactly one gets the lock.

Knows nothing of what lies in a generation, nor of what is labelled with its name.
"""

from __future__ import annotations

import fcntl
import os
import stat

from wrapper.errors import ConfigError
from wrapper.files import DIRECTORY, remove_tree

_PREFIX = "generation-"


class Generation:
    """A generation's folder, locked by this process. `name` is what to label with."""

    def __init__(self, base: str, name: str, fd: int) -> None:
        self.name = name
        self.path = os.path.join(base, name)
        self._fd = fd

    def __repr__(self) -> str:
        return f"<Generation {self.path} {'ours' if self._fd >= 0 else 'gone'}>"

    @classmethod
    def begin(cls, base: str, *, passable: bool = False) -> Generation:
        """A new one for this process below `base`, which is made if need be. Raises ConfigError.

        `passable`: other users may go through it to what they have a right to, but not list it.
        """
        base_fd = _open_base(base)
        try:
            # Nobody looks for the dead between our making the folder and our locking it.
            fcntl.flock(base_fd, fcntl.LOCK_EX)
            name = f"{_PREFIX}{os.getpid()}-{os.urandom(6).hex()}"
            os.mkdir(name, 0o700, dir_fd=base_fd)
            fd = os.open(name, DIRECTORY, dir_fd=base_fd)
            try:
                if passable:
                    os.fchmod(fd, 0o711)
                    os.fchmod(base_fd, 0o711)
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BaseException:
                os.close(fd)
                raise
            return cls(base, name, fd)
        finally:
            os.close(base_fd)

    def wipe(self) -> None:
        """Delete the folder with all that is in it. Idempotent.

        Raises RuntimeUnavailable if it stays; so does the lock then, and a later call may do better.
        """
        if self._fd < 0:
            return
        remove_tree(self.path)
        self.leave()

    def leave(self) -> None:
        """Give up the lock without deleting anything: the next to start finds the generation dead."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def take_over(base: str) -> list[Generation]:
    """Generations whose process is dead, locked for us. Kill what carries their names, then `wipe` each."""
    base_fd = _open_base(base)
    found: list[Generation] = []
    try:
        fcntl.flock(base_fd, fcntl.LOCK_EX)
        for name in sorted(os.listdir(base_fd)):
            if name.startswith(_PREFIX):
                fd = _lock_if_dead(base_fd, name)
                if fd >= 0:
                    found.append(Generation(base, name, fd))
    except BaseException:
        for generation in found:
            generation.leave()
        raise
    finally:
        os.close(base_fd)
    return found


def names_in(base: str) -> set[str]:
    """The generations below `base`, of processes that live or are dead."""
    try:
        return {name for name in os.listdir(base) if name.startswith(_PREFIX)}
    except FileNotFoundError:
        return set()


def _lock_if_dead(base_fd: int, name: str) -> int:
    try:
        fd = os.open(name, DIRECTORY, dir_fd=base_fd)
    except OSError:
        return -1  # wiped in this moment, or no generation
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(fd).st_ino == os.stat(name, dir_fd=base_fd, follow_symlinks=False).st_ino:
            return fd
    except FileNotFoundError:
        pass  # wiped between our opening it and our locking it
    except BlockingIOError:
        pass  # it lives, or somebody else is wiping it
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return -1


def _open_base(base: str) -> int:
    try:
        os.makedirs(base, mode=0o700, exist_ok=True)
        fd = os.open(base, DIRECTORY)
    except OSError as error:
        raise ConfigError(
            f"the folder {base}, for what processes of ours keep, cannot be used: {error}"
        ) from error
    try:
        info = os.fstat(fd)
        mode = stat.S_IMODE(info.st_mode)
        if info.st_uid != os.geteuid() or mode & 0o022:
            raise ConfigError(
                f"the folder {base}, for what processes of ours keep, must belong to uid {os.geteuid()} "
                f"and be writable for nobody else; it belongs to uid {info.st_uid} and has mode {mode:04o}"
            )
    except BaseException:
        os.close(fd)
        raise
    return fd
