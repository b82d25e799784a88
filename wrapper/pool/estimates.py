"""How long a key's workers take, learnt from their recent requests: the base of the decision to grow.

On few cores a second cold JVM makes the first, warm one slower and is itself ten times slower than
it: a queue behind one warm worker is often the quicker way. So a key grows only if waiting is
expected to cost more than a cold worker does.
"""

from __future__ import annotations

_WEIGHT = 0.3
"""Of the newest value in the moving averages: the last handful of requests decide."""


class Estimates:
    """Moving averages in seconds; None until something was measured."""

    __slots__ = ("cooling_s", "first_s", "serving_s", "start_s")

    def __init__(self) -> None:
        self.start_s: float | None = None
        """From the decision to start a worker to its being ready."""
        self.first_s: float | None = None
        """A worker's first request: its runtime loads its code, or compiles it."""
        self.serving_s: float | None = None
        """A later request."""
        self.cooling_s: float | None = None

    def started(self, seconds: float) -> None:
        self.start_s = _blend(self.start_s, seconds)

    def served(self, seconds: float, *, first: bool) -> None:
        if first:
            self.first_s = _blend(self.first_s, seconds)
        else:
            self.serving_s = _blend(self.serving_s, seconds)

    def cooled(self, seconds: float) -> None:
        self.cooling_s = _blend(self.cooling_s, seconds)

    def wait_s(self, position: int, slots: int) -> float | None:
        """How long the waiter at `position` (from 1) will wait for one of `slots` busy slots."""
        if self.serving_s is None:
            return None
        return position * (self.serving_s + (self.cooling_s or 0.0)) / max(1, slots)

    def cold_s(self) -> float | None:
        """What a cold worker costs more than a warm one: its start, and its slower first request."""
        if self.start_s is None or self.first_s is None:
            return None
        return self.start_s + max(0.0, self.first_s - (self.serving_s or 0.0))


def _blend(old: float | None, new: float) -> float:
    return new if old is None else old + _WEIGHT * (new - old)
