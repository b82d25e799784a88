"""How worker mode ends: EOF, signals, a host that is gone or does not read. Nothing may be left."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.support.raw_host import PATIENCE_S, RawHost, ask, configured, echo_tool, outputs, until
from tests.workers.echo_worker import expected_output
from wrapper.worker_protocol.messages import WorkResponse


def test_end_of_input_finishes_what_was_accepted_and_ends_well(tmp_path: Path) -> None:
    with RawHost(echo_tool("--delay-ms", "20"), "--max-instances", "2", cwd=tmp_path) as host:
        host.send(*[ask(str(n), request_id=n) for n in range(1, 31)])
        answers = host.finish()
        assert outputs(answers) == {n: expected_output([b"%d" % n]) for n in range(1, 31)}
        host.assert_nothing_left()


def test_no_input_at_all_is_no_error_and_starts_nothing(tmp_path: Path) -> None:
    with RawHost(echo_tool("--exit-at-once", "3"), "-vv", cwd=tmp_path) as host:
        assert host.finish() == []
        assert "worker started" not in host.stderr()


def test_dev_null_and_files_as_stdin_and_stdout(tmp_path: Path) -> None:
    requests = tmp_path / "requests"
    requests.write_bytes(b"\x05\x0a\x01a\x18\x07")
    for source in (os.devnull, str(requests)):
        for target in (os.devnull, str(tmp_path / "answers")):
            with (
                open(source, "rb") as stdin,
                open(target, "wb") as stdout,
                RawHost(echo_tool(), cwd=tmp_path, stdin=stdin.fileno(), stdout=stdout.fileno()) as host,
            ):
                assert host.wait() == 0, host.stderr()
                assert host.stderr() == ""
    assert (tmp_path / "answers").read_bytes() == b"\x0a\x12\x06echo:a\x18\x07"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("multiplex", [False, True], ids=["singleplex", "multiplex"])
def test_a_signal_in_mid_request_answers_and_ends_promptly_with_all_children(
    tmp_path: Path, number: signal.Signals, multiplex: bool
) -> None:
    flags = ["--multiplex"] if multiplex else []
    options = ["--tool-multiplex"] if multiplex else []
    tool = echo_tool(*flags, "--own-child")
    with RawHost(tool, *options, "--max-instances", "2", cwd=tmp_path) as host:
        host.one("warm", "--leave-daemon")
        host.send(ask("--sleep-ms=100000", "--stderr=busy", request_id=1), ask("--hang", request_id=2))
        until(lambda: len(host.children()) >= (2 if multiplex else 4), "workers with their children")
        host.signal(number)
        answers = host.rest()
        assert host.wait() == 0
        assert sorted(answer.pb.request_id for answer in answers) == [1, 2]
        for answer in answers:
            assert answer.pb.exit_code == 75
            assert not answer.pb.was_cancelled  # nobody cancelled: that would be an error to Bazel
            assert number.name.encode() in answer.pb.output
        host.assert_nothing_left()


def test_sigterm_while_a_daemon_of_the_request_runs_kills_the_daemon_too(tmp_path: Path) -> None:
    with RawHost(echo_tool(), cwd=tmp_path) as host:
        host.send(ask("--leave-daemon", "--big=10", request_id=1), ask("--hang", request_id=2))
        host.receive(1)
        until(host.children, "workers")
        host.signal(signal.SIGTERM)
        host.rest()
        assert host.wait() == 0
        host.assert_nothing_left()


def test_a_tool_that_ignores_sigterm_and_the_end_of_its_input_is_killed(tmp_path: Path) -> None:
    tool = echo_tool("--ignore-sigterm", "--ignore-eof", "--own-child")
    options = configured(tmp_path, "limits: {stop_grace_s: 0.2}")
    with RawHost(tool, *options, "--max-instances", "2", cwd=tmp_path) as host:
        host.one("idle afterwards")
        host.send(ask("--hang", request_id=1))
        until(lambda: len(host.children()) >= 2, "the worker and its child")
        host.signal(signal.SIGTERM)
        host.rest()
        assert host.wait() == 0
        host.assert_nothing_left()


def test_a_host_that_dies_is_noticed_on_stdin_and_everything_ends(tmp_path: Path) -> None:
    with RawHost(echo_tool(), cwd=tmp_path) as host:
        host.one("warm")
        host.send(ask("--hang", request_id=1), ask("--sleep-ms=50", request_id=2))
        until(lambda: len(host.workers()) == 2, "two workers")
        host.receive(1)
        host.children()
        host.close_stdin()
        host.close_stdout()  # both ends, as when the host's process is killed
        host.process.send_signal(signal.SIGTERM)  # the hanging request would be waited for else
        assert host.wait() == 0
        host.assert_nothing_left()


def test_a_closed_stdout_ends_the_wrapper_although_its_stdin_stays_open(tmp_path: Path) -> None:
    with RawHost(echo_tool(), cwd=tmp_path) as host:
        host.send(ask("--sleep-ms=100", request_id=1), ask("--hang", request_id=2))
        until(host.workers, "a worker")
        host.close_stdout()
        assert host.wait() == 0
        assert "closed our stdout" not in host.stderr()  # that is for -v
        host.assert_nothing_left()


def test_the_workers_of_a_wrapper_that_is_killed_see_their_input_end(tmp_path: Path) -> None:
    with RawHost(echo_tool(), "--max-instances", "2", cwd=tmp_path) as host:
        host.send(*[ask("--sleep-ms=300", request_id=n) for n in range(1, 7)])
        host.receive(3)
        workers = [psutil.Process(pid) for pid in host.workers()]
        assert workers
        host.process.kill()
        _, alive = psutil.wait_procs(workers, timeout=PATIENCE_S)
        assert not alive
        host.wait()
        for directory in host.tmp.iterdir():  # the private directories are all that is left
            assert directory.name.startswith("nlww-")
            subprocess.run(["rm", "-r", str(directory)], check=True)


def test_a_host_that_does_not_read_costs_bounded_memory_and_gets_everything_later(tmp_path: Path) -> None:
    count, each = 3_000, 50_000  # 150 MB of answers
    stream = b"".join(
        bytes([len(body)]) + body
        for body in (
            ask(f"--big={each}", "x" * 90, request_id=n).pb.SerializeToString() for n in range(1, count + 1)
        )
    )
    with RawHost(echo_tool(), "--max-instances", "2", cwd=tmp_path) as host:
        host.one("warm")
        sent = host.try_to_send_bytes(stream)
        assert sent < len(stream), "it takes whatever comes"
        # Nothing is read until the wrapper has stopped working on what it took.
        assert wait_until_quiet(host) < 160, "the 1,000 requests in flight have 50 MB of answers"
        answers: list[WorkResponse] = []
        while len(answers) < count:
            answers += host.receive(min(100, count - len(answers)))
            sent += host.try_to_send_bytes(stream[sent:], patience_s=0)
        assert sorted(a.pb.request_id for a in answers) == list(range(1, count + 1))
        assert all(len(a.pb.output) > each for a in answers)
        assert host.one("alive").pb.output == expected_output([b"alive"])


def wait_until_quiet(host: RawHost) -> float:
    """Until neither the wrapper nor its workers use the processor any more; returns MiB."""
    before = -1.0

    def used() -> float:
        processes = [psutil.Process(host.process.pid), *host.children()]
        return sum(sum(process.cpu_times()[:2]) for process in processes)

    def is_quiet() -> bool:
        nonlocal before
        now = used()
        quiet, before = now == before, now
        if not quiet:
            try:
                host.process.wait(0.3)
            except subprocess.TimeoutExpired:
                pass
        return quiet

    until(is_quiet, "the wrapper waits")
    return host.rss_mib()


@pytest.mark.parametrize(
    ("stream", "said"),
    [
        (b"hello, is this a worker?\n" * 20, "expected"),
        (b"{not json at all}\n" * 3, "expected"),
        (b"\x7f\x0a", "of 128 bytes"),
        (b"\xff\xff\xff\xff\x7f", "length"),
        (b"\x80\x80\x80\x80\x10" + b"x" * 100, "length"),
    ],
    ids=["text", "almost-json", "truncated", "overlong", "oversized"],
)
@pytest.mark.parametrize("before", [0, 3], ids=["at-once", "after-three"])
def test_bytes_that_are_no_requests_are_named_and_what_came_before_is_answered(
    tmp_path: Path, stream: bytes, said: str, before: int
) -> None:
    with RawHost(echo_tool("--delay-ms", "10"), cwd=tmp_path) as host:
        host.send(*[ask("fine", request_id=n) for n in range(1, before + 1)])
        host.try_to_send_bytes(stream)
        answers = host.finish(65)
        assert outputs(answers) == dict.fromkeys(range(1, before + 1), expected_output([b"fine"]))
        assert "requests" in host.stderr()
        assert said in host.stderr()
        assert "at byte" in host.stderr()


def test_a_frame_above_the_configured_size_is_refused_from_its_length_alone(tmp_path: Path) -> None:
    with RawHost(echo_tool(), *configured(tmp_path, "limits: {max_frame_mb: 1}"), cwd=tmp_path) as host:
        host.one("fine")
        host.send_bytes(b"\x81\x80\x40")  # announces 1 MiB + 1
        assert host.rest() == []
        assert host.wait() == 65
        assert "1048577" in host.stderr()
