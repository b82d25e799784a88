"""The private temporary directory of one worker: what was added to it, and its removal.

Everything below the directory was made by a tool that nobody vouches for: nothing here follows a
symbolic link or trusts a name or a mode. Knows nothing of processes; whoever calls `remove` has killed
those that could still write.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable

from wrapper.files import remove_below, remove_tree

_PIN = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_SENTINEL_NS = 1_000_000_000 * 1_000_000_000  # 2001-09-09: no change of a directory happens then


class PrivateTmpdir:
    """A directory of mode 0700 that one worker gets as TMPDIR.

    `exists`: somebody has made it already. `owner`: the worker's (uid, gid), if they are not ours.
    """

    def __init__(self, path: str, *, exists: bool = False, owner: tuple[int, int] | None = None) -> None:
        self.path = path
        self._owner = owner
        if not exists:
            self._make()
        self._own: dict[str, frozenset[str]] = {"": frozenset()}
        """Directories that are the worker's own (relative paths), with the entries that are."""
        self._suspect: set[str] = {""}

    def _make(self) -> None:
        os.mkdir(self.path, 0o700)
        if self._owner is not None:
            os.chown(self.path, *self._owner, follow_symlinks=False)

    def take_as_own(self) -> None:
        """Whatever is there now belongs to the worker."""
        self._own = {}
        todo = [""]
        while todo:
            directory = todo.pop()
            names = []
            try:
                pin = self._pin(directory)
            except OSError:
                continue  # gone again
            try:
                _mark(pin)
                with os.scandir(_path_of(pin)) as entries:
                    for entry in entries:
                        names.append(entry.name)
                        if entry.is_dir(follow_symlinks=False):
                            todo.append(os.path.join(directory, entry.name))
            except OSError:
                continue  # made unreadable by the worker: then its content is not compared
            finally:
                os.close(pin)
            self._own[directory] = frozenset(names)
        self._suspect = set(self._own)

    def adopt(self, names: Iterable[str]) -> None:
        """These entries, directly in it, belong to the worker too from now on."""
        if "" in self._own:
            self._own[""] |= frozenset(names)

    def _pin(self, directory: str) -> int:
        """A descriptor of one of the directories, reached through no link: the worker is at work here too."""
        pin = os.open(self.path, _PIN)
        for component in directory.split("/") if directory else ():
            try:
                below = os.open(component, _PIN, dir_fd=pin)
            finally:
                os.close(pin)
            pin = below
        return pin

    def added(self) -> list[str]:
        """Relative paths of entries that are new since `take_as_own`; a new directory counts once."""
        found: list[str] = []
        for directory, own_names in list(self._own.items()):
            try:
                pin = self._pin(directory)
            except FileNotFoundError:
                if directory:
                    del self._own[directory]
                    self._suspect.discard(directory)
                else:  # a tool that empties its TMPDIR may remove too much: the next request needs one
                    self._make()
                continue
            except OSError:  # something else is in its place
                found.append(directory)
                continue
            try:
                if os.fstat(pin).st_mtime_ns == _SENTINEL_NS and directory not in self._suspect:
                    continue
                _mark(pin)
                names = _list(pin)
            except OSError:
                self._suspect.add(directory)
                continue
            finally:
                os.close(pin)
            new = [os.path.join(directory, name) for name in names if name not in own_names]
            found += new
            if new:
                self._suspect.add(directory)
            else:
                self._suspect.discard(directory)
        return found

    def remove(self, paths: Iterable[str]) -> None:
        """Delete entries that `added` has found. Raises RuntimeUnavailable if one stays. May take long."""
        for path in paths:
            if path:
                remove_below(self.path, path)
                self._own.pop(path, None)
            else:  # the directory itself was replaced by something else
                self.destroy()
                self._make()

    def destroy(self) -> None:
        """Delete the directory itself with all that is in it."""
        remove_tree(self.path)


def is_quick_to_remove(root: str, paths: list[str]) -> bool:
    """Whether the entries are few plain files, so that a thread would cost more than the work."""
    try:
        modes = [os.lstat(os.path.join(root, path)).st_mode for path in paths[:33]]
        return len(paths) <= 32 and not any(stat.S_ISDIR(mode) for mode in modes)
    except OSError:
        return len(paths) <= 1


def _path_of(pin: int) -> str:
    return f"/proc/self/fd/{pin}"


def _mark(pin: int) -> None:
    # A modification time of our own is the flag "not changed since": it does not depend on how finely the
    # file system counts time. Set before listing, so that a change in between shows.
    try:
        os.utime(_path_of(pin), ns=(_SENTINEL_NS, _SENTINEL_NS))
    except OSError:
        pass


def _list(pin: int) -> list[str]:
    try:
        return os.listdir(_path_of(pin))
    except PermissionError:
        os.chmod(_path_of(pin), stat.S_IMODE(os.fstat(pin).st_mode) | stat.S_IRWXU)
        return os.listdir(_path_of(pin))
