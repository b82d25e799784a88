"""What is known of each tool that actions were run with: whether it is a worker, what it speaks, its health.

Pure; takes `now`. Knows nothing of how a tool is run. Until a tool's first valid response nobody knows
that it is a worker at all, so its first actions are trials, in one protocol after the other.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field, replace

from wrapper.pool.breaker import CircuitBreaker
from wrapper.pool.worker_key import WorkerKey

MAX_RECORDS = 10_000
PROTOCOLS = ("proto", "json")
"""In the order in which they are tried: Bazel's default first."""


@dataclass(slots=True)
class ToolRecord:
    breaker: CircuitBreaker = field(default_factory=CircuitBreaker)
    speaks: str = ""
    """The protocol of its last valid response; empty: there was none yet."""
    does_not_speak: set[str] = field(default_factory=set)
    wants_digests: bool = False
    """It said that it cannot work without the digests of its inputs."""

    def protocols(self, asked: str | None) -> tuple[str, ...]:
        """Those to be tried with an action, in order. `asked`: what the action says, if it does."""
        if asked is not None:
            return () if asked in self.does_not_speak else (asked,)
        if self.speaks:
            return (self.speaks,)
        return tuple(one for one in PROTOCOLS if one not in self.does_not_speak)

    def answered(self, protocol: str) -> None:
        """It gave a valid response in this protocol."""
        self.speaks = protocol
        self.does_not_speak.discard(protocol)
        self.breaker.succeeded()

    def is_no_worker(self, protocol: str, now: float, reason: str, *, asked: str | None) -> None:
        """It ended, or said something else, when it was spoken to in this protocol."""
        self.does_not_speak.add(protocol)
        if not self.protocols(asked):
            self.breaker.open(now, reason)
            self.does_not_speak.clear()  # the breaker says when it is tried again, and then afresh


class ToolRecords:
    """The records, by what a tool's workers have in common whatever they speak. Bounded."""

    def __init__(self) -> None:
        self._records: OrderedDict[WorkerKey, ToolRecord] = OrderedDict()
        self._last: tuple[WorkerKey | None, ToolRecord] = (None, ToolRecord())

    def of(self, key: WorkerKey) -> ToolRecord:
        """The record of this kind of worker; a new one if there is none."""
        if self._last[0] == key:  # as most often: a build's actions come in rows
            return self._last[1]
        record = self._find(key)
        self._last = (key, record)
        return record

    def _find(self, key: WorkerKey) -> ToolRecord:
        key = replace(key, protocol="")
        record = self._records.get(key)
        if record is None:
            record = self._records[key] = ToolRecord()
            if len(self._records) > MAX_RECORDS:
                self._records.popitem(last=False)
        else:
            self._records.move_to_end(key)
        return record

    def items(self) -> list[tuple[WorkerKey, ToolRecord]]:
        """To be shown."""
        return list(self._records.items())
