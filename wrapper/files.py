"""Opening, copying and deleting what a tool or an action made, as whoever may be root.

Nothing here follows a symbolic link, trusts a name or a mode, or recurses as deep as the other side
likes. Knows nothing of workers, processes or actions: what must not change meanwhile, the caller has
seen to.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from functools import cache
from typing import Any

from wrapper.errors import RuntimeUnavailable

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
"""How a directory is opened that somebody else may have replaced by a link."""
REGULAR_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
"""How a file is opened that somebody else may have replaced by a link, a FIFO or a terminal."""
NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

_PIN = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_ATTEMPTS = 5
_CHUNK_BYTES = 1 << 20
_LONGEST_COPY_BYTES = 1 << 30  # of one system call
_OPENAT2 = 437  # syscall number: the same on all architectures, since Linux 5.6
_BENEATH_NO_LINKS = 0x02 | 0x04 | 0x08  # RESOLVE_NO_MAGICLINKS | RESOLVE_NO_SYMLINKS | RESOLVE_BENEATH
_CANNOT_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ETXTBSY}


def temporary_name() -> str:
    """A name that nobody else can have thought of."""
    return f".nlww-{os.urandom(8).hex()}"


# ---- opening -------------------------------------------------------------------------------------------


def open_with_rights(parent: int | None, name: str, flags: int, needed_mode: int) -> int:
    """Open a file or directory of our own, giving ourselves the rights to do so first."""
    # O_PATH needs no rights on the thing itself, and pins it against being swapped for a link.
    pin = os.open(name, _PIN | flags & os.O_DIRECTORY, dir_fd=parent)
    try:
        mode = os.fstat(pin).st_mode
        if stat.S_ISLNK(mode):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), name)
        if mode & needed_mode != needed_mode:
            os.chmod(f"/proc/self/fd/{pin}", stat.S_IMODE(mode) | needed_mode)
        return os.open(f"/proc/self/fd/{pin}", flags & ~os.O_NOFOLLOW)
    finally:
        os.close(pin)


def open_beneath(directory_fd: int, path: str, flags: int) -> int:
    """Open what lies at a relative path beneath a directory, through no symbolic link and past no `..` of it.

    Raises OSError: EXDEV if the path leads out (an absolute one does), ELOOP if there is a link on it.
    `flags` are those of `os.open` without O_CREAT; close-on-exec is added.
    """
    if "\0" in path:
        raise OSError(errno.EINVAL, "a zero byte in a path", path)
    flags |= os.O_CLOEXEC
    for _ in range(_ATTEMPTS):
        found = _openat2(directory_fd, path, flags)
        if found >= 0:
            return found
        if found in (-errno.ENOSYS, -errno.EPERM):  # an old kernel, or a filter that does not know the call
            break
        if found not in (-errno.EAGAIN, -errno.EINTR):
            raise OSError(-found, os.strerror(-found), path)
        # EAGAIN: there is a ".." in the path, and meanwhile something was renamed, anywhere on the machine
    return _open_by_component(directory_fd, path, flags)


def _openat2(directory_fd: int, path: str, flags: int) -> int:
    """The descriptor, or the negative error number."""
    how = struct.pack("=QQQ", flags, 0, _BENEATH_NO_LINKS)
    system_call, errno_of_call = _system_call()
    fd = system_call(_OPENAT2, directory_fd, os.fsencode(path), how, len(how))
    return int(fd) if fd >= 0 else -int(errno_of_call())


@cache
def _system_call() -> tuple[Any, Any]:
    import ctypes  # 5 ms that only a process which opens others' files has to pay

    call = ctypes.CDLL(None, use_errno=True).syscall
    call.restype = ctypes.c_long
    call.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t)
    return call, ctypes.get_errno


def _open_by_component(directory_fd: int, path: str, flags: int) -> int:
    """`open_beneath` where the kernel cannot do it in one."""
    if not path:
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    if path.startswith("/"):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), path)
    *parents, last = path.split("/")
    if last in ("", ".", ".."):  # it names a directory
        parents.append(last)
        last, flags = ".", flags | os.O_DIRECTORY
    passed: list[int] = []
    """Descriptors on the way: `..` goes back to the one that we came from, wherever it is by now."""
    try:
        for component in parents:
            if component in ("", "."):
                continue
            if component != "..":
                passed.append(_open_no_link(passed[-1] if passed else directory_fd, component, DIRECTORY))
            elif passed:
                os.close(passed.pop())
            else:
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), path)
        return _open_no_link(passed[-1] if passed else directory_fd, last, flags)
    finally:
        for fd in passed:
            os.close(fd)


def _open_no_link(parent: int, name: str, flags: int) -> int:
    if not flags & os.O_PATH:
        try:
            return os.open(name, flags | os.O_NOFOLLOW, dir_fd=parent)
        except NotADirectoryError:
            # With O_DIRECTORY a link is one of these; openat2 says which.
            if stat.S_ISLNK(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), name) from None
            raise
    fd = os.open(name, flags | os.O_NOFOLLOW, dir_fd=parent)
    if stat.S_ISLNK(os.fstat(fd).st_mode) and not flags & os.O_NOFOLLOW:
        os.close(fd)
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), name)
    return fd


class Descent:
    """Descriptors of the directories on one way down a tree: a bounded number, however deep it is.

    `fd` is that of the deepest. What was entered must keep its place until it is left again, which is
    looked at where it matters.
    """

    __slots__ = ("_fds", "_top", "fd")

    MOST_OPEN = 24

    def __init__(self, top: int) -> None:
        self._top = top
        self._fds: list[tuple[int, tuple[int, int] | None]] = []
        """Of each directory entered: its descriptor, or -1 and its (device, inode)."""
        self.fd = top

    def enter(self, fd: int) -> None:
        """Go down into the directory with this descriptor, which is ours to close from now on."""
        self._fds.append((fd, None))
        self.fd = fd
        if len(self._fds) > self.MOST_OPEN:
            place = len(self._fds) - 1 - self.MOST_OPEN
            closing, _ = self._fds[place]
            if closing >= 0:
                info = os.fstat(closing)
                self._fds[place] = (-1, (info.st_dev, info.st_ino))
                os.close(closing)

    def leave(self) -> None:
        """Go back up."""
        left, _ = self._fds.pop()
        try:
            if not self._fds:
                self.fd = self._top
                return
            fd, identity = self._fds[-1]
            if fd < 0:
                fd = os.open("..", DIRECTORY, dir_fd=left)
                self._fds[-1] = (fd, None)
                info = os.fstat(fd)
                if (info.st_dev, info.st_ino) != identity:
                    raise OSError(errno.ESTALE, "a directory was moved while it was looked through")
            self.fd = fd
        finally:
            os.close(left)

    def close(self) -> None:
        while self._fds:
            fd, _ = self._fds.pop()
            if fd >= 0:
                os.close(fd)
        self.fd = self._top


# ---- copying -------------------------------------------------------------------------------------------


def copy_contents(source: int, target: int, size: int) -> None:
    """Copy the first `size` bytes between two open files; holes stay holes. No more is read, if it grows."""
    at = 0
    while at < size:
        begin, end = _next_data(source, at, size)
        if begin >= size:
            break
        at = begin
        while at < end:
            copied = _copy_some(source, target, at, end - at)
            if not copied:  # it was cut off meanwhile
                at = size
                break
            at += copied
    os.ftruncate(target, size)


def _next_data(fd: int, at: int, size: int) -> tuple[int, int]:
    try:
        begin = os.lseek(fd, at, os.SEEK_DATA)
        return begin, min(size, max(begin + 1, os.lseek(fd, begin, os.SEEK_HOLE)))
    except OSError as error:
        if error.errno == errno.ENXIO:  # nothing but a hole from here on
            return size, size
        return at, size  # a file system that knows no holes


def _copy_some(source: int, target: int, at: int, count: int) -> int:
    try:
        return os.copy_file_range(source, target, min(count, _LONGEST_COPY_BYTES), at, at)
    except OSError as error:
        if error.errno not in _CANNOT_COPY:
            raise
    data = os.pread(source, min(count, _CHUNK_BYTES), at)
    return os.pwrite(target, data, at) if data else 0


# ---- deleting ------------------------------------------------------------------------------------------


def remove_tree(path: str) -> None:
    """Delete a file or directory, whatever its modes. Raises RuntimeUnavailable if it stays."""
    remove_below(os.path.dirname(path), os.path.basename(path))


def remove_below(root: str, path: str) -> None:
    """Delete the file or directory at a relative path, which leads through no link."""
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
            remove_entry(parent, name)
            return
        except OSError as error:
            last = error
        finally:
            os.close(parent)
    raise RuntimeUnavailable(
        f"cannot remove {os.path.join(root, path)!r}, which a worker left behind: {last}"
    ) from last


def _open_parent(root: str, path: str) -> tuple[int, str]:
    """Descriptor of the directory that holds `path`, reached from `root` without any symbolic link."""
    *parents, name = path.split("/")
    fd = open_mine(None, root)
    try:
        for component in parents:
            below = open_mine(fd, component)
            os.close(fd)
            fd = below
    except BaseException:
        os.close(fd)
        raise
    return fd, name


def remove_entry(parent: int, name: str) -> None:
    """Delete one entry of an open directory, and all that is in it. Raises OSError."""
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
        fd = open_mine(parent, directory)
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
                os.close(open_mine(fd, child))  # renaming a directory changes its "..": it must be writable
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


def open_mine(parent: int | None, name: str) -> int:
    """Open a directory, giving ourselves the rights to list and change it first."""
    return open_with_rights(parent, name, DIRECTORY, 0o700)
