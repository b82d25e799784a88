"""Running an action without a worker: as it stands, and under supervision where its time-out is ours."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys

import pytest

from tests.support.client_world import PATIENCE_S, ClientWorld, signal_of, wait_until_gone

TIMED_OUT = '{"failure": "timeout"}'
OURS = (
    "NL_WORKER_KEY",
    "NL_WORKER_TOOL",
    "NL_WORKER_PROTOCOL",
    "NL_TIMEOUT_MS",
    "NL_SIDE_CHANNEL",
    "NL_ACTION_DIR",
)
LONG_MS = "600000"
MODES = pytest.mark.parametrize("timeout", [None, LONG_MS], ids=["in place", "supervised"])


def env(timeout: str | None, **values: str) -> dict[str, str]:
    return {"PATH": "/usr/bin:/bin", **({} if timeout is None else {"NL_TIMEOUT_MS": timeout}), **values}


def python(code: str) -> list[str]:
    return [os.path.realpath(sys.executable), "-IS", "-c", code]


# ---- the environment -------------------------------------------------------------------------------


@MODES
def test_our_variables_are_not_passed_on_and_nothing_is_added(
    world: ClientWorld, timeout: str | None
) -> None:
    given = dict.fromkeys(OURS, "") | env(timeout, NL_OTHER="1", NL_WORKER_KEYS="2", LC_ALL="C")
    ended = world.run(["/usr/bin/env", "-0"], given)
    assert ended.code == 0
    assert set(ended.stdout.split(b"\0")) == {
        b"PATH=/usr/bin:/bin",
        b"NL_OTHER=1",
        b"NL_WORKER_KEYS=2",
        b"LC_ALL=C",
        b"",
    }


@MODES
def test_nothing_is_added_to_an_empty_environment(world: ClientWorld, timeout: str | None) -> None:
    given = {} if timeout is None else {"NL_TIMEOUT_MS": timeout}
    assert world.run(["/usr/bin/env", "-0"], given) == (0, b"", b"")


@MODES
def test_any_bytes_are_passed_on(world: ClientWorld, timeout: str | None) -> None:
    odd = bytes(range(1, 256))
    given: dict[bytes, bytes] = {b"ODD": odd, b"\xff\xfe": b"=x=", b"LC_ALL": b"C"}
    if timeout is not None:
        given[b"NL_TIMEOUT_MS"] = timeout.encode()
    code = "import posix; posix.write(1, open('/proc/self/cmdline', 'rb').read().split(b'marker\\0')[1])"
    assert (
        world.run([*python(code), "marker", odd, b"", b"--", odd], given).stdout
        == odd + b"\0\0--\0" + odd + b"\0"
    )
    shown = world.run(["/usr/bin/env", "-0"], given).stdout.split(b"\0")
    assert {b"ODD=" + odd, b"\xff\xfe==x="} <= set(shown)


# ---- which program ---------------------------------------------------------------------------------


@MODES
def test_a_program_without_a_slash_is_looked_up_in_the_actions_path(
    world: ClientWorld, timeout: str | None
) -> None:
    for folder in ("first", "second"):
        (world.cwd / folder).mkdir()
    tool = world.cwd / "second" / "tool"
    shutil.copy("/bin/echo", tool)
    assert world.run(["tool", "hi"], env(timeout, PATH="/nowhere:first:second")).stdout == b"hi\n"
    (world.cwd / "first" / "tool").write_text("not executable")
    assert world.run(["tool", "hi"], env(timeout, PATH="first:second")).stdout == b"hi\n"
    ended = world.run(["tool"], env(timeout, PATH="first"))
    assert (ended.code, ended.stderr) == (
        126,
        b"nativelink_worker_entrypoint: cannot run tool: Permission denied\n",
    )
    tool.rename(world.cwd / "tool")
    for path in (":/bin", "/nowhere:", ""):  # an empty entry is the cwd
        assert world.run(["tool", "hi"], env(timeout, PATH=path)).stdout == b"hi\n"


@MODES
def test_without_a_path_the_usual_one_is_searched(world: ClientWorld, timeout: str | None) -> None:
    given = env(timeout)
    del given["PATH"]
    assert world.run(["echo", "hi"], given) == (0, b"hi\n", b"")


@MODES
@pytest.mark.parametrize(
    ("program", "code", "reason"),
    [
        ("no-such-tool", 127, "No such file or directory"),
        ("./no-such-tool", 127, "No such file or directory"),
        ("/no-such-tool", 127, "No such file or directory"),
        ("", 127, "No such file or directory"),
        ("./text", 126, "Permission denied"),
        ("./broken", 126, "Exec format error"),
        ("/", 126, "Permission denied"),
        ("./text/x", 126, "Not a directory"),
        ("./orphan", 127, "No such file or directory"),
        ("x" * 256, 126, "File name too long"),
        ("x" * 5000, 126, "File name too long"),
        ("./" + "x" * 300, 126, "File name too long"),
    ],
)
def test_a_program_that_cannot_run_is_told_and_why(
    world: ClientWorld, timeout: str | None, program: str, code: int, reason: str
) -> None:
    (world.cwd / "text").write_text("x")
    (world.cwd / "broken").write_bytes(b"\x7fELFxxxx")
    (world.cwd / "orphan").write_text("#!/no/such/interpreter\n")
    for name in ("broken", "orphan"):
        (world.cwd / name).chmod(0o755)
    ended = world.run([program], env(timeout))
    said = f"nativelink_worker_entrypoint: cannot run {program}: {reason}\n"
    assert ended == (code, b"", said.encode())


def test_an_action_without_arguments_is_answered_with_the_usage(world: ClientWorld) -> None:
    ended = world.run([])
    assert (ended.code, ended.stdout) == (64, b"")
    assert ended.stderr.startswith(b"nativelink_worker_entrypoint: usage: ")


@pytest.mark.parametrize("given", [{}, {"NL_ACTION_DIR": ""}, {"NL_WORKER_KEY": "java"}])
def test_natvelinks_own_persistent_worker_is_refused_and_told_what_to_do(
    world: ClientWorld, given: dict[str, str]
) -> None:
    ended = world.run(["/bin/echo", "direct", "--persistent_worker"], given)
    assert (ended.code, ended.stdout) == (64, b"")
    assert b"supports-workers=1" in ended.stderr
    assert b"persistentWorkerKey" in ended.stderr
    assert world.nobody_connects()


def test_that_flag_elsewhere_or_of_an_action_is_nothing_special(world: ClientWorld) -> None:
    last = ["/bin/echo", "--persistent_worker"]
    assert world.run(last, {"NL_ACTION_DIR": "/x"}).stdout == b"--persistent_worker\n"
    assert world.run([*last, "x"], {}).stdout == b"--persistent_worker x\n"


# ---- what it inherits ------------------------------------------------------------------------------


@MODES
def test_the_action_has_the_three_streams_and_no_other_descriptor(
    world: ClientWorld, timeout: str | None
) -> None:
    code = "import posix; posix.write(1, ascii(sorted(posix.listdir('/proc/self/fd'))).encode())"
    expected = b"['0', '1', '2', '3']"  # the last is the listing itself
    assert world.run(python(code), env(timeout)).stdout == expected
    # After a connection, too, and a work root that was opened.
    assert world.converse(b"O\0\0\0\0", python(code)).stdout == expected
    given = world.environment() | env(timeout)
    assert world.converse(b"O\0\0\0\0", python(code), given).stdout == expected


@MODES
def test_standard_input_is_left_to_the_action(world: ClientWorld, timeout: str | None) -> None:
    process = world.start(["/bin/cat"], env(timeout), stdin=subprocess.PIPE)
    stdout, _ = process.communicate(b"every byte", timeout=PATIENCE_S)
    assert stdout == b"every byte"


def test_standard_input_is_not_read_while_the_daemon_has_the_action(world: ClientWorld) -> None:
    read, write = os.pipe()
    try:
        os.write(write, b"mine")
        process = world.start(["/bin/cat"], stdin=read)
        connection = world.accept()
        connection.request()
        connection.send(b"T\0\0\0\0E\4\0\0\0\0\0\0\0")
        assert world.end(process).code == 0
        assert os.read(read, 100) == b"mine"
    finally:
        os.close(read)
        os.close(write)


@MODES
def test_signals_are_at_their_defaults_and_none_is_blocked(world: ClientWorld, timeout: str | None) -> None:
    blocks = (
        "import os, signal, sys; signal.pthread_sigmask(0, range(1, 32)); os.execv(sys.argv[1], sys.argv[1:])"
    )
    ignores = ("/bin/sh", "-c", 'trap "" INT HUP TERM PIPE ALRM USR1 CHLD; exec "$@"', "sh")
    for frames in (None, b"O\0\0\0\0"):
        argv = ["/bin/cat", "/proc/self/status"]
        if frames is None:
            ended = world.run(argv, env(timeout), prefix=(*ignores, *python(blocks)))
        else:
            process = world.start(
                argv, world.environment() | env(timeout), prefix=(*ignores, *python(blocks))
            )
            connection = world.accept()
            connection.request()
            connection.send(frames)
            ended = world.end(process)
        fields = dict(line.split(b":\t", 1) for line in ended.stdout.splitlines())
        assert [int(fields[name], 16) for name in (b"SigBlk", b"SigIgn", b"SigCgt")] == [0, 0, 0], ended


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
@MODES
def test_a_stream_that_is_closed_stays_closed_and_nothing_of_ours_comes_in_its_place(
    world: ClientWorld, timeout: str | None, closed: str
) -> None:
    code = "import posix; fds = posix.listdir('/proc/self/fd'); open('out', 'w').write(ascii(fds))"
    prefix = ("/bin/sh", "-c", f'exec "$@" {closed}', "sh")
    direct = ["/usr/bin/env", "-i", *python(code)]
    subprocess.run([*prefix, *direct], cwd=world.cwd, check=True)
    expected = (world.cwd / "out").read_bytes()
    (world.cwd / "out").unlink()
    process = world.start(direct, world.environment() | env(timeout), prefix=prefix)
    connection = world.accept()
    connection.request()
    connection.send(b"O\0\0\0\0")
    assert world.end(process).code == 0
    assert (world.cwd / "out").read_bytes() == expected


def test_in_place_the_action_is_the_same_process(world: ClientWorld) -> None:
    process = world.start(["/bin/sh", "-c", "echo $$ $PPID"], env(None))
    pid, parent = map(int, world.end(process).stdout.split())
    assert (pid, parent) == (process.pid, os.getpid())


# ---- under supervision -----------------------------------------------------------------------------

REPORT = "import os; print(os.getpid(), os.getppid(), os.getpgid(0), flush=True); os.read(0, 1)"


@pytest.mark.parametrize(
    "text", ["1", "604800000", "0000000604800000"], ids=["one", "seven days", "leading zeros"]
)
def test_a_time_out_makes_the_action_a_child_in_a_group_of_its_own(world: ClientWorld, text: str) -> None:
    if text == "1":
        text = LONG_MS
    process = world.start(
        ["/bin/sh", "-c", "echo $$ $PPID; ps -o pgid= $$ || cut -d' ' -f5 /proc/$$/stat"], env(text)
    )
    pid, parent, group = map(int, world.end(process).stdout.split())
    assert parent == process.pid
    assert pid == group != parent


@pytest.mark.parametrize(
    "text", ["", "0", "-1", "+5", "1.5", " 5", "5 ", "5ms", "0x5", "604800001", "9" * 40, "\u0665"]
)
def test_what_is_no_time_out_is_none(world: ClientWorld, text: str) -> None:
    process = world.start(["/bin/sh", "-c", "echo $$"], env(text))
    assert int(world.end(process).stdout) == process.pid


def test_with_the_hosts_time_outs_nothing_is_supervised(world: ClientWorld) -> None:
    world.policy(timeouts="host")
    process = world.start(["/bin/sh", "-c", "echo $$"], env("1"))
    assert world.end(process) == (0, f"{process.pid}\n".encode(), b"")


@pytest.mark.parametrize("code", [0, 1, 42, 255])
def test_the_childs_exit_code_is_ours(world: ClientWorld, code: int) -> None:
    assert world.run(["/bin/sh", "-c", f"exit {code}"], env(LONG_MS)).code == code


@pytest.mark.parametrize("name", ["KILL", "TERM", "SEGV"])
def test_a_signal_that_ends_the_child_is_told_as_a_shell_does(world: ClientWorld, name: str) -> None:
    ended = world.run(["/bin/sh", "-c", f"ulimit -c 0; kill -{name} $$"], env(LONG_MS))
    assert ended.code == 128 + signal.Signals[f"SIG{name}"]


@pytest.mark.parametrize("has_action_directory", [True, False])
def test_at_the_deadline_the_whole_group_is_killed_and_nativelink_told(
    world: ClientWorld, has_action_directory: bool
) -> None:
    if not has_action_directory:
        world.policy(work_root="/nowhere")
    grandchild = "(trap '' TERM INT; echo grandchild $BASHPID; exec sleep 1000) &"
    script = f"trap '' TERM INT; {grandchild} echo child $$; wait"
    given = world.environment(NL_WORKER_KEY="", NL_TIMEOUT_MS="300")
    ended = world.run(["/bin/bash", "-c", script], given)
    assert ended.code == 124
    assert b"did not end within 300 ms" in ended.stderr
    assert world.side_channel() == (TIMED_OUT if has_action_directory else None)
    pids = dict(line.split() for line in ended.stdout.decode().splitlines())
    assert set(pids) == {"grandchild", "child"}
    for pid in pids.values():
        wait_until_gone(int(pid))


def test_an_action_that_stops_itself_is_killed_all_the_same(world: ClientWorld) -> None:
    given = world.environment(NL_WORKER_KEY="", NL_TIMEOUT_MS="200")
    assert world.run(["/bin/sh", "-c", "kill -STOP $$"], given).code == 124
    assert world.side_channel() == TIMED_OUT


def test_an_action_that_ends_in_time_leaves_no_side_channel_file(world: ClientWorld) -> None:
    given = world.environment(NL_WORKER_KEY="", NL_TIMEOUT_MS=LONG_MS)
    assert world.run(["/bin/true"], given).code == 0
    assert world.side_channel() is None


def read_line(process: subprocess.Popen[bytes]) -> bytes:
    assert process.stdout is not None
    line = b""
    while not line.endswith(b"\n"):
        assert select.select([process.stdout], [], [], PATIENCE_S)[0], line
        chunk = os.read(process.stdout.fileno(), 1)
        assert chunk, line
        line += chunk
    return line


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_is_passed_on_to_the_group_whose_end_is_ours(world: ClientWorld, name: str) -> None:
    number = signal.Signals[name]
    script = f"trap 'echo caught; exit 3' {number}; echo ready; while :; do sleep 0.01; done"
    process = world.start(["/bin/bash", "-c", script], env(LONG_MS))
    assert read_line(process) == b"ready\n"
    process.send_signal(number)
    assert world.end(process)[:2] == (3, b"caught\n")
    process = world.start(
        python("import posix; posix.write(1, b'ready\\n'); posix.read(0, 1)"),
        env(LONG_MS),
        stdin=subprocess.PIPE,
    )
    assert read_line(process) == b"ready\n"
    process.send_signal(signal.SIGTERM)
    process.wait(PATIENCE_S)
    assert signal_of(world.end(process)) == signal.SIGTERM


@pytest.mark.parametrize("name", ["SIGKILL", "SIGHUP", "SIGQUIT"])
def test_a_client_that_dies_takes_the_action_with_it(world: ClientWorld, name: str) -> None:
    prefix = ("/bin/sh", "-c", 'ulimit -c 0; exec "$@"', "sh")
    code = "import posix; posix.write(1, b'%d\\n' % posix.getpid()); posix.read(0, 1)"
    process = world.start(python(code), env(LONG_MS), stdin=subprocess.PIPE, prefix=prefix)
    pid = int(read_line(process))
    process.send_signal(signal.Signals[name])
    process.wait(PATIENCE_S)
    wait_until_gone(pid)
    assert process.returncode == -signal.Signals[name]


@pytest.mark.skipif(os.geteuid() != 0, reason="a pid namespace needs root")
def test_as_process_1_of_a_namespace_it_reaps_orphans_and_kills_at_the_deadline(world: ClientWorld) -> None:
    prefix = ("/usr/bin/unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
    code = """
import os
for _ in range(20):
    if os.fork() == 0:
        if os.fork() == 0:
            os._exit(0)
        os._exit(0)
    os.wait()
while len(alive := [name for name in os.listdir("/proc") if name.isdigit()]) > 2:
    os.sched_yield()
os.write(1, b"%d" % os.getppid())
"""
    assert world.run([sys.executable, "-c", code], env(LONG_MS), prefix=prefix) == (0, b"1", b"")
    given = world.environment(NL_WORKER_KEY="", NL_TIMEOUT_MS="200")
    assert world.run(["/bin/sleep", "1000"], given, prefix=prefix).code == 124
    assert world.side_channel() == TIMED_OUT
