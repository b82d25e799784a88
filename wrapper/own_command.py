"""The kind of worker that a pool's `worker_command` is.

One for a pool, whatever key asked for it: its command is the same.
"""

from __future__ import annotations

from wrapper.config import PoolConfig
from wrapper.errors import WorkerStartFailed
from wrapper.pool.worker_key import WorkerKey
from wrapper.runtime.spawn import resolve_program


def own_worker_key(
    pool: PoolConfig, cwd: str, *, trust_domain: str = "", working_directory: str = ""
) -> WorkerKey | None:
    """None: the pool has no command of its own. `cwd`: where workers without an execroot work."""
    if not pool.worker_command:
        return None
    program, *arguments = pool.worker_command
    own = pool.has_own_execroots
    if pool.runtime == "process":
        try:
            # The file itself, or its freshness could not be checked.
            program = resolve_program(program, pool.env, cwd)
        except WorkerStartFailed:
            pass  # each start will say so, and find it should it come
    return WorkerKey(
        pool=pool.name,
        argv=(program, *arguments),
        cwd=pool.execroot.path if own else cwd,
        env=tuple(sorted(pool.env.items())),
        trust_domain=trust_domain,
        protocol=pool.worker_protocol,
        multiplex=pool.limits.max_requests_per_worker_at_once > 1,
        own_execroot=own,
        for_actions=own,
        working_directory=working_directory,
    )
