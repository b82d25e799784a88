"""One worker's own execroot for actions: an action's tree is staged into it, and its outputs collected.

Owns the order of the steps and their undoing. The worker's working directory never changes, nor its
inode; each action's directory is new. Everything in an action's tree was made by strangers, and the
worker runs while we work: all is reached by descriptor, and the execroot itself is ours, not the
worker's, whenever entries are moved in or out. The caller has killed the worker's stragglers before it
collects. Knows nothing of pools, processes or the wire.

`rename` costs little whatever the number of files and may be called on the event loop; `link` costs time
for each file, and so does a copy of an output that is still held open for writing.
"""

from __future__ import annotations

import enum
import errno
import os
from dataclasses import dataclass

from wrapper.errors import ConfigError, RequestRefused, RuntimeUnavailable
from wrapper.execroot.handover import Directory, Handover, Ids, file_system_clock_ns
from wrapper.execroot.mirror import Carrier, Mirror
from wrapper.execroot.outputs import Collected, Outputs
from wrapper.files import DIRECTORY, remove_entry, remove_tree, temporary_name

__all__ = ["ActionExecroot", "Collected", "StagedAction", "Strategy"]


class Strategy(enum.Enum):
    """How an action's tree gets into the worker's execroot."""

    RENAME = "rename"
    """Its entries are moved there and back. Asks for one mount."""
    LINK = "link"
    """It is mirrored there, by hard links or copies, and outputs are carried back."""


@dataclass(slots=True)
class _Level:
    """The execroot, or a directory on the way from there to the working directory: never moved."""

    fd: int
    path: list[str]
    inode: int
    kept: str | None = None
    """The entry that leads to the next level."""


class ActionExecroot:
    """One worker's own execroot for actions. `path` never changes, nor does its inode."""

    def __init__(self, path: str, *, uid: int, gid: int, strategy: Strategy, seen_as: str) -> None:
        self.path = path
        self.strategy = strategy
        self._worker = Ids(uid, gid)
        self._seen_as = seen_as
        self._is_ours = uid == os.geteuid()
        """We run as the worker does: nothing can be kept from it, and nothing is."""
        self._levels: list[_Level] = []
        self._counts_links = False
        self._unusable = ""
        self._staged: StagedAction | None = None

    def __repr__(self) -> str:
        state = self._unusable or ("staged" if self._staged else "empty" if self._levels else "removed")
        return f"<ActionExecroot {self.path} {self.strategy.value} {state}>"

    @classmethod
    def make(
        cls,
        base: str,
        name: str,
        *,
        uid: int,
        gid: int,
        strategy: Strategy = Strategy.RENAME,
        working_directory: bytes = b"",
        seen_as: str = "",
    ) -> ActionExecroot:
        """A new one, the worker's own, with mode 0700. Raises OSError.

        `working_directory` is the worker's, below the execroot; its components exist from now on.
        `seen_as` is the path under which the worker sees the execroot, if that is another one.
        Raises RequestRefused if the working directory is not a path below the execroot.
        """
        components = _components(working_directory)
        path = os.path.join(base, name)
        os.mkdir(path, 0o700)
        execroot = cls(path, uid=uid, gid=gid, strategy=strategy, seen_as=seen_as or path)
        try:
            execroot._furnish(components)
        except BaseException:
            execroot.remove()
            raise
        return execroot

    @property
    def working_directory(self) -> str:
        """Where the worker is to be started, as this process sees it."""
        return os.path.join(self.path, *(level.kept for level in self._levels if level.kept is not None))

    @staticmethod
    def check_same_mount(base: str, work_root: str) -> None:
        """Raises ConfigError unless what lies below one of these folders can be renamed into the other.

        Found out by trying: two bind mounts of one file system have the same device, and yet EXDEV.
        """
        name = temporary_name()
        source, target = os.path.join(work_root, name), os.path.join(base, name)
        try:
            os.mkdir(source, 0o700)
            try:
                os.rename(source, target)
            except BaseException:
                os.rmdir(source)
                raise
            os.rmdir(target)
        except OSError as error:
            hint = "; they are on different mounts: use strategy link" if error.errno == errno.EXDEV else ""
            raise ConfigError(f"nothing can be renamed from {work_root} into {base}: {error}{hint}") from error

    def stage(self, action_fd: int) -> StagedAction:
        """Show the worker the tree in this directory: an action's input root.

        Raises RequestRefused, with the tree as it was, if it cannot be staged; RuntimeUnavailable if
        the execroot is unusable, and then the worker must not go on.
        """
        if self._unusable or self._staged is not None or not self._levels:
            raise RuntimeUnavailable(f"{self!r} cannot take an action")
        staged = StagedAction(self)
        try:
            staged._open(action_fd)
            now_ns = self._empty()
            staged._move_in(now_ns)
            self._unlock()
        except BaseException as error:
            staged._put_back(error)
            raise
        self._staged = staged
        return staged

    def remove(self) -> None:
        """Delete the execroot with all that is in it. Idempotent. Raises RuntimeUnavailable if it stays."""
        for level in self._levels:
            os.close(level.fd)
        self._levels = []
        remove_tree(self.path)

    # ---- the directory itself --------------------------------------------------------------------------

    def _furnish(self, components: list[str]) -> None:
        fd = os.open(self.path, DIRECTORY)
        self._add_level(fd, [])
        # Whether a directory tells by its number of links that it has no subdirectories.
        os.mkdir("probe", dir_fd=fd)
        self._counts_links = os.fstat(fd).st_nlink == 3
        os.rmdir("probe", dir_fd=fd)
        for component in components:
            above = self._levels[-1]
            os.mkdir(component, 0o700, dir_fd=above.fd)
            above.kept = component
            self._add_level(
                os.open(component, DIRECTORY, dir_fd=above.fd), [*above.path, component]
            )
        self._unlock()

    def _add_level(self, fd: int, path: list[str]) -> None:
        try:
            self._levels.append(_Level(fd, path, os.fstat(fd).st_ino))
        except BaseException:
            os.close(fd)
            raise

    def _unlock(self) -> None:
        if not self._is_ours:
            for level in self._levels:
                os.fchown(level.fd, self._worker.uid, self._worker.gid)

    def _lock(self) -> None:
        """From here on the worker moves nothing into the execroot or out of it."""
        above: _Level | None = None
        for level in self._levels:
            if above is not None and above.kept is not None:
                info = os.stat(above.kept, dir_fd=above.fd, follow_symlinks=False)
                if info.st_ino != level.inode:
                    raise OSError(errno.ESTALE, "the worker has replaced its working directory", above.kept)
            if not self._is_ours:
                os.fchown(level.fd, os.geteuid(), os.getegid())
            os.fchmod(level.fd, 0o700)  # after the owner: the worker could have given rights to all
            above = level

    def _empty(self) -> int:
        """Lock it and remove what the worker left while it was idle. Returns the file system's time."""
        try:
            self._lock()
            for level in self._levels:
                for name in os.listdir(level.fd):
                    if name != level.kept:
                        remove_entry(level.fd, name)
            return file_system_clock_ns(self._levels[0].fd)
        except OSError as error:
            self._unusable = "unusable"
            raise RuntimeUnavailable(f"the worker's execroot {self.path} cannot be emptied: {error}") from error


class StagedAction:
    """An action whose tree a worker sees. Ends with exactly one of `collect`, `undo` and `abandon`."""

    def __init__(self, execroot: ActionExecroot) -> None:
        self._execroot = execroot
        self._fds: list[int] = []
        """Of the action's directories, level by level; -1 where it has none."""
        self._staged: list[Directory] = []
        self._moved: list[tuple[int, str]] = []
        self._handover = Handover(Ids(0, 0), Ids(0, 0), now_ns=0, counts_links=False)

    def collect(self) -> Collected:
        """Give the tree back, with whatever the worker added. Raises RuntimeUnavailable: nothing is given back."""
        return self._finish(discard=False)

    def undo(self) -> None:
        """For a request that was never sent: the tree goes back as it came, quietly."""
        try:
            self._finish(discard=True)
        except RuntimeUnavailable:
            pass  # the error that led here is the one to tell, and the execroot remembers

    def abandon(self) -> None:
        """Give nothing back. The execroot takes no other action; the tree goes with it."""
        if self._fds:
            self._execroot._unusable = "abandoned"
            self._end()

    # ---- in --------------------------------------------------------------------------------------------

    def _open(self, action_fd: int) -> None:
        execroot = self._execroot
        self._fds.append(os.dup(action_fd))
        info = os.fstat(action_fd)
        self._owner = Ids(info.st_uid, info.st_gid)
        for level in execroot._levels[:-1]:
            above = self._fds[-1]
            if above < 0:
                self._fds.append(-1)
                continue
            try:
                self._fds.append(os.open(level.kept or ".", DIRECTORY, dir_fd=above))
            except FileNotFoundError:
                self._fds.append(-1)
            except OSError as error:
                raise RequestRefused(
                    f"the action's working directory is not a directory of its tree: {error}"
                ) from error

    def _move_in(self, now_ns: int) -> None:
        execroot = self._execroot
        is_mirror = execroot.strategy is Strategy.LINK
        handover = self._handover = Handover(
            self._owner,
            execroot._worker,
            now_ns=now_ns,
            counts_links=execroot._counts_links,
            keeps_names=is_mirror,
        )
        try:
            if is_mirror:
                mirror = Mirror(handover)
                for fd, level in zip(self._fds, execroot._levels, strict=True):
                    top = self._remember_level()
                    if fd >= 0:
                        mirror.make(fd, level.fd, level.kept, top)
                return
            names_of = []
            for fd, level in zip(self._fds, execroot._levels, strict=True):
                top = self._remember_level()
                names_of.append(self._hand_over_level(fd, level, top) if fd >= 0 else [])
            for number, names in enumerate(names_of):
                source, target = self._fds[number], execroot._levels[number].fd
                for name in names:
                    self._moved.append((number, name))
                    os.rename(name, name, src_dir_fd=source, dst_dir_fd=target)
        except OSError as error:
            hint = "; it is on another mount: use strategy link" if error.errno == errno.EXDEV else ""
            raise RequestRefused(
                f"the action's tree cannot be moved into the worker's execroot: {error}{hint}"
            ) from error

    def _remember_level(self) -> Directory:
        top = Directory("", 0, 0, 0, False)
        self._staged.append(top)
        return top

    def _hand_over_level(self, fd: int, level: _Level, top: Directory) -> list[str]:
        with os.scandir(fd) as listing:
            entries = [entry for entry in listing if entry.name != level.kept]
        if self._handover.is_trusted:
            top.names = {entry.name: entry.inode() for entry in entries}
        directories = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        self._handover.hand_over(fd, directories, top.below)
        return [entry.name for entry in entries]

    def _put_back(self, error: BaseException) -> None:
        """After a failed stage. The worker has seen nothing: the execroot was locked."""
        execroot = self._execroot
        first: OSError | None = None
        if execroot.strategy is Strategy.RENAME:
            for number, name in reversed(self._moved):
                source, target = execroot._levels[number].fd, self._fds[number]
                try:
                    os.rename(name, name, src_dir_fd=source, dst_dir_fd=target)
                except FileNotFoundError:
                    pass  # the one that could not be moved
                except OSError as second:
                    first = first or second
            for fd, top in zip(self._fds, self._staged, strict=False):
                if fd >= 0:
                    first = self._handover.take_back(fd, top.below) or first
        try:
            if not execroot._unusable:
                if execroot.strategy is Strategy.LINK:
                    execroot._empty()
                execroot._unlock()
        except (OSError, RuntimeUnavailable):
            execroot._unusable = "unusable"
        self._end()
        if first is not None:
            execroot._unusable = "unusable"
            raise RuntimeUnavailable(
                f"a part of an action's tree may have stayed in the worker's execroot {execroot.path}: {first}"
            ) from error

    # ---- out -------------------------------------------------------------------------------------------

    def _finish(self, *, discard: bool) -> Collected:
        if not self._fds:
            return Collected()
        execroot = self._execroot
        before, execroot._unusable = execroot._unusable, "unusable"
        try:
            execroot._lock()
            if execroot.strategy is Strategy.RENAME:
                collected = self._sort_out(discard, None)
                self._move_out()
            else:
                collected = Collected()
                if not discard:
                    carrier = Carrier(self._handover, self._fds[0])
                    try:
                        collected = self._sort_out(discard, carrier)
                    finally:
                        carrier.close()
                execroot._empty()
            execroot._unlock()
            execroot._unusable = before
        except OSError as error:
            raise RuntimeUnavailable(
                f"the outputs of an action in {execroot.path} cannot be given back: {error}"
            ) from error
        finally:
            self._end()
        return collected

    def _sort_out(self, discard: bool, carrier: Carrier | None) -> Collected:
        execroot = self._execroot
        outputs = Outputs(self._handover, execroot._seen_as, discard=discard, delivery=carrier)
        for level, staged in zip(execroot._levels, self._staged, strict=True):
            outputs.collect(level.fd, level.path, staged, level.kept)
        return outputs.collected

    def _move_out(self) -> None:
        for number, level in enumerate(self._execroot._levels):
            for name in os.listdir(level.fd):
                if name != level.kept:
                    os.rename(name, name, src_dir_fd=level.fd, dst_dir_fd=self._action_fd(number))

    def _action_fd(self, number: int) -> int:
        """The action's directory of this level, made now if the action came without it."""
        fd = self._fds[number]
        if fd < 0:
            above, name = self._action_fd(number - 1), self._execroot._levels[number - 1].kept or "."
            os.mkdir(name, 0o755, dir_fd=above)
            fd = self._fds[number] = os.open(name, DIRECTORY, dir_fd=above)
            self._handover.lock(fd, 0o755)
        return fd

    def _end(self) -> None:
        for fd in self._fds:
            if fd >= 0:
                os.close(fd)
        self._fds = []
        self._staged = []
        self._execroot._staged = None


def _components(path: bytes) -> list[str]:
    parts = [part for part in path.split(b"/") if part not in (b"", b".")]
    if path.startswith(b"/") or b".." in parts or b"\0" in path:
        raise RequestRefused(f"working directory {os.fsdecode(path)!r} is not a path below the execroot")
    return [os.fsdecode(part) for part in parts]
