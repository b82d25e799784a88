"""Warm workers for Python programs: `WarmWorkerPoolManager`.

Composition root of that face: builds the pools of a configuration on the process runtime, and lets
nobody in before the pools that have `check_health` are proven. Whoever has a pool's name or a
persistentWorkerKey gets leases; who gets which worker, and when one starts or stops, is the pool's
business. `docs/python-api.md` shows its use.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from wrapper.action_runner import run_action
from wrapper.config import Config, PoolConfig
from wrapper.errors import ConfigError, PoolDraining, RequestRefused, UnknownPool
from wrapper.events import EventBus
from wrapper.own_command import own_worker_key
from wrapper.pool.health import prove_pool
from wrapper.pool.lease import Lease, WorkerOutcome
from wrapper.pool.pool import WorkerPool
from wrapper.pool.start_statistics import StartRecorder, StartStatistics
from wrapper.pool.worker_key import WorkerKey
from wrapper.pool.worker_states import StopReason, WorkerState
from wrapper.runtime.base import Runtime
from wrapper.runtimes import runtimes_of, state_dir_of
from wrapper.worker_protocol.messages import WorkRequest, WorkResponse

_READY = (WorkerState.IDLE, WorkerState.RESERVED)
_ACTIVE = (WorkerState.LEASED, WorkerState.DOOMED, WorkerState.COOLING)
_PROVISIONING = (WorkerState.STARTING, WorkerState.WARMING)


@dataclass(frozen=True, slots=True)
class PoolCreateOptions:
    """What a manager is made of."""

    config: Config
    """See `wrapper.load_config`."""
    cwd: str = field(default_factory=os.getcwd)
    """The workers' working directory; default: ours, now. A relative `worker_command` counts from it."""
    log_dir: str | None = None
    """Where the workers' stderr goes, in rotating files; None: only a bounded tail is kept."""
    make_runtime: Callable[[PoolConfig], Runtime] | None = None
    """For tests: what runs the workers of a pool, instead of what its `runtime` names."""


@dataclass(frozen=True, slots=True)
class PoolMetrics:
    """Numbers of one pool, or of all. Workers are counted now, the rest since the start.

    A worker that is being stopped holds its place in the pool's limits, but is none of the first three.
    """

    ready_workers: int
    """Idle: a lease can have one at once."""
    active_workers: int
    """Leased, or being cleaned after a lease."""
    provisioning_workers: int
    """Being started or warmed up."""
    recycled_workers: int
    """Workers that were started and then stopped, for whatever reason."""
    gets: int
    """Leases given."""
    cleans: int
    """Workers cleaned after a lease."""
    prepares: int
    """Workers that became ready."""
    warmups_pending: int
    """Workers that wait for their turn to be started, of those that are provisioning."""
    warmups_active: int
    """Workers between the begin of their start and ready, of those that are provisioning."""


class WarmWorkerPoolManager:
    """Keeps the pools of a configuration. Use it within one event loop.

    `async with manager:` starts and closes it; the first lease starts it too, and then `close` is owed.
    A manager is started once: after `close`, or after a start that failed, a new one is needed.
    """

    def __init__(self, options: PoolCreateOptions) -> None:
        self._options = options
        self.events = EventBus()
        """Tells whoever subscribes what happens: `manager.events.subscribe(print)`."""
        self._keys: dict[str, WorkerKey] = {}
        self._pool: WorkerPool | None = None
        self._starting: asyncio.Task[None] | None = None
        self._usable = False
        self._closed = False

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def start(self) -> None:
        """Begin to keep each pool's minimum of warm workers; prove the pools that have `check_health`.

        Returns when the proofs are done, not when the minimum is ready. Idempotent. Raises the
        WrapperError of the first pool that is not healthy (all are closed then), also at later calls;
        PoolDraining once the manager was closed. Cancelled, it goes on in the background.
        """
        if self._starting is None:
            if self._closed:
                raise PoolDraining("the manager is closed")
            self._pool = self._make_pool()
            self._pool.start()
            self._starting = asyncio.create_task(self._prove(self._pool), name="manager start")
        if not self._starting.done():
            await asyncio.wait([self._starting])
        if self._starting.cancelled():
            raise PoolDraining("the manager was closed while it started")
        self._starting.result()

    async def close(self) -> None:
        """Refuse whoever waits, let leases end for `drain_timeout_s`, stop every worker. Idempotent.

        When it returns, also by cancellation, no process of any worker is left.
        """
        self._closed = True
        try:
            if self._starting is not None:
                self._starting.cancel()  # a proof that is under way; no effect on one that is done
                await asyncio.wait([self._starting])
                if not self._starting.cancelled():
                    self._starting.exception()  # whoever awaited `start` was told
        finally:
            if self._pool is not None:
                await self._pool.close(self._options.config.drain_timeout_s)

    async def acquire(self, pool_or_key: str, *, timeout_s: float | None = None) -> Lease:
        """A worker of the pool of this name, else of the first pool that serves this persistentWorkerKey.

        `timeout_s`: how long to wait in turn for a worker; None: `limits.acquire_timeout_s` of the pool.
        To be ended by `lease.release(WorkerOutcome.COMPLETED | FAILED)`; a lease that is dropped stops
        its worker.

        Raises UnknownPool, ConfigError (the pool has no `worker_command`), PoolTimeout, PoolExhausted,
        PoolDraining (the manager was closed), WorkerStartFailed (with the program's stderr), WorkerDied
        (several workers in a row died before their first answer), RuntimeUnavailable; and what `start`
        raises.
        """
        pool = self._pool_for(pool_or_key)
        if not self._usable:
            await self.start()
        assert self._pool is not None  # noqa: S101 - it was started
        return await self._pool.acquire(self._keys[pool.name], timeout_s=timeout_s)

    async def run(
        self, pool_or_key: str, request: WorkRequest, *, directory: str | None = None
    ) -> WorkResponse:
        """Run one action: a warm worker, its files, the request, its outputs, and the worker back.

        `directory`: the action's own, with its inputs. The worker finds its content in its own;
        afterwards it is back in place, with the outputs. For pools whose workers have an execroot of their
        own (`execroot.work_root`, or runtime "cri").

        Raises what `acquire` raises; WorkerDied and WorkerProtocolError (the directory is empty then, and
        whatever was in it gone); RequestRefused (nothing has happened); RuntimeUnavailable.
        Cancelled, it returns when no process is at work for the action any more.
        """
        pool = self._pool_for(pool_or_key)
        key = self._keys[pool.name]
        if directory is not None and not key.for_actions:
            raise ConfigError(
                f"the workers of pool {pool.name!r} have no execroots of their own: "
                'give it execroot.work_root, or runtime "cri"'
            )
        if not self._usable:
            await self.start()
        assert self._pool is not None  # noqa: S101 - it was started
        fd = None
        if directory is not None:
            try:
                fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except OSError as error:
                raise RequestRefused(f"the action's directory cannot be opened: {error}") from error
        try:
            return await run_action(self._pool, key, request, directory_fd=fd)
        finally:
            if fd is not None:
                os.close(fd)

    @asynccontextmanager
    async def lease(self, pool_or_key: str, *, timeout_s: float | None = None) -> AsyncIterator[Lease]:
        """`acquire` and `release` around a block; an exception in the block says that the worker failed.

        But for RequestRefused: then the worker has seen nothing of the request.
        """
        lease = await self.acquire(pool_or_key, timeout_s=timeout_s)
        try:
            yield lease
        except RequestRefused:
            lease.release(WorkerOutcome.COMPLETED)
            raise
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
            recycled_workers=sum(
                number
                for state in states.values()
                for reason, number in state.stops.items()
                if reason is not StopReason.START_FAILED  # there never was a worker
            ),
            gets=count("grant"),
            cleans=count("clean"),
            prepares=count("ready"),
            warmups_pending=self._pool.warmups.pending(pool) if self._pool is not None else 0,
            warmups_active=self._pool.warmups.active(pool) if self._pool is not None else 0,
        )

    def start_statistics(self, pool: str | None = None) -> StartStatistics:
        """Cold and warm requests of the pool of this name; None: of all together. Raises UnknownPool."""
        states = self._pool.pool_states() if self._pool is not None else {}
        if pool is not None:
            self._pool_named(pool)
        return StartRecorder.summary(state.starts for name, state in states.items() if pool in (None, name))

    def is_healthy(self, pool: str) -> bool:
        """Whether fewer than `warmup.unhealthy_after` starts in a row have failed now. Raises UnknownPool."""
        self._pool_named(pool)
        states = self._pool.pool_states() if self._pool is not None else {}
        return pool not in states or states[pool].is_healthy

    def _make_pool(self) -> WorkerPool:
        config = self._options.config
        cwd = os.path.abspath(self._options.cwd)
        keys = {pool.name: own_worker_key(pool, cwd) for pool in config.pools}
        self._keys = {name: key for name, key in keys.items() if key is not None}
        return WorkerPool(
            {pool.name: pool.settings(self._state_dir_of(pool)) for pool in config.pools},
            self._runtimes(),
            total=config.total_limits(),
            minimum_keys=self._keys,
            events=self.events,
        )

    async def _prove(self, pool: WorkerPool) -> None:
        """Prove the pools that ask for it, one after the other: their first starts are expensive.

        Pools without a `worker_command` are left out, since nothing can be leased from them here.
        """
        try:
            for configured in self._options.config.pools:
                if configured.check_health and configured.name in self._keys:
                    await prove_pool(pool, self._keys[configured.name])
        except Exception:
            await pool.close()
            raise
        self._usable = True

    def _runtimes(self) -> Mapping[str, Runtime]:
        make, config = self._options.make_runtime, self._options.config
        if make is not None:
            return {pool.name: make(pool) for pool in config.pools}
        return runtimes_of(config, log_dir=self._options.log_dir)

    def _state_dir_of(self, pool: PoolConfig) -> str:
        return state_dir_of(self._options.config.state_dir) if pool.has_own_execroots else ""

    def _pool_for(self, pool_or_key: str) -> PoolConfig:
        config = self._options.config
        pool = config.pool_named(pool_or_key) or config.pool_for_key(pool_or_key)
        if pool is None:
            raise UnknownPool(
                f"no pool is named {pool_or_key!r}, and none serves it as a persistentWorkerKey. "
                f"{self._served()}"
            )
        if not pool.worker_command:
            raise ConfigError(f"pool {pool.name!r} has no worker_command: there is nothing to start")
        return pool

    def _pool_named(self, name: str) -> PoolConfig:
        pool = self._options.config.pool_named(name)
        if pool is None:
            raise UnknownPool(f"no pool is named {name!r}. {self._served()}")
        return pool

    def _served(self) -> str:
        pools = self._options.config.pools
        return "Pools and their keys: " + "; ".join(f"{p.name}: {', '.join(p.keys) or 'none'}" for p in pools)
