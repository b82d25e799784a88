"""The pools document as frozen models: every field, its default and what it may be.

Owns the shape of the configuration and its translation into the plain values that the rest of the
program works with. Knows nothing of files or of how an error is worded (`config.py`,
`config_problems.py`). With those, `config_fields.py`, `config_actions.py` and
`config_containers.py` the only place that imports pydantic.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Annotated, Literal

from pydantic import Field, Strict, StringConstraints

from wrapper.config_actions import ActionsConfig, DigestsChoice, Tools
from wrapper.config_containers import EXECROOTS, ExecrootConfig, IsolationConfig
from wrapper.config_fields import (
    MEBIBYTE,
    Allowed,
    Argv,
    CountOrNever,
    Milliseconds,
    Positive,
    Seconds,
    Section,
    Text,
    Time,
    TimeOrNever,
    Whole,
    Workers,
    YesNo,
)
from wrapper.pool.limits import PoolLimits, TotalLimits
from wrapper.pool.settings import ExecrootSettings, PoolSettings, WarmupRules
from wrapper.runtime.base import CommandSpec, Language


class Command(Section):
    """A command that runs beside a worker, in its environment and working directory."""

    argv: Annotated[Argv, Field(min_length=1)]
    timeout_s: Annotated[
        Seconds | None,
        Allowed("a number of seconds above 0, at most a year, or null for the section's default"),
    ] = None

    def spec(self, default_timeout_s: float) -> CommandSpec:
        return CommandSpec(self.argv, default_timeout_s if self.timeout_s is None else self.timeout_s)


_Commands = Annotated[tuple[Command, ...], Allowed("a list of commands, each {argv: [...], timeout_s: 30}")]


class Warmup(Section):
    """How a new worker is made ready, and commands around its life."""

    commands: _Commands = ()
    verification: _Commands = ()
    post_job_cleanup: _Commands = ()
    default_timeout_s: Time = 30.0
    requests: Annotated[
        tuple[Text, ...],
        Allowed('a list of record files, which "nativelink_worker_wrapper record" makes'),
    ] = ()
    warmup_batch_size: Annotated[Whole, Field(ge=1, le=1000), Allowed("a whole number from 1 to 1000")] = 10
    preload: YesNo = True
    precompile: YesNo = True
    lazy_loading: YesNo = False
    allow_foreign_requests: YesNo = False
    target_cold_start_ms: Milliseconds = 100.0
    max_warmup_ms: Milliseconds = 5000.0
    unhealthy_after: Annotated[Whole, Field(ge=1, le=1000), Allowed("a whole number from 1 to 1000")] = 3

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


class Lifecycle(Section):
    """When a worker has served its time."""

    worker_ttl_seconds: TimeOrNever = 3600.0
    max_jobs_per_worker: CountOrNever = 200
    gc_job_frequency: CountOrNever = 25


class Limits(Section):
    """How far a pool may grow, and how long anything in it may take."""

    max_instances_per_key: Workers = 10
    max_waiting: Annotated[Whole, Field(ge=0, le=1_000_000), Allowed("a whole number from 0 to 1000000")] = (
        10_000
    )
    max_requests_per_worker_at_once: Annotated[
        Whole,
        Field(ge=1, le=1000),
        Allowed("a whole number from 1 to 1000; above 1 only for tools that speak multiplex"),
    ] = 1
    idle_timeout_s: TimeOrNever = 300.0
    start_instead_after_ms: Annotated[
        float,
        Strict(),
        Field(ge=0, le=3_600_000, allow_inf_nan=False),
        Allowed("a number of milliseconds from 0 to 3600000"),
    ] = 1000.0
    acquire_timeout_s: TimeOrNever = 300.0
    stop_grace_s: Time = 5.0
    frame_timeout_s: Time = 5.0
    max_frame_mb: Annotated[Whole, Field(ge=1, le=1024), Allowed("a whole number from 1 to 1024")] = 64


class Memory(Section):
    """What a worker may keep."""

    max_memory_mb: Annotated[
        Positive | None, Allowed("a whole number of MiB, at least 1, or null for no limit")
    ] = None


class PoolConfig(Section):
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
        tuple[Text, ...],
        Allowed('a list of patterns of persistentWorkerKey, for example ["java-*"]'),
    ] = ()
    runtime: Annotated[Literal["process", "cri"], Allowed('"process" or "cri"', ("process", "cri"))] = (
        "process"
    )
    cri_socket: Annotated[Text | None, Allowed("the path of a CRI socket")] = None
    container_image: Annotated[Text | None, Allowed("the reference of an image")] = None
    worker_command: Annotated[
        Argv,
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
    tools: Tools = ()
    digests: DigestsChoice = "auto"
    warm_fraction: Annotated[
        float,
        Strict(),
        Field(ge=0, le=1, allow_inf_nan=False),
        Allowed("a number from 0 (no action goes to a worker) to 1 (all do)"),
    ] = 1.0
    min_warm_workers: Annotated[Whole, Field(ge=0, le=10_000), Allowed("a whole number from 0 to 10000")] = 2
    max_workers: Workers = 20
    worker_protocol: Annotated[Literal["proto", "json"], Allowed('"proto" or "json"', ("proto", "json"))] = (
        "proto"
    )
    check_health: Annotated[bool, Strict(), Allowed("true or false")] = False
    gc_command: Annotated[Command | None, Allowed("a command, {argv: [...], timeout_s: 30}, or null")] = None
    warmup: Annotated[Warmup, Allowed("an object")] = Warmup()
    lifecycle: Annotated[Lifecycle, Allowed("an object")] = Lifecycle()
    limits: Annotated[Limits, Allowed("an object")] = Limits()
    memory: Annotated[Memory, Allowed("an object")] = Memory()
    isolation: Annotated[IsolationConfig, Allowed("an object")] = IsolationConfig()
    execroot: Annotated[ExecrootConfig, Allowed("an object")] = ExecrootConfig()

    @property
    def has_own_execroots(self) -> bool:
        """Whether each worker runs in a directory of its own, into which an action's files are moved."""
        if self.execroot.strategy == "inplace":
            return False
        return self.runtime == "cri" or self.execroot.work_root is not None

    def execroot_settings(self, state_dir: str) -> ExecrootSettings:
        """Where the workers work. `state_dir`: for the execroots of a pool that has no work root."""
        work_root = self.execroot.work_root
        in_container = self.runtime == "cri"
        isolation = self.isolation
        return ExecrootSettings(
            strategy=self.execroot.strategy,
            base=self._execroot_base(state_dir),
            work_root=work_root or "",
            seen_as=self.execroot.path if in_container else "",
            uid=isolation.uid if in_container else isolation.run_as_user,
            gid=isolation.gid if in_container or isolation.run_as_user else None,
            user=None if in_container else isolation.process_user(),
            in_container=in_container,
        )

    def _execroot_base(self, state_dir: str) -> str:
        if not self.has_own_execroots:
            return ""
        work_root = self.execroot.work_root
        return os.path.join(work_root, EXECROOTS) if work_root else os.path.join(state_dir, "execroots")

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

    def settings(self, state_dir: str = "") -> PoolSettings:
        """All that the pool is told. `state_dir`: see `execroot_settings`."""
        return PoolSettings(
            name=self.name,
            limits=self.pool_limits(),
            language=self.language_kind,
            warmup=self.warmup_commands(),
            verification=self.verification_commands(),
            warmup_rules=self.warmup.rules(),
            post_job_cleanup=self.cleanup_commands(),
            gc_command=self.gc_command_spec(),
            execroot=self.execroot_settings(state_dir),
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


class Config(Section):
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
    drain_timeout_s: Time = 60.0
    actions: Annotated[ActionsConfig, Allowed("an object")] = ActionsConfig()
    state_dir: Annotated[
        Annotated[str, StringConstraints(pattern=r"^/[^\x00]+$")] | None,
        Allowed("an absolute path of a folder for sockets and temporary files, or null for the default"),
    ] = None

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
