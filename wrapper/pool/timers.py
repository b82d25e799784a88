"""What the core wants to do later: a heap of actions by time. Reads no clock."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

from wrapper.pool.core_records import Waiter

Action = Callable[[float], None]
"""Called with the time of the tick that it is due at."""


class Timers:
    """Actions by the time from which they are due."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Action, Waiter | None]] = []
        self._sequence = itertools.count()
        self._compact_at = 1_000

    @property
    def next_at(self) -> float | None:
        """When the next action is due; None: there is none."""
        return self._heap[0][0] if self._heap else None

    def at(self, at: float, action: Action, waiter: Waiter | None = None) -> None:
        """Call `action` at the first tick from then on; what is for a waiter ends with its waiting."""
        if len(self._heap) > self._compact_at:
            self._heap = [timer for timer in self._heap if timer[3] is None or timer[3].queued]
            heapq.heapify(self._heap)
            self._compact_at = max(1_000, 2 * len(self._heap))
        heapq.heappush(self._heap, (at, next(self._sequence), action, waiter))

    def tick(self, now: float) -> None:
        """Do what is due."""
        while self._heap and self._heap[0][0] <= now:
            heapq.heappop(self._heap)[2](now)
