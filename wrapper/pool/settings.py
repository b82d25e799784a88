"""All that one pool is told: its limits and how its workers are run and kept. Plain values."""

from __future__ import annotations

from dataclasses import dataclass, field

from wrapper.pool.limits import PoolLimits
from wrapper.runtime.base import CommandSpec, Language
from wrapper.worker_protocol.wire_format import WireFormat

SETTLE_S = 0.002
"""How long a tool that does not echo request ids must stay silent after an answer.

Only silence tells a second answer of such a tool from the first one to the next request."""


@dataclass(frozen=True, slots=True)
class PoolSettings:
    name: str
    limits: PoolLimits = field(default_factory=PoolLimits)
    language: Language = Language.CUSTOM
    warmup: tuple[CommandSpec, ...] = ()
    """Run in order beside a new worker before it takes its first lease; then `verification`."""
    verification: tuple[CommandSpec, ...] = ()
    post_job_cleanup: tuple[CommandSpec, ...] = ()
    """Run in order after each job, when its caller already has its answer."""
    gc_command: CommandSpec | None = None
    frame_timeout_s: float = 5.0
    """An answer that has begun must end within this, or it is no answer."""
    max_frame_bytes: int = 64 * 1024 * 1024
    acquire_timeout_s: float | None = 300.0
    """How long a request waits for a worker."""


def wire_format_of(protocol: str) -> WireFormat:
    """The wire format that a WorkerKey names."""
    return WireFormat(protocol)
