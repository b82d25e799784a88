"""The strategy `link`: an action's tree is mirrored into the worker's execroot, and outputs are carried back.

For a tree on another mount or filesystem, where nothing can be renamed. Files are hard links where the
system allows that, else copies of the owner's that the worker can only read. Directories are the
worker's own. The action's tree is not touched until outputs are delivered. Costs time for every file.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator

from wrapper.execroot.handover import Directory, Handover, Identity
from wrapper.execroot.seal import copy_to_new, open_file, remove_quietly, sealed_mode
from wrapper.files import DIRECTORY, Descent, remove_entry, temporary_name

_CANNOT_LINK = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP}


class Mirror:
    """Copies of the directories of one action's tree, made for its worker.

    `closed_to_others`: nobody but their owner may write there, whatever the modes of the tree say.
    """

    def __init__(self, handover: Handover, *, closed_to_others: bool = False) -> None:
        self._handover = handover
        self._can_link = True
        self._mask = 0o7777 & ~0o022 if closed_to_others else 0o7777

    def make(self, source: int, target: int, kept: str | None, top: Directory) -> None:
        """Mirror what is in one directory into another, and remember it in `top`. Raises OSError.

        The topmost directories are ours until `Handover.open_gates`.
        """
        sources, targets = Descent(source), Descent(target)
        todo = [(self._fill(source, target, kept, top), top)]
        try:
            while todo:
                names, into = todo[-1]
                for name in names:
                    below = self._enter(name, sources, targets, is_gate=len(todo) == 1)
                    into.below.append(below)
                    todo.append((self._fill(sources.fd, targets.fd, None, below), below))
                    break
                else:
                    todo.pop()
                    if todo:
                        sources.leave()
                        targets.leave()
        finally:
            sources.close()
            targets.close()

    def _enter(self, name: str, sources: Descent, targets: Descent, *, is_gate: bool) -> Directory:
        sources.enter(os.open(name, DIRECTORY, dir_fd=sources.fd))
        mode = stat.S_IMODE(os.fstat(sources.fd).st_mode) & self._mask | 0o700
        os.mkdir(name, 0o700, dir_fd=targets.fd)
        targets.enter(os.open(name, DIRECTORY, dir_fd=targets.fd))
        info = os.fstat(targets.fd)
        worker = self._handover.worker
        if not is_gate or self._handover.is_trusted:
            if info.st_uid != worker.uid or info.st_gid != worker.gid:
                os.fchown(targets.fd, worker.uid, worker.gid)
            os.fchmod(targets.fd, mode)
        return Directory(name, info.st_ino, mode & ~0o022, 0, False, {})

    def _fill(self, source: int, target: int, kept: str | None, into: Directory) -> Iterator[str]:
        """Mirror the files and links of a directory; returns its subdirectories."""
        with os.scandir(source) as listing:
            entries = [entry for entry in listing if entry.name != kept]
        below = []
        names: dict[str, Identity] = {}
        into.names = names
        for entry in entries:
            name = entry.name
            if entry.is_dir(follow_symlinks=False):
                below.append(name)
            elif entry.is_symlink():
                names[name] = copy_link(source, name, target, name, self._handover)
            elif entry.is_file(follow_symlinks=False):
                names[name] = self._mirror_file(source, target, name)
        return iter(below)

    def _mirror_file(self, source: int, target: int, name: str) -> Identity:
        if self._can_link:
            try:
                os.link(name, name, src_dir_fd=source, dst_dir_fd=target, follow_symlinks=False)
                return _identity(target, name)
            except OSError as error:
                if error.errno not in _CANNOT_LINK:
                    raise
                self._can_link = error.errno == errno.EMLINK
        return copy_file(source, name, target, name, self._handover)


class Carrier:
    """Carries what was found in a mirror to the action's tree. See `outputs.Delivery`."""

    def __init__(self, handover: Handover, action: int) -> None:
        self._handover = handover
        self._action = action
        self._fd = -1
        self._at: list[str] | None = None

    def directory(self, path: list[str]) -> None:
        self._open(path)

    def entry(self, directory: list[str], parent: int, name: str, info: os.stat_result) -> None:
        """Put this file or link of the mirror into the action's directory of the same path."""
        target = self._open(directory)
        temporary = temporary_name()
        try:
            if stat.S_ISLNK(info.st_mode):
                copy_link(parent, name, target, temporary, self._handover)
            else:
                try:
                    os.link(name, temporary, src_dir_fd=parent, dst_dir_fd=target, follow_symlinks=False)
                except OSError as error:
                    if error.errno not in _CANNOT_LINK:
                        raise
                    copy_file(parent, name, target, temporary, self._handover)
            try:
                os.rename(temporary, name, src_dir_fd=target, dst_dir_fd=target)
            except IsADirectoryError:  # the worker has put a file where an input directory was
                remove_entry(target, name)
                os.rename(temporary, name, src_dir_fd=target, dst_dir_fd=target)
        except BaseException:
            remove_quietly(target, temporary)
            raise

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._at = None

    def _open(self, path: list[str]) -> int:
        if not path:
            return self._action
        if path == self._at:
            return self._fd
        fd = os.dup(self._action)
        try:
            for name in path:
                below = self._open_or_make(fd, name)
                os.close(fd)
                fd = below
        except BaseException:
            os.close(fd)
            raise
        self.close()
        self._fd, self._at = fd, list(path)
        return fd

    def _open_or_make(self, parent: int, name: str) -> int:
        try:
            return os.open(name, DIRECTORY, dir_fd=parent)
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                raise
            os.unlink(name, dir_fd=parent)  # an input that the worker has replaced by a directory
        return self._handover.make_directory(parent, name)


def copy_file(source: int, name: str, target: int, new_name: str, handover: Handover) -> Identity:
    """A copy of the owner's, which the worker can only read, with the times of the original."""
    fd = open_file(source, name)
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise OSError(errno.ESTALE, "a file was replaced while it was looked at", name)
        copy_to_new(fd, info.st_size, target, new_name, sealed_mode(info.st_mode), handover.owner)
        times = (info.st_atime_ns, info.st_mtime_ns)
        os.utime(new_name, ns=times, dir_fd=target, follow_symlinks=False)
    finally:
        os.close(fd)
    return _identity(target, new_name)


def copy_link(source: int, name: str, target: int, new_name: str, handover: Handover) -> Identity:
    """The same link, the owner's, with the times of the original."""
    os.symlink(os.readlink(name, dir_fd=source), new_name, dir_fd=target)
    if not handover.is_trusted:
        owner = handover.owner
        os.chown(new_name, owner.uid, owner.gid, dir_fd=target, follow_symlinks=False)
    info = os.stat(name, dir_fd=source, follow_symlinks=False)
    times = (info.st_atime_ns, info.st_mtime_ns)
    os.utime(new_name, ns=times, dir_fd=target, follow_symlinks=False)
    return _identity(target, new_name)


def _identity(parent: int, name: str) -> Identity:
    info = os.stat(name, dir_fd=parent, follow_symlinks=False)
    return (info.st_ino, info.st_mtime_ns)
