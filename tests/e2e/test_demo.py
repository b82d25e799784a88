"""The demo as a newcomer runs it: it compares the bytes, prints its table, and the pool is quicker."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.driver import REPOSITORY

DEMO = REPOSITORY / "examples" / "java-persistent-worker" / "demo"
SAFE_SPEED_UP = 2.0
"""Far below what the full demo reaches: a loaded machine must not fail the test."""


def run_demo(tmp_path: Path, *options: str) -> tuple[str, str, dict[str, Any]]:
    figures = tmp_path / "figures.json"
    done = subprocess.run(
        [DEMO, *options, "--json", figures],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, done.stderr, json.loads(figures.read_text())


@pytest.mark.e2e
def test_the_quick_demo_gives_identical_bytes_a_table_and_a_speed_up(tmp_path: Path) -> None:
    table, progress, figures = run_demo(tmp_path, "--quick", "--input", "maven")
    assert figures["identical"] is True
    assert figures["input"].startswith("org.apache.commons:commons-lang3:")
    assert figures["actions"] == 40
    assert figures["speed_up_like_with_like"] >= SAFE_SPEED_UP
    assert figures["steady_median_s"] < figures["process_c1_median_s"]
    for line in (
        "one process an action, C1 + serial GC",
        "warm pool, C1 + serial GC",
        "identical bytes: yes",
    ):
        assert line in table
    assert "40/40" in progress


@pytest.mark.e2e
def test_without_the_library_the_demo_compiles_our_own_sources_and_says_so(tmp_path: Path) -> None:
    table, _, figures = run_demo(tmp_path, "--quick", "--input", "own", "--actions", "6")
    assert figures["identical"] is True
    assert "the repository's own" in table


@pytest.mark.e2e
@pytest.mark.parametrize("wrong", [("--actions", "0"), ("--input", "elsewhere"), ("--no-such-option",)])
def test_a_wrong_option_is_named_and_nothing_runs(wrong: tuple[str, ...]) -> None:
    done = subprocess.run(
        [DEMO, *wrong], capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300
    )
    assert done.returncode == 2
    assert wrong[0] in done.stderr
