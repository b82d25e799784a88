"""What a configuration means for a daemon that serves actions: where its workers work, and what it refuses.

Owns the translation of pools for that face, and the checks that only it needs. Starts nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

from wrapper.action import ActionRules
from wrapper.action_service import Rules
from wrapper.config import Config, PoolConfig
from wrapper.config_containers import EXECROOTS
from wrapper.errors import ConfigError
from wrapper.own_command import own_worker_key
from wrapper.pool.settings import PoolSettings
from wrapper.pool.worker_key import WorkerKey
from wrapper.runtimes import state_dir_of
from wrapper.work_roots import WorkRoot, WorkRoots

_CAPABILITIES = {
    "CAP_CHOWN": 0,
    "CAP_DAC_OVERRIDE": 1,
    "CAP_FOWNER": 3,
    "CAP_KILL": 5,
    "CAP_SETGID": 6,
    "CAP_SETUID": 7,
    "CAP_LEASE": 28,
}
"""linux/capability.h"""


@dataclass(frozen=True, slots=True)
class Serving:
    """A configuration, ready to be served."""

    config: Config
    settings: Mapping[str, PoolSettings]
    minimum_keys: Mapping[str, WorkerKey]
    rules: Rules

    def changed_since(self, other: Serving) -> frozenset[str]:
        """Pools that are other ones now, in whatever way."""
        before = {pool.name: pool for pool in other.config.pools}
        return frozenset(
            pool.name
            for pool in self.config.pools
            if pool.name in before
            and (pool != before[pool.name] or self.settings[pool.name] != other.settings[pool.name])
        )


def serving_of(config: Config) -> Serving:
    """Raises ConfigError if actions cannot be served with this configuration."""
    roots = tuple(WorkRoot(root.path, root.trust_domain) for root in config.actions.work_roots)
    if not roots:
        raise ConfigError(
            "actions.work_roots names no work root, and so no action could be served: "
            'give it NativeLink\'s work_directory, [{path: "/var/lib/nl/work1", trust_domain: "main"}]'
        )
    pools = tuple(_pool_for_actions(pool, roots[0].path) for pool in config.pools)
    config = config.model_copy(update={"pools": pools})
    state_dir = state_dir_of(config.state_dir)
    bases = _bases(config)
    settings = {pool.name: _settings_of(pool, state_dir, bases) for pool in config.pools}
    domain = roots[0].trust_domain
    keys = {pool.name: own_worker_key(pool, "/", trust_domain=domain) for pool in config.pools}
    return Serving(
        config,
        settings,
        {name: key for name, key in keys.items() if key is not None},
        Rules(config, ActionRules.from_config(config), WorkRoots(roots)),
    )


def check_mounts(serving: Serving) -> None:
    """Try whether actions can be moved into execroots. Raises ConfigError with what to do.

    A work root that does not exist yet is made beside its neighbours, so its parent is tried in its place.
    """
    if all(pool.execroot.strategy != "rename" for pool in serving.config.pools):
        return
    from wrapper.execroot.action_execroot import ActionExecroot
    from wrapper.generation import Generation

    bases = _bases(serving.config)
    for root in serving.config.actions.work_roots:
        place = root.path if os.path.isdir(root.path) else os.path.dirname(root.path)
        if not os.path.isdir(place):
            raise ConfigError(
                f"actions.work_roots: neither {root.path} nor the folder that it is to lie in exists"
            )
        trial = Generation.begin(bases[root.trust_domain])
        try:
            ActionExecroot.check_same_mount(trial.path, place)
        finally:
            trial.wipe()


def _pool_for_actions(pool: PoolConfig, work_root: str) -> PoolConfig:
    """The pool with execroots of its own for its workers."""
    if pool.execroot.strategy == "inplace":
        raise ConfigError(
            f'pool {pool.name}: execroot.strategy "inplace" is for worker mode; every action has a directory '
            'of its own, so say "rename" or "link"'
        )
    if pool.runtime == "process" and os.geteuid() == 0 and pool.isolation.run_as_user is None:
        raise ConfigError(
            f"pool {pool.name}: its workers would run as root, and could overwrite inputs, which are hard "
            "links to blobs of the CAS: set isolation.run_as_user to a user that owns nothing there"
        )
    if pool.runtime == "process" and pool.isolation.run_as_user not in (None, os.geteuid()):
        missing = missing_capabilities()
        if missing:
            raise ConfigError(
                f"pool {pool.name}: its workers are another user's than the daemon, which lacks for that: "
                f"{', '.join(missing)}. Run it as root, or give it these (deploy/systemd/ does)"
            )
    execroot = pool.execroot.model_copy(update={"work_root": pool.execroot.work_root or work_root})
    return pool.model_copy(update={"execroot": execroot})


def missing_capabilities() -> list[str]:
    """Of those that a daemon needs whose workers are somebody else, the ones that we do not have."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        effective = next(int(line.split()[1], 16) for line in file if line.startswith("CapEff:"))
    return [name for name, bit in _CAPABILITIES.items() if not effective >> bit & 1]


def _bases(config: Config) -> dict[str, str]:
    """Where the execroots of each trust domain lie: on the mount of its work roots, but in none of them.

    NativeLink deletes its work directory when it starts, and the daemon is started before it.
    """
    bases: dict[str, str] = {}
    for root in config.actions.work_roots:
        bases.setdefault(
            root.trust_domain, root.execroots or os.path.join(os.path.dirname(root.path), EXECROOTS)
        )
    return bases


def _settings_of(pool: PoolConfig, state_dir: str, bases: Mapping[str, str]) -> PoolSettings:
    settings = pool.settings(state_dir)
    first = next(iter(bases.values()))
    execroot = replace(settings.execroot, base=first, bases=tuple(bases.items()), work_root="")
    return replace(settings, execroot=execroot)
