"""From a pool's configuration to the runtime that runs its workers.

For composition roots: the one place that chooses between concrete runtimes, and imports only the chosen one.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from wrapper.errors import ConfigError
from wrapper.runtime.base import Runtime

if TYPE_CHECKING:
    from wrapper.config import Config, PoolConfig
    from wrapper.runtime.cri_container import CriSettings
    from wrapper.runtime.isolation import Isolation


def state_dir_of(configured: str | None) -> str:
    """The folder for sockets and temporary files of workers; by default one of this user's."""
    if configured is not None:
        return configured
    if os.geteuid() == 0:
        return "/run/nativelink_worker_wrapper"
    runtime_dir = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.geteuid()}"
    return os.path.join(runtime_dir, "nativelink_worker_wrapper")


def isolation_of(pool: PoolConfig) -> Isolation:
    """What the workers of a pool are kept from."""
    from wrapper.config import MEBIBYTE
    from wrapper.runtime.isolation import Isolation

    asked = pool.isolation
    tmp_mb = asked.tmp_limit_mb
    return Isolation(
        run_as_user=asked.uid,
        run_as_group=asked.gid,
        read_only_root=asked.read_only_root,
        drop_capabilities=asked.drop_capabilities,
        no_new_privileges=asked.no_new_privileges,
        seccomp=asked.seccomp,
        loopback_only=asked.loopback_only,
        memory_limit_bytes=asked.memory_limit_in_bytes,
        pids_limit=asked.pids_limit,
        tmp_limit_bytes=None if tmp_mb is None else tmp_mb * MEBIBYTE,
    )


def cri_settings_of(pool: PoolConfig, state_dir: str) -> CriSettings:
    """All that the container runtime is told of a pool."""
    from wrapper.runtime.cri_container import CriSettings

    assert pool.cri_socket is not None  # noqa: S101 - the configuration was checked
    assert pool.container_image is not None  # noqa: S101
    return CriSettings(
        pool=pool.name,
        socket=pool.cri_socket,
        image=pool.container_image,
        isolation=isolation_of(pool),
        mounts=tuple(mount.mount() for mount in pool.isolation.mounts),
        state_dir=state_dir,
    )


def in_place(pool: PoolConfig, cwd: str) -> PoolConfig:
    """The pool for workers that run in their host's own execroot, `cwd`, and write their outputs there.

    Without a `run_as_user` they run as the owner of that directory. Raises ConfigError if that is root.
    """
    isolation = pool.isolation
    if isolation.run_as_user is None:
        info = os.stat(cwd)
        if info.st_uid == 0:
            raise ConfigError(
                f"pool {pool.name}: the working directory {cwd} belongs to root, and no worker runs as "
                "root: set isolation.run_as_user to the user that may write there"
            )
        own = {"run_as_user": info.st_uid, "run_as_group": isolation.run_as_group or info.st_gid or None}
        isolation = isolation.model_copy(update=own)
    execroot = pool.execroot.model_copy(update={"strategy": "inplace"})
    return pool.model_copy(update={"isolation": isolation, "execroot": execroot})


def runtime_of(
    pool: PoolConfig | None,
    state_dir: str | None,
    *,
    log_dir: str | None = None,
    forward_stderr_to: int | None = None,
) -> Runtime:
    """The runtime that a pool asks for; None: plain processes."""
    if pool is None or pool.runtime == "process":
        from wrapper.runtime.local_process import LocalProcessRuntime

        return LocalProcessRuntime(log_dir=log_dir, forward_stderr_to=forward_stderr_to)
    from wrapper.runtime.cri_container import CriRuntime

    settings = cri_settings_of(pool, state_dir_of(state_dir))
    return CriRuntime(settings, log_dir=log_dir, forward_stderr_to=forward_stderr_to)


def runtimes_of(
    config: Config, *, log_dir: str | None = None, survives_kills: bool = False
) -> dict[str, Runtime]:
    """The runtime of each pool, by its name.

    `survives_kills`: plain processes too are found by the next of us, if we are killed.
    """
    runtimes: dict[str, Runtime] = {}
    processes: Runtime | None = None  # one for all pools: it finds stray children by their tags
    for pool in config.pools:
        if pool.runtime == "process":
            if processes is None:
                from wrapper.runtime.local_process import LocalProcessRuntime

                folder = os.path.join(state_dir_of(config.state_dir), "processes") if survives_kills else None
                processes = LocalProcessRuntime(log_dir=log_dir, generations=folder)
            runtimes[pool.name] = processes
        else:
            runtimes[pool.name] = runtime_of(pool, config.state_dir, log_dir=log_dir)
    return runtimes
