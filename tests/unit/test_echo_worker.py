"""The tests' own tool: each way of speaking to it, so that no other test is misled by it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.workers.echo_worker import expected_output, proto_answer, varint

ECHO = str(Path(__file__).resolve().parents[1] / "workers" / "echo_worker.py")


def request(*arguments: bytes, request_id: int = 0, cancel: bool = False) -> bytes:
    body = b"".join(b"\x0a" + varint(len(a)) + a for a in arguments)
    if request_id:
        body += b"\x18" + varint(request_id)
    if cancel:
        body += b"\x20\x01"
    return varint(len(body)) + body


def run(data: bytes, *flags: str) -> subprocess.CompletedProcess[bytes]:
    argv = [sys.executable, "-I", "-S", ECHO, *flags]
    return subprocess.run(argv, input=data, capture_output=True, timeout=30)


def test_it_answers_each_proto_request_with_its_own_arguments() -> None:
    done = run(request(b"a", request_id=3) + request(b"b", b"--exit=2"), "--persistent_worker")
    assert done.stdout == proto_answer(0, b"echo:a", 3, False) + proto_answer(2, b"echo:b --exit=2", 0, False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_it_answers_json_with_or_without_a_line_feed() -> None:
    one = json.dumps({"arguments": ["a b"], "requestId": 5}).encode()
    for flags, end in ((["--json"], b"\n"), (["--json", "--no-newline"], b"")):
        done = run(one + one, *flags)
        answer = done.stdout[: len(done.stdout) // 2]
        assert done.stdout == answer + answer
        assert answer.endswith(b"}" + end)
        assert json.loads(answer) == {"exitCode": 0, "output": "echo:a b", "requestId": 5}


def test_a_tool_that_echoes_no_ids_says_zero() -> None:
    assert run(request(b"a", request_id=3), "--no-echo-ids").stdout == proto_answer(0, b"echo:a", 0, False)


def test_a_multiplex_worker_answers_the_quick_one_first() -> None:
    data = request(b"slow", b"--sleep-ms=300", request_id=1) + request(b"quick", request_id=2)
    quick, slow = (
        proto_answer(0, b"echo:quick", 2, False),
        proto_answer(0, b"echo:slow --sleep-ms=300", 1, False),
    )
    assert run(data, "--multiplex").stdout == quick + slow


def test_a_cancelled_request_says_so_and_a_late_cancel_is_ignored() -> None:
    data = request(b"x", b"--sleep-ms=60000", request_id=1) + request(request_id=1, cancel=True)
    assert run(data, "--multiplex", "--cancel").stdout == proto_answer(0, b"", 1, True)
    assert run(request(request_id=9, cancel=True), "--cancel").stdout == b""


@pytest.mark.parametrize(
    ("flags", "answers", "code"),
    [
        (["--die-after", "2"], 2, 9),
        (["--die-every", "3"], 2, 9),
        (["--answer-twice-every", "2"], 6, 0),
        (["--exit-code", "0"], 4, 0),
    ],
)
def test_it_misbehaves_when_told(flags: list[str], answers: int, code: int) -> None:
    done = run(request(b"a") * 4, *flags)
    assert done.stdout == proto_answer(0, expected_output([b"a"]), 0, False) * answers
    assert done.returncode == code


def test_garbage_replaces_the_answer_when_asked_for() -> None:
    assert b"not protocol" in run(request(b"--garbage")).stdout
    assert run(request(b"a") * 2, "--garbage-every", "2").stdout.count(b"not protocol") == 1
