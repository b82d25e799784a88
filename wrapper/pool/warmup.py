"""From asking for a worker's start to ready, phase by phase, and how long each takes.

    queue → load → preload → verify → prime → gc → ready

Owns the phases after the start, their common budget of time (`max_warmup_ms`), and the report of all of
them. Which worker starts when is `core.py`'s business, whose turn it is `warmup_queue.py`'s, and what priming
does `priming.py`'s.

The budget begins when the runtime has started the worker. A command that it ends is abandoned, and the
worker is used as it is. Verification is not bound by it: a worker that was not verified is not used.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any

from wrapper.errors import WorkerStartFailed, WrapperError
from wrapper.events import EventKind
from wrapper.pool.live_worker import LiveWorker
from wrapper.pool.settings import PoolSettings
from wrapper.pool.warmup_queue import Urgency, WarmupQueue
from wrapper.pool.worker_key import WorkerKey
from wrapper.pool.worker_states import StopReason, WarmupFailed
from wrapper.runtime.base import CommandSpec

if TYPE_CHECKING:
    from wrapper.pool.execroots import Execroot
    from wrapper.pool.priming import Priming

MIN_CONCURRENT_WARMUPS = 4
MAX_TOLD = 1_000
"""Keys of which it is remembered that priming was skipped, so that it is told once for each."""

_log = logging.getLogger(__name__)

_TIME_IS_OVER = "max_warmup_ms is over"

Publish = Callable[[EventKind, str, dict[str, float]], None]


def default_concurrent_warmups() -> int:
    """How many workers are between start and ready at a time, if nobody says so.

    A JVM's start is bound by the processors: eight on two of them are all ready after the same time, two or
    eight at once, but the first of them after a quarter of it. A container's start is bound by the engine,
    which wants a few at a time. Twice the processors costs JVMs a tenth of their mean time to ready.
    """
    return max(MIN_CONCURRENT_WARMUPS, 2 * len(os.sched_getaffinity(0)))


class Places:
    """The places of the queue, for tasks that wait for theirs."""

    def __init__(self, max_active: int | None) -> None:
        self.queue = WarmupQueue(max_active or default_concurrent_warmups())
        self._waiting: dict[int, asyncio.Future[None]] = {}

    async def take(self, worker_id: int, pool: str, urgency: Callable[[], Urgency]) -> None:
        """Wait for a place. Whether or not it was waited for to the end, `free` is owed."""
        if self.queue.enter(worker_id, pool, urgency):
            return
        turn = self._waiting[worker_id] = asyncio.get_running_loop().create_future()
        await turn

    def free(self, worker_id: int) -> None:
        """This worker is ready, or will never be. Idempotent."""
        self._waiting.pop(worker_id, None)
        turn = self._waiting.pop(self.queue.leave(worker_id), None)
        if turn is not None and not turn.done():  # else its task was cancelled, and will free its place
            turn.set_result(None)


class Warmups:
    """What all warm-ups of one WorkerPool share: the priming of each pool. Raises ConfigError."""

    def __init__(self, settings: Mapping[str, PoolSettings]) -> None:
        self._priming: dict[str, Priming] = {}
        self._told: set[WorkerKey] = set()
        try:
            for name, pool in settings.items():
                if pool.warmup_rules.requests and pool.warmup_rules.precompile:
                    from wrapper.pool.priming import Priming  # 10 ms, and few pools prime

                    self._priming[name] = Priming(pool.warmup_rules)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the record files. Idempotent."""
        for priming in self._priming.values():
            priming.close()

    def has_nothing_to_do(self, key: WorkerKey, settings: PoolSettings) -> bool:
        """Whether a worker of this key is ready as soon as it is started."""
        commands = (settings.warmup and settings.warmup_rules.preload) or settings.verification
        return not commands and key.pool not in self._priming

    def priming_of(self, key: WorkerKey, publish: Publish) -> Priming | None:
        """What a worker of this key is primed with; tells, once, if that is less than was asked for."""
        priming = self._priming.get(key.pool)
        if priming is None:
            return None
        obstacle = priming.obstacle(key)
        if obstacle and key not in self._told:
            if len(self._told) >= MAX_TOLD:
                self._told.clear()
            self._told.add(key)
            publish(EventKind.WARMUP_SKIPPED, f"not primed: {obstacle}", {})
        return priming if key.own_execroot else None


class Warmup:
    """The warm-up of one worker."""

    def __init__(
        self,
        worker: LiveWorker,
        *,
        now: Callable[[], float],
        is_waited_for: Callable[[], bool],
        publish: Publish,
    ) -> None:
        assert worker.connection is not None  # noqa: S101 - it was started
        assert worker.housekeeping is not None  # noqa: S101
        self._key = worker.key
        self._settings = worker.settings
        self._rules = worker.settings.warmup_rules
        self._connection = worker.connection
        self._process = worker.connection.process
        self._housekeeping = worker.housekeeping
        self._execroot = worker.execroot
        self._times = worker.times
        self._now = now
        self._is_waited_for = is_waited_for
        self._publish = publish
        self._deadline = worker.times.loaded + self._rules.max_s
        self._numbers: dict[str, float] = {}
        self._cut_short = ""

    async def run(self, warmups: Warmups) -> None:
        """Make the worker ready, and report it. Raises WarmupFailed."""
        try:
            await self._phases(warmups)
        except WrapperError as error:
            raise WarmupFailed(StopReason.WARMUP_FAILED, error) from error
        except WarmupFailed:
            raise
        except Exception as error:
            _log.exception("warming up a worker of %s failed", self._key.label)
            ours = WrapperError(f"an error of the wrapper's own: {error!r}")
            raise WarmupFailed(StopReason.WARMUP_FAILED, ours) from error
        numbers = self._times.numbers(self._now()) | self._numbers
        numbers["memory_bytes"] = self._process.memory_bytes()
        numbers["target_met"] = float(numbers["total_s"] <= self._rules.target_s)
        numbers["cut_short"] = float(bool(self._cut_short))
        self._publish(EventKind.WARMUP_DONE, self._cut_short and f"cut short: {self._cut_short}", numbers)

    async def _phases(self, warmups: Warmups) -> None:
        if self._settings.warmup and self._rules.preload:
            await self._timed("preload", self._preload())
        if self._settings.verification:
            await self._timed("verify", self._verify())
        priming = warmups.priming_of(self._key, self._publish)
        if priming is None or self._execroot is None:
            return
        await self._timed("prime", self._prime(priming, self._execroot))
        if self._numbers["primed"] and not self._cut_short and self._housekeeping.collects_garbage:
            await self._timed("gc", self._housekeeping.collect_garbage())

    async def _timed(self, phase: str, work: Coroutine[Any, Any, None]) -> None:
        began = self._now()
        await work
        self._numbers[f"{phase}_s"] = self._now() - began
        self._numbers[f"{phase}_memory_bytes"] = self._process.memory_bytes()

    def _is_in_the_way(self) -> bool:
        return self._rules.lazy_loading and self._is_waited_for()

    async def _preload(self) -> None:
        for command in self._settings.warmup:
            if self._is_in_the_way():
                self._cut_short = "a request waits"
                return
            rest_s = self._deadline - self._now()
            if rest_s <= 0:
                self._cut_short = _TIME_IS_OVER
                return
            await self._command(command, min(command.timeout_s, rest_s))

    async def _verify(self) -> None:
        for command in self._settings.verification:
            await self._command(command, command.timeout_s)

    async def _command(self, command: CommandSpec, timeout_s: float) -> None:
        result = await self._process.run(CommandSpec(command.argv, timeout_s))
        if result.ok:
            return
        if result.returncode is None and timeout_s < command.timeout_s:
            self._cut_short = _TIME_IS_OVER  # not its own time: it did nothing wrong
            return
        how = "timed out" if result.returncode is None else f"exit code {result.returncode}"
        message = f"warm-up of {self._key.label}: {list(command.argv)} {how}"
        raise WorkerStartFailed(message, stderr_tail=result.output)

    async def _prime(self, priming: Priming, execroot: Execroot) -> None:
        from wrapper.pool.priming import PrimingRun

        run = PrimingRun(
            priming,
            self._key,
            self._connection,
            execroot,
            at_once=self._settings.limits.max_requests_per_worker_at_once if self._key.multiplex else 1,
            now=self._now,
            deadline=self._deadline,
        )
        try:
            await run.run(self._is_in_the_way)
        except asyncio.CancelledError:
            if self._connection.lost is not None:  # why it is being stopped
                died = f"while it was primed: {self._connection.lost.report()}"
                self._publish(EventKind.WORKER_START_FAILED, died, {})
            raise
        self._numbers |= {"primed": run.answered, "primed_failed": run.failed}
        self._cut_short = self._cut_short or run.ended_early
        if run.answered:
            problem = await self._housekeeping.clean(collect_garbage=False)
            if problem is not None:
                text = f"{self._key.label} could not be cleaned after priming: {problem.value}"
                raise WarmupFailed(problem, WorkerStartFailed(text, stderr_tail=self._process.stderr_tail()))
