"""Whether there is room for one more worker, who wants it, and who could make it. Decides nothing."""

from __future__ import annotations

from wrapper.pool.core_records import KeyState, PoolState, Registry, Worker
from wrapper.pool.limits import TotalLimits


class Capacity:
    """The limits over keys, pools and all pools together, against what the registry holds."""

    def __init__(self, registry: Registry, total: TotalLimits) -> None:
        self._registry = registry
        self._total = total

    def set_total(self, total: TotalLimits) -> None:
        """New limits over all pools together."""
        self._total = total

    def has_room(self, key: KeyState) -> bool:
        """For one more worker of this key, whatever limit is looked at."""
        return self.has_room_in_key(key) and self.has_room_in_pool(key.pool)

    def has_room_in_key(self, key: KeyState) -> bool:
        return len(key.workers) < key.pool.limits.max_instances_per_key

    def has_room_in_pool(self, pool: PoolState) -> bool:
        return pool.slots < pool.limits.max_workers and not self.total_is_full()

    def total_is_full(self) -> bool:
        return self._total.max_workers is not None and self._registry.slots >= self._total.max_workers

    def blocked_with(self, pool: PoolState) -> list[KeyState]:
        """The keys that want a slot and that one in this pool would help."""
        if not self._registry.blocked:
            return []
        total = self.total_is_full()
        return [key for key in self._registry.blocked.values() if total or key.pool is pool]

    def victim_for(self, key: KeyState) -> Worker | None:
        """The least recently used idle worker that stands in the way of this key.

        None if there is none, or if a slot is on its way already for each key that wants one.
        """
        pool = key.pool
        if pool.slots >= pool.limits.max_workers:
            wanted = sum(other.pool is pool for other in self._registry.blocked.values())
            pools, stopping = [pool], pool.stopping
        else:
            wanted = len(self._registry.blocked)
            pools, stopping = list(self._registry.pools.values()), self._registry.stopping
        if stopping >= wanted:
            return None
        victims = [next(iter(pool.idle.values())) for pool in pools if pool.idle]
        return min(victims, key=lambda worker: worker.idle_since, default=None)


def yields(worker: Worker, capacity: Capacity, now: float) -> bool:
    """Whether an idle worker makes room for another key although its own has waiters.

    It does if a request of that key came earlier and has already waited longer than a cold worker
    costs: without this a busy key would starve the others of a full pool; without the second
    condition two keys that take turns would start a worker for every request.
    """
    blocked = capacity.blocked_with(worker.key.pool)
    own = worker.key.first_waiter() if blocked else None
    if own is None:
        return False
    for key in blocked:
        first = key.first_waiter()
        if key is worker.key or first is None or first.sequence > own.sequence:
            continue
        patience_s = max(key.estimates.cold_s() or 0.0, key.pool.limits.start_instead_after_s)
        if now - first.since >= patience_s and capacity.has_room_in_key(key) and not key.pool.stopping:
            return True
    return False


def should_grow(key: KeyState, now: float) -> bool:
    """Whether waiting is expected to cost the last waiter of a key more than a cold worker does.

    What was never measured is not guessed: until then (and however good the estimates look) the
    first waiter's patience of `start_instead_after_s` decides.
    """
    first = key.first_waiter()
    if first is not None and now >= key.patience_ends_at(first):
        return True
    slots = key.serving * key.pool.limits.max_requests_per_worker_at_once
    wait_s = key.estimates.wait_s(key.waiting, slots)
    cold_s = key.estimates.cold_s()
    return wait_s is not None and cold_s is not None and wait_s > cold_s
