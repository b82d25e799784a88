"""The pools document as frozen models: every field, its default and what it may be.

Owns the shape of the configuration and its translation into the plain values that the rest of the
program works with. Knows nothing of files or of how an error is worded (`config.py`,
`config_problems.py`). With those two the only place that imports pydantic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, Strict, StringConstraints

from wrapper.pool.limits import PoolLimits, TotalLimits
from wrapper.pool.settings import PoolSettings, WarmupRules
from wrapper.runtime.base import CommandSpec, Language

MEBIBYTE = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Allowed:
    """What a field may hold, in words that complete "allowed: ..."; `choices`: what to guess from."""

    words: str
    choices: tuple[str, ...] = ()


# Scalars are strict: a number in quotes or a 1 for true is a slip of the pen, not a value.
_Whole = Annotated[int, Strict()]
_Seconds = Annotated[float, Strict(), Field(gt=0, le=31_536_000, allow_inf_nan=False)]
_Text = Annotated[str, StringConstraints(min_length=1, pattern=r"^[^\x00]*$")]
_Positive = Annotated[int, Strict(), Field(ge=1, le=1_000_000_000)]

_Workers = Annotated[int, Strict(), Field(ge=1, le=10_000), Allowed("a whole number from 1 to 10000")]
_Time = Annotated[_Seconds, Allowed("a number of seconds above 0, at most a year")]
_TimeOrNever = Annotated[
    _Seconds | None, Allowed("a number of seconds above 0, at most a year, or null for no limit")
]
_Milliseconds = Annotated[
    float,
    Strict(),
    Field(gt=0, le=3_600_000, allow_inf_nan=False),
    Allowed("a number of milliseconds above 0, at most 3600000"),
]
_YesNo = Annotated[bool, Strict(), Allowed("true or false")]
_CountOrNever = Annotated[_Positive | None, Allowed("a whole number of at least 1, or null for never")]
_Argv = Annotated[tuple[_Text, ...], Allowed("a list of strings, the program first, none of them empty")]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Command(_Section):
    """A command that runs beside a worker, in its environment and working directory."""

    argv: Annotated[_Argv, Field(min_length=1)]
    timeout_s: Annotated[
        _Seconds | None,
        Allowed("a number of seconds above 0, at most a year, or null for the section's default"),
    ] = None

    def spec(self, default_timeout_s: float) -> CommandSpec:
        return CommandSpec(self.argv, default_timeout_s if self.timeout_s is None else self.timeout_s)


_Commands = Annotated[tuple[Command, ...], Allowed("a list of commands, each {argv: [...], timeout_s: 30}")]


class Warmup(_Section):
    """How a new worker is made ready, and commands around its life."""

    commands: _Commands = ()
    verification: _Commands = ()
    post_job_cleanup: _Commands = ()
    default_timeout_s: _Time = 30.0
    requests: Annotated[
        tuple[_Text, ...],
        Allowed('a list of record files, which "nativelink_worker_wrapper record" makes'),
    ] = ()
    warmup_batch_size: Annotated[_Whole, Field(ge=1, le=1000), Allowed("a whole number from 1 to 1000")] = 10
    preload: _YesNo = True
    precompile: _YesNo = True
    lazy_loading: _YesNo = False
    allow_foreign_requests: _YesNo = False
    target_cold_start_ms: _Milliseconds = 100.0
    max_warmup_ms: _Milliseconds = 5000.0
    unhealthy_after: Annotated[_Whole, Field(ge=1, le=1000), Allowed("a whole number from 1 to 1000")] = 3

    def rules(self) -> WarmupRules:
        """All but the commands, for the pool."""
        return WarmupRules(
            requests=self.requests,
            batch_size=self.warmup_batch_size,
            preload=self.preload,
            precompile=self.precompile,
            lazy_loading=self.lazy_loading,
            allow_foreign_requests=self.allow_foreign_requests,
            target_s=self.target_cold_start_ms / 1000,
            max_s=self.max_warmup_ms / 1000,
        )


class Lifecycle(_Section):
    """When a worker has served its time."""

    worker_ttl_seconds: _TimeOrNever = 3600.0
    max_jobs_per_worker: _CountOrNever = 200
    gc_job_frequency: _CountOrNever = 25


class Limits(_Section):
    """How far a pool may grow, and how long anything in it may take."""

    max_instances_per_key: _Workers = 10
    max_waiting: Annotated[_Whole, Field(ge=0, le=1_000_000), Allowed("a whole number from 0 to 1000000")] = (
        10_000
    )
    max_requests_per_worker_at_once: Annotated[
        _Whole,
        Field(ge=1, le=1000),
        Allowed("a whole number from 1 to 1000; above 1 only for tools that speak multiplex"),
    ] = 1
    idle_timeout_s: _TimeOrNever = 300.0
    start_instead_after_ms: Annotated[
        float,
        Strict(),
        Field(ge=0, le=3_600_000, allow_inf_nan=False),
        Allowed("a number of milliseconds from 0 to 3600000"),
    ] = 1000.0
    acquire_timeout_s: _TimeOrNever = 300.0
    stop_grace_s: _Time = 5.0
    frame_timeout_s: _Time = 5.0
    max_frame_mb: Annotated[_Whole, Field(ge=1, le=1024), Allowed("a whole number from 1 to 1024")] = 64


class Memory(_Section):
    """What a worker may keep."""

    max_memory_mb: Annotated[
        _Positive | None, Allowed("a whole number of MiB, at least 1, or null for no limit")
    ] = None


class PoolConfig(_Section):
    """One pool: workers of one kind, and the keys that they serve."""

    name: Annotated[
        str,
        StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"),
        Allowed("1 to 63 letters, digits, '.', '_' and '-', the first a letter or a digit"),
    ]
    language: Annotated[
        str,
        StringConstraints(pattern=r"^(jvm|nodejs|custom\([A-Za-z0-9][A-Za-z0-9._+#-]{0,62}\))$"),
        Allowed('"jvm", "nodejs" or "custom(NAME)", for example "custom(rust)"', ("jvm", "nodejs")),
    ]
    keys: Annotated[
        tuple[_Text, ...],
        Allowed('a list of patterns of persistentWorkerKey, for example ["java-*"]'),
    ] = ()
    runtime: Annotated[Literal["process"], Allowed('"process"', ("process",))] = "process"
    cri_socket: Annotated[_Text | None, Allowed("the path of a CRI socket")] = None
    container_image: Annotated[_Text | None, Allowed("the reference of an image")] = None
    worker_command: Annotated[
        _Argv,
        Allowed(
            "a list of strings, the program first, none of them empty; [] for a pool "
            "that only starts the tools of its requests"
        ),
    ] = ("/usr/local/bin/nativelink-worker",)
    env: Annotated[
        Mapping[
            Annotated[str, StringConstraints(pattern=r"^[^=\x00]+$")],
            Annotated[str, StringConstraints(pattern=r"^[^\x00]*$")],
        ],
        Allowed("strings by name, a name without '='"),
    ] = {}
    min_warm_workers: Annotated[_Whole, Field(ge=0, le=10_000), Allowed("a whole number from 0 to 10000")] = 2
    max_workers: _Workers = 20
    worker_protocol: Annotated[Literal["proto", "json"], Allowed('"proto" or "json"', ("proto", "json"))] = (
        "proto"
    )
    check_health: Annotated[bool, Strict(), Allowed("true or false")] = False
    gc_command: Annotated[Command | None, Allowed("a command, {argv: [...], timeout_s: 30}, or null")] = None
    warmup: Annotated[Warmup, Allowed("an object")] = Warmup()
    lifecycle: Annotated[Lifecycle, Allowed("an object")] = Lifecycle()
    limits: Annotated[Limits, Allowed("an object")] = Limits()
    memory: Annotated[Memory, Allowed("an object")] = Memory()

    @property
    def language_kind(self) -> Language:
        """The language as the runtimes know it: how garbage is collected."""
        return Language(self.language.partition("(")[0])

    @property
    def warm_workers(self) -> int:
        """How many workers the pool keeps ready, `min_warm_workers` made to fit if it is the default.

        A pool without a `worker_command` keeps none: it cannot know what to start.
        """
        if "min_warm_workers" in self.model_fields_set:
            return self.min_warm_workers
        if not self.worker_command:
            return 0
        return min(self.min_warm_workers, self.max_workers, self.limits.max_instances_per_key)

    def pool_limits(self) -> PoolLimits:
        """The numbers for the pool's core."""
        memory = self.memory.max_memory_mb
        return PoolLimits(
            min_warm_workers=self.warm_workers,
            max_workers=self.max_workers,
            max_instances_per_key=self.limits.max_instances_per_key,
            max_waiting=self.limits.max_waiting,
            max_requests_per_worker_at_once=self.limits.max_requests_per_worker_at_once,
            idle_timeout_s=self.limits.idle_timeout_s,
            worker_ttl_s=self.lifecycle.worker_ttl_seconds,
            max_jobs_per_worker=self.lifecycle.max_jobs_per_worker,
            gc_job_frequency=self.lifecycle.gc_job_frequency,
            start_instead_after_s=self.limits.start_instead_after_ms / 1000,
            max_memory_bytes=None if memory is None else memory * MEBIBYTE,
            stop_grace_s=self.limits.stop_grace_s,
            unhealthy_after=self.warmup.unhealthy_after,
        )

    def settings(self) -> PoolSettings:
        """All that the pool is told."""
        return PoolSettings(
            name=self.name,
            limits=self.pool_limits(),
            language=self.language_kind,
            warmup=self.warmup_commands(),
            verification=self.verification_commands(),
            warmup_rules=self.warmup.rules(),
            post_job_cleanup=self.cleanup_commands(),
            gc_command=self.gc_command_spec(),
            frame_timeout_s=self.limits.frame_timeout_s,
            max_frame_bytes=self.max_frame_bytes(),
            acquire_timeout_s=self.limits.acquire_timeout_s,
        )

    def max_frame_bytes(self) -> int:
        """The longest frame that a worker of this pool may be sent or may answer."""
        return self.limits.max_frame_mb * MEBIBYTE

    def warmup_commands(self) -> tuple[CommandSpec, ...]:
        """What prepares a new worker, in order."""
        return self._specs(self.warmup.commands)

    def verification_commands(self) -> tuple[CommandSpec, ...]:
        """What must succeed before a new worker is used, in order."""
        return self._specs(self.warmup.verification)

    def cleanup_commands(self) -> tuple[CommandSpec, ...]:
        """What runs after every request, in order."""
        return self._specs(self.warmup.post_job_cleanup)

    def gc_command_spec(self) -> CommandSpec | None:
        """What collects a worker's garbage, if not the built-in way."""
        if self.gc_command is None:
            return None
        return self.gc_command.spec(self.warmup.default_timeout_s)

    def _specs(self, commands: tuple[Command, ...]) -> tuple[CommandSpec, ...]:
        return tuple(command.spec(self.warmup.default_timeout_s) for command in commands)


class Config(_Section):
    """The whole document."""

    pools: Annotated[
        tuple[PoolConfig, ...],
        Field(min_length=1),
        Allowed('a list of at least one pool, each {name: "...", language: "jvm", ...}'),
    ]
    max_total_workers: Annotated[
        Annotated[int, Strict(), Field(ge=1, le=100_000)] | None,
        Allowed("a whole number from 1 to 100000, or null for no limit"),
    ] = None
    max_concurrent_warmups: Annotated[
        Annotated[int, Strict(), Field(ge=1, le=1000)] | None,
        Allowed("a whole number from 1 to 1000, or null for what fits the processors"),
    ] = None
    drain_timeout_s: _Time = 60.0

    def total_limits(self) -> TotalLimits:
        """The numbers over all pools."""
        return TotalLimits(
            max_workers=self.max_total_workers, max_concurrent_warmups=self.max_concurrent_warmups
        )

    def pool_named(self, name: str) -> PoolConfig | None:
        """The pool of this name; None if there is none."""
        return next((pool for pool in self.pools if pool.name == name), None)

    def pool_for_key(self, key: str) -> PoolConfig | None:
        """The first pool, in the document's order, one of whose patterns matches; None if none does.

        Patterns are those of the shell: `*`, `?`, `[abc]`; case matters.
        """
        for pool in self.pools:
            if any(fnmatchcase(key, pattern) for pattern in pool.keys):
                return pool
        return None
