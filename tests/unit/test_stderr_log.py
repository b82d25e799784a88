"""The bounded tail and the rotating file of a worker's standard error."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from wrapper.runtime.stderr_log import RotatingFile, StderrLogs, StderrTail


def test_the_tail_is_the_newest_bytes() -> None:
    tail = StderrTail(limit=10)
    everything = b""
    for number in range(100):
        everything += b"%d," % number
        tail.feed(b"%d," % number)
        assert tail.tail() == everything[-10:]
    tail.feed(b"x" * 1000)
    assert tail.tail() == b"x" * 10


def test_a_file_rotates_before_it_exceeds_its_limit(tmp_path: Path) -> None:
    file = RotatingFile(str(tmp_path / "logs" / "w.log"), max_bytes=10, backups=2)
    for number in range(10):
        file.write(b"line%d\n" % number)
    file.close()
    found = {path.name: path.read_bytes() for path in (tmp_path / "logs").iterdir()}
    assert found == {"w.log": b"line9\n", "w.log.1": b"line8\n", "w.log.2": b"line7\n"}
    file.write(b"x\n")
    file.close()
    assert (tmp_path / "logs" / "w.log").read_bytes() == b"line9\nx\n"


def test_without_backups_the_old_file_goes(tmp_path: Path) -> None:
    file = RotatingFile(str(tmp_path / "w.log"), max_bytes=4, backups=0)
    file.write(b"abcd")
    file.write(b"efgh")
    file.close()
    assert [path.name for path in tmp_path.iterdir()] == ["w.log"]
    assert (tmp_path / "w.log").read_bytes() == b"efgh"


def test_a_place_that_cannot_be_written_costs_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "occupied").write_text("a file where the directory should be")
    file = RotatingFile(str(tmp_path / "occupied" / "w.log"), max_bytes=10, backups=1)
    with caplog.at_level(logging.WARNING):
        file.write(b"a")
        file.write(b"b")
    assert len(caplog.records) == 1
    os.unlink(tmp_path / "occupied")
    file.write(b"c")
    file.close()
    assert (tmp_path / "occupied" / "w.log").read_bytes() == b"c"


def test_workers_of_one_name_share_a_file_and_no_name_leaves_the_directory(tmp_path: Path) -> None:
    logs = StderrLogs(str(tmp_path))
    first, second = logs.borrow("../../pool/7"), logs.borrow("../../pool/7")
    assert first is second
    first.write(b"1")
    logs.give_back(first)
    second.write(b"2")
    logs.give_back(second)
    [path] = tmp_path.iterdir()
    assert path.read_bytes() == b"12"
