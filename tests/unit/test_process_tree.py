"""Reading /proc, and signalling only who was meant."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator

import pytest

from wrapper.runtime import process_tree


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["/bin/sleep", "1000"])
    yield process
    process.kill()
    process.wait()


def test_a_process_name_may_hold_anything() -> None:
    fields = " ".join(["S", "7", "8", "9", *["0"] * 13, "5", "0", "4242", "0"])
    stat = process_tree.parse_stat(b"12 (a) b) (c\n) " + fields.encode())
    assert stat == process_tree.ProcStat("S", parent=7, session=9, threads=5, start_ticks=4242)
    assert not stat.is_dead


def test_a_process_is_dead_only_when_its_last_thread_is() -> None:
    assert not process_tree.ProcStat("Z", 1, 1, threads=2, start_ticks=1).is_dead
    assert process_tree.ProcStat("Z", 1, 1, threads=1, start_ticks=1).is_dead


def test_children_are_found_with_and_without_the_kernels_list(sleeper: subprocess.Popen[bytes]) -> None:
    assert sleeper.pid in process_tree.children(os.getpid())
    assert sleeper.pid in process_tree.children_by_scan(os.getpid())


def test_a_signal_goes_only_to_the_process_that_was_seen(sleeper: subprocess.Popen[bytes]) -> None:
    stat = process_tree.read_stat(sleeper.pid)
    assert stat is not None
    assert not process_tree.send_signal(sleeper.pid, stat.start_ticks + 1, signal.SIGKILL)
    assert sleeper.poll() is None
    assert process_tree.send_signal(sleeper.pid, stat.start_ticks, signal.SIGKILL)
    sleeper.wait()
    assert not process_tree.send_signal(sleeper.pid, stat.start_ticks, signal.SIGKILL)
    assert process_tree.read_stat(sleeper.pid) is None
    assert process_tree.resident_bytes(sleeper.pid) == 0
    assert process_tree.children(sleeper.pid) == []


def test_a_caught_signal_is_told_from_a_deadly_one(sleeper: subprocess.Popen[bytes]) -> None:
    # A handler of our own: where the tests are started in the background, SIGINT is ignored by all of them.
    before = signal.signal(signal.SIGUSR1, lambda _number, _frame: None)
    try:
        assert process_tree.catches_signal(os.getpid(), signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert not process_tree.catches_signal(sleeper.pid, signal.SIGQUIT)
