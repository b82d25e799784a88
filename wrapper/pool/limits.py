"""The numbers a pool keeps to. Plain values: where they come from is `config.py`'s business."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """Limits and times of one pool. Times in seconds; counts of workers include those starting.

    A None switches the limit off.
    """

    min_warm_workers: int = 0
    """Workers of the pool's own `worker_command` that the pool keeps alive in the background."""
    max_workers: int = 20
    max_instances_per_key: int = 10
    max_waiting: int = 10_000
    """Requests that may wait for a worker of this pool; one more is refused at once."""
    max_requests_per_worker_at_once: int = 1
    """1: singleplex. More: that many requests are with one (multiplex) worker at the same time."""
    idle_timeout_s: float | None = 300.0
    worker_ttl_s: float | None = 3600.0
    worker_ttl_jitter: float = 0.1
    """A worker lives between (1 - jitter) and 1 times `worker_ttl_s`, or a pool would die all at once."""
    max_jobs_per_worker: int | None = 200
    gc_job_frequency: int | None = 25
    start_instead_after_s: float = 1.0
    """A request that waited this long for a busy worker gets a new one, whatever the estimates say."""
    max_memory_bytes: int | None = None
    """A worker with more resident memory than this after a garbage collection is retired."""
    stop_grace_s: float = 5.0
    """Between SIGTERM and SIGKILL."""
    unhealthy_after: int = 3
    """So many starts or warm-ups of one key that failed in a row make the pool unhealthy."""


@dataclass(frozen=True, slots=True)
class TotalLimits:
    """Limits over all pools of one process."""

    max_workers: int | None = None
    max_concurrent_warmups: int | None = None
    """Workers between start and ready at a time; None: as fits the number of processors."""
