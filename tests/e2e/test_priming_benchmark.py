"""The benchmark of priming runs, and what it measures is what priming is for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "priming.py"


@pytest.mark.e2e
def test_the_first_request_of_a_primed_jvm_is_several_times_quicker_than_that_of_an_unprimed_one(
    tmp_path: Path,
) -> None:
    """Twenty times against two, usually: a load on the machine that blurs that is none."""
    figures = tmp_path / "figures"
    argv = [sys.executable, str(BENCHMARK), "--requests", "0,10", "--rounds", "1", "--json", str(figures)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    unprimed, primed = json.loads(figures.read_text())
    assert (unprimed["primed"], primed["primed"]) == (0, 10)
    assert primed["ratio"] < unprimed["ratio"] / 3
    assert "wanted: a ratio of at most 1.3 with 50" in done.stdout
