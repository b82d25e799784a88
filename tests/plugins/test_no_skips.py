"""The plugin that makes skipped tests fail, in a pytest of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

SKIPS = {
    "by_mark": "@pytest.mark.skip(reason='because of by_mark')\ndef test_it(): pass\n",
    "by_condition": "@pytest.mark.skipif(True, reason='because of by_condition')\ndef test_it(): pass\n",
    "in_the_test": "def test_it(): pytest.skip('because of in_the_test')\n",
    "in_a_fixture": "@pytest.fixture\ndef it(): pytest.skip('because of in_a_fixture')\n\n"
    "def test_it(it): pass\n",
    "the_module": "pytest.skip('because of the_module', allow_module_level=True)\n",
}


def run(folder: Path, *options: str) -> tuple[int, str]:
    argv = [sys.executable, "-m", "pytest", "-c", "/dev/null", "--rootdir", str(folder)]
    argv += ["--continue-on-collection-errors", *options, str(folder)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_a_skip_of_any_kind_fails_the_run_and_its_reason_is_shown(tmp_path: Path) -> None:
    for how, code in SKIPS.items():
        (tmp_path / f"test_{how}.py").write_text(f"import pytest\n\n\n{code}")
    exit_code, said = run(tmp_path)
    assert (exit_code, "5 skipped" in said.splitlines()[-1]) == (0, True), said
    exit_code, said = run(tmp_path, "-p", "tests.plugins.no_skips")
    assert exit_code == 1
    assert "1 failed, 4 errors" in said.splitlines()[-1], said
    for how in SKIPS:
        assert f"because of {how}" in said


def test_passes_and_expected_failures_stay_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(
        "import pytest\n\n\ndef test_good(): pass\n\n\n"
        "@pytest.mark.xfail\ndef test_known(): raise ValueError\n"
    )
    exit_code, said = run(tmp_path, "-p", "tests.plugins.no_skips")
    assert exit_code == 0, said
    assert "1 passed, 1 xfailed" in said
