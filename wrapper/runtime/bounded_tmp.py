"""A temporary folder of bounded size: a tmpfs of its own, mounted for one worker.

Owns the two system calls, which Python has no functions for, and finding mounts that a dead process left.
"""

from __future__ import annotations

import ctypes
import os

from wrapper.errors import RuntimeUnavailable

_MS_NOSUID, _MS_NODEV = 2, 4  # mount(2); sys/mount.h
_MNT_DETACH = 2
_UMOUNT_NOFOLLOW = 8
_BYTES_PER_FILE = 16 * 1024
"""One file for so many bytes: no flood of empty files either."""


def mount_bounded(path: str, size_bytes: int, uid: int, gid: int) -> None:
    """Mount a tmpfs of this size over a folder, owned by the worker. Raises RuntimeUnavailable."""
    files = max(1024, size_bytes // _BYTES_PER_FILE)
    options = f"size={size_bytes},nr_inodes={files},mode=0700,uid={uid},gid={gid}"
    libc = ctypes.CDLL(None, use_errno=True)
    done = libc.mount(
        b"nlww-tmp", os.fsencode(path), b"tmpfs", ctypes.c_ulong(_MS_NOSUID | _MS_NODEV), options.encode()
    )
    if done != 0:
        problem = os.strerror(ctypes.get_errno())
        raise RuntimeUnavailable(
            f"cannot mount a bounded /tmp for a worker at {path}: {problem}; that needs CAP_SYS_ADMIN. "
            "Without it, isolation.tmp_limit_mb: null gives the worker a folder of the node's, unbounded"
        )


def unmount(path: str) -> None:
    """Unmount, whoever still uses it. Idempotent. Raises RuntimeUnavailable if it stays mounted."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.umount2(os.fsencode(path), _MNT_DETACH | _UMOUNT_NOFOLLOW) != 0:
        number = ctypes.get_errno()
        if os.path.ismount(path):
            raise RuntimeUnavailable(f"cannot unmount {path}: {os.strerror(number)}")


def mounts_below(folder: str) -> list[str]:
    """What is mounted below a folder, the deepest first."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        points = [line.split(" ")[4].replace("\\040", " ") for line in file]
    return sorted((point for point in points if point.startswith(f"{folder}/")), reverse=True)
