"""Cancel, for every kind of tool and at every point of a request's way."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from tests.support.raw_host import RawHost, ask, cancel, configured, echo_tool, until
from tests.workers.echo_worker import expected_output


@pytest.mark.parametrize("multiplex", [False, True], ids=["singleplex", "multiplex"])
def test_a_tool_that_can_cancel_is_asked_and_goes_on(tmp_path: Path, multiplex: bool) -> None:
    flags = ["--multiplex"] if multiplex else []
    options = ["--tool-multiplex"] if multiplex else []
    with RawHost(
        echo_tool("--cancel", *flags), *options, "--tool-cancel", "--max-instances", "1", cwd=tmp_path
    ) as host:
        host.one("warm")
        workers = host.workers()
        host.send(ask("--sleep-ms=60000", request_id=6), cancel(6))
        (answer,) = host.receive(1)
        assert (answer.pb.request_id, answer.pb.was_cancelled) == (6, True)
        assert host.one("after").pb.output == expected_output([b"after"])
        assert host.workers() == workers


def test_a_singleplex_tool_that_cannot_is_dead_before_was_cancelled_is_said(tmp_path: Path) -> None:
    tool = echo_tool("--ignore-sigterm", "--own-child")
    options = configured(tmp_path, "limits: {stop_grace_s: 0.3}")
    with RawHost(tool, *options, "--max-instances", "1", cwd=tmp_path) as host:
        host.one("warm")
        (worker,) = [psutil.Process(pid) for pid in host.workers()]
        family = [worker, *worker.children(recursive=True)]
        assert len(family) == 2
        host.send(ask("--sleep-ms=60000", request_id=0), cancel(0))
        (answer,) = host.receive(1)
        assert not any(process.is_running() for process in family)
        assert (answer.pb.request_id, answer.pb.was_cancelled, answer.pb.exit_code) == (0, True, 0)
        assert host.one("after").pb.output == expected_output([b"after"])


def test_a_multiplex_tool_that_cannot_is_let_finish_and_its_siblings_are_unharmed(tmp_path: Path) -> None:
    tool = echo_tool("--multiplex", "--delay-ms", "200")
    with RawHost(tool, "--tool-multiplex", "8", "--max-instances", "1", cwd=tmp_path) as host:
        host.one("warm")
        workers = host.workers()
        host.send(*[ask(str(n), request_id=n) for n in range(1, 6)], cancel(3), cancel(5))
        answers = {answer.pb.request_id: answer.pb for answer in host.receive(5)}
        assert {n: pb.output for n, pb in answers.items()} == {
            n: expected_output([b"%d" % n]) for n in range(1, 6)
        }
        assert host.workers() == workers


def test_a_request_that_waits_for_a_worker_is_cancelled_at_once_and_never_run(tmp_path: Path) -> None:
    with RawHost(echo_tool(), "--max-instances", "1", cwd=tmp_path) as host:
        host.send(ask("--sleep-ms=500", request_id=1), ask("--write=ran", request_id=2), cancel(2))
        first, second = host.receive(2)
        assert (first.pb.request_id, first.pb.was_cancelled) == (2, True)
        assert (second.pb.request_id, second.pb.exit_code) == (1, 0)
        host.one("after")
        assert not (tmp_path / "ran").exists()


def test_cancels_of_what_is_finished_unknown_or_cancelled_already_are_no_errors(tmp_path: Path) -> None:
    with RawHost(echo_tool(), "--max-instances", "1", cwd=tmp_path) as host:
        host.one("done", request_id=1)
        host.send(cancel(1), cancel(77), cancel(0))
        host.send(ask("--sleep-ms=60000", request_id=2), cancel(2), cancel(2), cancel(2))
        (answer,) = host.receive(1)
        assert (answer.pb.request_id, answer.pb.was_cancelled) == (2, True)
        host.send(cancel(2))
        assert host.one("after", request_id=2).pb.output == expected_output([b"after"])
        assert host.finish() == []
        assert host.stderr() == ""


def test_the_cancel_of_an_id_that_is_twice_in_flight_cancels_one_of_them(tmp_path: Path) -> None:
    with RawHost(echo_tool("--delay-ms", "300"), "--max-instances", "2", cwd=tmp_path) as host:
        host.send(ask("a", request_id=1), ask("b", request_id=1), cancel(1))
        answers = host.receive(2)
        assert [answer.pb.request_id for answer in answers] == [1, 1]
        assert sorted(answer.pb.was_cancelled for answer in answers) == [False, True]


@pytest.mark.nightly  # ten seconds; in virtual time in tests/shell
def test_a_singleplex_tool_that_ignores_the_cancel_it_promised_is_stopped_in_time(tmp_path: Path) -> None:
    with RawHost(echo_tool(), "--tool-cancel", "--max-instances", "1", cwd=tmp_path) as host:
        host.one("warm")
        workers = host.workers()
        host.send(ask("--sleep-ms=60000", request_id=1), cancel(1))
        (answer,) = host.receive(1)
        assert (answer.pb.request_id, answer.pb.was_cancelled) == (1, True)
        assert host.one("after").pb.output == expected_output([b"after"])
        assert host.workers() != workers


def test_a_cancel_that_comes_after_the_tool_has_finished_gets_the_tools_answer(tmp_path: Path) -> None:
    with RawHost(echo_tool("--cancel"), "--tool-cancel", cwd=tmp_path) as host:
        for number in range(1, 30):  # whichever is first: exactly one answer, and the next one is right
            host.send(ask("--sleep-ms=1", str(number), request_id=number), cancel(number))
            (answer,) = host.receive(1)
            assert answer.pb.request_id == number
            assert answer.pb.was_cancelled or answer.pb.output == expected_output(
                [b"--sleep-ms=1", b"%d" % number]
            )
        assert host.finish() == []


def test_a_tool_that_says_was_cancelled_unasked_fails_its_request_and_is_replaced(tmp_path: Path) -> None:
    script = tmp_path / "liar"
    script.write_text(
        "#!/usr/bin/env python3\nimport os\n"
        "while data := os.read(0, 65536):\n"
        "    number = data[data.rindex(b'\\x18') + 1]\n"
        "    os.write(1, bytes([4, 0x18, number, 0x20, 1]))\n"
    )
    script.chmod(0o755)
    with RawHost([str(script), "--persistent_worker"], cwd=tmp_path) as host:
        answer = host.one("x", request_id=4).pb
        assert not answer.was_cancelled
        assert answer.exit_code == 76
        assert b"nobody cancelled" in answer.output


def test_a_worker_that_dies_of_the_cancel_is_no_hang_and_no_other_request_is_harmed(tmp_path: Path) -> None:
    with RawHost(echo_tool("--cancel"), "--tool-cancel", "--max-instances", "2", cwd=tmp_path) as host:
        host.send(ask("--hang", request_id=1))  # sleeps where no cancel is looked at
        until(host.workers, "a worker")
        host.send(cancel(1), ask("other", request_id=2))
        (other,) = host.receive(1)
        assert (other.pb.request_id, other.pb.exit_code) == (2, 0)
        for pid in host.workers():
            psutil.Process(pid).kill()
        (answer,) = host.receive(1)
        assert answer.pb.request_id == 1
        assert answer.pb.was_cancelled or answer.pb.exit_code == 70
