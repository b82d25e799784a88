"""Which action a descriptor means: a directory beneath a work root, found again by a way of our own.

A host of actions (NativeLink) makes a new directory for each, `<work root>/<operation>/work`, and starts its
client there or below. Whoever connects to us passes a descriptor of its working directory; what it says
beside that is not believed. The path that the kernel shows for the descriptor is a hint only: it is
opened anew, beneath the work root and through no link, and must be the same inode. So a descriptor of any
other directory is refused, and renames go through our own mount even if the client has another one.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from wrapper.errors import RequestRefused
from wrapper.files import DIRECTORY, open_beneath

_MOST_COMPONENTS = 64
_DIRECTORY = DIRECTORY & ~os.O_NOFOLLOW  # `open_beneath` goes through no link anyway


@dataclass(frozen=True, slots=True)
class WorkRoot:
    path: str
    trust_domain: str
    """Actions of different ones never share a worker."""


@dataclass(slots=True)
class ActionPlace:
    """An action's directory, opened by us. To be closed."""

    root: WorkRoot
    fd: int
    """`<work root>/<operation>/work`: what holds the inputs."""
    cwd_fd: int
    """The same, or the action's working directory below it."""
    working_directory: str
    identity: tuple[int, int]
    """(device, inode) of `fd`."""
    directory: str
    """The operation's: `<work root>/<operation>`."""

    def close(self) -> None:
        """Idempotent."""
        for fd in {self.fd, self.cwd_fd} - {-1}:
            os.close(fd)
        self.fd = self.cwd_fd = -1


class WorkRoots:
    """The configured work roots. They need not exist yet, and may be made anew (NativeLink's start does)."""

    def __init__(self, roots: Sequence[WorkRoot]) -> None:
        self.roots = tuple(roots)

    def find(self, passed_fd: int) -> ActionPlace:
        """The action in whose directory this descriptor is. Raises RequestRefused if it is in none."""
        info = os.fstat(passed_fd)
        if not stat.S_ISDIR(info.st_mode):
            raise RequestRefused("the descriptor that came with the request is no directory")
        shown = os.readlink(f"/proc/self/fd/{passed_fd}")
        for root in self.roots:
            for components in _candidates(shown, root.path):
                place = _open(root, components, (info.st_dev, info.st_ino))
                if place is not None:
                    return place
        names = ", ".join(root.path for root in self.roots) or "none is configured"
        raise RequestRefused(f"the directory {shown!r} is no action's beneath a work root ({names})")


def _candidates(shown: str, root: str) -> Iterator[list[str]]:
    """Ways from the work root to the directory, the likeliest first."""
    parts = [part for part in shown.split("/") if part]
    if len(parts) > _MOST_COMPONENTS:
        return
    above = [part for part in root.split("/") if part]
    if parts[: len(above)] == above:
        yield parts[len(above) :]
        return
    # With a mount namespace of its own the client sees the work root at another place.
    for start in range(len(parts) - 1):
        yield parts[start:]


def _open(root: WorkRoot, components: list[str], identity: tuple[int, int]) -> ActionPlace | None:
    if len(components) < 2:  # the work root itself, or an operation's folder
        return None
    try:
        root_fd = os.open(root.path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    fd = cwd_fd = -1
    try:
        fd = open_beneath(root_fd, "/".join(components[:2]), _DIRECTORY)
        below = "/".join(components[2:])
        cwd_fd = open_beneath(fd, below, _DIRECTORY) if below else fd
        info = os.fstat(cwd_fd)
        if (info.st_dev, info.st_ino) == identity:
            top = os.fstat(fd) if below else info
            identity, directory = (top.st_dev, top.st_ino), f"{root.path}/{components[0]}"
            place = ActionPlace(root, fd, cwd_fd, below, identity, directory)
            fd = cwd_fd = -1
            return place
    except OSError:
        pass
    finally:
        os.close(root_fd)
        for one in {fd, cwd_fd} - {-1}:
            os.close(one)
    return None
