"""`check-runtime FILE`: what the container engines of a configuration can, and what is missing.

Owns the print-out and the trial: one worker of each pool is started, proven to be isolated, and stopped, by
the same code that a pool uses. Leaves nothing behind.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple, TextIO

from wrapper.config import PoolConfig, load_config
from wrapper.errors import WrapperError
from wrapper.execroot.action_execroot import ActionExecroot
from wrapper.files import remove_tree
from wrapper.runtime.base import Mount, WorkerSpec
from wrapper.runtime.cri_container import CriRuntime
from wrapper.runtime.native import shim_path
from wrapper.runtimes import cri_settings_of, state_dir_of

_REMEDIES = {
    "RuntimeReady": "look at the engine's own log (journalctl -u crio, journalctl -u containerd)",
    "NetworkReady": "give the engine a CNI configuration; one with loopback only is in deploy/cni",
}


class Finding(NamedTuple):
    """One line of the report."""

    is_well: bool
    what: str
    seen: str


async def check_runtime(path: str | Path, out: TextIO) -> int:
    """Print one line for each thing looked at; returns the exit code: 0, or 69 if something is missing.

    Raises ConfigError.
    """
    config = load_config(path)
    exit_code = 0
    for pool in config.pools:
        print(f"pool {pool.name}:", file=out)
        if pool.runtime == "process":
            print("  ok       plain processes need no engine; nothing isolates them", file=out)
            continue
        async for finding in _look_at(pool, state_dir_of(config.state_dir)):
            mark = "ok" if finding.is_well else "MISSING"
            print(f"  {mark:<8} {finding.what}: {finding.seen}", file=out, flush=True)
            if not finding.is_well:
                exit_code = 69
    return exit_code


async def _look_at(pool: PoolConfig, state_dir: str) -> AsyncIterator[Finding]:
    try:
        yield Finding(True, "shim", shim_path())
    except WrapperError as error:
        yield Finding(False, "shim", error.message)
        return
    runtime = CriRuntime(cri_settings_of(pool, state_dir))
    try:
        try:
            version = await runtime.engine.version()
            conditions, _ = await runtime.engine.status()
            systemd = await runtime.engine.puts_groups_under_systemd()
        except WrapperError as error:
            yield Finding(False, "engine", error.message)
            return
        yield Finding(True, "engine", str(version))
        for name, (holds, why) in conditions.items():
            remedy = "" if holds else f"{why}; {_REMEDIES.get(name, 'see the log of the engine')}"
            yield Finding(holds, name, "yes" if holds else remedy)
        yield Finding(True, "control groups", "under systemd" if systemd else "by path")
        image = await _image(pool, runtime)
        yield image
        if image.is_well:
            yield await _trial(pool, runtime, state_dir)
    finally:
        await runtime.close()


async def _image(pool: PoolConfig, runtime: CriRuntime) -> Finding:
    try:
        reference = pool.container_image or ""
        image = await runtime.engine.image(reference)
        if image is not None:
            return Finding(True, "image", f"{reference} ({image.size >> 20} MiB)")
        await runtime.engine.ensure_image(reference)
        return Finding(True, "image", f"{reference}, pulled now")
    except WrapperError as error:
        return Finding(False, "image", error.message)


async def _trial(pool: PoolConfig, runtime: CriRuntime, state_dir: str) -> Finding:
    """Start a worker in an execroot of its own, as the pool would, and stop it."""
    if not pool.worker_command:
        return Finding(True, "trial", "none: the pool has no worker_command of its own to start")
    base = os.path.join(state_dir, f"trial-{os.getpid()}")
    isolation = runtime.settings.isolation
    try:
        await runtime.prepare()
        os.mkdir(base, 0o700)
        own = ActionExecroot.make(base, "1", uid=isolation.run_as_user, gid=isolation.run_as_group)
        try:
            seen_as = pool.execroot.path
            worker = await runtime.start(
                WorkerSpec(
                    name=pool.name,
                    argv=pool.worker_command,
                    env=dict(pool.env),
                    cwd=seen_as,
                    language=pool.language_kind,
                    mounts=(Mount(own.path, seen_as, read_only=False),),
                )
            )
            await worker.stop(0)
        finally:
            own.remove()
    except (WrapperError, OSError) as error:
        return Finding(False, "trial", error.report() if isinstance(error, WrapperError) else str(error))
    finally:
        remove_tree(base)
    return Finding(True, "trial", "a worker starts, and is isolated as asked")
