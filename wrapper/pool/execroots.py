"""The directories that workers run in: made before a worker starts, removed after it.

Owns which kind a worker gets, and this process's folder for those of actions, where what dead processes left
is removed. What is in an execroot, and how it gets there, is `execroot/`'s.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

from wrapper.errors import RuntimeUnavailable, WorkerStartFailed
from wrapper.execroot.scratch import Scratch, Staged
from wrapper.execroot.worker_execroot import WorkerExecroot
from wrapper.pool.inplace import InplaceMounts
from wrapper.pool.settings import ExecrootSettings, PoolSettings
from wrapper.pool.worker_key import WorkerKey
from wrapper.runtime.base import Mount

if TYPE_CHECKING:
    from wrapper.execroot.action_execroot import ActionExecroot
    from wrapper.execroot.seed import SeedTree
    from wrapper.generation import Generation
    from wrapper.pool.seeds import Seeds


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
        top = settings.seen_as or own.path
        self.seen_as = top + own.working_directory.removeprefix(own.path)
        self.mounts = (Mount(own.path, top, read_only=False),) if settings.in_container else ()

    @classmethod
    def make(
        cls,
        base: str,
        worker_id: int,
        key: WorkerKey,
        settings: ExecrootSettings,
        seed: SeedTree | None = None,
    ) -> ActionsExecroot:
        """A new one. Takes time for each file of the seed. Raises RequestRefused, OSError."""
        from wrapper.execroot.action_execroot import ActionExecroot, Strategy  # not in worker mode

        own = ActionExecroot.make(
            base,
            str(worker_id),
            uid=os.geteuid() if settings.uid is None else settings.uid,
            gid=os.getegid() if settings.gid is None else settings.gid,
            strategy=Strategy(settings.strategy),
            working_directory=os.fsencode(key.working_directory),
            seen_as=settings.seen_as,
            seed=seed,
        )
        return cls(own, settings)

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

    def __init__(
        self, settings: Mapping[str, PoolSettings], in_use: Callable[[WorkerKey], bool] = lambda _key: True
    ) -> None:
        self._settings = settings
        self._generations: dict[str, Generation] = {}
        self._inplace = InplaceMounts()
        self._in_use = in_use
        self._seeds: Seeds | None = None

    async def make(self, key: WorkerKey, worker_id: int) -> Execroot | None:
        """None: the worker runs where its host does.

        Raises RequestRefused, ConfigError, WorkerStartFailed, RuntimeUnavailable, OSError. Cancelled, it
        has made nothing.
        """
        if not key.own_execroot:
            return None
        settings = self._settings[key.pool].execroot
        if not key.for_actions:
            mounts = self._inplace.of(key.cwd) if settings.in_container else ()
            return SandboxExecroot(key.cwd, worker_id, settings, mounts)
        base = self._generation(settings, key).path
        if not key.tool:
            return ActionsExecroot.make(base, worker_id, key, settings)
        seed = self.seeds.of(key)
        if seed is None:
            raise WorkerStartFailed(f"the files of {key.label} are gone; the next action brings them again")
        # Many links to make: not on the event loop.
        making = asyncio.ensure_future(
            asyncio.to_thread(ActionsExecroot.make, base, worker_id, key, settings, seed)
        )
        try:
            return await asyncio.shield(making)
        except asyncio.CancelledError:
            await asyncio.wait([making])
            if making.exception() is None:
                making.result().remove()
            raise

    @property
    def seeds(self) -> Seeds:
        """Of the tools that come with actions."""
        if self._seeds is None:
            from wrapper.pool.seeds import Seeds  # not in worker mode

            self._seeds = Seeds(self._folder_of, self._in_use)
        return self._seeds

    def _folder_of(self, key: WorkerKey) -> str:
        return self._generation(self._settings[key.pool].execroot, key).path

    def remove_of_dead(self) -> None:
        """Remove what dead processes have left staged, whose workers are gone. Raises RuntimeUnavailable."""
        bases: set[str] = set()
        for pool in self._settings.values():
            bases |= {pool.execroot.base, *(base for _, base in pool.execroot.bases)}
        for base in bases - self._generations.keys():
            if base and os.path.isdir(base):
                from wrapper.generation import take_over

                for dead in take_over(base):
                    dead.wipe()

    def _generation(self, settings: ExecrootSettings, key: WorkerKey) -> Generation:
        base = dict(settings.bases).get(key.trust_domain, settings.base)
        generation = self._generations.get(base)
        if generation is None:
            from wrapper.execroot.action_execroot import ActionExecroot
            from wrapper.generation import Generation

            self.remove_of_dead()
            generation = Generation.begin(base, passable=settings.user is not None)
            try:
                if settings.strategy == "rename" and settings.work_root:
                    ActionExecroot.check_same_mount(generation.path, settings.work_root)
            except BaseException:
                generation.wipe()
                raise
            self._generations[base] = generation
        return generation

    def mounts_in_place(self, key: WorkerKey) -> tuple[Mount, ...]:
        """What a worker sees that runs where its host does."""
        if key.own_execroot or not self._settings[key.pool].execroot.in_container:
            return ()
        return self._inplace.of(key.cwd)

    async def close(self) -> None:
        """Delete this process's folders; every execroot was removed before. Raises RuntimeUnavailable."""
        if self._seeds is not None:
            await self._seeds.close()
        while self._generations:
            _, generation = self._generations.popitem()
            generation.wipe()
