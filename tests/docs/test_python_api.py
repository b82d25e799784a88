"""docs/python-api.md says what is true: its example is run, its tables are compared with the code."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import wrapper.errors
from wrapper.manager import PoolMetrics, WarmWorkerPoolManager
from wrapper.pool.health import PROOF_TIMEOUT_S
from wrapper.pool.housekeeping import CLEANING_ATTEMPTS, CLEANING_BACKOFF_S
from wrapper.pool.start_statistics import StartStatistics

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "python-api.md").read_text()


def block(language: str) -> str:
    """The content of the page's only block in this language."""
    (content,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert isinstance(content, str)
    return content


def first_cells(section: str) -> list[str]:
    """The names in backticks in the first column of the table under this heading."""
    text = PAGE[PAGE.index(f"## {section}\n") :].split("\n## ")[0]
    cells = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def test_the_example_runs_as_it_stands_and_prints_what_the_page_says(tmp_path: Path) -> None:
    program = tmp_path / "example.py"
    program.write_text(block("python"))
    done = subprocess.run([sys.executable, program], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert re.sub(r"worker \d+", "worker 2", done.stdout) == block("text")


def test_the_table_of_metrics_has_each_field_once() -> None:
    assert first_cells("The metrics") == [field.name for field in fields(PoolMetrics)]


def test_the_table_of_cold_and_warm_requests_has_each_field_once() -> None:
    assert first_cells("Cold and warm requests") == [field.name for field in fields(StartStatistics)]


def test_the_table_of_calls_has_each_public_method_of_the_manager() -> None:
    shown = " ".join(first_cells("The manager"))
    public = {name for name in vars(WarmWorkerPoolManager) if not name.startswith("_")}
    assert {name for name in public if f"manager.{name}(" in shown} == public


def test_the_errors_in_the_table_exist() -> None:
    for name in first_cells("What can go wrong"):
        assert issubclass(getattr(wrapper.errors, name), wrapper.errors.WrapperError), name


def test_the_numbers_of_the_health_check_are_those_of_the_code() -> None:
    section = PAGE[PAGE.index("## The health check") :]
    assert f"within {PROOF_TIMEOUT_S:g} s" in section
    assert f"tried {CLEANING_ATTEMPTS} times" in section
    waits = [f"{CLEANING_BACKOFF_S * n * n:g}" for n in range(1, CLEANING_ATTEMPTS)]
    assert f"{', '.join(waits[:-1])} and {waits[-1]} s" in section
