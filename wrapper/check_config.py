"""`check-config FILE`: says what a configuration means, or what is wrong with it.

Owns the print-out only. Starts nothing, looks at nothing but the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from wrapper.config import Command, Config, PoolConfig, load_config
from wrapper.config_actions import ToolConfig, WorkRootConfig
from wrapper.config_containers import MountConfig
from wrapper.errors import ConfigError
from wrapper.runtime.base import Language

_NAME_WIDTH = 39
_NO_ACTIONS = {"socket_group": "our own", "max_timeout_s": "no limit"}


def check_config(path: str | Path, out: TextIO) -> int:
    """Print the pools of this file with every limit in force; returns the exit code.

    0: nothing is wrong. Else (78) what is printed is the error that starting with this file gives.
    """
    try:
        config = load_config(path)
    except ConfigError as error:
        print(error.report(), file=out)
        return error.exit_code
    for line in describe(config, str(path)):
        print(line, file=out)
    return 0


def describe(config: Config, source: str) -> Iterator[str]:
    """The effective configuration, one line after another. Values of `env` are not shown."""
    count = len(config.pools)
    yield f"{source}: nothing wrong; {count} pool{'s' if count != 1 else ''}"
    yield ""
    given = config.model_fields_set
    yield _line(
        "max_total_workers", _value(config.max_total_workers, "no limit"), "max_total_workers" in given
    )
    yield _line(
        "max_concurrent_warmups",
        _value(config.max_concurrent_warmups, "what fits the processors"),
        "max_concurrent_warmups" in given,
    )
    yield _line("state_dir", _value(config.state_dir, "the system's place"), "state_dir" in given)
    yield _line("drain_timeout_s", _value(config.drain_timeout_s), "drain_timeout_s" in given)
    for name in type(config.actions).model_fields:
        value = _value(getattr(config.actions, name), _NO_ACTIONS.get(name, "none"))
        yield _line(f"actions.{name}", value, name in config.actions.model_fields_set)
    for pool in config.pools:
        yield ""
        yield from _pool(pool)


def _pool(pool: PoolConfig) -> Iterator[str]:
    given = pool.model_fields_set
    yield f"pool {pool.name}: {pool.language}, {pool.runtime}"
    yield _line("keys", _value(pool.keys) if pool.keys else "none: to be asked for by name", "keys" in given)
    for name in ("cri_socket", "container_image"):
        value = getattr(pool, name)
        if value is not None:
            unused = " (not used by plain processes)" if pool.runtime == "process" else ""
            yield _line(name, f"{value}{unused}", True)
    command = _value(pool.worker_command) if pool.worker_command else "none: the tool comes with the request"
    yield _line("worker_command", command, "worker_command" in given)
    yield _line("tools", _value(pool.tools), "tools" in given)
    yield _line("digests", _value(pool.digests), "digests" in given)
    yield _line("warm_fraction", _value(pool.warm_fraction), "warm_fraction" in given)
    yield _line("env", ", ".join(sorted(pool.env)) or "empty", "env" in given)
    yield _line("min_warm_workers", _value(pool.warm_workers), "min_warm_workers" in given)
    yield _line("max_workers", _value(pool.max_workers), "max_workers" in given)
    yield _line("worker_protocol", pool.worker_protocol, "worker_protocol" in given)
    yield _line("check_health", _value(pool.check_health), "check_health" in given)
    default_s = pool.warmup.default_timeout_s
    for name in ("commands", "verification", "post_job_cleanup"):
        commands: tuple[Command, ...] = getattr(pool.warmup, name)
        lines = [_command(command, default_s) for command in commands] or ["none"]
        for line in lines:
            yield _line(f"warmup.{name}", line, name in pool.warmup.model_fields_set)
    for name in type(pool.warmup).model_fields:
        if name not in ("commands", "verification", "post_job_cleanup", "default_timeout_s"):
            value = _value(getattr(pool.warmup, name)) + _warmup_note(pool, name)
            yield _line(f"warmup.{name}", value, name in pool.warmup.model_fields_set)
    sections = ("lifecycle", "limits", "memory", "execroot", "isolation")
    for section in sections if pool.runtime == "cri" else sections[:-1]:
        values = getattr(pool, section)
        for name in type(values).model_fields:
            value = _value(getattr(values, name), _nothing(section, name))
            yield _line(f"{section}.{name}", value + _note(pool, name), name in values.model_fields_set)
    yield _line("gc_command", _garbage_collection(pool), "gc_command" in given)


def _nothing(section: str, name: str) -> str:
    if section == "lifecycle":
        return "never"
    return "none" if section == "execroot" or name.startswith("run_as") else "no limit"


def _note(pool: PoolConfig, name: str) -> str:
    if name == "run_as_user" and pool.isolation.run_as_user is None:
        if pool.execroot.strategy == "inplace":
            return ": the owner of the host's execroot"
        return f": {pool.isolation.uid}"
    if name == "run_as_group" and pool.isolation.run_as_group is None:
        return ": as run_as_user"
    if name == "strategy" and not pool.has_own_execroots and pool.execroot.strategy != "inplace":
        return " (not used without a work_root: the workers run where the wrapper does)"
    lifetime = pool.pool_limits()
    if name == "worker_ttl_seconds" and lifetime.worker_ttl_s is not None:
        shortest = lifetime.worker_ttl_s * (1 - lifetime.worker_ttl_jitter)
        return f" (each worker lives {shortest:g} to {lifetime.worker_ttl_s:g} s)"
    if name == "gc_job_frequency" and pool.gc_command is None and pool.language_kind is Language.CUSTOM:
        return " (not used: this language has no built-in way, and there is no gc_command)"
    return ""


def _warmup_note(pool: PoolConfig, name: str) -> str:
    warmup = pool.warmup
    if name == "requests" and warmup.requests:
        if not warmup.precompile:
            return " (not used: warmup.precompile is false)"
        return " (only workers with an execroot of their own are primed with them)"
    if name == "preload" and not warmup.preload and warmup.commands:
        return " (warmup.commands are not run)"
    return ""


def _garbage_collection(pool: PoolConfig) -> str:
    if pool.gc_command is not None:
        return _command(pool.gc_command, pool.warmup.default_timeout_s)
    return "none" if pool.language_kind is Language.CUSTOM else "built in"


def _command(command: Command, default_timeout_s: float) -> str:
    return f"{_value(command.argv)}, at most {command.spec(default_timeout_s).timeout_s:g} s"


def _value(value: object, none: str = "none") -> str:
    if value is None:
        return none
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple) and value and isinstance(value[0], MountConfig):
        return ", ".join(f"{mount.host_path} at {mount.path or mount.host_path}" for mount in value)
    if isinstance(value, tuple) and value and isinstance(value[0], WorkRootConfig):
        return ", ".join(f"{root.path} (trust domain {json.dumps(root.trust_domain)})" for root in value)
    if isinstance(value, tuple) and value and isinstance(value[0], ToolConfig):
        return ", ".join(_tool(tool) for tool in value)
    return json.dumps(value, ensure_ascii=False)


def _tool(tool: ToolConfig) -> str:
    protocol = tool.protocol or "protocol found out"
    return f"{json.dumps(tool.pattern, ensure_ascii=False)} ({protocol}, digests {tool.digests})"


def _line(name: str, value: str, given: bool) -> str:
    return f"  {name:<{_NAME_WIDTH}} {value}{'' if given else '  (default)'}"
