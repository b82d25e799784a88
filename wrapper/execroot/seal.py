"""Making a file that a worker wrote one that nobody can change any more.

A file that is given back becomes a blob of the host's store; whoever could still write to it would
change the blob under its digest. Not the name is sealed but the inode, so other hard links to it that a
worker keeps elsewhere do no harm: in this order,

1. the owner is the action's, and the mode read-only: from here on nobody opens it for writing, also not by
   another name or through /proc/self/fd, and the worker can set neither mode nor access list back;
2. a read lease (F_SETLEASE) is asked for, which the kernel refuses while anything holds the inode open for
   writing: a descriptor, one queued in a socket, a writable mapping. It is given up at once.

On refusal the content is copied to a new file. Knows nothing of trees.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import stat

from wrapper.execroot.handover import Ids
from wrapper.files import NEW_FILE, REGULAR_FILE, copy_contents, open_with_rights, temporary_name

_LEASE_SIGNAL = signal.SIGURG
"""What a broken lease sends us: ignored by default, while SIGIO would end our process."""


def sealed_mode(mode: int) -> int:
    """What a file is given back with: read-only, executable if it was so for anyone."""
    return 0o555 if mode & 0o111 else 0o444


def seal(parent: int, name: str, owner: Ids, writer: Ids) -> bool:
    """Seal a file in a directory that is locked. Returns whether it had to be copied. Raises OSError."""
    fd = open_file(parent, name)
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise OSError(errno.ESTALE, "a file was replaced while it was looked at", name)
        mode = sealed_mode(info.st_mode)
        if (info.st_uid, info.st_gid) != (owner.uid, owner.gid):
            os.fchown(fd, owner.uid, owner.gid)
        os.fchmod(fd, mode)
        if _nobody_writes(fd):
            return False
        if owner.uid != writer.uid:
            # It is the worker's still: under another of its names it must not pass for a sealed one.
            os.fchown(fd, writer.uid, writer.gid)
        _replace_by_copy(parent, name, fd, info.st_size, mode, owner)
        return True
    finally:
        os.close(fd)


def open_file(parent: int, name: str) -> int:
    """Open for reading what may be anything by now. Never waits: a FIFO, or a lease of the worker's."""
    try:
        return os.open(name, REGULAR_FILE, dir_fd=parent)
    except PermissionError:  # a mode without the right to read, and we are not root
        return open_with_rights(parent, name, REGULAR_FILE, 0o400)
    except BlockingIOError as error:
        raise OSError(error.errno, "the worker holds a write lease on it", name) from error


def _nobody_writes(fd: int) -> bool:
    try:
        fcntl.fcntl(fd, fcntl.F_SETSIG, _LEASE_SIGNAL)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError:
        return False  # somebody does, or this file system cannot tell
    return True  # the lease ends with the descriptor


def _replace_by_copy(parent: int, name: str, source: int, size: int, mode: int, owner: Ids) -> None:
    temporary = temporary_name()
    try:
        copy_to_new(source, size, parent, temporary, mode, owner)
        os.rename(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)
    except BaseException:
        remove_quietly(parent, temporary)
        raise


def copy_to_new(source: int, size: int, parent: int, name: str, mode: int, owner: Ids) -> None:
    """A new file with this content, which nobody else ever had a descriptor of."""
    target = os.open(name, NEW_FILE, 0o600, dir_fd=parent)
    try:
        copy_contents(source, target, size)
        if os.geteuid() != owner.uid or os.getegid() != owner.gid:
            os.fchown(target, owner.uid, owner.gid)
        os.fchmod(target, mode)
    finally:
        os.close(target)


def remove_quietly(parent: int, name: str) -> None:
    try:
        os.unlink(name, dir_fd=parent)
    except OSError:
        pass  # it was never made, or is removed with the directory
