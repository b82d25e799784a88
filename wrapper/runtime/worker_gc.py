"""Chooses how a worker's garbage is collected, and cleans up after that way.

The ways: the operator's command, HotSpot's attach socket, the agent inside Node.js; a custom
worker without a command has none. Knows nothing of when it is time to collect.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

from wrapper.errors import RuntimeUnavailable
from wrapper.runtime import jvm_attach
from wrapper.runtime.base import CommandResult, CommandSpec, ExitStatus, Language, WorkerSpec
from wrapper.runtime.node_gc import NodeGc, agent_environment


@dataclass(frozen=True, slots=True)
class SeenInside:
    """How a worker in a container sees what its garbage collection needs."""

    directory: str
    agent: str
    uid: int
    gid: int
    pid_of: Callable[[int], int | None]
    """From a pid inside to the one that we see."""


class WorkerGc:
    """Garbage collection of one worker. `directory`: a private one, for what the way needs."""

    def __init__(
        self,
        spec: WorkerSpec,
        directory: str,
        loop: asyncio.AbstractEventLoop,
        inside: SeenInside | None = None,
    ) -> None:
        self._spec = spec
        self._jvm_pid: int | None = None
        self._node: NodeGc | None = None
        self.has_a_way = spec.gc_command is not None or spec.language is not Language.CUSTOM
        self.environment: dict[str, str] = {}
        """What the worker needs in its environment."""
        if spec.language is Language.NODEJS and spec.gc_command is None:
            fifo = os.path.join(directory, "gc")
            if inside is None:
                self._node = NodeGc(fifo, loop)
                if spec.user is not None:
                    os.chown(fifo, *spec.user)
                self.environment = agent_environment(spec.env, fifo)
            else:
                self._node = NodeGc(fifo, loop, inside.pid_of)
                if os.geteuid() != inside.uid:
                    os.chown(fifo, inside.uid, inside.gid)
                seen = os.path.join(inside.directory, "gc")
                self.environment = agent_environment(spec.env, seen, inside.agent)

    async def collect(self, pids: list[int], run: Callable[[CommandSpec], Awaitable[CommandResult]]) -> bool:
        """Collect the garbage of the worker that consists of `pids`; False if there is no way to.

        Raises RuntimeUnavailable if there is one and it failed.
        """
        if self._spec.gc_command is not None:
            result = await run(self._spec.gc_command)
            if result.ok:
                return True
            how = "timed out"
            if result.returncode is not None:
                how = f"ended with {ExitStatus(result.returncode)}"
            output = result.output[-500:].decode("utf-8", "replace")
            raise RuntimeUnavailable(f"the command {self._spec.gc_command.argv} {how}: {output}")
        if self._node is not None:
            return await self._node.collect(pids)
        if self._spec.language is Language.JVM:
            return await self._collect_jvm(pids)
        return False

    async def _collect_jvm(self, pids: list[int]) -> bool:
        if self._jvm_pid not in pids:
            self._jvm_pid = jvm_attach.find_jvm(pids)
        if self._jvm_pid is None:
            return False
        try:
            await jvm_attach.jcmd(self._jvm_pid, "GC.run")
        except jvm_attach.AttachForbidden:
            return False
        return True

    def remove_traces(self, dead_pids: Iterable[int]) -> None:
        """Delete what killed processes of this worker leave outside its private directory."""
        if self._spec.language is Language.JVM:
            jvm_attach.remove_traces(dead_pids)

    def close(self) -> None:
        """Idempotent."""
        if self._node is not None:
            self._node.close()
