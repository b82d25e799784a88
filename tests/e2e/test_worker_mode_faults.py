"""Tools that die, lie, babble or hang behind the wrapper: one request fails, and says why; no other does."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from tests.support.raw_host import RawHost, ask, configured, echo_tool, outputs, until
from tests.workers.echo_worker import expected_output

DIED, PROTOCOL = 70, 76
QUICK_FRAMES = "limits: {frame_timeout_s: 0.3}"


def tool_of(tmp_path: Path, body: str) -> list[str]:
    """A tool of a few lines of Python, `read()` and `answer(id, text)` given."""
    script = tmp_path / "tool.py"
    script.write_text(
        "import os, sys, time\n"
        "def read():\n"
        "    data = os.read(0, 65536)\n"
        "    if not data: sys.exit(0)\n"
        "    return data[data.rindex(b'\\x18') + 1]\n"  # a request with a small id, which ends with it
        "def answer(number, text):\n"
        "    body = b'\\x12' + bytes([len(text)]) + text + (b'\\x18' + bytes([number]) if number else b'')\n"
        "    os.write(1, bytes([len(body)]) + body)\n" + body
    )
    return [sys.executable, "-I", "-S", str(script), "--persistent_worker"]


@pytest.mark.parametrize("multiplex", [False, True], ids=["singleplex", "multiplex"])
@pytest.mark.parametrize(
    ("fault", "exit_code", "reason"),
    [
        ("--die", DIED, "exit code 9"),
        ("--die=0", DIED, "exit code 0"),
        ("--garbage", PROTOCOL, "not a WorkResponse"),
    ],
)
def test_a_fault_fails_its_own_request_with_the_reason_and_the_tools_last_words(
    tmp_path: Path, fault: str, exit_code: int, reason: str, multiplex: bool
) -> None:
    flags = ["--multiplex"] if multiplex else []
    options = ["--tool-multiplex"] if multiplex else []
    with RawHost(echo_tool(*flags, "--stderr", "the last words"), *options, cwd=tmp_path) as host:
        assert host.one("before").pb.output == expected_output([b"before"])
        failed = host.one(fault, request_id=4).pb
        assert failed.exit_code == exit_code
        text = failed.output.decode()
        assert reason in text
        assert "the last words" in text
        assert "pid" in text
        assert host.one("after").pb.output == expected_output([b"after"])


@pytest.mark.parametrize("signal_name", ["SIGKILL", "SIGSEGV"])
def test_a_worker_killed_in_mid_request_is_told_with_its_signal(tmp_path: Path, signal_name: str) -> None:
    tool = tool_of(tmp_path, "read()\nopen(sys.argv[0] + '.busy', 'w').close()\ntime.sleep(99)\n")
    with RawHost(tool, cwd=tmp_path) as host:
        host.send(ask("x", request_id=1))
        until((tmp_path / "tool.py.busy").exists, "at work")
        os.kill(host.workers()[0], signal.Signals[signal_name])
        (failed,) = host.receive(1)
        assert (failed.pb.exit_code, failed.pb.request_id) == (DIED, 1)
        assert signal_name.encode() in failed.pb.output
        assert b"in the middle of a request" in failed.pb.output


def test_text_that_looks_like_a_length_is_given_up_after_the_frame_timeout(tmp_path: Path) -> None:
    tool = tool_of(tmp_path, "while True:\n    read()\n    os.write(1, b'~ hello')\n")
    with RawHost(tool, *configured(tmp_path, QUICK_FRAMES), cwd=tmp_path) as host:
        failed = host.one("x", request_id=9).pb
        assert failed.exit_code == PROTOCOL
        assert b"within 0.3 s" in failed.output
        assert b"~ hello" in failed.output


@pytest.mark.parametrize("echoes", [True, False], ids=["echoes-ids", "echoes-none"])
def test_a_second_answer_reaches_nobody_and_the_worker_is_replaced(tmp_path: Path, echoes: bool) -> None:
    flags = [] if echoes else ["--no-echo-ids"]
    with RawHost(echo_tool(*flags), "-v", "--max-instances", "1", cwd=tmp_path) as host:
        for number in range(1, 6):
            answer = host.one("--answer-twice", str(number), request_id=number)
            assert answer.pb.output == expected_output([b"--answer-twice", b"%d" % number])
        assert host.finish() == []
        assert host.stderr().count("stray output") >= 5


@pytest.mark.parametrize("multiplex", [False, True], ids=["singleplex", "multiplex"])
def test_a_wrong_id_is_a_diagnosis_and_never_a_hang(tmp_path: Path, multiplex: bool) -> None:
    flags = ["--multiplex"] if multiplex else []
    options = ["--tool-multiplex"] if multiplex else []
    with RawHost(echo_tool(*flags), *options, "--max-instances", "1", cwd=tmp_path) as host:
        for _ in range(2):
            failed = host.one("--wrong-id", request_id=3).pb
            assert failed.exit_code == PROTOCOL
            assert b"request id" in failed.output
            assert host.one("fine", request_id=3).pb.output == expected_output([b"fine"])


def test_an_answer_with_another_requests_id_hangs_neither(tmp_path: Path) -> None:
    # Two in flight; the first is answered with the second one's id: nobody can tell that apart.
    body = "data = b''\nwhile data.count(b'\\x18') < 2: data += os.read(0, 65536)\n"
    body += "answer(2, b'stolen'); answer(2, b'mine'); read()\n"
    tool = tool_of(tmp_path, body)
    with RawHost(tool, "--tool-multiplex", "2", "--max-instances", "1", cwd=tmp_path) as host:
        host.send(ask("a", request_id=1))
        until(host.workers, "a worker")
        host.send(ask("b", request_id=2))
        answers = host.receive(2)
        assert sorted(answer.pb.request_id for answer in answers) == [1, 2]
        assert [answer.pb.exit_code for answer in answers if answer.pb.request_id == 1] == [PROTOCOL]


def test_an_answer_before_any_request_is_seen_and_goes_to_nobody(tmp_path: Path) -> None:
    body = "marker = os.path.join(sys.argv[0] + '.once')\n"
    body += "if not os.path.exists(marker): open(marker, 'w').close(); answer(77, b'unasked')\n"
    body += "while True: answer(read(), b'asked')\n"
    with RawHost(tool_of(tmp_path, body), "-v", cwd=tmp_path) as host:
        first = host.one("x", request_id=5).pb
        # Caught before the first request, or that one fails: it depends on who is quicker.
        assert first.output == b"asked" or (first.exit_code == PROTOCOL and b"request id 77" in first.output)
        assert host.one("y", request_id=6).pb.output == b"asked"


def test_an_answer_while_idle_retires_the_worker_before_the_next_request(tmp_path: Path) -> None:
    body = "number = read(); answer(number, b'%d' % os.getpid())\n"
    body += "while not os.path.exists(sys.argv[0] + '.go'): time.sleep(0.01)\n"
    body += "answer(number + 1, b'poison'); open(sys.argv[0] + '.done', 'w').close()\n"
    body += "while True: answer(read(), b'poison too')\n"
    with RawHost(tool_of(tmp_path, body), "-v", cwd=tmp_path) as host:
        (pid,) = [int(host.one("x", request_id=5).pb.output)]
        (tmp_path / "tool.py.go").touch()
        until((tmp_path / "tool.py.done").exists, "the unasked answer is written")
        (tmp_path / "tool.py.go").unlink()
        answer = int(host.one("y", request_id=6).pb.output)
        assert answer != pid


@pytest.mark.parametrize("stream", ["stdout", "stdin"])
def test_a_worker_that_closes_its_end_of_a_pipe_is_told_apart_from_a_slow_one(
    tmp_path: Path, stream: str
) -> None:
    close = "os.close(1)" if stream == "stdout" else "os.close(0)"
    body = f"number = read()\nif number == 11: answer(number, b'ok'); read()\n{close}\n"
    body += "sys.stderr.write('pipe closed\\n'); sys.stderr.flush(); time.sleep(99)\n"
    if stream == "stdin":  # only a later write can see it
        body = f"answer(read(), b'ok'); {close}\nsys.stderr.write('pipe closed\\n'); sys.stderr.flush()\n"
        body += "open(sys.argv[0] + '.closed', 'w').close(); time.sleep(99)\n"
    with RawHost(tool_of(tmp_path, body), "--max-instances", "1", cwd=tmp_path) as host:
        assert host.one("x", request_id=1).pb.output == b"ok"
        if stream == "stdin":
            until((tmp_path / "tool.py.closed").exists, "it closed its stdin")
        failed = host.one("y", request_id=2).pb
        assert failed.exit_code == PROTOCOL
        assert f"closed its {stream}".encode() in failed.output
        assert b"pipe closed" in failed.output


def test_a_tool_that_exits_after_each_answer_serves_every_request_but_those_it_was_given_too_late(
    tmp_path: Path,
) -> None:
    body = "answer(read(), b'served'); sys.exit(0)\n"
    with RawHost(tool_of(tmp_path, body), "--max-instances", "2", cwd=tmp_path) as host:
        served = 0
        for number in range(1, 21):
            answer = host.one("x", request_id=number).pb
            served += answer.output == b"served"
            if answer.output != b"served":
                assert answer.exit_code == DIED
                assert b"exit code 0" in answer.output
                # The failed one killed nobody: the worker after it is a new one, which serves.
            else:
                until(lambda: not host.workers(), "the worker has exited")
        assert served == 20


@pytest.mark.parametrize("echoes", [True, False], ids=["echoes-ids", "echoes-none"])
@pytest.mark.parametrize("every", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("fault", ["die", "garbage", "answer-twice"])
def test_a_fault_after_every_kth_request_fails_at_most_one_request_each(
    tmp_path: Path, fault: str, every: int, echoes: bool
) -> None:
    count = 60
    # A worker answers `every` requests well, and the fault is what it does with the next one.
    flags = [f"--{fault}-every", str(every + (fault != "answer-twice"))]
    flags += [] if echoes else ["--no-echo-ids"]
    with RawHost(echo_tool(*flags), "-v", "--max-instances", "3", cwd=tmp_path) as host:
        answers = host.exchange(*[ask("right", str(n), request_id=n) for n in range(1, count + 1)])
        assert host.finish() == []
    assert sorted(answer.pb.request_id for answer in answers) == list(range(1, count + 1))
    failed = [answer for answer in answers if answer.pb.exit_code]
    outputs_of = outputs(answer for answer in answers if not answer.pb.exit_code)
    for number, output in outputs_of.items():
        assert output == expected_output([b"right", b"%d" % number])
    for answer in failed:
        text = answer.pb.output.decode()
        assert answer.pb.exit_code in (DIED, PROTOCOL), text
        assert "worker" in text
        assert "exit code 9" in text or "not a WorkResponse" in text or "request id" in text, text
    if fault == "answer-twice":
        assert not failed  # the answers themselves are right
    else:
        events = host.stderr().count("(crash)") + host.stderr().count("(protocol error)")
        assert len(failed) <= events <= count // (every + 1)
        assert failed  # the fault was there


def test_a_hanging_request_holds_up_nobody_and_sigterm_ends_it(tmp_path: Path) -> None:
    with RawHost(echo_tool(), "--max-instances", "2", cwd=tmp_path) as host:
        host.send(ask("--hang", request_id=1))
        until(host.workers, "the hanging worker")
        for number in range(2, 12):
            assert host.one("fine", request_id=number).pb.output == expected_output([b"fine"])
        host.signal(signal.SIGTERM)
        (hung,) = host.rest()
        assert (hung.pb.request_id, hung.pb.exit_code) == (1, 75)
        assert b"SIGTERM" in hung.pb.output
        assert host.wait() == 0


def test_a_tool_that_prints_before_it_serves_fails_clearly(tmp_path: Path) -> None:
    with RawHost(echo_tool("--garbage-at-start"), *configured(tmp_path, QUICK_FRAMES), cwd=tmp_path) as host:
        failed = host.one("x").pb
        assert failed.exit_code in (PROTOCOL, DIED, 69)
        assert b"Hello from a chatty tool" in failed.output


@pytest.mark.parametrize("fault", ["--die-every", "--garbage-every"])
def test_a_tool_that_never_serves_fails_every_request_at_once_with_its_reason(
    tmp_path: Path, fault: str
) -> None:
    with RawHost(echo_tool(fault, "1"), "-v", "--max-instances", "3", cwd=tmp_path) as host:
        answers = host.exchange(*[ask("x", request_id=n) for n in range(1, 61)])
        assert sorted(answer.pb.request_id for answer in answers) == list(range(1, 61))
        for answer in answers:
            assert answer.pb.exit_code in (DIED, PROTOCOL)
            assert b"exit code 9" in answer.pb.output or b"not a WorkResponse" in answer.pb.output
        # Not one start after the other for each of them.
        assert host.stderr().count("worker stopping") < 20
