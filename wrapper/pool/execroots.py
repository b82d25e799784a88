"""The directories that workers run in: made before a worker starts, removed after it.

Owns which kind a worker gets, and this process's folder for those of actions, where what dead processes left
is removed. What is in an execroot, and how it gets there, is `execroot/`'s.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from wrapper.errors import RuntimeUnavailable
from wrapper.execroot.scratch import Scratch, Staged
from wrapper.execroot.worker_execroot import WorkerExecroot
from wrapper.pool.inplace import InplaceMounts
from wrapper.pool.settings import ExecrootSettings, PoolSettings
from wrapper.pool.worker_key import WorkerKey
from wrapper.runtime.base import Mount

if TYPE_CHECKING:
    from wrapper.execroot.action_execroot import ActionExecroot
    from wrapper.generation import Generation


class Execroot(Protocol):
    """A worker's own directory."""

    @property
    def path(self) -> str:
        """As we see it."""

    @property
    def seen_as(self) -> str:
        """As the worker sees it."""

    @property
    def mounts(self) -> tuple[Mount, ...]:
        """What a container needs for that."""

    def stage_action(self, directory_fd: int) -> Staged:
        """Show the worker an action's directory. Raises RequestRefused, RuntimeUnavailable."""

    def stage_sandbox(self, sandbox_dir: bytes) -> Staged:
        """Show the worker a request's `sandbox_dir`. Raises RequestRefused, RuntimeUnavailable."""

    def scratch(self, number: int) -> Scratch:
        """A directory from which a request of our own making can be staged. Raises OSError."""

    def remove(self) -> None:
        """Delete it. Idempotent. Raises RuntimeUnavailable if it stays."""


class SandboxExecroot:
    """Below the execroot of our own host, for tools that do not know `sandbox_dir`."""

    def __init__(
        self, host: str, worker_id: int, settings: ExecrootSettings, mounts: tuple[Mount, ...]
    ) -> None:
        self._host = host
        self._own = WorkerExecroot.make(host, worker_id, uid=settings.uid, gid=settings.gid)
        self.path = self.seen_as = self._own.path
        self.mounts = mounts

    def stage_action(self, directory_fd: int) -> Staged:
        raise RuntimeUnavailable("a worker that serves sandboxed requests takes no action's directory")

    def stage_sandbox(self, sandbox_dir: bytes) -> Staged:
        return self._own.stage(sandbox_dir)

    def scratch(self, number: int) -> Scratch:
        # On the same mount as the execroot, where the sandboxes of real requests are too.
        path = f"{self._own.path}.prime-{number}"
        relative = os.fsencode(os.path.relpath(path, self._host))
        return Scratch(path, lambda: self._own.stage(relative))

    def remove(self) -> None:
        self._own.remove()


class ActionsExecroot:
    """For actions that come with a directory each."""

    def __init__(self, own: ActionExecroot, settings: ExecrootSettings) -> None:
        self._own = own
        self.path = own.path
        self.seen_as = settings.seen_as or own.path
        self.mounts = (Mount(own.path, self.seen_as, read_only=False),) if settings.in_container else ()

    def stage_action(self, directory_fd: int) -> Staged:
        return self._own.stage(directory_fd)

    def stage_sandbox(self, sandbox_dir: bytes) -> Staged:
        raise RuntimeUnavailable("a worker that serves actions takes no sandbox_dir")

    def scratch(self, number: int) -> Scratch:
        path = f"{self._own.path}.prime-{number}"

        def stage() -> Staged:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                return self._own.stage(fd)
            finally:
                os.close(fd)

        return Scratch(path, stage)

    def remove(self) -> None:
        self._own.remove()


class Execroots:
    """Makes the execroots of the workers of all pools."""

    def __init__(self, settings: Mapping[str, PoolSettings]) -> None:
        self._settings = settings
        self._generations: dict[str, Generation] = {}
        self._inplace = InplaceMounts()

    def make(self, key: WorkerKey, worker_id: int) -> Execroot | None:
        """None: the worker runs where its host does. Raises RequestRefused, ConfigError, OSError."""
        if not key.own_execroot:
            return None
        settings = self._settings[key.pool].execroot
        if not key.for_actions:
            mounts = self._inplace.of(key.cwd) if settings.in_container else ()
            return SandboxExecroot(key.cwd, worker_id, settings, mounts)
        from wrapper.execroot.action_execroot import ActionExecroot, Strategy  # not in worker mode

        generation = self._generation(settings)
        own = ActionExecroot.make(
            generation.path,
            str(worker_id),
            uid=os.geteuid() if settings.uid is None else settings.uid,
            gid=os.getegid() if settings.gid is None else settings.gid,
            strategy=Strategy(settings.strategy),
            seen_as=settings.seen_as,
        )
        return ActionsExecroot(own, settings)

    def remove_of_dead(self) -> None:
        """Remove what dead processes have left staged, whose workers are gone. Raises RuntimeUnavailable."""
        bases = {pool.execroot.base for pool in self._settings.values()}
        for base in bases - self._generations.keys():
            if base and os.path.isdir(base):
                from wrapper.generation import take_over

                for dead in take_over(base):
                    dead.wipe()

    def _generation(self, settings: ExecrootSettings) -> Generation:
        generation = self._generations.get(settings.base)
        if generation is None:
            from wrapper.execroot.action_execroot import ActionExecroot
            from wrapper.generation import Generation

            self.remove_of_dead()
            generation = Generation.begin(settings.base)
            try:
                if settings.strategy == "rename" and settings.work_root:
                    ActionExecroot.check_same_mount(generation.path, settings.work_root)
            except BaseException:
                generation.wipe()
                raise
            self._generations[settings.base] = generation
        return generation

    def mounts_in_place(self, key: WorkerKey) -> tuple[Mount, ...]:
        """What a worker sees that runs where its host does."""
        if key.own_execroot or not self._settings[key.pool].execroot.in_container:
            return ()
        return self._inplace.of(key.cwd)

    def close(self) -> None:
        """Delete this process's folders; every execroot was removed before. Raises RuntimeUnavailable."""
        while self._generations:
            _, generation = self._generations.popitem()
            generation.wipe()
