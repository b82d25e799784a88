"""Cancelling: by a signal, by a second one, and by the death of the client."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.support.client_world import PATIENCE_S, ClientWorld, Connection, signal_of
from wrapper.client_protocol import FailureKind, busy, end, failure, one_shot, output, taken, waiting

SIGNALS = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
TAKEN = pytest.mark.parametrize("is_taken", [False, True], ids=["before TAKEN", "after TAKEN"])


def begun(world: ClientWorld, *, is_taken: bool) -> tuple[subprocess.Popen[bytes], Connection]:
    """A client that is waiting: it has shown something of what was sent, or can have done nothing else."""
    process = world.start(["/bin/echo", "direct"])
    connection = world.accept()
    connection.request()
    if is_taken:
        connection.send(taken(), output(b"."))
        assert process.stderr is not None
        assert os.read(process.stderr.fileno(), 1) == b"."
    return process, connection


@SIGNALS
@TAKEN
def test_a_signal_asks_the_daemon_to_cancel_and_waits_for_its_word(
    world: ClientWorld, is_taken: bool, number: signal.Signals
) -> None:
    process, connection = begun(world, is_taken=is_taken)
    process.send_signal(number)
    assert connection.ends()
    assert process.poll() is None
    connection.send(waiting(), failure(FailureKind.CANCELLED, "as you wish"))
    ended = world.end(process)
    assert (ended.code, ended.stdout) == (128 + number, b"")
    assert ended.stderr.endswith(b"as you wish\n")
    assert world.side_channel() is None


@pytest.mark.parametrize("frames", [b"", busy("full"), one_shot("cancelled"), b"?"])
def test_a_cancelled_action_is_never_run_as_a_fallback(world: ClientWorld, frames: bytes) -> None:
    for policy in ({}, {"fallback": "fail"}):
        world.policy(**policy)
        process, connection = begun(world, is_taken=False)
        process.send_signal(signal.SIGTERM)
        assert connection.ends()
        connection.send(frames)
        connection.close()
        assert world.end(process) == (128 + signal.SIGTERM, b"", b"")


@pytest.mark.parametrize("frames", [b"", failure(FailureKind.LOST, "gone"), b"?"])
def test_a_cancelled_action_is_not_asked_for_again(world: ClientWorld, frames: bytes) -> None:
    process, connection = begun(world, is_taken=True)
    process.send_signal(signal.SIGINT)
    assert connection.ends()
    connection.send(frames)
    connection.close()
    assert world.end(process).code == 128 + signal.SIGINT
    assert world.side_channel() is None


def test_an_action_that_has_ended_meanwhile_has_ended(world: ClientWorld) -> None:
    process, connection = begun(world, is_taken=True)
    process.send_signal(signal.SIGTERM)
    assert connection.ends()
    connection.send(output(b"done"), end(3))
    ended = world.end(process)
    assert (ended.code, ended.stderr) == (3, b"done")


@SIGNALS
@TAKEN
def test_a_second_signal_does_not_wait(world: ClientWorld, is_taken: bool, number: signal.Signals) -> None:
    process, connection = begun(world, is_taken=is_taken)
    process.send_signal(signal.SIGTERM)
    assert connection.ends()
    process.send_signal(number)
    assert world.end(process)[:2] == (128 + number, b"")
    assert world.side_channel() is None


def test_a_daemon_that_does_not_confirm_is_waited_for_ten_seconds(worlds: list[ClientWorld]) -> None:
    all_begun = [begun(world, is_taken=True) for world in worlds]
    for process, connection in all_begun:
        process.send_signal(signal.SIGINT)
        assert connection.ends()
    for world in worlds:
        assert world.end()[:2] == (128 + signal.SIGINT, b"")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP, signal.SIGQUIT], ids=lambda n: n.name)
@TAKEN
def test_a_client_that_dies_is_seen_as_the_end_of_the_socket(
    world: ClientWorld, is_taken: bool, number: signal.Signals
) -> None:
    process = world.start(["/bin/echo", "direct"], prefix=("/bin/sh", "-c", 'ulimit -c 0; exec "$@"', "sh"))
    connection = world.accept()
    connection.request()
    if is_taken:
        connection.send(taken())
    process.send_signal(number)
    assert connection.ends()
    ended = world.end(process)
    assert (ended.code, ended.stdout) == (-number, b"")
    with pytest.raises(BrokenPipeError):
        connection.send(waiting())


@SIGNALS
def test_a_signal_while_output_cannot_be_written_is_told_to_the_daemon_at_once(
    world: ClientWorld, number: signal.Signals
) -> None:
    process, connection = begun(world, is_taken=True)
    connection.socket.settimeout(0)
    try:
        while True:  # until the pipe and the socket are full
            connection.send(output(b"x" * 65536))
    except BlockingIOError:
        connection.socket.settimeout(PATIENCE_S)
    process.send_signal(number)
    assert connection.ends()
    process.send_signal(number)
    process.wait(PATIENCE_S)
    assert signal_of(world.end(process)) == number


@pytest.mark.parametrize("blocked", ["TERM", "INT"])
def test_signals_that_were_blocked_or_ignored_by_who_started_us_are_heard(
    world: ClientWorld, blocked: str
) -> None:
    ignores = ("/bin/sh", "-c", f'trap "" {blocked}; exec "$@"', "sh")
    process = world.start(["/bin/echo"], prefix=ignores)
    connection = world.accept()
    connection.request()
    connection.send(taken())
    process.send_signal(signal.Signals[f"SIG{blocked}"])
    assert connection.ends()
    connection.send(failure(FailureKind.CANCELLED, ""))
    assert world.end(process).code == 128 + signal.Signals[f"SIG{blocked}"]


@pytest.mark.skipif(os.geteuid() != 0, reason="a pid namespace needs root")
def test_process_1_of_a_namespace_is_cancelled_from_outside(world: ClientWorld) -> None:
    prefix = ("/usr/bin/unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
    process = world.start(["/bin/echo"], prefix=prefix)
    connection = world.accept()
    connection.request()
    connection.send(taken())
    [child] = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(child), signal.SIGTERM)
    assert connection.ends()
    connection.send(failure(FailureKind.CANCELLED, ""))
    assert world.end(process).code == 128 + signal.SIGTERM
