"""The benchmark runs to its end and gives every figure it promises; how good they are is not tested here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.driver import REPOSITORY


@pytest.mark.e2e
def test_the_overhead_benchmark_gives_all_its_figures(tmp_path: Path) -> None:
    figures_file = tmp_path / "figures.json"
    done = subprocess.run(
        [
            *(sys.executable, REPOSITORY / "benchmarks" / "overhead.py", "--json", figures_file),
            *("--requests", "100", "--rounds", "2", "--starts", "1"),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(figures_file.read_text())
    shown = {(row["size"], row["in_flight"], row["via"]) for row in figures["rows"]}
    for size in ("1 KB", "100 KB"):
        for in_flight in (1, 8):
            assert (size, in_flight, "wrapper") in shown
    assert figures["first_answer_wrapper_ms"] > 0
    assert figures["wrapper_resident_mb"] > 0
    assert "resident memory" in done.stdout
