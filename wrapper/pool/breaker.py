"""When to stop giving requests to workers that keep failing, and when to try again. Takes `now`.

A tool that crashes on every request costs each of them a start and a run; without workers the same
requests succeed. Counted are crashes, broken protocol and time-outs, never exit codes: a compile that
fails is an answer.
"""

from __future__ import annotations

FAILURES_IN_A_ROW = 3
FIRST_PAUSE_S = 30.0
MAX_PAUSE_S = 1800.0


class CircuitBreaker:
    """Closed: requests pass. Open: none does. After the pause one passes, on trial."""

    __slots__ = ("_failures", "_on_trial", "_openings", "reason", "retry_at")

    def __init__(self) -> None:
        self._failures = 0
        self._openings = 0
        self._on_trial = False
        self.retry_at: float | None = None
        """When it is open: until then nothing passes."""
        self.reason = ""
        """Why it opened last."""

    @property
    def is_open(self) -> bool:
        return self.retry_at is not None

    def allows(self, now: float) -> bool:
        """Whether a request may pass now. Of each that did, one of the methods below is told the end."""
        if self.retry_at is None:
            return True
        if now < self.retry_at or self._on_trial:
            return False
        self._on_trial = True
        return True

    def succeeded(self) -> None:
        """It was answered, whatever its exit code."""
        self._failures = self._openings = 0
        self._on_trial = False
        self.retry_at = None

    def says_nothing(self) -> None:
        """It was cancelled, or never reached a worker."""
        self._on_trial = False

    def failed(self, now: float, reason: str) -> None:
        """Its worker crashed, broke the protocol, or took too long."""
        self._failures += 1
        if self._on_trial or self._failures >= FAILURES_IN_A_ROW:
            self.open(now, reason)

    def open(self, now: float, reason: str) -> None:
        """At once: it is known that it cannot work."""
        if self.retry_at is not None and not self._on_trial:
            return  # one that passed before it opened
        self.retry_at = now + min(MAX_PAUSE_S, FIRST_PAUSE_S * 2 ** min(self._openings, 10))
        self.reason = reason
        self._openings += 1
        self._failures = 0
        self._on_trial = False
