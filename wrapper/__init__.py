"""Warm persistent workers for remote execution. The names below are the public Python API."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wrapper.config import load_config
    from wrapper.manager import PoolCreateOptions, PoolMetrics, WarmWorkerPoolManager
    from wrapper.pool.lease import Lease, WorkerOutcome
    from wrapper.worker_protocol.messages import WorkRequest, WorkResponse

__all__ = [
    "Lease",
    "PoolCreateOptions",
    "PoolMetrics",
    "WarmWorkerPoolManager",
    "WorkRequest",
    "WorkResponse",
    "WorkerOutcome",
    "load_config",
]

_HOMES = {
    "Lease": "wrapper.pool.lease",
    "PoolCreateOptions": "wrapper.manager",
    "PoolMetrics": "wrapper.manager",
    "WarmWorkerPoolManager": "wrapper.manager",
    "WorkRequest": "wrapper.worker_protocol.messages",
    "WorkResponse": "wrapper.worker_protocol.messages",
    "WorkerOutcome": "wrapper.pool.lease",
    "load_config": "wrapper.config",
}


def __getattr__(name: str) -> object:
    """Import a public name when first asked for: the executable needs none of them, and is in a hurry."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
