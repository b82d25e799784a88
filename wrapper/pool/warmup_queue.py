"""Whose turn it is to start: at most so many workers are between start and ready at a time.

Starts and warm-ups compete for the same processors; all at once, none of them would be ready soon. Owns
the places and who waits for one. Pure: what is started, and how urgent that is, is its caller's business.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple


class Urgency(IntEnum):
    """What a worker is started for; the smaller goes first."""

    WAITED_FOR = 0
    """A request waits for a worker of its key."""
    MINIMUM = 1
    """The pool's minimum of warm workers."""
    SPARE = 2
    """The replacement of a worker that has nearly served its time, or a start whose request has left."""


class _Entry(NamedTuple):
    pool: str
    urgency: Callable[[], Urgency]


class WarmupQueue:
    """Places for `max_active` workers, which are named by numbers.

    How urgent a start is, is asked when a place becomes free: requests may have come or gone since it
    began to wait. Among equals the first come is the first served.
    """

    def __init__(self, max_active: int) -> None:
        self.max_active = max_active
        self._active: dict[int, str] = {}
        self._pending: dict[int, _Entry] = {}

    def __repr__(self) -> str:
        return f"<WarmupQueue active={len(self._active)}/{self.max_active} pending={len(self._pending)}>"

    def enter(self, worker_id: int, pool: str, urgency: Callable[[], Urgency]) -> bool:
        """Ask for a place. False: it has to wait, and `leave` of another will name it."""
        if len(self._active) < self.max_active:
            self._active[worker_id] = pool
            return True
        self._pending[worker_id] = _Entry(pool, urgency)
        return False

    def leave(self, worker_id: int) -> int:
        """Give up a place, or the wait for one; returns who has a place from now on, or 0.

        Does nothing for a worker that has none, so it may be called more than once.
        """
        self._pending.pop(worker_id, None)
        if self._active.pop(worker_id, None) is None or not self._pending:
            return 0
        first = min(self._pending, key=lambda waiting: self._pending[waiting].urgency())
        self._active[first] = self._pending.pop(first).pool
        return first

    def active(self, pool: str | None = None) -> int:
        """How many workers of this pool (None: of all) have a place."""
        return sum(pool in (None, mine) for mine in self._active.values())

    def pending(self, pool: str | None = None) -> int:
        """How many workers of this pool (None: of all) wait for a place."""
        return sum(pool in (None, entry.pool) for entry in self._pending.values())
