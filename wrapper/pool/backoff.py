"""When to try again after starts that failed. Takes `now`, reads no clock."""

from __future__ import annotations

from wrapper.errors import RuntimeUnavailable, WrapperError

FIRST_DELAY_S = 0.2
MAX_DELAY_S = 30.0
MAX_DELAY_OF_RUNTIME_S = 2.0
"""A container engine that restarts is back in a moment, and requests wait for it."""
RUNTIME_PATIENCE_S = 5.0
EARLY_DEATHS_TOLERATED = 2
"""Workers in a row that may die before their first answer before callers are refused.

A single request can kill the worker it is given to; the requests behind it are innocent.
"""


class StartBackoff:
    """The failed starts of one key, in a row.

    A program that cannot start is reported to every caller at once while the delay lasts; it
    doubles with each failure and one success ends it. A worker that dies before its first answer
    counts as half a failure: it delays starts that nobody waits for, and refuses callers only
    after EARLY_DEATHS_TOLERATED of them, and only if no worker of this key has ever served: else
    whatever kills them, requests that were sent to none of them are not to blame.

    And when it is the runtime that cannot start anything now, callers wait until it can: that is a matter of
    time, and not of the program. For a key that has never served it may be one of the configuration: then
    they are told after RUNTIME_PATIENCE_S.
    """

    __slots__ = ("_failing_since", "_failures", "_has_served", "_refusing", "_waits", "error", "retry_at")

    def __init__(self) -> None:
        self._failures = 0
        self._failing_since = 0.0
        self._has_served = False
        self._refusing = False
        self._waits = False
        self.error: WrapperError | None = None
        self.retry_at = 0.0

    def start_failed(self, now: float, error: WrapperError) -> None:
        if not self._failures:
            self._failing_since = now
        patient = self._has_served or now - self._failing_since < RUNTIME_PATIENCE_S
        if patient and isinstance(error, RuntimeUnavailable):
            self._note(now, error, MAX_DELAY_OF_RUNTIME_S)
            self._waits = True
            return
        self._note(now, error)
        self._refusing = True
        self._waits = False

    def died_before_first_answer(self, now: float, error: WrapperError) -> None:
        self._note(now, error)
        too_many = self._failures > EARLY_DEATHS_TOLERATED and not self._has_served
        self._refusing = self._refusing or too_many

    def succeeded(self) -> None:
        self._has_served = True
        self._failures = 0
        self._refusing = self._waits = False
        self.error = None
        self.retry_at = 0.0

    def refusal(self, now: float) -> WrapperError | None:
        """What to tell a caller for whom a worker would have to be started now; None: start one."""
        return self.error if self._refusing and now < self.retry_at else None

    def holds(self, now: float) -> bool:
        """Whether a caller has to wait for a start, since the runtime cannot do one now."""
        return self._waits and now < self.retry_at

    def delays(self, now: float) -> bool:
        """Whether a start that nobody waits for has to wait."""
        return now < self.retry_at

    def _note(self, now: float, error: WrapperError, most_s: float = MAX_DELAY_S) -> None:
        self._failures += 1
        self.error = error
        self.retry_at = now + min(most_s, FIRST_DELAY_S * 2 ** min(self._failures - 1, 10))
