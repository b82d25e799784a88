"""The pool's shell: carries out what the core decides, and tells it what came of it.

Owns the workers' tasks, connections and execroots, and the futures of those who wait. Decides nothing:
whoever gets which worker, and when one starts or stops, is `core.py`.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from wrapper.clock import precise_clock
from wrapper.errors import RuntimeUnavailable, WorkerDied, WorkerStartFailed, WrapperError
from wrapper.events import Event, EventBus, EventKind
from wrapper.pool import core_messages as m
from wrapper.pool.core import Core
from wrapper.pool.core_records import PoolState
from wrapper.pool.execroots import Execroots
from wrapper.pool.housekeeping import Housekeeping
from wrapper.pool.lease import Lease
from wrapper.pool.limits import TotalLimits
from wrapper.pool.live_worker import LiveWorker, StartTimes
from wrapper.pool.settings import PoolSettings, wire_format_of
from wrapper.pool.warmup import Places, Warmup, Warmups
from wrapper.pool.warmup_queue import WarmupQueue
from wrapper.pool.worker_connection import WorkerConnection
from wrapper.pool.worker_key import ToolFingerprint, WorkerKey
from wrapper.pool.worker_states import StopReason, WarmupFailed
from wrapper.runtime.base import Runtime, WorkerSpec
from wrapper.worker_protocol.exchange import WorkerExchange

OnLease = Callable[[Lease | WrapperError], None]
"""Called once, from the event loop, perhaps before `ask` returns. Must not raise."""

_log = logging.getLogger(__name__)


class WorkerPool:
    """Warm workers of several pools. All methods belong to the event loop's thread.

    Raises ConfigError if a record file (`warmup.requests`) is not in order.
    """

    def __init__(
        self,
        settings: Mapping[str, PoolSettings],
        runtimes: Mapping[str, Runtime],
        *,
        total: TotalLimits | None = None,
        minimum_keys: Mapping[str, WorkerKey] | None = None,
        events: EventBus | None = None,
    ) -> None:
        self._now = precise_clock()
        self.events = events or EventBus()
        self._settings = dict(settings)
        self._warmups = Warmups(settings)
        self._old_warmups: list[Warmups] = []
        self._old_runtimes: set[Runtime] = set()
        self._places = Places(total.max_concurrent_warmups if total is not None else None)
        self._runtimes = dict(runtimes)
        limits = {name: pool.limits for name, pool in settings.items()}
        self._execroots = Execroots(self._settings, self._has_workers)
        self._core = Core(limits, total or TotalLimits(), minimum_keys=minimum_keys)
        self._workers: dict[int, LiveWorker] = {}
        self._waiters: dict[int, OnLease] = {}
        self._last_lease_id = 0
        self._inbox: deque[m.Event] = deque()
        self._handling = False
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._empty: asyncio.Event = asyncio.Event()
        self._closing: asyncio.Task[None] | None = None
        self._obey: dict[type, Callable[[Any], None]] = {
            m.Start: self._on_start,
            m.Warm: self._on_warm,
            m.Probe: self._on_probe,
            m.Grant: self._on_grant,
            m.Refuse: self._on_refuse,
            m.Clean: self._on_clean,
            m.Stop: self._on_stop,
            m.WakeAt: self._on_wake_at,
            m.TellHealth: self._on_tell_health,
            m.TellFirst: self._on_tell_first,
        }

    # ---- for those who want a worker -----------------------------------------------------------------

    def start(self) -> None:
        """Begin to keep the minimum of warm workers, and remove what dead processes of ours have left."""
        self._spawn(self._prepare(), "remove what dead processes have left")
        self._feed(m.Tick())

    async def _prepare(self) -> None:
        try:
            for runtime in set(self._runtimes.values()):
                await runtime.prepare()
            self._execroots.remove_of_dead()  # only now: nobody works in them any more
        except WrapperError as error:
            _log.warning("%s", error.message)  # the first start tries again, and tells its caller

    def reconfigure(
        self,
        settings: Mapping[str, PoolSettings],
        runtimes: Mapping[str, Runtime],
        *,
        total: TotalLimits,
        minimum_keys: Mapping[str, WorkerKey],
        changed: frozenset[str],
    ) -> None:
        """Go on with another configuration: workers of pools in `changed` are replaced one by one.

        Those of other pools stay; those of pools that are gone end after their request. A runtime that is
        not used any more is closed with the pool. Raises ConfigError, and has changed nothing then.
        """
        warmups = Warmups(settings)
        self._old_warmups.append(self._warmups)  # a worker may be primed with its records right now
        self._warmups = warmups
        self._old_runtimes |= set(self._runtimes.values())
        gone = {name: pool for name, pool in self._settings.items() if name not in settings}
        self._settings.update(settings)
        self._runtimes = {**{name: self._runtimes[name] for name in gone}, **runtimes}
        limits = {name: pool.limits for name, pool in settings.items()}
        self._feed(m.Reconfigure(limits, total, minimum_keys, changed))

    async def acquire(self, key: WorkerKey, *, timeout_s: float | None = None) -> Lease:
        """A worker of this key, the most recently used first; waits in turn while there is none.

        `timeout_s`: how long to wait at most; None: what the pool is set to. Does not suspend when a
        worker is idle. Raises UnknownPool, PoolTimeout, PoolExhausted, PoolDraining, WorkerStartFailed
        (no worker of this key can be started; with the program's stderr), RuntimeUnavailable.
        """
        granted: asyncio.Future[Lease | WrapperError] = asyncio.get_running_loop().create_future()

        def on_lease(lease: Lease | WrapperError) -> None:
            if not granted.done():
                granted.set_result(lease)
            elif isinstance(lease, Lease):
                lease.release()

        lease_id = self.ask(key, on_lease, timeout_s=timeout_s)
        try:
            lease = granted.result() if granted.done() else await granted
        except asyncio.CancelledError:
            self.take_back(lease_id)
            if granted.done() and not granted.cancelled() and isinstance(granted.result(), Lease):
                on_lease(granted.result())
            raise
        if isinstance(lease, WrapperError):
            raise lease
        return lease

    def ask(self, key: WorkerKey, on_lease: OnLease, *, timeout_s: float | None = None) -> int:
        """As `acquire`, with a callback; returns the number by which the question can be taken back."""
        self._last_lease_id += 1
        if timeout_s is None and key.pool in self._settings:
            timeout_s = self._settings[key.pool].acquire_timeout_s
        lease_id = self._last_lease_id
        deadline = None if timeout_s is None else self._now() + timeout_s
        self._waiters[lease_id] = on_lease
        candidate = self._core.candidate(key)
        probed = candidate if candidate and self._workers[candidate].problem() is None else 0
        self._feed(m.Acquire(lease_id, key, deadline, probed))
        return lease_id

    def take_back(self, lease_id: int) -> None:
        """Whoever asked does not wait any more; too late for one that was answered."""
        if self._waiters.pop(lease_id, None) is not None:
            self._feed(m.WaiterGone(lease_id))

    async def plant_seed(self, key: WorkerKey, directory_fd: int) -> None:
        """Before `acquire` of a key with a `tool`: its files are in this action's directory.

        Raises RequestRefused, ConfigError, RuntimeUnavailable.
        """
        await self._execroots.seeds.plant(key, directory_fd)

    def _has_workers(self, key: WorkerKey) -> bool:
        state = self._core.registry.keys.get(key)
        return state is not None and bool(state.workers or state.waiting)

    def retire(self, worker_id: int, reason: StopReason) -> None:
        """Stop a worker: now if nobody has it, else when its last lease is released."""
        self._feed(m.Retire(worker_id, reason))

    def pool_states(self) -> Mapping[str, PoolState]:
        """The core's books, to read."""
        return self._core.registry.pools

    @property
    def warmups(self) -> WarmupQueue:
        """Which workers are between start and ready, and which wait for that: to read."""
        return self._places.queue

    async def wait_until_clean(self, worker_id: int) -> None:
        """Until the worker is not being cleaned (or stopped for it). Raises WorkerDied if it was stopped."""
        worker = self._workers.get(worker_id)
        while worker is not None and worker.task is not None and not worker.task.done():
            await asyncio.wait([worker.task])
        if worker is None or worker.reason is not None:
            reason = "" if worker is None or worker.reason is None else f": {worker.reason.value}"
            raise WorkerDied(f"worker {worker_id} did not survive its cleaning{reason}")

    async def wait_until_stopped(self, worker_id: int) -> None:
        """Until nothing is left of this worker."""
        stopped = asyncio.Event()
        self.when_stopped(worker_id, stopped.set)
        await stopped.wait()

    def when_stopped(self, worker_id: int, then: Callable[[], None]) -> None:
        """Call `then` once nothing is left of this worker: now, if that is so already."""
        worker = self._workers.get(worker_id)
        if worker is None:
            then()
        else:
            worker.watchers.append(then)

    async def close(self, drain_timeout_s: float = 0.0) -> None:
        """Refuse those who wait, let leases end for `drain_timeout_s`, then stop every worker.

        When it returns, also by cancellation, nothing of any worker is left. Idempotent.
        """
        if self._closing is None:
            self._closing = asyncio.create_task(self._close(drain_timeout_s), name="pool close")
        try:
            await asyncio.shield(self._closing)
        except asyncio.CancelledError:
            for worker_id, worker in list(self._workers.items()):
                if worker.reason is None:
                    self._feed(m.Exited(worker_id, StopReason.DRAINED, WorkerDied("the pool was closed")))
            await asyncio.wait([self._closing])
            raise

    async def _close(self, drain_timeout_s: float) -> None:
        self._feed(m.Drain())
        try:
            async with asyncio.timeout(drain_timeout_s):
                await self._until_empty(lambda worker: worker.reason is None)
        except TimeoutError:
            for worker_id, worker in list(self._workers.items()):
                if worker.reason is None:
                    self._feed(m.Exited(worker_id, StopReason.DRAINED, WorkerDied("the pool was closed")))
        await self._until_empty(lambda _worker: True)
        if self._timer is not None:
            self._timer.cancel()
        for warmups in (self._warmups, *self._old_warmups):
            warmups.close()
        for runtime in self._old_runtimes | set(self._runtimes.values()):
            await runtime.close()
        try:
            await self._execroots.close()
        except RuntimeUnavailable as error:
            _log.error("%s; the next start removes it", error.message)

    async def _until_empty(self, counts: Callable[[LiveWorker], bool]) -> None:
        while any(counts(worker) for worker in self._workers.values()):
            self._empty.clear()
            await self._empty.wait()

    # ---- the core ------------------------------------------------------------------------------------

    def _feed(self, event: m.Event) -> None:
        """Tell the core, and carry out what it says; events that come of that wait their turn."""
        self._inbox.append(event)
        if self._handling:
            return
        self._handling = True
        try:
            now = self._now()
            while self._inbox:
                for command in self._core.handle(self._inbox.popleft(), now):
                    self._obey[type(command)](command)
        finally:
            self._handling = False

    def _on_wake_at(self, command: m.WakeAt) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(command.at, self._feed, m.Tick())

    def _on_grant(self, command: m.Grant) -> None:
        worker = self._workers[command.worker_id]
        connection = worker.connection
        on_lease = self._waiters.pop(command.lease_id, None)
        if on_lease is None or connection is None:
            self._inbox.append(m.Released(command.lease_id, used=False))
            return
        on_lease(Lease(command.lease_id, command.worker_id, connection, worker.execroot, self._released))

    def _on_refuse(self, command: m.Refuse) -> None:
        on_lease = self._waiters.pop(command.lease_id, None)
        if on_lease is not None:
            on_lease(command.error)

    def _released(self, lease_id: int, worker_id: int, used: bool, problem: StopReason | None) -> None:
        worker = self._workers.get(worker_id)
        if not used or problem is not None or worker is None or worker.key.multiplex:
            self._feed(m.Released(lease_id, used, problem))
            return
        # The usual case is looked at here: nothing to clean, and perhaps somebody waiting.
        clean = worker.is_clean()
        probed = clean and self._core.is_waited_for(worker.key) and worker.problem() is None
        self._feed(m.Released(lease_id, used, problem, clean, probed))

    def _on_probe(self, command: m.Probe) -> None:
        problem = self._workers[command.worker_id].problem()
        self._inbox.append(m.ProbeDone(command.worker_id, command.lease_id, problem))

    # ---- a worker's life -----------------------------------------------------------------------------

    def _on_start(self, command: m.Start) -> None:
        worker_id, key = command.worker_id, command.key
        fingerprint, times = ToolFingerprint.of(key.argv, key.cwd), StartTimes(self._now())
        worker = LiveWorker(worker_id, key, self._settings[key.pool], fingerprint, times)
        self._workers[worker_id] = worker
        worker.task = self._spawn(self._start(worker_id, worker), f"start worker {worker_id}")

    async def _start(self, worker_id: int, worker: LiveWorker) -> None:
        key, settings = worker.key, worker.settings
        await self._places.take(worker_id, key.pool, lambda: self._core.urgency(worker_id))
        worker.times.begun = self._now()
        try:
            await self._runtimes[key.pool].prepare()
            worker.execroot = await self._execroots.make(key, worker_id)
            if worker.execroot is not None:
                cwd, mounts = worker.execroot.seen_as, worker.execroot.mounts
            else:
                cwd, mounts = key.cwd, self._execroots.mounts_in_place(key)
            env = dict(key.env)
            if env.get("PWD") == key.cwd:
                env["PWD"] = cwd
            worker.process = await self._runtimes[key.pool].start(
                WorkerSpec(
                    name=key.label,
                    argv=key.argv,
                    env=env,
                    cwd=cwd,
                    language=settings.language,
                    gc_command=settings.gc_command,
                    mounts=mounts,
                    user=settings.execroot.user,
                )
            )
        except WrapperError as error:
            self._start_failed(worker_id, worker, error)
            return
        except Exception as error:  # noqa: BLE001 - whatever it is, the slot must not be lost
            self._start_failed(worker_id, worker, WorkerStartFailed(f"cannot start {key.label}: {error!r}"))
            return
        worker.times.loaded = self._now()
        exchange = WorkerExchange(
            wire_format_of(key.protocol), multiplex=key.multiplex, max_frame_bytes=settings.max_frame_bytes
        )
        worker.connection = WorkerConnection(
            worker.process,
            exchange,
            description=f"worker {worker_id} ({key.label}, pid {worker.process.pid})",
            frame_timeout_s=settings.frame_timeout_s,
            on_lost=lambda reason, error: self._feed(m.Exited(worker_id, reason, error)),
            on_stray=lambda text: self._publish(EventKind.STRAY_OUTPUT, worker_id, text),
        )
        worker.housekeeping = Housekeeping(
            worker.process,
            worker.connection,
            settings,
            lambda kind, detail, numbers: self._publish(kind, worker_id, detail, numbers),
        )
        self._publish(EventKind.WORKER_STARTED, worker_id, f"pid {worker.process.pid}")
        self._feed(m.Started(worker_id))

    def _start_failed(self, worker_id: int, worker: LiveWorker, error: WrapperError) -> None:
        self._remove_execroot(worker)
        self._publish(EventKind.WORKER_START_FAILED, worker_id, error.message)
        self._forget(worker_id)
        self._feed(m.StartFailed(worker_id, error))

    def _on_warm(self, command: m.Warm) -> None:
        worker_id = command.worker_id
        worker = self._workers[worker_id]
        if self._warmups.has_nothing_to_do(worker.key, worker.settings):
            self._ready(worker_id, worker)
            return
        worker.task = self._spawn(self._warm(worker_id, worker), f"warm worker {worker_id}")

    async def _warm(self, worker_id: int, worker: LiveWorker) -> None:
        warmup = Warmup(
            worker,
            now=self._now,
            is_waited_for=lambda: self._core.is_waited_for(worker.key),
            publish=lambda kind, detail, numbers: self._publish(kind, worker_id, detail, numbers),
        )
        try:
            await warmup.run(self._warmups)
        except WarmupFailed as failed:
            self._publish(EventKind.WORKER_START_FAILED, worker_id, failed.error.report())
            self._feed(m.Exited(worker_id, failed.reason, failed.error))
        else:
            self._ready(worker_id, worker)

    def _ready(self, worker_id: int, worker: LiveWorker) -> None:
        self._places.free(worker_id)
        self._publish(EventKind.WORKER_READY, worker_id, "", worker.times.numbers(self._now()))
        self._feed(m.Warmed(worker_id))

    def _on_tell_health(self, command: m.TellHealth) -> None:
        kind, detail = EventKind.POOL_HEALTHY, f"after {command.failures} starts that failed"
        if command.error is not None:
            kind = EventKind.POOL_UNHEALTHY
            detail = f"{command.failures} starts in a row failed: {command.error.report()}"
        self.events.publish(Event(kind, command.key.pool, 0, command.key.label, detail))

    def _on_tell_first(self, command: m.TellFirst) -> None:
        numbers = {"first_request_s": command.latency_s}
        self._publish(EventKind.FIRST_REQUEST, command.worker_id, "", numbers)

    def _on_clean(self, command: m.Clean) -> None:
        worker = self._workers[command.worker_id]
        housekeeping = worker.housekeeping
        assert housekeeping is not None  # noqa: S101 - it has served
        collects = command.collect_garbage and housekeeping.collects_garbage
        if not collects and worker.is_clean():
            self._inbox.append(m.Cleaned(command.worker_id))
            return
        worker.task = self._spawn(
            self._clean(command.worker_id, housekeeping, command.collect_garbage),
            f"clean worker {command.worker_id}",
        )

    async def _clean(self, worker_id: int, housekeeping: Housekeeping, collect_garbage: bool) -> None:
        try:
            problem = await housekeeping.clean(collect_garbage=collect_garbage)
        except Exception:  # noqa: BLE001 - whatever it is, the slot must not be lost
            _log.exception("cleaning worker %d failed", worker_id)
            problem = StopReason.UNCLEAN
        self._feed(m.Cleaned(worker_id, problem))

    def _on_stop(self, command: m.Stop) -> None:
        worker = self._workers[command.worker_id]
        worker.reason = command.reason
        self._publish(EventKind.WORKER_STOPPING, command.worker_id, command.reason.value)
        self._spawn(self._stop(command.worker_id, worker), f"stop worker {command.worker_id}")

    async def _stop(self, worker_id: int, worker: LiveWorker) -> None:
        try:
            if worker.task is not None and not worker.task.done():
                worker.task.cancel()
                await asyncio.wait([worker.task])
            self._places.free(worker_id)
            if worker.connection is not None:
                worker.connection.close()
            if worker.process is not None:
                await worker.process.stop(worker.grace_s())
        except RuntimeUnavailable as error:
            _log.error("stopping worker %d: %s", worker_id, error)
        finally:
            self._remove_execroot(worker)
            self._publish(EventKind.WORKER_STOPPED, worker_id, worker.reason.value if worker.reason else "")
            self._forget(worker_id)
            self._feed(m.Stopped(worker_id))

    @staticmethod
    def _remove_execroot(worker: LiveWorker) -> None:
        try:
            if worker.execroot is not None:
                worker.execroot.remove()
        except RuntimeUnavailable as error:
            _log.error("%s; the next start removes it", error.message)

    def _forget(self, worker_id: int) -> None:
        worker = self._workers.pop(worker_id)
        self._places.free(worker_id)
        for watcher in worker.watchers:
            watcher()
        self._empty.set()

    def _spawn(self, coroutine: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)
        return task

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            _log.error("%s failed", task.get_name(), exc_info=task.exception())

    def _publish(
        self, kind: EventKind, worker_id: int, detail: str = "", numbers: dict[str, float] | None = None
    ) -> None:
        worker = self._workers.get(worker_id)
        pool, label = (worker.key.pool, worker.key.label) if worker is not None else ("", "")
        self.events.publish(Event(kind, pool, worker_id, label, detail, numbers or {}))
