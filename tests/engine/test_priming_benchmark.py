"""The benchmark of priming runs with containers too."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.engine import PrivateContainerd

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "priming.py"


@pytest.mark.engine
def test_a_jvm_in_a_container_is_primed_and_its_first_request_measured(
    engine: PrivateContainerd, tmp_path: Path
) -> None:
    figures = tmp_path / "figures"
    argv = [sys.executable, str(BENCHMARK), "--runtime", "cri", "--requests", "10", "--rounds", "1"]
    done = subprocess.run([*argv, "--json", str(figures)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (primed,) = json.loads(figures.read_text())
    assert primed["primed"] == 10
    assert primed["ratio"] < 8  # unprimed it is 11 and more
    assert "wanted: a ratio of at most 1.3 with 50" in done.stdout
