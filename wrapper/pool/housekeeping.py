"""What is done to a worker between two requests: silence, leftovers, cleanup commands, garbage.

All of it after the caller has its answer, and while nobody else can lease the worker. Answers with the
reason for which the worker must stop, or None: it is as it was before.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from wrapper.errors import RuntimeUnavailable, WrapperError
from wrapper.events import EventKind
from wrapper.pool.settings import SETTLE_S, PoolSettings
from wrapper.pool.worker_connection import WorkerConnection
from wrapper.pool.worker_states import StopReason
from wrapper.runtime.base import WorkerProcess

CLEANING_ATTEMPTS = 5
CLEANING_BACKOFF_S = 0.05
"""Times the square of the attempt's number: 0.05, 0.2, 0.45, 0.8 s."""

LEAK_COLLECTIONS = 5
"""Memory after garbage collection that grew this many times in a row, and …"""
LEAK_FACTOR = 1.5
"""… is this many times what it was at the first, is a leak."""

Publish = Callable[[EventKind, str, dict[str, float]], None]


class Housekeeping:
    """The cleaning of one worker. `publish` is told what was found."""

    def __init__(
        self,
        process: WorkerProcess,
        connection: WorkerConnection,
        settings: PoolSettings,
        publish: Publish,
    ) -> None:
        self._process = process
        self._connection = connection
        self._settings = settings
        self._publish = publish
        self._growth = GrowthWatch()

    @property
    def collects_garbage(self) -> bool:
        """Whether a garbage collection of this worker would do anything."""
        return self._process.has_garbage

    def is_clean_already(self) -> bool:
        """Whether there is nothing to do after the last request. Quick: this is the usual case."""
        return (
            not self._settings.post_job_cleanup
            and self._connection.exchange.echoes_ids is True
            and self._connection.is_silent()
            and not self._process.leftovers()
            and not self._uses_too_much_memory()
        )

    async def clean(self, *, collect_garbage: bool) -> StopReason | None:
        """Clean the worker; tried up to CLEANING_ATTEMPTS times with quadratic back-off."""
        if not await self._stays_silent():
            return StopReason.STRAY_OUTPUT
        for attempt in range(1, CLEANING_ATTEMPTS + 1):
            try:
                await self._clean_once()
                break
            except RuntimeUnavailable as error:
                if self._connection.lost is not None:
                    return StopReason.CRASH
                self._publish(EventKind.CLEANING_FAILED, error.report(), {"attempt": attempt})
                if attempt == CLEANING_ATTEMPTS:
                    return StopReason.UNCLEAN
                await asyncio.sleep(CLEANING_BACKOFF_S * attempt**2)
        if collect_garbage or self._uses_too_much_memory():
            await self.collect_garbage()
            if self._uses_too_much_memory():
                return StopReason.MEMORY
            if self._growth.is_leak:
                return StopReason.LEAK
        return None if await self._stays_silent() else StopReason.STRAY_OUTPUT

    async def _stays_silent(self) -> bool:
        if self._connection.exchange.echoes_ids is False:
            await asyncio.sleep(SETTLE_S)
        return self._connection.is_silent()

    async def _clean_once(self) -> None:
        if self._process.leftovers():
            removed = await self._process.remove_leftovers()
            names = ", ".join(removed.files[:5]) + (", …" if len(removed.files) > 5 else "")
            self._publish(
                EventKind.LEFTOVERS_REMOVED,
                f"files: {names}" if names else "",
                {"processes": len(removed.processes), "files": len(removed.files)},
            )
        for command in self._settings.post_job_cleanup:
            result = await self._process.run(command)
            if not result.ok:
                how = "timed out" if result.returncode is None else f"exit code {result.returncode}"
                tail = result.output[-500:].decode("utf-8", "replace")
                raise RuntimeUnavailable(f"post_job_cleanup {command.argv!r}: {how}: {tail}")

    async def collect_garbage(self) -> None:
        """Make the worker collect its garbage, and tell what came of it."""
        try:
            report = await self._process.collect_garbage()
        except WrapperError as error:
            self._publish(EventKind.GARBAGE_COLLECTION_FAILED, error.report(), {})
            return
        if report is not None:
            self._growth.collected(report.after_bytes)
            self._publish(
                EventKind.GARBAGE_COLLECTED,
                "",
                {
                    "reclaimed_bytes": report.reclaimed_bytes,
                    "after_bytes": report.after_bytes,
                    "duration_s": report.duration_s,
                },
            )

    def _uses_too_much_memory(self) -> bool:
        limit = self._settings.limits.max_memory_bytes
        return limit is not None and self._process.memory_bytes() > limit


class GrowthWatch:
    """Whether memory after garbage collection keeps growing."""

    def __init__(self) -> None:
        self._base: int | None = None
        self._last = 0
        self._grown = 0

    def collected(self, after_bytes: int) -> None:
        if self._base is None:
            self._base = after_bytes
        elif after_bytes > self._last:
            self._grown += 1
        else:
            self._grown = 0
        self._last = after_bytes

    @property
    def is_leak(self) -> bool:
        return (
            self._grown >= LEAK_COLLECTIONS
            and self._base is not None
            and self._last > self._base * LEAK_FACTOR
        )
