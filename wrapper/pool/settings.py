"""All that one pool is told: its limits and how its workers are run and kept. Plain values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from wrapper.pool.limits import PoolLimits
from wrapper.runtime.base import CommandSpec, Language, User
from wrapper.worker_protocol.wire_format import WireFormat

SETTLE_S = 0.002
"""How long a tool that does not echo request ids must stay silent after an answer.

Only silence tells a second answer of such a tool from the first one to the next request."""


class WarmupRules(NamedTuple):
    """How a pool's new workers are made ready, beside the commands."""

    requests: tuple[str, ...] = ()
    """Record files, whose requests prime a worker."""
    batch_size: int = 10
    preload: bool = True
    """Run the warm-up commands."""
    precompile: bool = True
    """Prime with `requests`."""
    lazy_loading: bool = False
    """No preloading and priming while a request waits for the worker."""
    allow_foreign_requests: bool = False
    """Prime with requests of another trust domain, too."""
    target_s: float = 0.1
    """From asking for the start to ready: only reported."""
    max_s: float = 5.0
    """Of everything after the start: what is over then is left out. Verification is not."""


@dataclass(frozen=True, slots=True)
class ExecrootSettings:
    """Where and how the workers of a pool get to see the files of their requests."""

    strategy: str = "rename"
    """For actions: "rename" or "link" (`execroot.action_execroot.Strategy`)."""
    base: str = ""
    """Below it are the execroots of all processes of ours. For "rename" on the mount of the actions."""
    bases: tuple[tuple[str, str], ...] = ()
    """By trust domain, where that is another one than `base`."""
    work_root: str = ""
    """Below it are the actions' directories, if that is known: then "rename" is tried at once."""
    seen_as: str = ""
    """The path under which a worker sees its own execroot; empty: the real one."""
    uid: int | None = None
    """The workers' user; None: ours."""
    gid: int | None = None
    user: User | None = None
    """Whom plain processes run as; None: ours."""
    in_container: bool = False
    """The workers see nothing of the node's files but what is mounted for them."""


@dataclass(frozen=True, slots=True)
class PoolSettings:
    name: str
    limits: PoolLimits = field(default_factory=PoolLimits)
    language: Language = Language.CUSTOM
    warmup: tuple[CommandSpec, ...] = ()
    """Run in order beside a new worker before it takes its first lease; then `verification`."""
    verification: tuple[CommandSpec, ...] = ()
    warmup_rules: WarmupRules = WarmupRules()  # noqa: RUF009 - a tuple
    post_job_cleanup: tuple[CommandSpec, ...] = ()
    """Run in order after each job, when its caller already has its answer."""
    gc_command: CommandSpec | None = None
    execroot: ExecrootSettings = field(default_factory=ExecrootSettings)
    frame_timeout_s: float = 5.0
    """An answer that has begun must end within this, or it is no answer."""
    max_frame_bytes: int = 64 * 1024 * 1024
    acquire_timeout_s: float | None = 300.0
    """How long a request waits for a worker."""


def wire_format_of(protocol: str) -> WireFormat:
    """The wire format that a WorkerKey names."""
    return WireFormat(protocol)
