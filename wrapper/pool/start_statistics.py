"""How often a request had to wait for a worker's start, and what that cost it.

Bounded: counts, sums, and the last samples for the percentile. Takes durations, reads no clock.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

MAX_SAMPLES = 1_000
"""Starts that the percentile looks back on."""


@dataclass(frozen=True, slots=True)
class StartStatistics:
    """Numbers since the start. A mean or percentile of nothing is None.

    A request is *cold* if it was given a worker that was not ready when it asked; its latency counts from
    its asking to the end of its lease.
    """

    cold_requests: int
    warm_requests: int
    cold_share: float | None
    """Cold requests among all, from 0 to 1."""
    cold_latency_s: float | None
    """Mean."""
    warm_latency_s: float | None
    """Mean."""
    starts: int
    """Workers that became ready."""
    start_p95_s: float | None
    """Of the last 1,000 of them, from asking for the start to ready: 95 % took no longer."""
    first_requests: int
    """Workers that have served at least one request."""
    first_request_s: float | None
    """Mean latency of a worker's first request, without the wait for the worker."""


class StartRecorder:
    """Takes the samples of one pool. `served` is on the path of each request."""

    __slots__ = ("first", "first_s", "requests", "seconds", "starts", "starts_s")

    def __init__(self) -> None:
        self.requests = [0, 0]
        """Warm, cold."""
        self.seconds = [0.0, 0.0]
        self.first = 0
        self.first_s = 0.0
        self.starts = 0
        self.starts_s: deque[float] = deque(maxlen=MAX_SAMPLES)

    def served(self, cold: bool, seconds: float) -> None:
        """A request ended, so long after it was asked for."""
        self.requests[cold] += 1
        self.seconds[cold] += seconds

    def first_served(self, seconds: float) -> None:
        """A worker's first request took so long, without the wait for it."""
        self.first += 1
        self.first_s += seconds

    def started(self, seconds: float) -> None:
        """A worker is ready, so long after its start was asked for."""
        self.starts += 1
        self.starts_s.append(seconds)

    @staticmethod
    def summary(recorders: Iterable[StartRecorder]) -> StartStatistics:
        """Of one pool, or of several together."""
        all_of_them = list(recorders)
        warm, cold = (sum(one.requests[which] for one in all_of_them) for which in (0, 1))
        warm_s, cold_s = (sum(one.seconds[which] for one in all_of_them) for which in (0, 1))
        first = sum(one.first for one in all_of_them)
        first_s = sum(one.first_s for one in all_of_them)
        return StartStatistics(
            cold_requests=cold,
            warm_requests=warm,
            cold_share=_mean(cold, warm + cold),
            cold_latency_s=_mean(cold_s, cold),
            warm_latency_s=_mean(warm_s, warm),
            starts=sum(one.starts for one in all_of_them),
            start_p95_s=_p95(sorted(chain.from_iterable(one.starts_s for one in all_of_them))),
            first_requests=first,
            first_request_s=_mean(first_s, first),
        )


def _mean(total: float, count: int) -> float | None:
    return total / count if count else None


def _p95(ordered: list[float]) -> float | None:
    """The nearest rank: a sample, not something between two."""
    return ordered[math.ceil(0.95 * len(ordered)) - 1] if ordered else None
