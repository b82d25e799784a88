"""What the processes of one base have in the engine and on the node: found by labels, removed when dead.

A pod, or a control group, of an owner is dead's if its generation is: if no folder of that name is below the
base, or its lock is free. So even what an engine has made for a process after that process's death is found,
at the latest by the next start. What carries another owner's labels is never touched.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os

from wrapper.generation import names_in, take_over
from wrapper.runtime.bounded_tmp import mounts_below, unmount
from wrapper.runtime.cgroups import ParentGroup
from wrapper.runtime.cri_belongings import GENERATION_LABEL, OWNER_LABEL, remove_pods
from wrapper.runtime.cri_engine import CriEngine

GROUP_PREFIX = "nlww"
PATIENCE_S = 5.0
"""How long to try again with a control group that is still in use: the engine may be at work in it."""

_log = logging.getLogger(__name__)


class Owned:
    """What belongs to the processes that share `base`."""

    def __init__(self, engine: CriEngine, base: str) -> None:
        self._engine = engine
        self._base = base
        self.owner = owner_of(base)

    def group(self, generation: str, serial: int) -> ParentGroup:
        """The control group of a worker."""
        return ParentGroup(f"{self._group_of_all(generation)}/{serial}")

    def slice(self, generation: str, serial: int) -> str:
        """As `group`, where systemd makes the groups."""
        return f"{self._group_of_all(generation)[1:]}-{serial}.slice"

    def _group_of_all(self, generation: str) -> str:
        return f"/{GROUP_PREFIX}-{self.owner}-{generation}"

    async def remove_of_dead(self) -> int:
        """Remove what dead processes have left; returns how many of them had a folder still.

        Raises EngineError if the engine is away: then their folders stay, and so does the knowledge of them.
        """
        # Looked at in this order: a process makes its folder before all else.
        pods = await self._engine.pods({OWNER_LABEL: self.owner})
        groups = self._generations_with_groups()
        dead = take_over(self._base)
        try:
            living = names_in(self._base) - {generation.name for generation in dead}
            gone = {labels.get(GENERATION_LABEL, "") for labels in pods.values()} | set(groups)
            for name in sorted((gone | {generation.name for generation in dead}) - living):
                await self.remove_of(name)
            for generation in dead:
                for point in mounts_below(generation.path):
                    unmount(point)
                generation.wipe()
        finally:
            for generation in dead:
                generation.leave()
        return len(dead)

    async def remove_of(self, generation: str) -> None:
        """Remove the pods and control groups of one process. Raises EngineError."""
        labels = {OWNER_LABEL: self.owner, GENERATION_LABEL: generation}
        pause_s, waited_s = 0.02, 0.0
        while True:
            await remove_pods(self._engine, labels)
            stuck = self._remove_groups(generation)
            if not stuck:
                return
            if waited_s:
                ParentGroup(self._group_of_all(generation)).kill()
            if waited_s >= PATIENCE_S:
                _log.warning("control groups are still in use, the next start removes them: %s", stuck)
                return
            await asyncio.sleep(pause_s)
            waited_s += pause_s
            pause_s *= 2

    def _generations_with_groups(self) -> list[str]:
        prefix = f"/{GROUP_PREFIX}-{self.owner}-"
        return [
            name.removeprefix(prefix)
            for name in ParentGroup("").below()
            if name.startswith(prefix) and not name.endswith(".slice")
        ]

    def _remove_groups(self, generation: str) -> list[str]:
        of_all = ParentGroup(self._group_of_all(generation))
        stuck = [path for name in of_all.below() for path in ParentGroup(name).remove()]
        return stuck or of_all.remove()


def owner_of(base: str) -> str:
    """The label of all that lies below this base on this machine."""
    try:
        with open("/etc/machine-id", encoding="ascii") as file:
            machine = file.read().strip()
    except OSError:
        machine = os.uname().nodename
    return hashlib.sha256(f"{machine}\0{os.path.realpath(base)}".encode()).hexdigest()[:12]
