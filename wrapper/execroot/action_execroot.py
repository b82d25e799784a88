"""One worker's own execroot for actions: an action's tree is staged into it, and its outputs collected.

The worker's working directory never changes, nor its inode; each action's directory is new. This is the
face of the package: what the steps are is in `staged_action.py`. Knows nothing of pools, processes or
the wire.

`rename` costs little whatever the number of files and may be called on the event loop; `link` costs time
for each file, and so does a copy of an output that is still held open for writing.
"""

from __future__ import annotations

import errno
import os

from wrapper.errors import ConfigError, RequestRefused, RuntimeUnavailable
from wrapper.execroot.handover import Ids
from wrapper.execroot.outputs import Collected
from wrapper.execroot.own_directory import OwnDirectory
from wrapper.execroot.seed import SeedTree
from wrapper.execroot.staged_action import StagedAction, Strategy
from wrapper.files import temporary_name

__all__ = ["ActionExecroot", "Collected", "StagedAction", "Strategy"]


class ActionExecroot:
    """One worker's own execroot for actions. `path` never changes, nor does its inode."""

    def __init__(self, own: OwnDirectory, strategy: Strategy) -> None:
        self.path = own.path
        self.strategy = strategy
        self._own = own
        self._staged: StagedAction | None = None

    def __repr__(self) -> str:
        state = self._own.unusable or ("staged" if self._is_taken else "empty")
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
        seed: SeedTree | None = None,
    ) -> ActionExecroot:
        """A new one, which nobody but the worker may enter. Raises OSError.

        `working_directory` is the worker's, below the execroot; its components exist from now on.
        `seen_as` is the path under which the worker sees the execroot, if that is another one. `seed` is
        what it sees there while no action is; linking it takes time for each file.
        Raises RequestRefused if the working directory is not a path below the execroot.
        """
        components = _components(working_directory)
        path = os.path.join(base, name)
        return cls(OwnDirectory(path, Ids(uid, gid), components, seen_as or path, seed), strategy)

    @property
    def working_directory(self) -> str:
        """Where the worker is to be started, as this process sees it."""
        return os.path.join(self.path, *(level.kept for level in self._own.levels if level.kept is not None))

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
            raise ConfigError(
                f"nothing can be renamed from {work_root} into {base}: {error}{hint}"
            ) from error

    def stage(self, action_fd: int) -> StagedAction:
        """Show the worker the tree in this directory: an action's input root.

        Raises RequestRefused, with the tree as it was, if it cannot be staged; RuntimeUnavailable if
        the execroot is unusable, and then the worker must not go on.
        """
        if self._own.unusable or self._is_taken:
            raise RuntimeUnavailable(f"{self!r} cannot take an action")
        self._staged = StagedAction(self._own, self.strategy)
        self._staged.begin(action_fd)
        return self._staged

    def remove(self) -> None:
        """Delete the execroot with all that is in it. Idempotent. Raises RuntimeUnavailable if it stays."""
        if self._staged is not None:
            self._staged.abandon()
        self._own.remove()

    @property
    def _is_taken(self) -> bool:
        return self._staged is not None and self._staged.is_staged


def _components(path: bytes) -> list[str]:
    parts = [part for part in path.split(b"/") if part not in (b"", b".")]
    if path.startswith(b"/") or b".." in parts or b"\0" in path:
        raise RequestRefused(f"working directory {os.fsdecode(path)!r} is not a path below the execroot")
    return [os.fsdecode(part) for part in parts]
