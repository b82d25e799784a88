"""What acquire and release cost with 10 and with 10,000 idle workers, alternately in one run.

The whole path is measured: the pool's shell and core, the probe before a lease, the look after it. Only
the processes are fake (see IdleRuntime): one descriptor each, and nobody behind it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import statistics
import sys
import time
from pathlib import Path

from wrapper.pool.limits import PoolLimits
from wrapper.pool.pool import WorkerPool
from wrapper.pool.settings import PoolSettings
from wrapper.pool.worker_key import WorkerKey
from wrapper.runtime.base import CommandResult, CommandSpec, ExitStatus, GcReport, Leftovers, WorkerSpec

KEYS = 10
"""The workers of both sizes are spread over so many keys: the number of workers is what differs."""


class IdleRuntime:
    """Workers that never say anything: each is a duplicate of one silent pipe."""

    def __init__(self) -> None:
        self.read_fd, self.write_fd = os.pipe()
        os.set_blocking(self.read_fd, False)

    async def prepare(self) -> None:
        pass

    async def start(self, spec: WorkerSpec) -> IdleWorker:
        return IdleWorker(spec, os.dup(self.read_fd))

    async def close(self) -> None:
        os.close(self.read_fd)
        os.close(self.write_fd)


class IdleWorker:
    """See WorkerProcess."""

    def __init__(self, spec: WorkerSpec, fd: int) -> None:
        self.spec = spec
        self.pid = 0
        self.has_garbage = False
        self.stdin_fd = -1
        self.stdout_fd = fd
        self.exited: asyncio.Future[ExitStatus] = asyncio.get_running_loop().create_future()

    def first_request_sent(self) -> None:
        pass

    def first_answer_seen(self) -> None:
        pass

    def kill_stragglers(self) -> None:
        pass

    def leftovers(self) -> Leftovers:
        return Leftovers()

    async def remove_leftovers(self) -> Leftovers:
        return Leftovers()

    async def run(self, command: CommandSpec) -> CommandResult:
        return CommandResult(0, b"")

    def memory_bytes(self) -> int:
        return 0

    def cpu_s(self) -> float:
        return 0.0

    async def collect_garbage(self) -> GcReport | None:
        return None

    def stderr_tail(self) -> bytes:
        return b""

    async def stop(self, grace_s: float) -> ExitStatus:
        if self.stdout_fd >= 0:
            os.close(self.stdout_fd)
            self.stdout_fd = -1
        return ExitStatus(0)


async def make_pool(workers: int) -> tuple[WorkerPool, list[WorkerKey]]:
    """A pool with so many idle workers."""
    limits = PoolLimits(max_workers=workers, max_instances_per_key=workers, start_instead_after_s=0.0)
    pool = WorkerPool({"p": PoolSettings("p", limits)}, {"p": IdleRuntime()})
    keys = [WorkerKey("p", (f"tool{n}",), "/") for n in range(min(KEYS, workers))]
    leases = [await pool.acquire(keys[n % len(keys)]) for n in range(workers)]
    for lease in leases:
        lease.release()
    return pool, keys


async def time_one_us(pool: WorkerPool, keys: list[WorkerKey], turns: int) -> float:
    """Microseconds of one acquire and release: the median over the turns."""
    samples = []
    for turn in range(turns):
        key = keys[turn % len(keys)]
        began = time.perf_counter()
        lease = await pool.acquire(key)
        lease.release()
        samples.append((time.perf_counter() - began) * 1e6)
    return statistics.median(samples)


async def measure(few: int, many: int, rounds: int, turns: int) -> dict[str, float]:
    """Medians in µs for both sizes, alternately, and their ratio."""
    small, small_keys = await make_pool(few)
    large, large_keys = await make_pool(many)
    figures: dict[int, list[float]] = {few: [], many: []}
    for _ in range(rounds):
        figures[few].append(await time_one_us(small, small_keys, turns))
        figures[many].append(await time_one_us(large, large_keys, turns))
    await small.close()
    await large.close()
    few_us, many_us = statistics.median(figures[few]), statistics.median(figures[many])
    return {"few_us": few_us, "many_us": many_us, "ratio": many_us / few_us}


def main() -> int:
    parser = argparse.ArgumentParser(prog="pool_scaling", description=__doc__.split("\n")[0])
    parser.add_argument("--few", type=int, default=10, metavar="N")
    parser.add_argument("--many", type=int, default=10_000, metavar="N")
    parser.add_argument("--rounds", type=int, default=10, metavar="N")
    parser.add_argument("--turns", type=int, default=2_000, metavar="N", help="acquires a round")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    given = parser.parse_args()
    allow_descriptors(given.many + 1_000)
    figures = asyncio.run(measure(given.few, given.many, given.rounds, given.turns))
    print(f"acquire + release, {given.few:>6,} idle workers: {figures['few_us']:6.1f} us")
    print(f"acquire + release, {given.many:>6,} idle workers: {figures['many_us']:6.1f} us")
    print(f"ratio: {figures['ratio']:.2f} (at most 1.5)")
    if given.json:
        given.json.write_text(json.dumps(figures))
    return 0


def allow_descriptors(count: int) -> None:
    """Raise our own limit of open files, as far as the system lets us."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(count, hard), hard))


if __name__ == "__main__":
    sys.exit(main())
