"""Acquire and release cost the same however many workers are idle."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

from tests.support.loop import run_async

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
if str(BENCHMARKS) not in sys.path:
    sys.path.insert(0, str(BENCHMARKS))

from pool_scaling import allow_descriptors, make_pool, time_one_us  # noqa: E402

FEW, MANY = 10, 10_000
ROUNDS, TURNS = 15, 200
QUIETEST = 5
"""Whoever else uses the machine only makes rounds slower: the quickest ones tell what the code costs."""


async def ratio() -> float:
    small, small_keys = await make_pool(FEW)
    large, large_keys = await make_pool(MANY)
    few_us, many_us = [], []
    for _ in range(ROUNDS):
        few_us.append(await time_one_us(small, small_keys, TURNS))
        many_us.append(await time_one_us(large, large_keys, TURNS))
    await small.close()
    await large.close()
    return statistics.median(sorted(many_us)[:QUIETEST]) / statistics.median(sorted(few_us)[:QUIETEST])


def test_ten_thousand_idle_workers_make_an_acquire_at_most_half_as_dear_again() -> None:
    allow_descriptors(MANY + 1_000)
    assert run_async(ratio(), timeout_s=300) <= 1.5
