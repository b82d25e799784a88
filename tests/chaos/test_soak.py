"""A long run through worker mode: the wrapper must not grow, in memory or in descriptors."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.e2e.driver import REPOSITORY

if str(REPOSITORY / "benchmarks") not in sys.path:
    sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import overhead

SETTLED_AFTER = 5_000
"""Requests until every cache of the interpreter is full and every code path was taken."""
REQUESTS = 20_000
GROWTH = 1.10
OF_ONE_WORKER = 6
"""Descriptors of one worker: there may have been one of the two at the first look and both at the second.

A leak of a single one with each of the 75 workers in between would show."""


def descriptors(pid: int) -> dict[str, str]:
    found = {}
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            found[name] = os.readlink(f"/proc/{pid}/fd/{name}")
        except OSError:
            continue
    return found


@pytest.mark.nightly
@pytest.mark.parametrize("size", [1_000, 20_000], ids=["1 KB", "20 KB"])
@pytest.mark.parametrize("in_flight", [1, 8])
def test_20_000_requests_do_not_make_the_wrapper_grow(in_flight: int, size: int, tmp_path: Path) -> None:
    """Workers are recycled all the while (200 jobs each), so starts and stops are in it too."""
    worker = [overhead.build_echo_worker(), "--persistent_worker"]
    wrapper = [sys.executable, "-m", "wrapper", "--max-instances", "2", "--log-dir", str(tmp_path), "--"]
    line = overhead.Line([*wrapper, *worker])
    try:
        load = overhead.make_load(size, in_flight)
        line.run(load, SETTLED_AFTER)
        memory_before, open_before = line.resident_bytes(), descriptors(line.process.pid)
        line.run(load, REQUESTS - SETTLED_AFTER)
        memory_after, open_after = line.resident_bytes(), descriptors(line.process.pid)
    finally:
        line.close()
    assert line.process.returncode == 0
    assert memory_after <= memory_before * GROWTH, f"{memory_before} → {memory_after} bytes"
    assert len(open_after) <= len(open_before) + OF_ONE_WORKER, f"{open_before} → {open_after}"
