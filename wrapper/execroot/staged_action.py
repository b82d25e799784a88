"""One action's tree on its way into a worker's execroot and out: the order of the steps, and their undoing.

Everything in the tree was made by strangers, and the worker runs while we work: all is reached by
descriptor, and the execroot is locked whenever entries are moved in or out. The caller has killed the
worker's stragglers before it collects; what a straggler could do all the same is harmless.
"""

from __future__ import annotations

import enum
import errno
import os

from wrapper.errors import ActionLost, RequestRefused, RuntimeUnavailable
from wrapper.execroot.handover import Directory, Handover, Ids, identities
from wrapper.execroot.mirror import Carrier, Mirror
from wrapper.execroot.outputs import Collected, Outputs
from wrapper.execroot.own_directory import Level, OwnDirectory
from wrapper.files import DIRECTORY


class Strategy(enum.Enum):
    """How an action's tree gets into the worker's execroot."""

    RENAME = "rename"
    """Its entries are moved there and back. Asks for one mount."""
    LINK = "link"
    """It is mirrored there, by hard links or copies, and outputs are carried back."""


class StagedAction:
    """An action whose tree a worker sees. Ends with exactly one of `collect`, `undo` and `abandon`."""

    def __init__(self, own: OwnDirectory, strategy: Strategy) -> None:
        self._own = own
        self._strategy = strategy
        self._fds: list[int] = []
        """Of the action's directories, level by level; -1 where it has none."""
        self._tops: list[Directory] = []
        """What was handed over, level by level."""
        self._moved: list[tuple[int, str]] = []
        self._handover = Handover(Ids(0, 0), Ids(0, 0), now_ns=0, counts_links=False)

    @property
    def is_staged(self) -> bool:
        """Whether the tree is in the execroot still."""
        return bool(self._fds)

    def begin(self, action_fd: int) -> None:
        """Stage it. See `ActionExecroot.stage`."""
        try:
            owner = self._open(action_fd)
            self._move_in(owner, self._own.empty())
            self._own.unlock()
        except OSError as error:
            self._put_back(error)
            hint = "; it is on another mount: use strategy link" if error.errno == errno.EXDEV else ""
            raise RequestRefused(
                f"the action's tree cannot be moved into the worker's execroot: {error}{hint}"
            ) from error
        except BaseException as error:
            self._put_back(error)
            raise

    def collect(self) -> Collected:
        """Give the tree back, with whatever the worker added.

        Raises RuntimeUnavailable if that cannot be done safely: the action has failed, and the worker
        must not go on.
        """
        return self._finish(discard=False)

    def undo(self) -> bool:
        """The tree goes back as it came, quietly, without what is new. Whether all inputs surely are there.

        For a request that was never sent, or had no answer. A worker that was at work may have removed
        inputs, which nobody can bring back.
        """
        try:
            return self._finish(discard=True).inputs_are_there
        except RuntimeUnavailable:
            return False  # the error that led here is the one to tell, and the execroot takes no more actions

    def abandon(self) -> None:
        """Give nothing back. The execroot takes no other action; the tree goes with it."""
        if self._fds:
            self._own.unusable = "abandoned"
            self._end()

    # ---- in --------------------------------------------------------------------------------------------

    def _open(self, action_fd: int) -> Ids:
        """Open the action's directory of each level. Returns whose the tree is."""
        self._fds.append(os.dup(action_fd))
        info = os.fstat(action_fd)
        for level in self._own.levels:
            if level.kept is None:
                break
            above = self._fds[-1]
            try:
                fd = os.open(level.kept, DIRECTORY, dir_fd=above) if above >= 0 else -1
            except FileNotFoundError:
                fd = -1
            self._fds.append(fd)
        return Ids(info.st_uid, info.st_gid)

    def _move_in(self, owner: Ids, now_ns: int) -> None:
        own = self._own
        is_mirror = self._strategy is Strategy.LINK
        self._handover = Handover(
            owner, own.worker, now_ns=now_ns, counts_links=own.counts_links, keeps_names=is_mirror
        )
        self._tops = [Directory("", 0, 0, 0, False, None) for _ in own.levels]
        if is_mirror:
            mirror = Mirror(self._handover)
            for fd, level, top in zip(self._fds, own.levels, self._tops, strict=True):
                if fd >= 0:
                    mirror.make(fd, level.fd, level.kept, top)
            self._open_gates()
            return
        # First in, then handed over: whatever happens to us in between, no directory of the host's is
        # left with an owner that keeps the host from deleting it.
        directories = [
            self._move_level_in(number, fd, level) if fd >= 0 else []
            for number, (fd, level) in enumerate(zip(self._fds, own.levels, strict=True))
        ]
        for level, top, names in zip(own.levels, self._tops, directories, strict=True):
            self._handover.hand_over(level.fd, names, top.below)
        self._open_gates()

    def _open_gates(self) -> None:
        for level, top in zip(self._own.levels, self._tops, strict=True):
            self._handover.open_gates(level.fd, top.below)

    def _move_level_in(self, number: int, fd: int, level: Level) -> list[str]:
        """Move the entries of one level in; returns which of them are directories."""
        with os.scandir(fd) as listing:
            entries = [entry for entry in listing if entry.name != level.kept]
        directories = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        self._tops[number].names = identities(entries)
        for entry in entries:
            self._moved.append((number, entry.name))
            os.rename(entry.name, entry.name, src_dir_fd=fd, dst_dir_fd=level.fd)
        return directories

    def _put_back(self, error: BaseException) -> None:
        """After a failed `begin`. The worker has changed nothing: the gates were closed."""
        own = self._own
        first: OSError | RuntimeUnavailable | None = None
        if self._strategy is Strategy.RENAME:
            for level, top in zip(own.levels, self._tops, strict=False):
                first = self._handover.take_back(level.fd, top.below) or first
            for number, name in reversed(self._moved):
                try:
                    if name in os.listdir(own.levels[number].fd):  # else it is the one that failed
                        os.rename(name, name, src_dir_fd=own.levels[number].fd, dst_dir_fd=self._fds[number])
                except OSError as second:
                    first = first or second
        self._end()
        try:
            if not own.unusable:
                if self._strategy is Strategy.LINK:
                    own.empty()
                own.give_back()
        except (OSError, RuntimeUnavailable) as second:
            own.unusable = "unusable"
            first = first or second
        if first is not None:
            own.unusable = "unusable"
            raise ActionLost(
                f"an action's tree was put back only in part from the worker's execroot {own.path}: {first}"
            ) from error

    # ---- out -------------------------------------------------------------------------------------------

    def _finish(self, *, discard: bool) -> Collected:
        if not self._fds:
            return Collected()
        own = self._own
        own.unusable = "unusable"  # until all is done
        try:
            own.lock()
            if self._strategy is Strategy.RENAME:
                outputs = Outputs(self._handover, own.seen_as, discard=discard)
                collected = self._sort_out(outputs)
                self._move_out(outputs.tops)
            else:
                collected = Collected() if discard else self._carry_out()
                own.empty()
            own.give_back()
        except OSError as error:
            raise ActionLost(
                f"the outputs of an action in {own.path} cannot be given back: {error}"
            ) from error
        finally:
            self._end()
        own.unusable = ""
        return collected

    def _carry_out(self) -> Collected:
        carrier = Carrier(self._handover, self._fds[0])
        try:
            return self._sort_out(Outputs(self._handover, self._own.seen_as, delivery=carrier))
        finally:
            carrier.close()

    def _sort_out(self, outputs: Outputs) -> Collected:
        for level, top in zip(self._own.levels, self._tops, strict=True):
            outputs.collect(level.fd, level.path, top, level.kept)
        return outputs.collected

    def _move_out(self, tops: list[list[str]]) -> None:
        for number, (level, names) in enumerate(zip(self._own.levels, tops, strict=True)):
            for name in names:
                try:
                    os.rename(name, name, src_dir_fd=level.fd, dst_dir_fd=self._action_fd(number))
                except FileNotFoundError:
                    pass  # a socket or the like, which was removed

    def _action_fd(self, number: int) -> int:
        """The action's directory of this level, made now if the action came without it."""
        fd = self._fds[number]
        if fd < 0:
            above, name = self._action_fd(number - 1), self._own.levels[number].path[-1]
            fd = self._fds[number] = self._handover.make_directory(above, name)
        return fd

    def _end(self) -> None:
        for fd in self._fds:
            if fd >= 0:
                os.close(fd)
        self._fds = []
        self._tops = []
