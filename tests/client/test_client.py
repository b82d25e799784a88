"""The per-action client, native and in Python: every step of it, with one suite for both."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.client.conftest import NAME, Host
from tests.client.scripted_daemon import (
    TAKEN,
    WAITING,
    Asked,
    Behaviour,
    ScriptedDaemon,
    end,
    failure,
    frame,
    saying,
)
from wrapper.client_protocol import RequestDecoder

ONE_SHOT = frame(b"O", b"no worker's")
SHELL = ("/bin/sh", "-c")


@contextlib.contextmanager
def daemon(host: Host, *behaviours: Behaviour) -> Iterator[ScriptedDaemon]:
    with ScriptedDaemon(host.socket, *behaviours) as scripted:
        yield scripted


def eventually(condition: Callable[[], bool], timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# ---- served by a worker --------------------------------------------------------------------------------


def test_a_worker_answers_and_its_output_and_code_are_passed_on(host: Host) -> None:
    with daemon(host, saying(WAITING, TAKEN, frame(b"D", b"a warning\n"), frame(b"D", b"another"), end(3))):
        done = host.run("tool", "@flags")
    assert (done.returncode, done.stdout, done.stderr) == (3, b"", b"a warning\nanother")
    assert not host.side_channel.exists()


def test_the_daemon_gets_the_whole_action_and_only_its_working_directory(host: Host) -> None:
    env = {
        "NL_WORKER_TOOL": "t*",
        "NL_WORKER_PROTOCOL": "json",
        "NL_TIMEOUT_MS": "1500",
        "A": "b=c",
        "EMPTY": "",
        "ODD": os.fsdecode(b"\xff\xfe \n"),
    }
    with daemon(host, saying(TAKEN, end(0))) as scripted:
        assert host.run("tool", "", "a b", b"\xff\n", env=dict(env)).returncode == 0
    (asked,) = scripted.asked
    assert asked.argv == [b"tool", b"", b"a b", b"\xff\n"]
    assert (asked.key, asked.tool, asked.protocol, asked.timeout_ms) == (b"key", b"t*", b"json", 1500)
    expected = {b"PATH=/usr/bin:/bin", b"A=b=c", b"EMPTY=", b"ODD=\xff\xfe \n"}
    assert set(asked.env) - {one for one in asked.env if one.startswith(b"LC_CTYPE=")} == expected
    assert len(asked.descriptors) == 1
    assert asked.cwd == str(host.cwd)
    request = RequestDecoder().feed(asked.raw)
    assert request is not None
    assert [os.fsencode(text) for text in request.argv] == asked.argv
    assert request.timeout_s == 1.5


@pytest.mark.parametrize(
    ("code", "exit_code"), [(0, 0), (1, 1), (255, 255), (256, 1), (-1, 255), (-256, 1), (2**31 - 1, 255)]
)
def test_exit_codes_are_passed_on_and_no_failure_becomes_a_success(
    host: Host, code: int, exit_code: int
) -> None:
    with daemon(host, saying(TAKEN, end(code))):
        assert host.run("tool").returncode == exit_code


@pytest.mark.parametrize("piece", [1, 2, 3, 5, 7])
def test_frames_may_come_in_any_pieces(host: Host, piece: int) -> None:
    data = WAITING + TAKEN + frame(b"D", b"0123456789" * 20) + WAITING + end(9)
    with daemon(host, lambda asked: asked.say(data, piece=piece)):
        done = host.run("tool")
    assert (done.returncode, done.stderr) == (9, b"0123456789" * 20)


def test_much_output_is_written_whole_to_a_slow_reader(host: Host) -> None:
    text = os.urandom(65536)
    with daemon(host, saying(TAKEN, frame(b"D", text) * 20, end(0))):
        process = host.start("tool")
        time.sleep(0.05)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 0
    assert errors == text * 20


def test_an_stderr_that_nobody_reads_does_not_change_the_outcome(host: Host) -> None:
    read, write = os.pipe()
    os.close(read)
    with daemon(host, saying(TAKEN, frame(b"D", b"x" * 60000) * 3, end(5))), os.fdopen(write, "wb") as closed:
        process = host.start("tool", stderr=closed)
        process.communicate(timeout=30)
    assert process.returncode == 5


def test_nothing_of_the_streams_or_of_other_descriptors_is_passed_on(host: Host) -> None:
    """A process that inherits an action's output keeps the action open for ever."""
    seen: list[list[str]] = []

    def look(asked: Asked) -> None:
        seen.append([asked.cwd])
        asked.say(TAKEN + end(0))

    with daemon(host, look) as scripted:
        host.run("tool")
    assert seen == [[str(host.cwd)]]
    assert len(scripted.asked[0].descriptors) == 1


# ---- the action itself ---------------------------------------------------------------------------------

PROBE = "echo out; echo err >&2; env | sort; pwd; readlink /proc/self/fd/0; ls /proc/self/fd | wc -l; exit 4"


@pytest.mark.parametrize("why", ["no key", "elsewhere", "one-shot", "no policy", "absent"])
def test_an_action_that_gets_no_worker_runs_as_it_stands(host: Host, why: str) -> None:
    env: dict[str, str | None] = {"A": "1", "NL_WORKER_PROTOCOL": "x"}
    cwd = host.cwd
    if why == "no key":
        env["NL_WORKER_KEY"] = None
    elif why == "elsewhere":
        cwd = host.folder
    elif why == "no policy":
        host.policy.unlink()
    with daemon(host, saying(ONE_SHOT)) if why == "one-shot" else contextlib.nullcontext():
        done = host.run(*SHELL, PROBE, env=env, cwd=cwd)
    plain = subprocess.run(
        [*SHELL, PROBE],
        cwd=cwd,
        env={"A": "1", "PATH": "/usr/bin:/bin"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
    )
    lines = [line for line in done.stdout.splitlines() if not line.startswith(b"LC_CTYPE=")]
    assert (done.returncode, done.stderr) == (plain.returncode, plain.stderr) == (4, b"err\n")
    assert lines == plain.stdout.splitlines()


def test_the_tool_property_alone_is_enough_to_ask(host: Host) -> None:
    with daemon(host, saying(TAKEN, end(6))):
        done = host.run("tool", env={"NL_WORKER_KEY": "", "NL_WORKER_TOOL": "tool"})
    assert done.returncode == 6


def test_one_shot_may_be_said_after_taken_too(host: Host) -> None:
    """The daemon says so only when the action's tree is as it came."""
    with daemon(host, saying(TAKEN, ONE_SHOT)):
        done = host.run(*SHELL, "echo ran")
    assert (done.returncode, done.stdout) == (0, b"ran\n")


def test_the_action_cannot_reach_the_daemon_through_what_we_leave_open(host: Host) -> None:
    with daemon(host, saying(ONE_SHOT)):
        done = host.run(*SHELL, "ls -l /proc/self/fd")
    assert b"socket:" not in done.stdout
    assert str(host.work_root).encode() not in done.stdout


@pytest.mark.parametrize(("program", "code"), [("missing", 127), ("/nothing/there", 127), ("/etc", 126)])
def test_an_action_that_cannot_be_run_says_so(host: Host, program: str, code: int) -> None:
    done = host.run(program, env={"NL_WORKER_KEY": ""})
    assert done.returncode == code
    assert program.encode() in done.stderr


def test_a_program_without_a_slash_is_looked_for_on_the_actions_path(host: Host) -> None:
    tools = host.folder / "tools"
    tools.mkdir()
    (tools / "tool").write_text("#!/bin/sh\necho found $0\n")
    (tools / "tool").chmod(0o755)
    done = host.run("tool", env={"NL_WORKER_KEY": "", "PATH": f"/nothing:{tools}:/usr/bin:/bin"})
    assert done.stdout == f"found {tools}/tool\n".encode()


def test_signals_are_the_actions_own_again(host: Host) -> None:
    script = (
        "trap 'echo got; exit 9' TERM; grep -E '^Sig(Blk|Ign)' /proc/self/status; kill -TERM $$; sleep 10"
    )
    with daemon(host, saying(ONE_SHOT)):
        done = host.run(*SHELL, script)
    assert done.returncode == 9
    blocked, ignored = (int(line.split()[1], 16) for line in done.stdout.splitlines()[:2])
    assert blocked & (1 << signal.SIGTERM - 1 | 1 << signal.SIGINT - 1 | 1 << signal.SIGCHLD - 1) == 0
    assert ignored & (1 << signal.SIGTERM - 1 | 1 << signal.SIGPIPE - 1) == 0


# ---- time-outs -----------------------------------------------------------------------------------------


def test_a_direct_run_is_ended_in_time_with_all_of_its_group(host: Host) -> None:
    pids = host.folder / "pids"
    script = f"sleep 60 & echo $! > {pids}; echo $$ >> {pids}; wait"
    done = host.run(*SHELL, script, env={"NL_TIMEOUT_MS": "300", "NL_WORKER_KEY": ""})
    assert done.returncode == 124
    assert host.side_channel.read_text() == '{"failure": "timeout"}'
    for pid in pids.read_text().split():
        eventually(lambda pid=pid: not Path(f"/proc/{pid}").exists())  # type: ignore[misc]


def test_a_direct_run_that_ends_in_time_ends_as_it_did(host: Host) -> None:
    env: dict[str, str | None] = {"NL_TIMEOUT_MS": "30000", "NL_WORKER_KEY": ""}
    assert host.run(*SHELL, "exit 7", env=env).returncode == 7
    assert host.run(*SHELL, "kill -KILL $$", env=env).returncode == 128 + 9
    assert not host.side_channel.exists()


@pytest.mark.parametrize("text", ["", "0", "abc", "-5", "1e3", "9999999999999999999999", "604800001"])
def test_a_time_that_is_none_is_no_time(host: Host, text: str) -> None:
    script = 'test "$(ps -o ppid= -p $$)" -eq 0 2>/dev/null; echo $PPID'
    done = host.run(*SHELL, script, env={"NL_TIMEOUT_MS": text, "NL_WORKER_KEY": ""})
    assert int(done.stdout) == os.getpid()


def test_where_the_host_ends_actions_there_is_no_process_between(host: Host) -> None:
    host.set_policy("timeouts = host")
    done = host.run(*SHELL, "echo $PPID", env={"NL_TIMEOUT_MS": "5000", "NL_WORKER_KEY": ""})
    assert int(done.stdout) == os.getpid()


def test_a_killed_client_takes_its_action_along(host: Host) -> None:
    pid = host.folder / "pid"
    process = host.start(
        *SHELL,
        f"echo $$ > {pid}.new; mv {pid}.new {pid}; exec sleep 60",
        env={"NL_TIMEOUT_MS": "60000", "NL_WORKER_KEY": ""},
    )
    eventually(pid.exists)
    process.kill()
    process.communicate(timeout=30)
    eventually(lambda: not Path(f"/proc/{pid.read_text().strip()}").exists())


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_the_whole_group_of_a_direct_run(host: Host, signum: int) -> None:
    ready = host.folder / "ready"
    script = f"trap 'echo trapped; exit 3' TERM INT; touch {ready}; while :; do sleep 0.05; done"
    process = host.start(*SHELL, script, env={"NL_TIMEOUT_MS": "60000", "NL_WORKER_KEY": ""})
    eventually(ready.exists)
    process.send_signal(signum)
    output, _ = process.communicate(timeout=30)
    assert (process.returncode, output) == (3, b"trapped\n")


def test_a_worker_that_took_too_long_is_told_to_the_host(host: Host) -> None:
    with daemon(host, saying(TAKEN, failure(b"t", b"it took 5 s"))):
        done = host.run("tool", env={"NL_TIMEOUT_MS": "5000"})
    assert done.returncode == 124
    assert b"it took 5 s" in done.stderr
    assert host.side_channel.read_text() == '{"failure": "timeout"}'


def test_a_time_out_is_not_told_to_a_host_that_ends_actions_itself(host: Host) -> None:
    host.set_policy("timeouts = host")
    with daemon(host, saying(TAKEN, failure(b"t"))):
        assert host.run("tool").returncode == 124
    assert not host.side_channel.exists()


# ---- the side-channel file -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "",
        "A" * 32,
        "a" * 31,
        "a" * 33,
        "g" * 32,
        "a" * 31 + "/",
        "../" + "a" * 32 + "/x",
        "work",
        "a" * 32 + "\n",
    ],
)
def test_no_other_file_can_be_named_as_the_side_channel(host: Host, name: str) -> None:
    before = sorted(host.folder.rglob("*"))
    with daemon(host, saying(TAKEN, failure(b"t"))):
        done = host.run("tool", env={"NL_SIDE_CHANNEL": name})
    assert done.returncode == 124
    assert b"NL_SIDE_CHANNEL" in done.stderr
    assert sorted(host.folder.rglob("*")) == before


@pytest.mark.parametrize("folder", ["/etc", "/tmp", "..", "../../..", ""])
def test_the_folder_of_the_side_channel_is_never_believed(host: Host, folder: str) -> None:
    with daemon(host, saying(TAKEN, failure(b"t"))):
        host.run("tool", env={"NL_SIDE_CHANNEL": f"{folder}/{NAME}", "NL_ACTION_DIR": "/etc"})
    assert host.side_channel.read_text() == '{"failure": "timeout"}'
    assert not Path("/etc", NAME).exists()


def test_a_link_in_its_place_is_replaced_and_not_followed(host: Host) -> None:
    precious = host.folder / "precious"
    precious.write_text("precious")
    host.side_channel.symlink_to(precious)
    (host.action_dir / f".nlww-{NAME}").symlink_to(precious)
    with daemon(host, saying(TAKEN, failure(b"l"))):
        host.run("tool")
    assert precious.read_text() == "precious"
    assert not host.side_channel.is_symlink()


def test_the_action_directory_is_that_of_the_working_directory_however_deep(host: Host) -> None:
    deep = host.cwd / "a" / "b"
    deep.mkdir(parents=True)
    with daemon(host, saying(TAKEN, failure(b"t"))) as scripted:
        host.run("tool", cwd=deep)
    assert scripted.asked[0].cwd == str(deep)
    assert host.side_channel.exists()


def test_directly_beneath_the_work_root_is_no_action(host: Host) -> None:
    with daemon(host, saying(TAKEN, end(5))) as scripted:
        for cwd in (host.work_root, host.action_dir):
            assert host.run("/bin/true", cwd=cwd).returncode == 0
    assert scripted.asked == []


def test_the_second_of_two_work_roots_counts_too(host: Host) -> None:
    other = host.folder / "second" / "op" / "work"
    other.mkdir(parents=True)
    host.set_policy(f"work_root = {host.folder}/second/")
    with daemon(host, saying(TAKEN, end(5))):
        assert host.run("tool", cwd=other).returncode == 5


# ---- a daemon that is absent, full or gone -------------------------------------------------------------


def gone(asked: Asked) -> None:
    pass


BEFORE = {
    "gone": gone,
    "busy": saying(frame(b"B", b"the queue is full")),
    "waiting, then gone": saying(WAITING, WAITING),
    "waiting, then busy": saying(WAITING, frame(b"B", b"the queue is full")),
    "another protocol": saying(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
    "half a frame": saying(TAKEN[:3]),
    "too large": saying(b"D" + struct.pack("<I", 65537)),
    "output before taken": saying(frame(b"D", b"x")),
    "end before taken": saying(end(0)),
}


@pytest.mark.parametrize("how", BEFORE)
def test_before_it_was_taken_the_action_runs_as_it_stands(host: Host, how: str) -> None:
    with daemon(host, BEFORE[how]):
        done = host.run(*SHELL, "echo ran; exit 2")
    assert (done.returncode, done.stdout) == (2, b"ran\n")
    assert not host.side_channel.exists()


@pytest.mark.parametrize("how", ["absent", *BEFORE])
def test_or_it_fails_if_the_policy_says_so(host: Host, how: str) -> None:
    host.set_policy("fallback = fail")
    with contextlib.nullcontext() if how == "absent" else daemon(host, BEFORE[how]):
        done = host.run(*SHELL, "echo ran")
    assert (done.returncode, done.stdout) == (75, b"")
    assert b"fallback = fail" in done.stderr
    if "busy" in how:
        assert b"the queue is full" in done.stderr


AFTER = {
    "gone": saying(TAKEN),
    "gone in mid-frame": saying(TAKEN, end(0)[:-1]),
    "busy": saying(TAKEN, frame(b"B", b"full")),
    "taken twice": saying(TAKEN, TAKEN, end(0)),
    "nonsense": saying(TAKEN, b"nonsense"),
    "an unknown frame": saying(TAKEN, frame(b"Z")),
    "empty output": saying(TAKEN, frame(b"D")),
    "an end of another length": saying(TAKEN, frame(b"E", b"\0\0\0")),
    "lost": saying(TAKEN, failure(b"l", b"the worker died")),
    "an unknown failure": saying(TAKEN, failure(b"?", b"what")),
    "a failure without a kind": saying(TAKEN, frame(b"F")),
}


@pytest.mark.parametrize("how", AFTER)
def test_after_it_was_taken_it_is_never_run_by_us_and_the_host_is_told(host: Host, how: str) -> None:
    with daemon(host, AFTER[how]):
        done = host.run(*SHELL, f"touch {host.folder}/ran")
    assert done.returncode == 75
    assert not (host.folder / "ran").exists()
    told = host.side_channel.read_text()
    assert told
    assert not told.startswith("{")


@pytest.mark.parametrize("how", AFTER)
def test_or_it_fails_for_good(host: Host, how: str) -> None:
    host.set_policy("lost = fail")
    with daemon(host, AFTER[how]):
        done = host.run(*SHELL, f"touch {host.folder}/ran")
    assert done.returncode == 70
    assert not (host.folder / "ran").exists()
    assert not host.side_channel.exists()


def test_an_action_that_is_refused_fails_with_the_code_and_the_reason(host: Host) -> None:
    with daemon(host, saying(failure(b"r", b"flagfile missing: out/flags", 64))):
        done = host.run("tool")
    assert done.returncode == 64
    assert b"flagfile missing: out/flags" in done.stderr
    assert not host.side_channel.exists()


def wait_until_told(asked: Asked) -> None:
    asked.wait_for_end()


@pytest.mark.parametrize("taken", [False, True])
def test_a_daemon_that_says_nothing_any_more_is_lost(host: Host, taken: bool) -> None:
    host.set_policy("silence_s = 1")

    def silent(asked: Asked) -> None:
        asked.say(TAKEN if taken else WAITING)
        asked.wait_for_end()

    with daemon(host, silent):
        done = host.run(*SHELL, "echo ran")
    assert (done.returncode, done.stdout) == ((75, b"") if taken else (0, b"ran\n"))
    assert host.side_channel.exists() == taken


def test_a_daemon_that_says_that_it_lives_is_waited_for(host: Host) -> None:
    host.set_policy("silence_s = 1")

    def patient(asked: Asked) -> None:
        for _ in range(8):
            time.sleep(0.25)
            asked.say(WAITING)
        asked.say(TAKEN + end(4))

    with daemon(host, patient):
        assert host.run("tool").returncode == 4


def test_whoever_gives_up_and_is_taken_in_that_moment_does_not_run_it(host: Host) -> None:
    """The daemon's TAKEN lies in the socket when the client gives up: it is the daemon's."""
    host.set_policy("silence_s = 1")
    process: list[subprocess.Popen[bytes]] = []

    def late(asked: Asked) -> None:
        time.sleep(0.1)
        process[0].send_signal(signal.SIGSTOP)
        time.sleep(1.2)
        asked.say(TAKEN)
        process[0].send_signal(signal.SIGCONT)
        asked.wait_for_end()

    with daemon(host, late):
        process.append(host.start(*SHELL, f"touch {host.folder}/ran"))
        process[0].communicate(timeout=30)
    assert process[0].returncode == 75
    assert not (host.folder / "ran").exists()


def test_after_it_gave_up_the_daemon_can_take_nothing(host: Host) -> None:
    host.set_policy("silence_s = 1")
    took: list[bool] = []

    def late(asked: Asked) -> None:
        asked.wait_for_end()
        try:
            asked.say(TAKEN)
            took.append(True)
        except OSError:
            took.append(False)

    with daemon(host, late):
        done = host.run(*SHELL, "echo ran")
    assert (done.stdout, took) == (b"ran\n", [False])


@pytest.mark.parametrize("at", range(len(TAKEN + frame(b"D", b"ab") + end(0))))
def test_an_answer_that_ends_anywhere_is_never_a_success(host: Host, at: int) -> None:
    whole = TAKEN + frame(b"D", b"ab") + end(0)
    with daemon(host, saying(whole[:at])):
        done = host.run(*SHELL, "exit 55")
    assert done.returncode == (55 if at < len(TAKEN) else 75)


def test_a_socket_that_nobody_accepts_on_does_not_hold_the_action_for_ever(host: Host) -> None:
    host.set_policy("silence_s = 1")
    with ScriptedDaemon(host.socket, gone):
        pass
    import socket

    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(str(host.socket))
        deaf.listen(1)
        done = host.run(*SHELL, "echo ran")
    assert done.stdout == b"ran\n"


# ---- cancelled -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("first", [TAKEN, WAITING], ids=["taken", "waiting"])
def test_a_signal_cancels_and_the_end_of_it_is_waited_for(host: Host, signum: int, first: bytes) -> None:
    asked_to_wait = threading.Event()
    rest: list[bytes] = []

    def serve(asked: Asked) -> None:
        asked.say(first)
        asked_to_wait.set()
        rest.append(asked.wait_for_end())
        time.sleep(0.1)
        asked.say(failure(b"c", b"nothing is left of it"))

    with daemon(host, serve):
        process = host.start(*SHELL, f"touch {host.folder}/ran")
        assert asked_to_wait.wait(20)
        time.sleep(0.05)
        process.send_signal(signum)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + signum
    assert b"nothing is left of it" in errors
    assert rest == [b""]
    assert not (host.folder / "ran").exists()
    assert not host.side_channel.exists()


def test_a_second_signal_ends_it_at_once(host: Host) -> None:
    cancelled, release = threading.Event(), threading.Event()

    def serve(asked: Asked) -> None:
        asked.say(TAKEN)
        asked.wait_for_end()
        cancelled.set()
        release.wait(20)

    with daemon(host, serve):
        process = host.start("tool")
        time.sleep(0.1 if not host.is_python else 0.3)
        process.send_signal(signal.SIGTERM)
        assert cancelled.wait(20)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=5)
        release.set()
    assert process.returncode == 128 + signal.SIGINT


def test_the_answer_that_comes_after_a_cancel_still_counts(host: Host) -> None:
    def serve(asked: Asked) -> None:
        asked.say(TAKEN)
        asked.wait_for_end()
        asked.say(end(0))

    with daemon(host, serve):
        process = host.start("tool")
        time.sleep(0.1 if not host.is_python else 0.3)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    assert process.returncode == 0


def test_a_kill_is_seen_as_the_end_of_the_connection(host: Host) -> None:
    taken, seen = threading.Event(), threading.Event()

    def serve(asked: Asked) -> None:
        asked.say(TAKEN)
        taken.set()
        asked.wait_for_end()
        seen.set()

    with daemon(host, serve):
        process = host.start("tool")
        assert taken.wait(20)
        process.kill()
        assert seen.wait(20)
        process.communicate()


# ---- policy --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lines",
    [
        ["unknown = 1"],
        ["fallback = maybe"],
        ["lost = never"],
        ["timeouts = both"],
        ["silence_s = 0"],
        ["silence_s = 1.5"],
        ["silence_s = 99999"],
        ["silence_s ="],
        ["work_root = relative"],
        ["socket = relative"],
        ["socket = /" + "x" * 200],
        ["no equals sign"],
        ["work_root = /x"] * 16,
        ["nul\0 = 1"],
    ],
    ids=lambda lines: lines[0][:20].replace("\0", "0"),
)
def test_a_policy_that_is_not_in_order_stops_every_action(host: Host, lines: list[str]) -> None:
    host.set_policy(*lines)
    done = host.run(*SHELL, "echo ran")
    assert (done.returncode, done.stdout) == (78, b"")
    assert b"nativelink_worker_entrypoint.conf" in done.stderr


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o666])
def test_a_policy_that_others_can_write_is_not_believed(host: Host, mode: int) -> None:
    host.policy.chmod(mode)
    done = host.run(*SHELL, "echo ran")
    assert (done.returncode, done.stdout) == (78, b"")


@pytest.mark.parametrize("kind", ["another's", "link", "directory", "FIFO", "too large"])
def test_a_policy_that_somebody_else_made_is_not_believed(host: Host, nobody: int, kind: str) -> None:
    text = host.policy.read_text()
    if kind == "another's":
        os.chown(host.policy, nobody, nobody)
    elif kind == "too large":
        host.policy.write_text(text + "#" * 65536)
    else:
        host.policy.unlink()
        if kind == "link":
            (host.folder / "elsewhere").write_text(text)
            host.policy.symlink_to(host.folder / "elsewhere")
        elif kind == "directory":
            host.policy.mkdir()
        else:
            os.mkfifo(host.policy)
    done = host.run(*SHELL, "echo ran")
    assert (done.returncode, done.stdout) == (78, b"")


def test_the_owner_of_the_program_may_write_its_policy(host: Host, nobody: int) -> None:
    os.chown(host.policy, nobody, nobody)
    os.chown(host.program, nobody, nobody)
    with daemon(host, saying(TAKEN, end(5))):
        assert host.run("tool").returncode == 5


def test_comments_blanks_and_carriage_returns_are_fine(host: Host) -> None:
    host.policy.write_text(
        f"# a comment\r\n\r\n  socket\t=  {host.socket} \r\n   # another\n"
        f"work_root={host.work_root}///\nlost = fail"
    )
    with daemon(host, saying(TAKEN)):
        assert host.run("tool").returncode == 70


def test_a_link_to_the_program_has_the_policy_of_the_program(host: Host) -> None:
    link = host.folder / "link"
    link.symlink_to(host.program)
    (host.folder / "nativelink_worker_entrypoint.conf").write_text("nonsense")
    host.program = link
    with daemon(host, saying(TAKEN, end(5))):
        assert host.run("tool").returncode == 5


@pytest.mark.parametrize(
    "name", ["NLWW_SOCKET", "NL_SOCKET", "SOCKET", "PYTHONPATH", "PYTHONSTARTUP", "PYTHONHOME"]
)
def test_no_variable_of_the_action_changes_where_it_connects(host: Host, name: str) -> None:
    with daemon(host, saying(TAKEN, end(5))):
        assert host.run("tool", env={name: str(host.folder)}).returncode == 5


# ---- the rest ------------------------------------------------------------------------------------------


def test_a_host_that_takes_it_for_a_persistent_worker_is_told_what_is_wrong(host: Host) -> None:
    for value in (None, ""):
        done = host.run("tool", "--persistent_worker", env={"NL_ACTION_DIR": value})
        assert done.returncode == 64
        assert b"supports-workers=1" in done.stderr
    with daemon(host, saying(TAKEN, end(5))):
        assert host.run("tool", "--persistent_worker").returncode == 5


def test_without_a_command_line_it_says_what_it_is_for(host: Host) -> None:
    done = host.run()
    assert done.returncode == 64
    assert b"command line" in done.stderr


def test_a_command_line_up_to_what_the_system_takes_is_sent(host: Host) -> None:
    long = ["x" * 100_000] * 10
    with daemon(host, saying(TAKEN, end(5))) as scripted:
        assert host.run("tool", *long).returncode == 5
    assert scripted.asked[0].argv[1:] == [text.encode() for text in long]


def test_a_key_that_is_too_long_is_no_workers(host: Host) -> None:
    with daemon(host, saying(TAKEN, end(5))) as scripted:
        assert host.run(*SHELL, "exit 6", env={"NL_WORKER_KEY": "k" * 4097}).returncode == 6
        assert host.run(*SHELL, "exit 6", env={"NL_WORKER_KEY": "k" * 4096}).returncode == 5
    assert len(scripted.asked) == 1


def test_it_works_without_standard_streams(host: Host) -> None:
    with daemon(host, saying(TAKEN, end(5))):
        done = subprocess.run(
            ["/bin/sh", "-c", f"exec {host.program} tool <&- >&- 2>&-"], cwd=host.cwd, env=host.environment()
        )
    assert done.returncode == 5


def test_the_two_ends_are_told_apart_by_every_frame_in_every_order(host: Host) -> None:
    """Whatever two frames come, the outcome is one of those that are allowed, and comes at once."""
    frames = [
        WAITING,
        TAKEN,
        ONE_SHOT,
        frame(b"B", b"b"),
        frame(b"D", b"d"),
        end(0),
        failure(b"t"),
        failure(b"l"),
    ]
    host.set_policy("timeouts = host", "lost = fail")
    behaviours = [saying(first, second) for first, second in itertools.product(frames, frames)]
    with daemon(host, *behaviours):
        for first, second in itertools.product(frames, frames):
            done = host.run(*SHELL, "exit 55")
            assert done.returncode in (0, 55, 70, 124), (first, second)
            assert (done.returncode == 0) == (first == TAKEN and second == end(0)), (first, second)
