"""What one worker in a container has on the node and in the engine, and the removal of all of it.

Owns the order of removal and the patience with an engine that is away: nothing is forgotten, and nothing that
carries another owner's labels is touched. Knows nothing of how a worker is started or used.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

from wrapper.errors import RuntimeUnavailable
from wrapper.files import remove_tree
from wrapper.runtime.bounded_tmp import unmount
from wrapper.runtime.cgroups import ParentGroup
from wrapper.runtime.cri_engine import CriEngine, EngineError

LABEL = "nativelink-worker-wrapper"
OWNER_LABEL = f"{LABEL}/owner"
GENERATION_LABEL = f"{LABEL}/generation"
POOL_LABEL = f"{LABEL}/pool"
WORKER_LABEL = f"{LABEL}/worker"
KEY_LABEL = f"{LABEL}/key"

_PAUSES_S = (0.05, 0.2, 0.5)
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Belongings:
    """Filled while a worker is started, so that whatever happens it is known what there is to remove."""

    labels: Mapping[str, str]
    """Of this worker only."""
    folder: str = ""
    tmp: str = ""
    group: ParentGroup | None = None
    pod_was_asked_for: bool = False
    container_id: str = ""
    """As the engine has answered: to work with, not to remove by. It may be another's (see `remove_pods`)."""


async def remove_pods(engine: CriEngine, labels: Mapping[str, str]) -> None:
    """Remove the pods with these labels, with all that is in them. Raises EngineError.

    By labels, never by the ids that an engine has answered: an answer may be lost, and for a name that it
    knows already CRI-O answers with the id of what somebody else has made.

    A container that ends in this moment is tried again: containerd says that it is stopped, and refuses to
    remove it because it runs.
    """
    for pause_s in _PAUSES_S:
        try:
            await _remove_pods(engine, labels)
            return
        except EngineError as error:
            if error.is_away or error.timed_out:
                raise
            await asyncio.sleep(pause_s)
    await _remove_pods(engine, labels)


async def _remove_pods(engine: CriEngine, labels: Mapping[str, str]) -> None:
    """A container is killed before its pod is stopped: CRI-O would wait 59 s for a first process that ignores
    SIGTERM.
    """
    pods = await engine.pods(labels)
    for container_id in await engine.containers(labels):
        await engine.stop_container(container_id)
        await engine.remove_container(container_id)
    for pod_id in pods:
        await engine.remove_pod(pod_id)


class Removal:
    """Removes belongings, again and again while the engine is away."""

    def __init__(self, engine: CriEngine) -> None:
        self._engine = engine
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def pending(self) -> int:
        """Workers that something may be left of."""
        return len(self._tasks)

    def begin(self, belongings: Belongings) -> asyncio.Task[None]:
        """Remove all of it in the background; the task ends when nothing is left."""
        return self._spawn(self._until_removed(belongings), f"remove {belongings.folder}")

    def _spawn(self, coroutine: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def finish(self) -> bool:
        """Wait for what is under way; False: something is left, which the next process will find."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=self._engine.deadlines.removal_s)
        left = list(self._tasks)
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left)
            _log.error(
                "%s: %d containers could not be removed; the next start does", self._engine.name, len(left)
            )
        return not left

    async def _until_removed(self, belongings: Belongings) -> None:
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                await self._remove(belongings)
                return
            except RuntimeUnavailable as error:
                _log.log(
                    logging.INFO if pause_s == _FIRST_PAUSE_S else logging.WARNING,
                    "removing a worker: %s; trying again",
                    error.message,
                )
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _remove(self, own: Belongings) -> None:
        if own.pod_was_asked_for:
            await remove_pods(self._engine, own.labels)
            own.pod_was_asked_for = False
        if own.tmp:
            unmount(own.tmp)
            own.tmp = ""
        if own.group is not None:
            stuck = own.group.remove()
            if stuck:
                own.group.kill()
                raise RuntimeUnavailable(f"control groups are still in use: {', '.join(stuck)}")
            own.group = None
        if own.folder:
            remove_tree(own.folder)
            own.folder = ""
