"""Workers' stderr passed on to ours: complete while somebody reads, never a reason to wait."""

from __future__ import annotations

import os

from wrapper.runtime.stderr_log import StderrForward


def test_what_is_read_arrives_whole() -> None:
    read_fd, write_fd = os.pipe()
    forward = StderrForward(write_fd)
    forward.write(b"one\n")
    forward.write(b"x" * 10_000)
    assert os.read(read_fd, 65536) == b"one\n" + b"x" * 10_000
    os.close(read_fd)
    os.close(write_fd)


def test_a_reader_that_does_not_read_is_never_waited_for_and_is_told_what_it_missed() -> None:
    read_fd, write_fd = os.pipe()
    forward = StderrForward(write_fd)
    for _ in range(100):
        forward.write(b"y" * 10_000)
    kept = 0
    while kept < 900_000 and (data := os.read(read_fd, 1 << 20)):
        kept += len(data)
        if len(data) < 1 << 16:
            break
    forward.write(b"after\n")
    text = os.read(read_fd, 1 << 20)
    assert text.endswith(b"after\n")
    assert b"bytes of a worker's stderr were dropped" in text
    os.close(read_fd)
    os.close(write_fd)


def test_a_reader_that_is_gone_is_no_error() -> None:
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    forward = StderrForward(write_fd)
    forward.write(b"lost")
    os.close(write_fd)
