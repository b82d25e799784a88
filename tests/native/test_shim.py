"""The real shim, as process 1 and as any other: what it tells the host, and what the worker gets."""

from __future__ import annotations

import ast
import errno
import fcntl
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.shim_host import PATIENCE_S, ShimHost
from wrapper.runtime.native import shim_path

SOURCE = Path(__file__).resolve().parents[2] / "native" / "shim.c"
SANITIZED = """
const char *__asan_default_options(void) { return "detect_leaks=0"; }
long __wrap_syscall(void) { return -1; }
"""
"""The leak checker traces the process, and nobody may trace the shim. `syscall` fails: Linux before 5.11."""
ENVIRONMENT = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"}
ECHO = """
import os
while chunk := os.read(0, 1 << 16):
    while chunk:
        chunk = chunk[os.write(1, chunk):]
"""
"""A worker that sends everything back until its input ends."""

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="another user, or a pid namespace, needs root")


@pytest.fixture(params=["installed", "sanitized"])
def shim(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The shim that the package installs, and one that looks after its own memory, on an older Linux."""
    if request.param == "installed":
        return shim_path()
    program = tmp_path_factory.getbasetemp() / "sanitized-shim"
    if not program.exists():
        options = program.with_suffix(".c")
        options.write_text(SANITIZED)
        flags = ["-g", "-std=c11", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
        flags.append("-Wl,--wrap=syscall")
        subprocess.run(["cc", *flags, "-o", program, SOURCE, options], check=True)
    return str(program)


@pytest.fixture
def host(shim: str) -> Iterator[ShimHost]:
    with ShimHost(shim) as host:
        yield host


def python(code: str) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", code]


def run(host: ShimHost, code: str, *, in_namespace: bool = False) -> None:
    """Start a worker in Python; fails if that does not go well."""
    host.start(python(code), env=ENVIRONMENT, in_namespace=in_namespace)
    host.started()


def as_user(host: ShimHost, uid: int) -> None:
    """Shim and worker run as this user, who may not be able to read the checkout."""
    copy = host.folder / "shim"
    shutil.copy(host.shim, copy)
    host.shim = str(copy)
    host.prefix = ("/usr/bin/setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups")
    host.worker_uid = uid


# ---- the streams -----------------------------------------------------------------------------------


def test_the_worker_reads_and_writes_whole_megabytes(host: ShimHost) -> None:
    run(host, ECHO)
    for size in (1, 4096, 1 << 20, (1 << 20) + 1):
        frame = os.urandom(size)
        assert host.exchange(frame) == frame
    host.close(host.stdin_fd)
    assert host.end() == (0, 0)


def test_the_worker_tells_its_pid_and_the_connection_the_shims(host: ShimHost) -> None:
    run(host, "import os; os.write(1, b'%d %d %d' % (os.getpid(), os.getppid(), os.getsid(0)))")
    worker, parent, session = map(int, host.read_until_end().split())
    assert (host.worker_pid, host.shim_pid) == (worker, parent)
    assert (parent, session) == (host.process.pid, worker)


def test_the_streams_are_the_pipes_that_the_host_has_made(host: ShimHost) -> None:
    run(host, "import os; print(*[os.fstat(fd).st_ino for fd in range(3)], flush=True)")
    theirs = [int(inode) for inode in host.read_until_end().split()]
    assert theirs == [os.fstat(fd).st_ino for fd in (host.stdin_fd, host.stdout_fd, host.stderr_fd)]


@needs_root
@pytest.mark.parametrize("uid", [0, 1000])
def test_the_streams_can_be_opened_again_by_their_names(host: ShimHost, uid: int) -> None:
    as_user(host, uid)
    code = "printf 'one ' >&2; printf two >/dev/stderr; head -c 5 </dev/stdin >/dev/stdout"
    host.start(["/bin/sh", "-c", code], env=ENVIRONMENT)
    host.started()
    host.write(b"three")
    assert (host.read_stderr(7), host.read_until_end()) == (b"one two", b"three")


def test_a_full_stderr_makes_the_worker_wait_and_does_not_fail(host: ShimHost) -> None:
    run(host, "import os; os.write(2, bytes(1 << 18)); os.write(1, b'done')")
    assert host.read_stderr(1 << 18) == bytes(1 << 18)
    assert host.read_until_end() == b"done"


def test_the_host_sees_at_once_that_the_worker_has_closed_a_stream(host: ShimHost) -> None:
    code = """
import os, signal
os.close(1)
os.read(0, 1)
os.close(2)
os.read(0, 1)
os.close(0)
signal.pause()
"""
    run(host, code)
    assert host.read_until_end() == b""
    host.write(b"x")
    assert host.read_stderr(1) == b""
    host.write(b"x")
    closed = select.poll()
    closed.register(host.stdin_fd, 0)
    assert closed.poll(PATIENCE_S * 1000) == [(host.stdin_fd, select.POLLERR)]
    assert host.process.poll() is None
    os.kill(host.worker_pid, signal.SIGKILL)
    assert host.end() == (-9, 137)


def test_the_worker_has_no_descriptor_beyond_its_three(host: ShimHost) -> None:
    inherited = os.open("/dev/null", os.O_RDONLY)
    high = fcntl.fcntl(inherited, fcntl.F_DUPFD, 900)
    try:
        host.pass_fds = (inherited, high)
        run(host, "import os; os.write(1, ' '.join(sorted(os.listdir('/proc/self/fd'))).encode())")
    finally:
        os.close(inherited)
        os.close(high)
    assert host.read_until_end() == b"0 1 2 3"  # 3: the listing itself


@pytest.mark.parametrize("closed", ["<&- >&- 2>&-", "<&-", ">&-", "2>&-"])
def test_a_shim_without_standard_streams_of_its_own_gives_the_worker_three(
    host: ShimHost, closed: str
) -> None:
    host.prefix = ("/bin/sh", "-c", f'exec "$@" {closed}', "sh")
    run(host, "import os; os.write(2, b'x'); print(*sorted(os.listdir('/proc/self/fd')), flush=True)")
    assert (host.read_until_end(), host.read_stderr(1)) == (b"0 1 2 3\n", b"x")


# ---- what the worker finds -------------------------------------------------------------------------


@pytest.mark.parametrize("env", [{}, {"A": "1", "EMPTY": "", "ODD": "\udcff=\n"}], ids=["empty", "odd"])
def test_the_environment_and_the_arguments_arrive_untouched(host: ShimHost, env: dict[str, str]) -> None:
    code = """if True:
    print([open(f"/proc/self/{name}", "rb").read() for name in ("environ", "cmdline")], flush=True)
"""
    argv = [*python(code), "", "a b", "-x"]
    host.start(argv, env=env)
    host.started()
    environ, cmdline = ast.literal_eval(host.read_until_end().decode())
    assert environ == b"".join(os.fsencode(f"{name}={value}\0") for name, value in env.items())
    assert cmdline == b"".join(os.fsencode(f"{argument}\0") for argument in argv)


def test_a_program_without_a_slash_is_found_on_the_path_of_the_environment(host: ShimHost) -> None:
    (host.folder / "hello").write_text("#!/bin/sh\necho hello\n")
    (host.folder / "hello").chmod(0o755)
    host.start(["hello"], env={"PATH": f"/nonexistent:{host.folder}"})
    host.started()
    assert host.read_until_end() == b"hello\n"


def test_without_a_path_the_program_is_found_on_a_default_one_and_sees_none(host: ShimHost) -> None:
    host.start(["env"], env={"ONLY": "this"})
    host.started()
    assert host.read_until_end() == b"ONLY=this\n"
    host.start(["chroot", "--version"], env={})  # which is in /usr/sbin
    host.started()
    assert host.read_until_end().startswith(b"chroot ")


def test_the_worker_has_the_default_signal_mask_and_dispositions(host: ShimHost) -> None:
    blocks = (
        "import os, signal, sys; signal.pthread_sigmask(0, range(1, 32)); os.execv(sys.argv[1], sys.argv[1:])"
    )
    host.prefix = ("/bin/sh", "-c", 'trap "" INT HUP TERM PIPE; exec "$@"', "sh", *python(blocks))
    host.start(["/bin/cat", "/proc/self/status"], env={})
    host.started()
    fields = dict(line.split(":\t", 1) for line in host.read_until_end().decode().splitlines())
    assert [int(fields[name], 16) for name in ("SigBlk", "SigIgn", "SigCgt")] == [0, 0, 0]


@needs_root
def test_a_worker_of_the_same_user_cannot_look_into_the_shim_but_others_can_look_into_it(
    host: ShimHost,
) -> None:
    as_user(host, 1000)
    # The colleague stands for jcmd: of the same user, not related.
    look = "&& echo open || echo closed"
    code = f'ls /proc/$PPID/fd >&2 {look}; sh -c "ls /proc/$$/fd >&2" {look}'
    host.start(["/bin/sh", "-c", code], env={"PATH": "/usr/bin:/bin"})
    host.started()
    assert host.read_until_end().split() == [b"closed", b"open"]


# ---- failures --------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", ["/nonexistent/tool", "nonexistent-tool"])
def test_a_missing_program_is_told_at_once(host: ShimHost, program: str) -> None:
    host.start([program], env=ENVIRONMENT)
    assert host.failure() == (errno.ENOENT, 127)
    assert f"cannot run {program}: No such file" in host.own_stderr()


def test_a_program_that_may_not_be_executed_is_told_apart(host: ShimHost) -> None:
    (host.folder / "tool").write_text("#!/bin/sh\n")
    host.start([str(host.folder / "tool")], env=ENVIRONMENT)
    assert host.failure() == (errno.EACCES, 127)


@pytest.mark.parametrize("descriptors", [0, 1, 2, 4, 5, 50])
def test_another_number_of_streams_than_three_is_an_error(host: ShimHost, descriptors: int) -> None:
    host.start(["/bin/true"], env=ENVIRONMENT, descriptors=descriptors)
    assert host.read_status(1) == b""
    assert host.process.wait(PATIENCE_S) == 125
    assert host.own_stderr().startswith("shim: no streams came: ")


@pytest.mark.parametrize("how", ["close", "shutdown"])
def test_a_host_that_goes_without_a_word_is_an_error(shim: str, tmp_path: Path, how: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen()
        argv = [shim, str(tmp_path / "socket"), "/bin/true"]
        with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as process:
            connection, _ = listener.accept()
            with connection:
                connection.shutdown(socket.SHUT_RDWR) if how == "shutdown" else connection.close()
                _, said = process.communicate(timeout=PATIENCE_S)
        assert (process.returncode, said) == (
            125,
            "shim: no streams came: Software caused connection abort\n",
        )


def test_without_a_socket_the_shim_says_so_and_fails(shim: str, tmp_path: Path) -> None:
    for path, reason in (
        (tmp_path / "nothing-here", "No such file"),
        (tmp_path / ("x" * 200), "File name too long"),
    ):
        done = subprocess.run([shim, path, "/bin/true"], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (125, done.stderr)
        assert done.stderr.startswith(f"shim: cannot connect to {path}: {reason}")


def test_too_few_arguments_are_answered_with_the_usage(shim: str) -> None:
    done = subprocess.run([shim, "socket"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (125, "usage: shim SOCKET PROGRAM [ARGS...]\n")


# ---- the end ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 1, 42, 255])
def test_the_exit_code_is_told_and_is_the_shims_own(host: ShimHost, code: int) -> None:
    run(host, f"import os; os._exit({code})")
    assert host.end() == (code, code)


@pytest.mark.parametrize("name", ["KILL", "SEGV", "PIPE"])
def test_a_signal_that_ends_the_worker_is_told_as_such(host: ShimHost, name: str) -> None:
    number = signal.Signals[f"SIG{name}"]
    host.start(["/bin/sh", "-c", f"ulimit -c 0; kill -{name} $$"], env=ENVIRONMENT)
    host.started()
    assert host.end() == (-number, 128 + number)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_to_the_shim_reaches_the_worker_whose_end_it_waits_for(host: ShimHost, name: str) -> None:
    code = f"""
import os, signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.{name}])
os.write(1, b"ready ")
signal.sigwait([signal.{name}])
os.write(1, b"caught")
os.read(0, 1)
os._exit(3)
"""
    run(host, code)
    assert host.read(6) == b"ready "
    host.process.send_signal(signal.Signals[name])
    assert host.read(6) == b"caught"
    assert host.process.poll() is None
    host.write(b"x")
    assert host.end() == (3, 3)


def test_a_host_that_is_gone_ends_neither_the_worker_nor_the_shim(host: ShimHost) -> None:
    gate = host.folder / "gate"
    os.mkfifo(gate)
    run(host, f"import os; os.read(os.open({str(gate)!r}, os.O_RDONLY), 1); os._exit(5)")
    host.close_connections()
    gate.write_bytes(b"x")
    assert host.process.wait(PATIENCE_S) == 5


# ---- process 1 of a pid namespace ------------------------------------------------------------------


@needs_root
def test_process_1_reaps_every_orphan(host: ShimHost) -> None:
    code = """
import json, os
for _ in range(20):
    gate, held = os.pipe()
    if os.fork() == 0:
        if os.fork() == 0:
            os.close(held)
            os.read(gate, 1)  # until nobody is left who could wait for it
        os._exit(0)
    os.wait()
    os.close(held)
    os.close(gate)
while len(alive := [name for name in os.listdir("/proc") if name.isdigit()]) > 2:
    os.sched_yield()
os.write(1, json.dumps([os.getpid(), os.getppid(), sorted(map(int, alive))]).encode())
"""
    run(host, code, in_namespace=True)
    pid, parent, alive = json.loads(host.read_until_end())
    assert (parent, alive) == (1, [1, pid])


@needs_root
def test_the_pids_that_the_host_gets_are_its_own_namespaces(host: ShimHost) -> None:
    run(host, "import os; os.write(1, b'%d' % os.getpid()); os.close(1); os.read(0, 1)", in_namespace=True)
    inside = int(host.read_until_end())
    for pid, expected in ((host.shim_pid, 1), (host.worker_pid, inside)):
        status = Path(f"/proc/{pid}/status").read_text()
        pids = re.findall(r"^NSpid:\t(.*)$", status, re.MULTILINE)[0].split()
        assert (int(pids[0]), int(pids[-1])) == (pid, expected)


@needs_root
def test_a_signal_of_the_workers_own_ends_the_worker_and_not_process_1(host: ShimHost) -> None:
    """Nor does the worker's own fake of its death, or a stop."""
    code = """
import os, signal
for number in set(signal.valid_signals()) - {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}:
    os.kill(1, number)
os.write(1, b"alive")
os.read(0, 1)
os.kill(1, signal.SIGTERM)
signal.pause()
"""
    run(host, code, in_namespace=True)
    assert host.read(5) == b"alive"
    host.write(b"x")
    assert host.end() == (-signal.SIGTERM, 128 + signal.SIGTERM)


@needs_root
def test_process_1_takes_with_it_what_the_worker_leaves_behind(host: ShimHost) -> None:
    code = """
import os
if os.fork() == 0:
    os.setsid()
    os.execv("/bin/sleep", ["sleep", "1000"])
os.read(0, 1)
os._exit(9)
"""
    run(host, code, in_namespace=True)
    host.write(b"x")
    assert host.end() == (9, 9)
    assert host.read_until_end() == b""  # the straggler held the pipe too


@needs_root
def test_process_1_forwards_a_signal_from_outside(host: ShimHost) -> None:
    run(host, "import os; os.write(1, b'ready'); os.read(0, 1)", in_namespace=True)
    assert host.read(5) == b"ready"
    os.kill(host.shim_pid, signal.SIGTERM)
    assert host.end() == (-signal.SIGTERM, 128 + signal.SIGTERM)


def test_the_shim_can_be_read_in_one_go() -> None:
    assert len(SOURCE.read_text().splitlines()) <= 120
