"""Who waits for a worker. Keeps the counts and the order; who is next and why is the core's business."""

from __future__ import annotations

import itertools

from wrapper.errors import PoolExhausted, PoolTimeout
from wrapper.pool.core_records import KeyState, PoolState, Waiter


class WaitQueue:
    """The waiters of all keys, by their lease; each key has them in their order too."""

    def __init__(self) -> None:
        self.waiters: dict[int, Waiter] = {}
        self._sequence = itertools.count()

    def new_waiter(self, lease_id: int, key: KeyState, now: float, deadline: float | None) -> Waiter:
        """A waiter with its place in the order of arrival; not queued yet."""
        return Waiter(lease_id, key, now, deadline, next(self._sequence))

    def add(self, waiter: Waiter, *, first: bool = False) -> None:
        self.waiters[waiter.lease_id] = waiter
        waiter.queued = True
        key = waiter.key
        key.waiting += 1
        key.pool.waiting += 1
        if first:
            key.waiters.appendleft(waiter)
        else:
            key.waiters.append(waiter)

    def remove(self, waiter: Waiter) -> None:
        del self.waiters[waiter.lease_id]
        key = waiter.key
        key.waiting -= 1
        key.pool.waiting -= 1
        if key.waiters and key.waiters[0] is waiter:
            key.waiters.popleft()
        waiter.queued = False


def overdue(waiter: Waiter, now: float) -> PoolTimeout:
    """Why this waiter got no worker in time, with what a reader needs to change that."""
    key = waiter.key
    return PoolTimeout(
        f"pool {key.pool.name!r}: no worker for {key.key.label!r} became free within "
        f"{now - waiter.since:.1f} s ({len(key.workers)} workers of this key, "
        f"{key.pool.slots} of at most {key.pool.limits.max_workers} in the pool, "
        f"{key.waiting} requests of this key waiting)"
        + (f"; the last start failed: {key.backoff.error.message}" if key.backoff.error is not None else "")
    )


def exhausted(pool: PoolState) -> PoolExhausted:
    """Why no request can wait any more."""
    return PoolExhausted(
        f"pool {pool.name!r}: {pool.limits.max_waiting} requests already wait for a worker "
        "(max_waiting); run fewer at a time or allow more workers"
    )
