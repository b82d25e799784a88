"""Finding what a worker added to an action's tree, and making it fit to be given back.

Owns the walk over the tree while it is still in the worker's execroot. From the top down, each directory
is locked before it is listed, so that nothing that was looked at can be swapped afterwards. Everything
that is not an input is an output: it becomes the owner's and is sealed (`seal.py`). Whose a file is tells
what it is, since a worker cannot give files away: with the owner's uid it is an input, maybe under another
name, or was sealed already. Only where both have one uid, or where outputs are copied, names are compared.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from wrapper.execroot.handover import Directory, Handover, Identity
from wrapper.execroot.seal import remove_quietly, seal
from wrapper.files import Descent, remove_entry, temporary_name

_MOST_NAMES = 16
"""How many of the things that cannot be outputs are told by name."""


@dataclass(slots=True)
class Collected:
    """What became of the outputs."""

    outputs: int = 0
    """Files and symbolic links that were not there before."""
    copied: int = 0
    """Of these, files that something still held open for writing."""
    links_rewritten: int = 0
    """Absolute links into the execroot, relative now."""
    removed: int = 0
    """FIFOs, sockets and devices: no action has those as outputs."""
    inputs_are_there: bool = field(default=True, compare=False)
    """False: one is perhaps missing, or was put in the place of another."""
    removed_paths: list[str] = field(default_factory=list)
    """The first few of them."""


class Delivery(Protocol):
    """Takes what was found where it is not given back by rename. Paths are those of the action's tree."""

    def entry(self, directory: list[str], parent: int, name: str, info: os.stat_result) -> None: ...
    def directory(self, path: list[str]) -> None: ...


class Outputs:
    """One collection. `execroot` is the path under which the worker sees its execroot."""

    def __init__(
        self, handover: Handover, execroot: str, *, discard: bool = False, delivery: Delivery | None = None
    ) -> None:
        self.collected = Collected()
        self._handover = handover
        self._execroot = [part for part in execroot.split("/") if part]
        self._discard = discard
        self._delivery = delivery
        self.tops: list[list[str]] = []
        """Names in each level: it is locked, so that there are no others; what is no output is gone."""
        self._listed: list[str] = []
        self._path: list[str] = []

    def collect(self, top: int, path: list[str], staged: Directory, kept: str | None) -> None:
        """Go through one level of the execroot, which is locked; `kept` in it leads to the next level."""
        self._path = list(path)
        descent = Descent(top)
        todo = [self._changed(top, staged, kept)]
        self.tops.append(self._listed)
        try:
            while todo:
                for name, known in todo[-1]:
                    if known is None and self._discard:
                        remove_entry(descent.fd, name)
                        continue
                    fd, changed = self._handover.open_and_lock(descent.fd, name, known)
                    if not changed and known is not None and not known.below:
                        os.close(fd)  # as most are
                        continue
                    if changed and known is not None and known.is_shared and known.names is None:
                        self.collected.inputs_are_there = False
                    try:
                        self._path.append(name)
                        below = self._look(fd, known, changed)
                    except BaseException:
                        os.close(fd)
                        raise
                    if below is not None:
                        descent.enter(fd)
                        todo.append(below)
                        break
                    self._path.pop()
                    os.close(fd)
                else:
                    todo.pop()
                    if todo:
                        self._path.pop()
                        descent.leave()
        finally:
            descent.close()

    def _look(
        self, fd: int, known: Directory | None, changed: bool
    ) -> Iterator[tuple[str, Directory | None]] | None:
        if known is None and self._delivery is not None:
            self._delivery.directory(self._path)
        if changed:
            return self._changed(fd, known, None)
        if known is None or not known.below:
            return None
        return iter([(directory.name, directory) for directory in known.below])

    def _changed(
        self, fd: int, known: Directory | None, kept: str | None
    ) -> Iterator[tuple[str, Directory | None]]:
        """See to the entries of a directory; its subdirectories are left to the caller."""
        with os.scandir(fd) as listing:
            entries = [
                (entry.name, entry.inode(), entry.is_dir(follow_symlinks=False))
                for entry in listing
                if entry.name != kept
            ]
        self._listed = [name for name, _, _ in entries]
        names = None if known is None else known.names
        directories = {} if known is None else {below.name: below for below in known.below}
        found: list[tuple[str, Directory | None]] = []
        missing = len(directories) + len(names or ())
        for name, inode, is_directory in entries:
            if is_directory:
                below = directories.get(name)
                is_known = below is not None and below.inode == inode
                missing -= is_known
                found.append((name, below if is_known else None))
            else:
                missing -= names is not None and names.get(name, (-1,))[0] == inode
                self._see_to(fd, name, names)
        if missing:
            self.collected.inputs_are_there = False
        return iter(found)

    def _see_to(self, parent: int, name: str, names: dict[str, Identity] | None) -> None:
        handover = self._handover
        info = os.stat(name, dir_fd=parent, follow_symlinks=False)
        is_owners = info.st_uid == handover.owner.uid
        if names is not None and is_owners:
            known = names.get(name, (-1,))
            if known == (info.st_ino, info.st_mtime_ns)[: len(known)]:
                return
        if is_owners and not handover.is_trusted and self._delivery is None:
            return
        if self._discard:
            os.unlink(name, dir_fd=parent)
            return
        collected = self.collected
        if stat.S_ISREG(info.st_mode):
            if handover.is_trusted or not is_owners:
                collected.copied += seal(parent, name, handover.owner, handover.worker)
        elif stat.S_ISLNK(info.st_mode):
            self._see_to_link(parent, name)
        else:
            os.unlink(name, dir_fd=parent)
            collected.removed += 1
            if collected.removed <= _MOST_NAMES:
                collected.removed_paths.append("/".join([*self._path, name]))
            return
        collected.outputs += 1
        if self._delivery is not None:
            info = os.stat(name, dir_fd=parent, follow_symlinks=False)
            self._delivery.entry(self._path, parent, name, info)

    # ---- links -----------------------------------------------------------------------------------------

    def _see_to_link(self, parent: int, name: str) -> None:
        owner = self._handover.owner
        target = self._relative(os.readlink(name, dir_fd=parent))
        if target is None:
            if not self._handover.is_trusted:
                os.chown(name, owner.uid, owner.gid, dir_fd=parent, follow_symlinks=False)
            return
        temporary = temporary_name()
        try:
            os.symlink(target, temporary, dir_fd=parent)
            if not self._handover.is_trusted:
                os.chown(temporary, owner.uid, owner.gid, dir_fd=parent, follow_symlinks=False)
            os.rename(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)
        except BaseException:
            remove_quietly(parent, temporary)
            raise
        self.collected.links_rewritten += 1

    def _relative(self, target: str) -> str | None:
        """The same place, seen from the directory that is looked at; None if it is not in the execroot."""
        if not target.startswith("/"):
            return None
        parts = [part for part in target.split("/") if part not in ("", ".")]
        length = len(self._execroot)
        if parts[:length] != self._execroot:
            return None
        below = parts[length:]
        if _leaves(below):
            return None
        return "/".join([".."] * len(self._path) + below) or "."


def _leaves(parts: Iterable[str]) -> bool:
    depth = 0
    for part in parts:
        depth += -1 if part == ".." else 1
        if depth < 0:
            return True
    return False
