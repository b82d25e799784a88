"""The benchmark of staging runs, and says what it measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_it_measures_both_strategies_and_the_floor_and_leaves_nothing(tmp_path: Path) -> None:
    trees = tmp_path / "trees"
    trees.mkdir()
    shown = subprocess.run(
        [
            *(sys.executable, str(ROOT / "benchmarks/staging.py")),
            *("--turns", "2", "--directory", str(trees), "--json", str(tmp_path / "figures")),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    figures = json.loads((tmp_path / "figures").read_text())
    assert [(row["tree"], row["how"].split(":")[0]) for row in figures] == [
        (tree, how) for tree in ("10 files", "1,001 files") for how in ("floor", "rename", "link")
    ]
    assert all(row[what] > 0 for row in figures for what in ("stage_ms", "collect_ms", "cpu_ms"))
    assert len(shown.splitlines()) == len(figures) + 1
    assert list(trees.iterdir()) == []
