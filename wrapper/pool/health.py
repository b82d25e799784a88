"""Whether a worker may take a lease, and whether a pool works at all."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from wrapper.errors import PoolTimeout, WorkerDied
from wrapper.events import Event, EventKind
from wrapper.pool.worker_connection import WorkerConnection
from wrapper.pool.worker_key import ToolFingerprint
from wrapper.pool.worker_states import StopReason
from wrapper.worker_protocol.messages import WorkRequest

if TYPE_CHECKING:
    from wrapper.pool.pool import WorkerPool
    from wrapper.pool.worker_key import WorkerKey

PROOF_TIMEOUT_S = 60.0


def problem_before_lease(connection: WorkerConnection, fingerprint: ToolFingerprint) -> StopReason | None:
    """Why this worker must not take a lease; None if it may. Asked before every lease, so it is quick."""
    if not connection.is_silent():
        return StopReason.STRAY_OUTPUT if connection.lost is None else StopReason.CRASH
    if connection.process.exited.done():
        return StopReason.CRASH
    if fingerprint.changed() is not None:
        return StopReason.TOOL_CHANGED
    return None


async def prove_pool(pool: WorkerPool, key: WorkerKey) -> None:
    """Start a worker, let it serve, clean and stop it: all that the pool will have to do later.

    The request is an empty one; any well-formed answer proves that the worker serves, whatever its exit
    code. Raises the WrapperError that stands in the way; PoolTimeout after PROOF_TIMEOUT_S.
    """
    step = "start"
    worker_id = 0
    seen: dict[EventKind, str] = {}

    def look(event: Event) -> None:
        if event.worker_id == worker_id:
            seen[event.kind] = event.detail

    end_looking = pool.events.subscribe(look)
    try:
        async with asyncio.timeout(PROOF_TIMEOUT_S):
            lease = await pool.acquire(key, timeout_s=PROOF_TIMEOUT_S)
            worker_id = lease.worker_id
            step = "serve"
            try:
                await lease.execute(WorkRequest.of())
            finally:
                lease.release()
            step = "be cleaned"
            try:
                await pool.wait_until_clean(worker_id)
            except WorkerDied as died:
                stopped_for = seen.get(EventKind.WORKER_STOPPING, "")
                if stopped_for != StopReason.MAX_JOBS.value:  # else it serves once and is never cleaned
                    why = seen.get(EventKind.CLEANING_FAILED, died.message)
                    raise WorkerDied(f"pool {key.pool!r} is not healthy: {stopped_for}: {why}") from died
            step = "stop"
            pool.retire(worker_id, StopReason.DRAINED)
            await pool.wait_until_stopped(worker_id)
    except TimeoutError:
        raise PoolTimeout(
            f"pool {key.pool!r} is not healthy: a worker did not {step} within {PROOF_TIMEOUT_S:g} s"
        ) from None
    finally:
        end_looking()
    pool.events.publish(Event(EventKind.HEALTH_CHECKED, key.pool, worker_id, key.label))
