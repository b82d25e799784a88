"""A world around the pool's core for tests of single rules: everything in it happens in simulated time.

Starts, requests, cleaning and stopping take as long as a test says; callers come when it says.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from wrapper.errors import WrapperError
from wrapper.pool import core_messages as m
from wrapper.pool.core import Core
from wrapper.pool.core_records import PoolState, Worker
from wrapper.pool.limits import PoolLimits, TotalLimits
from wrapper.pool.worker_key import WorkerKey
from wrapper.pool.worker_states import StopReason


@dataclass(slots=True)
class Times:
    """How long things take, in seconds. None: until the test says so itself."""

    start_s: float | None = 0.0
    first_request_s: float = 0.0
    request_s: float | None = 0.0
    clean_s: float = 0.0
    stop_s: float | None = 0.0


def tool(name: str = "tool", pool: str = "p") -> WorkerKey:
    return WorkerKey(pool, (name,), "/")


class World:
    """Pool "p" with these limits; others can be given by name."""

    def __init__(
        self,
        times: Times | None = None,
        *,
        total: int | None = None,
        minimum: WorkerKey | None = None,
        pools: dict[str, PoolLimits] | None = None,
        **limits: object,
    ) -> None:
        self.times = times or Times()
        self.now = 0.0
        pools = pools or {"p": PoolLimits(**limits)}  # type: ignore[arg-type]
        minimum_keys = {minimum.pool: minimum} if minimum is not None else {}
        self.core = Core(pools, TotalLimits(total), minimum_keys=minimum_keys, random_unit=lambda: 0.5)
        self.started: list[WorkerKey] = []
        """The key of each start, in order."""
        self.stopped: list[StopReason] = []
        self.granted: dict[int, int] = {}
        """Lease → worker, of leases that are not over."""
        self.order: list[int] = []
        """Leases in the order in which they were granted."""
        self.refused: dict[int, WrapperError] = {}
        self.cleaned_with_gc = 0
        self.problems: dict[int, StopReason] = {}
        """What a probe finds, by worker."""
        self.after: Callable[[int], None] = lambda _lease: None
        """Called when a lease was released."""
        self._jobs: Counter[int] = Counter()
        self._leases = itertools.count(1)
        self._sequence = itertools.count()
        self._future: list[tuple[float, int, m.Event]] = []
        self.tell(m.Tick())

    # What a test does.

    def ask(self, key: WorkerKey | None = None, *, within_s: float | None = None) -> int:
        """Somebody wants a worker; returns the number of the lease that this may become."""
        lease_id = next(self._leases)
        self.tell(m.Acquire(lease_id, key or tool(), None if within_s is None else self.now + within_s))
        return lease_id

    def release(self, lease_id: int, problem: StopReason | None = None, *, used: bool = True) -> None:
        self.tell(m.Released(lease_id, used, problem))
        self.after(lease_id)

    def tell(self, event: m.Event) -> None:
        if isinstance(event, m.Released):
            self.granted.pop(event.lease_id, None)
        for command in self.core.handle(event, self.now):
            self._obey(command)

    def wait(self, seconds: float = 0.0) -> None:
        """Let time pass, and whatever is due happen."""
        end = self.now + seconds
        while self._future and self._future[0][0] <= end:
            at, _, event = heapq.heappop(self._future)
            self.now = max(self.now, at)
            if isinstance(event, m.Released):
                self.release(event.lease_id)
            else:
                self.tell(event)
        self.now = end

    # What a test looks at.

    @property
    def workers(self) -> list[Worker]:
        return list(self.core.registry.workers.values())

    def pool(self, name: str = "p") -> PoolState:
        return self.core.registry.pools[name]

    def keys_alive(self) -> list[WorkerKey]:
        return [worker.key.key for worker in self.workers]

    # The world.

    def _later(self, after_s: float | None, event: m.Event) -> None:
        if after_s is not None:
            heapq.heappush(self._future, (self.now + after_s, next(self._sequence), event))

    def _obey(self, command: m.Command) -> None:
        match command:
            case m.Start(worker_id, key):
                self.started.append(key)
                self._later(self.times.start_s, m.Started(worker_id))
            case m.Warm(worker_id):
                self._later(0.0, m.Warmed(worker_id))
            case m.Probe(worker_id, lease_id):
                self._later(0.0, m.ProbeDone(worker_id, lease_id, self.problems.get(worker_id)))
            case m.Grant(lease_id, worker_id):
                self.granted[lease_id] = worker_id
                self.order.append(lease_id)
                self._jobs[worker_id] += 1
                if self.times.request_s is not None:
                    first = self._jobs[worker_id] == 1
                    self._later(
                        self.times.first_request_s if first else self.times.request_s, m.Released(lease_id)
                    )
            case m.Refuse(lease_id, error):
                self.refused[lease_id] = error
            case m.Clean(worker_id, collect_garbage):
                self.cleaned_with_gc += collect_garbage
                self._later(self.times.clean_s, m.Cleaned(worker_id))
            case m.Stop(worker_id, reason):
                self.stopped.append(reason)
                self._later(self.times.stop_s, m.Stopped(worker_id))
            case m.WakeAt(at):
                self._later(max(0.0, at - self.now), m.Tick())
