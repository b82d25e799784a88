"""What the pool's shell holds of one worker, and what it can be asked at any moment.

Owns no decision and no life cycle: those are `core.py`'s and `pool.py`'s.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from wrapper.pool.execroots import Execroot
from wrapper.pool.health import problem_before_lease
from wrapper.pool.housekeeping import Housekeeping
from wrapper.pool.settings import PoolSettings
from wrapper.pool.worker_connection import WorkerConnection
from wrapper.pool.worker_key import ToolFingerprint, WorkerKey
from wrapper.pool.worker_states import StopReason
from wrapper.runtime.base import WorkerProcess

CANCELLED_GRACE_S = 0.5
"""The asker of a cancelled request waits until its worker is gone."""

_log = logging.getLogger(__name__)


class StartTimes:
    """When a worker's start was asked for, was begun, and was done."""

    __slots__ = ("asked", "begun", "loaded")

    def __init__(self, now: float) -> None:
        self.asked = self.begun = self.loaded = now

    def numbers(self, now: float) -> dict[str, float]:
        """How long it waited for its turn, how long its start took, and all up to now."""
        queued_s, load_s = self.begun - self.asked, self.loaded - self.begun
        return {"queued_s": queued_s, "load_s": load_s, "total_s": now - self.asked}


@dataclass(slots=True, eq=False)
class LiveWorker:
    """See the module."""

    id: int
    key: WorkerKey
    settings: PoolSettings
    fingerprint: ToolFingerprint
    times: StartTimes
    execroot: Execroot | None = None
    process: WorkerProcess | None = None
    connection: WorkerConnection | None = None
    housekeeping: Housekeeping | None = None
    task: asyncio.Task[None] | None = None
    """Starting, warming or cleaning it: ended before it is stopped."""
    reason: StopReason | None = None
    watchers: list[Callable[[], None]] = field(default_factory=list)

    def problem(self) -> StopReason | None:
        """Why it must not take a lease now."""
        if self.connection is None or self.reason is not None:
            return StopReason.CRASH
        try:
            return problem_before_lease(self.connection, self.fingerprint)
        except Exception:  # noqa: BLE001 - a worker that cannot be looked at is not healthy
            _log.exception("probing worker %d failed", self.id)
            return StopReason.UNHEALTHY

    def is_clean(self) -> bool:
        """Whether there surely is nothing to clean up after its last request."""
        try:
            return self.housekeeping is not None and self.housekeeping.is_clean_already()
        except Exception:  # noqa: BLE001 - the thorough cleaning will say whether it matters
            _log.exception("looking at worker %d after its request failed", self.id)
            return False

    def grace_s(self) -> float:
        """One that died or talks nonsense gets no time for tidying up, a cancelled one gets little."""
        grace_s = self.settings.limits.stop_grace_s
        if self.reason in (StopReason.CRASH, StopReason.PROTOCOL_ERROR):
            return 0.0
        return min(grace_s, CANCELLED_GRACE_S) if self.reason is StopReason.CANCELLED else grace_s
