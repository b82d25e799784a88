"""Many tool patterns and pools make a decision about an action little dearer than none."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from wrapper.action import OneShot, WorkerCall, classify

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
if str(BENCHMARKS) not in sys.path:
    sys.path.insert(0, str(BENCHMARKS))

from classification import COMMANDS, Action, make_rules, time_one_us  # noqa: E402

ROUNDS, TURNS = 15, 20


def quickest_us(pools: int, patterns: int) -> float:
    """Whoever else uses the machine only makes rounds slower."""
    rules = make_rules(pools, patterns, 10 if patterns else 0)
    actions = [Action(argv, f"team-{pools - 1:03}-x") for argv in COMMANDS]
    return min(time_one_us(rules, actions, TURNS) for _ in range(ROUNDS))


def test_a_thousand_patterns_and_a_hundred_pools_cost_at_most_three_times_what_none_do() -> None:
    assert quickest_us(100, 1_000) <= 3 * quickest_us(1, 0)


@pytest.mark.parametrize("pools", [1, 100])
def test_what_is_measured_decides_both_ways(pools: int) -> None:
    rules = make_rules(pools, 1_000, 10)
    found = [classify(Action(argv, f"team-{pools - 1:03}-x"), rules) for argv in COMMANDS]
    assert [type(one) for one in found] == [WorkerCall, WorkerCall, OneShot, OneShot, OneShot]
    assert all("no pool" not in one.reason for one in found if isinstance(one, OneShot))
