"""Warm workers for Python programs: `WarmWorkerPoolManager`.

Composition root of that face: builds the pools of a configuration on the process runtime. Whoever has
the pools' names or a persistentWorkerKey gets leases; the rest is the pool's business.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from wrapper.config import Config, PoolConfig
from wrapper.errors import ConfigError, UnknownPool
from wrapper.events import EventBus
from wrapper.pool.health import prove_pool
from wrapper.pool.lease import Lease, WorkerOutcome
from wrapper.pool.pool import WorkerPool
from wrapper.pool.worker_key import WorkerKey
from wrapper.pool.worker_states import WorkerState
from wrapper.runtime.base import Runtime
from wrapper.runtime.local_process import LocalProcessRuntime

_READY = (WorkerState.IDLE, WorkerState.RESERVED)
_ACTIVE = (WorkerState.LEASED, WorkerState.DOOMED, WorkerState.COOLING)
_PROVISIONING = (WorkerState.STARTING, WorkerState.WARMING)


@dataclass(frozen=True, slots=True)
class PoolCreateOptions:
    """`config`: see `wrapper.config.load_config`. `cwd`: where workers run; default: where we do."""

    config: Config
    cwd: str = field(default_factory=os.getcwd)
    log_dir: str | None = None
    """Where the workers' stderr goes, in rotating files; None: only a bounded tail is kept."""
    make_runtime: Callable[[PoolConfig], Runtime] | None = None
    """For tests: what runs the workers of a pool, instead of what its `runtime` names."""


@dataclass(frozen=True, slots=True)
class PoolMetrics:
    """Numbers of one pool, or of all. Workers are counted now, the rest since the start."""

    ready_workers: int
    active_workers: int
    """Leased, or being cleaned after a lease."""
    provisioning_workers: int
    recycled_workers: int
    """Workers that were stopped, for whatever reason."""
    gets: int
    """Leases given."""
    cleans: int
    """Workers cleaned after a lease."""
    prepares: int
    """Workers that became ready."""


class WarmWorkerPoolManager:
    """Keeps the pools of a configuration. Use it within one event loop.

    `async with manager:` starts and closes it; the first lease starts it too, and then `close` is owed.
    """

    def __init__(self, options: PoolCreateOptions) -> None:
        self._options = options
        self.events = EventBus()
        self._pool: WorkerPool | None = None
        self._starting: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def start(self) -> None:
        """Begin to keep each pool's minimum of warm workers; prove the pools that have `check_health`.

        Idempotent. Raises the WrapperError of the first pool that is not healthy; all are closed then.
        """
        if self._starting is None:
            self._starting = asyncio.create_task(self._start(), name="manager start")
        await asyncio.shield(self._starting)

    async def close(self) -> None:
        """Refuse whoever waits, let leases end for `drain_timeout_s`, stop every worker. Idempotent."""
        if self._pool is not None:
            await self._pool.close(self._options.config.drain_timeout_s)

    async def acquire(self, pool_or_key: str, *, timeout_s: float | None = None) -> Lease:
        """A worker of the pool of this name, else of the first pool that serves this persistentWorkerKey.

        To be ended by `lease.release(WorkerOutcome.COMPLETED | FAILED)`; a lease that is dropped stops
        its worker. Raises UnknownPool, and what `WorkerPool.acquire` raises.
        """
        key = self._key(pool_or_key)
        if self._pool is None:
            await self.start()
        assert self._pool is not None  # noqa: S101 - it was started
        return await self._pool.acquire(key, timeout_s=timeout_s)

    @asynccontextmanager
    async def lease(self, pool_or_key: str, *, timeout_s: float | None = None) -> AsyncIterator[Lease]:
        """`acquire` and `release` around a block; an exception in the block says that the worker failed."""
        lease = await self.acquire(pool_or_key, timeout_s=timeout_s)
        try:
            yield lease
        except BaseException:
            lease.release(WorkerOutcome.FAILED)
            raise
        else:
            lease.release(WorkerOutcome.COMPLETED)

    def metrics(self, pool: str | None = None) -> PoolMetrics:
        """Of the pool of this name; None: of all together. Raises UnknownPool."""
        states = self._pool.pool_states() if self._pool is not None else {}
        if pool is not None:
            self._pool_named(pool)
            states = {name: state for name, state in states.items() if name == pool}

        def workers(which: tuple[WorkerState, ...]) -> int:
            return sum(state.states[one] for state in states.values() for one in which)

        def count(what: str) -> int:
            return sum(state.counts.get(what, 0) for state in states.values())

        return PoolMetrics(
            ready_workers=workers(_READY),
            active_workers=workers(_ACTIVE),
            provisioning_workers=workers(_PROVISIONING),
            recycled_workers=sum(sum(state.stops.values()) for state in states.values()),
            gets=count("grant"),
            cleans=count("clean"),
            prepares=count("ready"),
        )

    async def _start(self) -> None:
        config = self._options.config
        keys = {pool.name: self._key_of(pool) for pool in config.pools if pool.worker_command}
        pool = self._pool = WorkerPool(
            {pool.name: pool.settings() for pool in config.pools},
            self._runtimes(),
            total=config.total_limits(),
            minimum_keys=keys,
            events=self.events,
        )
        pool.start()
        try:
            for configured in config.pools:
                if configured.check_health:
                    await prove_pool(pool, keys[configured.name])
        except BaseException:
            await pool.close()
            raise

    def _runtimes(self) -> Mapping[str, Runtime]:
        make = self._options.make_runtime
        if make is not None:
            return {pool.name: make(pool) for pool in self._options.config.pools}
        runtime = LocalProcessRuntime(log_dir=self._options.log_dir)
        return {pool.name: runtime for pool in self._options.config.pools}

    def _key(self, pool_or_key: str) -> WorkerKey:
        config = self._options.config
        named = config.pool_named(pool_or_key)
        pool = named or config.pool_for_key(pool_or_key)
        if pool is None:
            raise UnknownPool(
                f"no pool is named {pool_or_key!r}, and none serves it as a persistentWorkerKey. "
                f"{self._served()}"
            )
        if not pool.worker_command:
            raise ConfigError(f"pool {pool.name!r} has no worker_command: there is nothing to start")
        return self._key_of(pool)

    def _key_of(self, pool: PoolConfig) -> WorkerKey:
        """One kind of worker for a pool, whatever key asked for it: its command is the same."""
        multiplex = pool.limits.max_requests_per_worker_at_once > 1
        return WorkerKey(
            pool=pool.name,
            argv=tuple(pool.worker_command),
            cwd=self._options.cwd,
            env=tuple(sorted(pool.env.items())),
            protocol=pool.worker_protocol,
            multiplex=multiplex,
        )

    def _pool_named(self, name: str) -> PoolConfig:
        pool = self._options.config.pool_named(name)
        if pool is None:
            raise UnknownPool(f"no pool is named {name!r}. {self._served()}")
        return pool

    def _served(self) -> str:
        pools = self._options.config.pools
        return "Pools and their keys: " + "; ".join(f"{p.name}: {', '.join(p.keys) or 'none'}" for p in pools)
