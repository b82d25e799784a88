"""What a client makes of a daemon: of its absence, its answers, and of its end at any time."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import stat
import threading
from collections.abc import Iterator

import pytest

from tests.support.client_world import SIDE_CHANNEL, ClientWorld
from wrapper.client_protocol import (
    MAX_BODY_BYTES,
    MAX_NAME_BYTES,
    MAX_OUTPUT_BYTES,
    FailureKind,
    busy,
    end,
    failure,
    one_shot,
    output,
    taken,
    waiting,
)

RERUN = "nativelink_worker_entrypoint: the infrastructure failed, run this action again\n"
DIRECT = (0, b"direct\n", b"")
LOST = b"nativelink_worker_entrypoint: the pool daemon was lost while it had the action\n"


# ---- what the daemon gets --------------------------------------------------------------------------


def test_the_request_tells_all_and_the_descriptor_is_the_cwd(world: ClientWorld) -> None:
    env = world.environment(NL_WORKER_TOOL="javac", NL_WORKER_PROTOCOL="json", NL_TIMEOUT_MS="90000", A="b")
    process = world.start(["javac", "@args"], env)
    connection = world.accept()
    request = connection.request()
    assert (request.argv, request.key, request.tool) == (("javac", "@args"), "java", "javac")
    assert (request.protocol, request.timeout_s) == ("json", 90.0)
    assert request.env == (("PATH", "/usr/bin:/bin"), ("A", "b"))
    info = os.fstat(connection.cwd)
    assert stat.S_ISDIR(info.st_mode)
    assert os.path.samestat(info, world.cwd.stat())
    assert os.listdir(connection.cwd) == []  # it is open for reading
    connection.send(taken(), end(0))
    assert world.end(process).code == 0
    assert connection.ends()


@pytest.mark.parametrize(
    ("key", "tool", "asks"), [("k", "", True), ("", "t", True), ("", "", False), ("k", "t", True)]
)
def test_a_key_or_a_tool_makes_an_action_the_daemons(
    world: ClientWorld, key: str, tool: str, asks: bool
) -> None:
    env = world.environment(NL_WORKER_KEY=key, NL_WORKER_TOOL=tool, NL_WORKER_PROTOCOL="proto")
    if asks:
        assert world.converse(taken() + end(9), env=env).code == 9
    else:
        assert world.run(["/bin/echo", "direct"], env) == DIRECT
        assert world.nobody_connects()


def test_with_the_hosts_time_outs_the_daemon_is_told_of_them_all_the_same(world: ClientWorld) -> None:
    world.policy(timeouts="host")
    process = world.start(["/bin/echo"], world.environment(NL_TIMEOUT_MS="250"))
    connection = world.accept()
    assert connection.request().timeout_s == 0.25
    connection.send(taken(), failure(FailureKind.TIMEOUT, "too slow"))
    assert world.end(process).code == 124
    assert world.side_channel() is None


def test_standard_output_and_error_are_not_handed_over(world: ClientWorld) -> None:
    """The host would wait for whoever keeps them open."""
    process = world.start(["/bin/echo"])
    connection = world.accept()
    connection.request()
    process.kill()
    assert process.communicate() == (b"", b"")  # both ended, though the daemon lives


# ---- large requests --------------------------------------------------------------------------------


def test_a_megabyte_of_arguments_and_variables_arrives(world: ClientWorld) -> None:
    argv = ["tool", *(f"{number:06}" + "x" * 994 for number in range(1000))]
    env = world.environment(**{f"V{number}": "y" * 1000 for number in range(500)})
    process = world.start(argv, env)
    connection = world.accept()
    request = connection.request()
    assert request.argv == tuple(argv)
    assert len(request.env) == 501
    connection.send(taken(), end(0))
    assert world.end(process).code == 0


def exactly(world: ClientWorld, body_bytes: int) -> tuple[list[str], dict[str, str]]:
    """Arguments and an environment of which the request's body has this size."""
    env = world.environment()
    names = ("NL_WORKER_KEY", "NL_SIDE_CHANNEL", "NL_ACTION_DIR")
    fixed = (
        16
        + len(env["NL_WORKER_KEY"])
        + 3
        + sum(len(f"{n}={v}") + 1 for n, v in env.items() if n not in names)
    )
    argv = ["/bin/true"]
    left = body_bytes - fixed - len(argv[0]) - 1
    while left > 100_000:
        argv.append("x" * 99_999)
        left -= 100_000
    argv.append("x" * (left - 1))
    return argv, env


@pytest.fixture
def large_arguments() -> Iterator[None]:
    """They may take a quarter of the stack's limit, and 6 MB whatever that is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    resource.setrlimit(resource.RLIMIT_STACK, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_STACK, (soft, hard))


@pytest.mark.usefixtures("large_arguments")
def test_a_request_of_several_megabytes_arrives_however_slowly_it_is_read(world: ClientWorld) -> None:
    argv, env = exactly(world, 5 << 20)
    process = world.start(argv, env)
    connection = world.accept()
    connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    assert connection.request().argv == tuple(argv)
    connection.send(taken(), end(5))
    assert world.end(process).code == 5


@pytest.mark.parametrize("variable", ["NL_WORKER_KEY", "NL_WORKER_TOOL", "NL_WORKER_PROTOCOL"])
def test_a_name_of_more_than_the_bound_makes_the_action_run_directly(
    world: ClientWorld, variable: str
) -> None:
    env = world.environment(**{variable: "é" * (MAX_NAME_BYTES // 2)})
    assert world.converse(taken() + end(4), env=env).code == 4
    env[variable] += "x"
    assert world.run(["/bin/echo", "direct"], env) == DIRECT
    assert world.nobody_connects()


@pytest.mark.parametrize("what", ["arguments", "variables"])
def test_more_strings_than_the_bound_make_the_action_run_directly(world: ClientWorld, what: str) -> None:
    argv, env = ["/bin/true"], world.environment()
    if what == "arguments":
        argv += ["x"] * 65535
    else:
        env |= {f"V{number}": "" for number in range(65535)}
    assert world.converse(taken() + end(4), argv, env).code == 4
    if what == "arguments":
        argv.append("x")
    else:
        env["X"] = ""
    assert world.run(argv, env) == (0, b"", b"")
    assert world.nobody_connects()


# ---- before TAKEN ----------------------------------------------------------------------------------


def absent(world: ClientWorld) -> None:
    world.socket_path.unlink()


def refused(world: ClientWorld) -> None:
    world.listener.close()


def not_a_socket(world: ClientWorld) -> None:
    world.socket_path.unlink()
    world.socket_path.write_text("")


def folder_is_missing(world: ClientWorld) -> None:
    world.policy(socket=str(world.folder / "nowhere" / "socket"))


NOBODY = pytest.mark.parametrize("how", [absent, refused, not_a_socket, folder_is_missing])


@NOBODY
def test_without_a_daemon_the_action_runs_directly(world: ClientWorld, how: object) -> None:
    how(world)  # type: ignore[operator]
    assert world.run(["/bin/echo", "direct"]) == DIRECT


@NOBODY
def test_without_a_daemon_the_action_fails_if_the_policy_says_so(world: ClientWorld, how: object) -> None:
    world.policy(fallback="fail")
    how(world)  # type: ignore[operator]
    if how is folder_is_missing:
        world.policy(fallback="fail", socket=str(world.folder / "nowhere" / "socket"))
    ended = world.run(["/bin/echo", "direct"])
    assert (ended.code, ended.stdout) == (75, b"")
    assert b"did not take the action: " in ended.stderr
    assert world.side_channel() is None


@pytest.mark.parametrize("frames", [b"", waiting(), waiting() * 3 + b"T\0\0", busy("full"), b"?"])
def test_who_does_not_say_taken_leaves_the_action_to_the_fallback(world: ClientWorld, frames: bytes) -> None:
    assert world.converse(frames) == DIRECT
    world.policy(fallback="fail")
    ended = world.converse(frames)
    assert (ended.code, ended.stdout) == (75, b"")
    reason = b"full" if frames[:1] == b"B" else b"went away"
    assert ended.stderr.startswith(b"nativelink_worker_entrypoint: the pool daemon at /")
    assert reason in ended.stderr
    assert world.side_channel() is None


def test_a_daemon_that_closes_without_reading_is_one_that_went_away(world: ClientWorld) -> None:
    process = world.start(["/bin/echo", "direct"])
    world.accept().close()
    assert world.end(process) == DIRECT


@pytest.mark.usefixtures("large_arguments")
def test_what_a_daemon_says_before_it_closes_without_reading_is_heard(world: ClientWorld) -> None:
    world.policy(fallback="fail")
    argv, env = exactly(world, 2 << 20)
    process = world.start(argv, env)
    connection = world.accept()
    connection.send(failure(FailureKind.REFUSED, "too many connections", 69))
    connection.close()
    assert world.end(process) == (69, b"", b"nativelink_worker_entrypoint: too many connections\n")


@pytest.mark.parametrize("frames", [one_shot("not a worker"), taken() + waiting() + one_shot("")])
@pytest.mark.parametrize("fallback", ["one-shot", "fail"])
def test_the_daemons_one_shot_is_run_whatever_the_fallback_is(
    world: ClientWorld, frames: bytes, fallback: str
) -> None:
    world.policy(fallback=fallback)
    assert world.converse(frames) == DIRECT
    env = world.environment(NL_TIMEOUT_MS="100")
    assert world.converse(frames, ["/bin/sleep", "1000"], env).code == 124
    assert world.side_channel() == '{"failure": "timeout"}'


@pytest.mark.parametrize("fallback", ["one-shot", "fail"])
def test_the_connection_is_closed_before_the_action_runs(world: ClientWorld, fallback: str) -> None:
    """Else a daemon would take the action for a client that waits."""
    for frames, env in (
        (one_shot(""), world.environment()),
        (busy(""), world.environment(NL_TIMEOUT_MS="60000")),
    ):
        world.policy()
        read, write = os.pipe()
        try:
            process = world.start(["/bin/cat"], env, stdin=read)
            connection = world.accept()
            connection.request()
            connection.send(frames)
            assert connection.ends()
            assert process.poll() is None
        finally:
            os.close(read)
            os.close(write)
        assert world.end(process).code == 0


# ---- silence ---------------------------------------------------------------------------------------


def test_a_daemon_that_is_silent_before_taken_is_given_up(world: ClientWorld) -> None:
    world.policy(silence_s="0.2")
    process = world.start(["/bin/echo", "direct"])
    connection = world.accept()
    connection.request()
    assert world.end(process) == DIRECT
    with pytest.raises(BrokenPipeError):
        connection.send(taken())


def test_a_daemon_that_is_silent_after_taken_is_lost(world: ClientWorld) -> None:
    world.policy(silence_s="0.2")
    process = world.start(["/bin/echo", "direct"])
    connection = world.accept()
    connection.request()
    connection.send(taken())
    assert world.end(process) == (75, b"", LOST)
    assert world.side_channel() == RERUN


def test_a_daemon_that_gives_signs_of_life_is_waited_for(world: ClientWorld) -> None:
    world.policy(silence_s="0.5")
    process = world.start(["/bin/echo", "direct"])
    connection = world.accept()
    connection.request()
    connection.send(taken())
    quiet = threading.Event()
    for _ in range(8):  # together much longer than the silence that is allowed
        assert not quiet.wait(0.1)
        connection.send(waiting())
    connection.send(end(6))
    assert world.end(process).code == 6


def test_giving_up_is_atomic(world: ClientWorld) -> None:
    """Whatever moment the daemon says TAKEN at: it fails to, or the action is not run a second time.

    The silence is about as long as the time to TAKEN, so that both orders happen.
    """
    world.policy(silence_s="0.005")
    both = set()
    pause = threading.Event()
    for attempt in range(60):
        process = world.start(["/bin/echo", "direct"])
        connection = world.accept()
        connection.request()
        pause.wait(0.001 * (attempt % 30))
        try:
            connection.send(taken())
            is_taken = True
        except BrokenPipeError:
            is_taken = False
        ended = world.end(process)
        connection.close()
        assert (ended.code, ended.stdout) == ((75, b"") if is_taken else (0, b"direct\n")), attempt
        both.add(is_taken)
    assert both == {True, False}


def test_a_full_backlog_does_not_hold_an_action_for_ever(worlds: list[ClientWorld]) -> None:
    """The socket's own time-out, 5 s, ends it."""
    with contextlib.ExitStack() as stack:
        for world in worlds:
            world.listener.listen(0)
            try:
                while True:
                    client = stack.enter_context(socket.socket(socket.AF_UNIX))
                    client.setblocking(False)
                    client.connect(str(world.socket_path))
            except BlockingIOError:
                world.start(["/bin/echo", "direct"])
        for world in worlds:
            assert world.end() == DIRECT


# ---- after TAKEN -----------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [b"", waiting(), output(b"x")[:-1], b"E\4\0\0\0\0\0\0", b"T\0\0\0\0", b"?"])
@pytest.mark.parametrize("lost", ["rerun", "fail"])
def test_a_daemon_that_is_lost_with_the_action_never_makes_a_second_run(
    world: ClientWorld, more: bytes, lost: str
) -> None:
    world.policy(lost=lost)
    assert world.converse(taken() + more) == (75 if lost == "rerun" else 70, b"", LOST)
    assert world.side_channel() == (RERUN if lost == "rerun" else None)


@pytest.mark.parametrize("fallback", ["one-shot", "fail"])
def test_the_fallback_has_no_say_after_taken(world: ClientWorld, fallback: str) -> None:
    world.policy(fallback=fallback)
    assert world.converse(taken()).code == 75


def test_a_time_out_that_the_daemon_tells_is_written_down(world: ClientWorld) -> None:
    ended = world.converse(taken() + output(b"so far\n") + failure(FailureKind.TIMEOUT, "after 1 s"))
    assert ended == (124, b"", b"so far\nnativelink_worker_entrypoint: after 1 s\n")
    assert world.side_channel() == '{"failure": "timeout"}'
    assert (world.action_directory / SIDE_CHANNEL).stat().st_mode & 0o777 == 0o644


def test_frames_after_the_last_are_not_looked_at(world: ClientWorld) -> None:
    assert world.converse(taken() + end(3) + output(b"x") + end(4) + b"?") == (3, b"", b"")
    assert world.converse(one_shot("") + taken()) == DIRECT


# ---- output ----------------------------------------------------------------------------------------


def test_megabytes_of_output_arrive_whole_and_in_order(world: ClientWorld) -> None:
    data = b"".join(b"%07d\n" % number for number in range(400_000))
    process = world.start(["/bin/echo"])
    connection = world.accept()
    connection.request()
    sender = threading.Thread(target=connection.send, args=(taken(), output(data), end(2)))
    sender.start()
    ended = world.end(process)
    sender.join()
    assert (ended.code, ended.stdout) == (2, b"")
    assert ended.stderr == data


def test_small_frames_by_the_thousand_cost_no_more_than_their_bytes(world: ClientWorld) -> None:
    frames = b"".join(output(b"%d\n" % number) for number in range(5000))
    ended = world.converse(taken() + frames + end(0))
    assert ended.stderr == b"".join(b"%d\n" % number for number in range(5000))


def test_output_of_any_bytes_and_of_the_largest_frame_passes(world: ClientWorld) -> None:
    data = bytes(range(256)) * (MAX_OUTPUT_BYTES // 256)
    frames = output(data)
    assert len(frames) == MAX_OUTPUT_BYTES + 5
    process = world.start(["/bin/echo"])
    connection = world.accept()
    connection.request()
    sender = threading.Thread(target=connection.send, args=(taken(), frames, end(0)))
    sender.start()
    assert world.end(process).stderr == data
    sender.join()


def test_a_standard_error_that_does_not_wait_is_waited_for(world: ClientWorld) -> None:
    """Somebody has made the pipe non-blocking."""
    read, write = os.pipe()
    try:
        os.set_blocking(write, False)
        process = world.start(["/bin/echo"], stderr=write)
        os.close(write)
        write = -1
        connection = world.accept()
        connection.request()
        data = os.urandom(1 << 20)
        sender = threading.Thread(target=connection.send, args=(taken(), output(data), end(0)))
        sender.start()
        received = b""
        while chunk := os.read(read, 1 << 16):
            received += chunk
        sender.join()
    finally:
        os.close(read)
        if write >= 0:
            os.close(write)
    assert received == data
    assert world.end(process).code == 0


def test_a_standard_error_that_nobody_reads_any_more_changes_no_exit_code(world: ClientWorld) -> None:
    read, write = os.pipe()
    process = world.start(["/bin/echo"], stderr=write)
    os.close(write)
    os.close(read)
    connection = world.accept()
    connection.request()
    connection.send(taken(), output(b"x" * 100_000), waiting(), output(b"y"), end(3))
    assert process.wait(30) == 3


def test_with_standard_error_closed_output_goes_nowhere_and_not_into_the_socket(world: ClientWorld) -> None:
    process = world.start(["/bin/echo"], prefix=("/bin/sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"))
    connection = world.accept()
    connection.request()
    connection.send(taken(), output(b"x" * 1000), end(3))
    assert world.end(process).code == 3
    assert connection.ends(), "nothing came after the request"


def test_the_largest_body_that_a_request_may_have_is_the_bound(world: ClientWorld) -> None:
    """The kernel takes 6 MB of arguments at most, so that the bound is above whatever can be started."""
    assert MAX_BODY_BYTES > 6 << 20
