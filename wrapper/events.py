"""What happened, for whoever wants to know: logs now, metrics and the status page as subscribers.

Owns the vocabulary and the delivery. Nothing that publishes knows who listens; a listener that fails
never harms a request.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

_MEBIBYTE = 1 << 20

_log = logging.getLogger(__name__)


class EventKind(Enum):
    WORKER_STARTED = "worker started"
    WORKER_START_FAILED = "worker start failed"
    WORKER_READY = "worker ready"
    WORKER_STOPPING = "worker stopping"
    WORKER_STOPPED = "worker stopped"
    STRAY_OUTPUT = "stray output"
    LEFTOVERS_REMOVED = "leftovers removed"
    CLEANING_FAILED = "cleaning failed"
    GARBAGE_COLLECTED = "garbage collected"
    GARBAGE_COLLECTION_FAILED = "garbage collection failed"
    HEALTH_CHECKED = "health checked"
    WARMUP_DONE = "warm-up done"
    WARMUP_SKIPPED = "warm-up skipped"
    FIRST_REQUEST = "first request"
    POOL_UNHEALTHY = "pool unhealthy"
    POOL_HEALTHY = "pool healthy again"


@dataclass(frozen=True, slots=True)
class Event:
    """`worker_id` is 0 where no worker is meant; `numbers` are in the units that their names end with."""

    kind: EventKind
    pool: str
    worker_id: int = 0
    key: str = ""
    detail: str = ""
    numbers: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = [f"{self.kind.value}:", f"pool={self.pool}"]
        if self.worker_id:
            parts.append(f"worker={self.worker_id}")
        if self.key:
            parts.append(f"key={self.key}")
        parts += [_shown(name, value) for name, value in self.numbers.items()]
        if self.detail:
            parts.append(f"({self.detail})")
        return " ".join(parts)


def _shown(name: str, value: float) -> str:
    """`load_s=0.0312`; bytes in MiB from one on, since nobody reads nine digits."""
    if name.endswith("_bytes") and value >= _MEBIBYTE:
        return f"{name.removesuffix('_bytes')}={value / _MEBIBYTE:.1f}MiB"
    return f"{name}={value:.6g}"


class EventBus:
    """Hands each event to every subscriber at once, in the order of their subscription."""

    def __init__(self) -> None:
        self._subscribers: list[Callable[[Event], None]] = []

    def subscribe(self, subscriber: Callable[[Event], None]) -> Callable[[], None]:
        """From now on; the returned function ends it."""
        self._subscribers.append(subscriber)
        return lambda: self._subscribers.remove(subscriber)

    def publish(self, event: Event) -> None:
        for subscriber in tuple(self._subscribers):
            try:
                subscriber(event)
            except Exception:  # noqa: BLE001 - a listener's bug is not a request's problem
                _log.exception("a subscriber failed on %s", event)


_LEVELS = {
    EventKind.WORKER_START_FAILED: logging.WARNING,
    EventKind.STRAY_OUTPUT: logging.WARNING,
    EventKind.CLEANING_FAILED: logging.WARNING,
    EventKind.GARBAGE_COLLECTION_FAILED: logging.WARNING,
    EventKind.LEFTOVERS_REMOVED: logging.WARNING,
    EventKind.WARMUP_SKIPPED: logging.WARNING,
    EventKind.POOL_UNHEALTHY: logging.ERROR,
    EventKind.POOL_HEALTHY: logging.WARNING,
    EventKind.FIRST_REQUEST: logging.DEBUG,
    EventKind.WORKER_STARTED: logging.DEBUG,
    EventKind.WORKER_READY: logging.DEBUG,
    EventKind.WORKER_STOPPED: logging.DEBUG,
}


def log_events(event: Event) -> None:
    """A subscriber that writes one log line an event."""
    logging.getLogger("nativelink_worker_wrapper").log(_LEVELS.get(event.kind, logging.INFO), "%s", event)
