"""The private temporary directory of one worker: what was added to it, and its removal.

Everything below the directory was made by a tool that nobody vouches for: nothing here follows a
symbolic link, trusts a name or a mode, or recurses as deep as the tool likes. Knows nothing of
processes; whoever calls `remove` has killed those that could still write.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable

from wrapper.errors import RuntimeUnavailable

_PATH = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_SENTINEL_NS = 1_000_000_000 * 1_000_000_000  # 2001-09-09: no change of a directory happens then
_ATTEMPTS = 5


class PrivateTmpdir:
    """A directory of mode 0700 that one worker gets as TMPDIR. `exists`: somebody has made it already."""

    def __init__(self, path: str, *, exists: bool = False) -> None:
        self.path = path
        if not exists:
            os.mkdir(path, 0o700)
        self._own: dict[str, frozenset[str]] = {"": frozenset()}
        """Directories that are the worker's own (relative paths), with the entries that are."""
        self._suspect: set[str] = {""}

    def take_as_own(self) -> None:
        """Whatever is there now belongs to the worker."""
        self._own = {}
        todo = [""]
        while todo:
            directory = todo.pop()
            names = []
            self._mark(directory)
            try:
                with os.scandir(os.path.join(self.path, directory)) as entries:
                    for entry in entries:
                        names.append(entry.name)
                        if entry.is_dir(follow_symlinks=False):
                            todo.append(os.path.join(directory, entry.name))
            except OSError:
                continue  # gone again, or made unreadable by the worker: then its content is not compared
            self._own[directory] = frozenset(names)
        self._suspect = set(self._own)

    def _mark(self, directory: str) -> None:
        # A modification time of our own is the flag "not changed since": it does not depend on how
        # finely the file system counts time. Set before listing, so that a change in between shows.
        path = os.path.join(self.path, directory)
        try:
            os.utime(path, ns=(_SENTINEL_NS, _SENTINEL_NS), follow_symlinks=False)
        except OSError:
            pass

    def added(self) -> list[str]:
        """Relative paths of entries that are new since `take_as_own`; a new directory counts once."""
        found: list[str] = []
        for directory, own_names in list(self._own.items()):
            path = os.path.join(self.path, directory) if directory else self.path
            try:
                info = os.lstat(path)
            except OSError:
                if directory:
                    del self._own[directory]
                    self._suspect.discard(directory)
                else:  # a tool that empties its TMPDIR may remove too much: the next request needs one
                    os.mkdir(path, 0o700)
                continue
            if info.st_mtime_ns == _SENTINEL_NS and directory not in self._suspect:
                continue
            if not stat.S_ISDIR(info.st_mode):
                found.append(directory)
                continue
            self._mark(directory)
            try:
                names = _list(path)
            except OSError:
                self._suspect.add(directory)
                continue
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
                _remove_tree(self.path, path)
                self._own.pop(path, None)
            else:  # the directory itself was replaced by something else
                self.destroy()
                os.mkdir(self.path, 0o700)

    def destroy(self) -> None:
        """Delete the directory itself with all that is in it."""
        _remove_tree(os.path.dirname(self.path), os.path.basename(self.path))


def is_quick_to_remove(root: str, paths: list[str]) -> bool:
    """Whether the entries are few plain files, so that a thread would cost more than the work."""
    try:
        modes = [os.lstat(os.path.join(root, path)).st_mode for path in paths[:33]]
        return len(paths) <= 32 and not any(stat.S_ISDIR(mode) for mode in modes)
    except OSError:
        return len(paths) <= 1


def remove_tree(path: str) -> None:
    """Delete a file or directory, whatever its modes. Raises RuntimeUnavailable if it stays."""
    _remove_tree(os.path.dirname(path), os.path.basename(path))


def _remove_tree(root: str, path: str) -> None:
    last: OSError | None = None
    for _ in range(_ATTEMPTS):  # a process of the worker itself may add to it meanwhile
        try:
            parent, name = _open_parent(root, path)
        except FileNotFoundError:
            return
        except OSError as error:
            last = error
            continue
        try:
            _remove_entry(parent, name)
            return
        except OSError as error:
            last = error
        finally:
            os.close(parent)
    raise RuntimeUnavailable(
        f"cannot remove {os.path.join(root, path)!r}, which a worker left in its temporary directory: {last}"
    ) from last


def _open_parent(root: str, path: str) -> tuple[int, str]:
    """Descriptor of the directory that holds `path`, reached from `root` without any symbolic link."""
    *parents, name = path.split("/")
    fd = _open_mine(None, root)
    try:
        for component in parents:
            below = _open_mine(fd, component)
            os.close(fd)
            fd = below
    except BaseException:
        os.close(fd)
        raise
    return fd, name


def _remove_entry(parent: int, name: str) -> None:
    try:
        os.unlink(name, dir_fd=parent)
        return
    except FileNotFoundError:
        return
    except OSError as error:
        # Linux says EISDIR, POSIX says EPERM, if it is a directory.
        if error.errno not in (errno.EISDIR, errno.EPERM):
            raise
    # Directories are moved up next to the top one before they are emptied: a tree of any depth is
    # then removed with a fixed number of descriptors and no recursion.
    todo = [name]
    while todo:
        directory = todo[-1]
        fd = _open_mine(parent, directory)
        try:
            below = []
            for child in os.listdir(fd):
                try:
                    os.unlink(child, dir_fd=fd)
                    continue
                except FileNotFoundError:
                    continue
                except OSError as error:
                    if error.errno not in (errno.EISDIR, errno.EPERM):
                        raise
                if _rmdir(child, fd):
                    continue
                os.close(_open_mine(fd, child))  # renaming a directory changes its "..": it must be writable
                moved = f".nlww-trash-{os.urandom(8).hex()}"
                os.rename(child, moved, src_dir_fd=fd, dst_dir_fd=parent)
                below.append(moved)
        finally:
            os.close(fd)
        if _rmdir(directory, parent):
            todo.remove(directory)
        elif not below:
            raise OSError(errno.ENOTEMPTY, "something keeps writing into it", directory)
        todo += below


def _rmdir(name: str, parent: int) -> bool:
    try:
        os.rmdir(name, dir_fd=parent)
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.EACCES):
            return False
        raise
    return True


def _open_mine(parent: int | None, name: str) -> int:
    """Open a directory, giving ourselves the rights to list and change it first."""
    # O_PATH needs no rights on the directory itself, and pins it against being swapped for a link.
    pin = os.open(name, _PATH, dir_fd=parent)
    try:
        mode = stat.S_IMODE(os.fstat(pin).st_mode)
        if mode & 0o700 != 0o700:
            os.chmod(f"/proc/self/fd/{pin}", mode | 0o700)
        return os.open(f"/proc/self/fd/{pin}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    finally:
        os.close(pin)


def _list(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except PermissionError:
        fd = _open_mine(None, path)
        try:
            return os.listdir(fd)
        finally:
            os.close(fd)
