"""The real shim, as process 1 and as any other: what it tells the host, and what the worker gets."""

from __future__ import annotations

import ast
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.shim_host import ShimHost
from wrapper.runtime.native import shim_path

SOURCE = Path(__file__).resolve().parents[2] / "native" / "shim.c"
NO_LEAK_CHECK = 'const char *__asan_default_options(void) { return "detect_leaks=0"; }\n'
"""The leak checker traces the process, and nobody may trace the shim."""
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
    """The shim that the package installs, and one that looks after its own memory."""
    if request.param == "installed":
        return shim_path()
    program = tmp_path_factory.getbasetemp() / "sanitized-shim"
    if not program.exists():
        options = program.with_suffix(".c")
        options.write_text(NO_LEAK_CHECK)
        flags = ["-g", "-std=c11", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
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


# ---- the streams -----------------------------------------------------------------------------------


def test_the_worker_reads_and_writes_whole_megabytes_on_its_data_connection(host: ShimHost) -> None:
    run(host, ECHO)
    for size in (1, 4096, 1 << 20, (1 << 20) + 1):
        frame = os.urandom(size)
        assert host.exchange(frame) == frame
    host.data.shutdown(1)
    assert host.end() == (0, 0)


def test_the_peers_of_the_two_connections_are_the_shim_and_the_worker(host: ShimHost) -> None:
    run(host, "import os; os.write(1, b'%d %d %d' % (os.getpid(), os.getppid(), os.getsid(0)))")
    worker, parent, session = map(int, host.read_data_until_end().split())
    assert (host.peer_pid(host.data), host.peer_pid(host.status)) == (worker, parent)
    assert (parent, session) == (host.process.pid, worker)


def test_the_worker_has_as_large_a_send_buffer_as_the_system_allows(host: ShimHost) -> None:
    run(
        host,
        "import socket; s = socket.socket(fileno=1); print(s.getsockopt(1, socket.SO_SNDBUF), flush=True)",
    )
    most = int(Path("/proc/sys/net/core/wmem_max").read_text())
    assert int(host.read_data_until_end()) == 2 * min(1 << 20, most)  # the kernel doubles what is asked for


def test_stderr_is_a_pipe_that_can_be_opened_again_by_its_name(host: ShimHost) -> None:
    run(host, "import os; os.write(2, b'one '); open('/dev/stderr', 'w').write('two'); os.read(0, 1)")
    assert host.read_stderr(7) == b"one two"


def test_a_full_stderr_makes_the_worker_wait_and_does_not_fail(host: ShimHost) -> None:
    run(host, "import os; os.write(2, bytes(1 << 18)); os.write(1, b'done')")
    assert host.read_stderr(1 << 18) == bytes(1 << 18)
    assert host.read_data_until_end() == b"done"


def test_the_worker_has_no_descriptor_beyond_its_three(host: ShimHost) -> None:
    inherited = os.open("/dev/null", os.O_RDONLY)
    try:
        host.pass_fds = (inherited,)
        run(host, "import os; os.write(1, ' '.join(sorted(os.listdir('/proc/self/fd'))).encode())")
    finally:
        os.close(inherited)
    assert host.read_data_until_end() == b"0 1 2 3"  # 3: the listing itself


def test_a_shim_without_standard_streams_of_its_own_gives_the_worker_three(host: ShimHost) -> None:
    host.prefix = ("/bin/sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh")
    run(host, "import os; os.write(2, b'x'); print(*sorted(os.listdir('/proc/self/fd')), flush=True)")
    assert (host.read_data_until_end(), host.read_stderr(1)) == (b"0 1 2 3\n", b"x")


# ---- what the worker finds -------------------------------------------------------------------------


@pytest.mark.parametrize("env", [{}, {"A": "1", "EMPTY": "", "ODD": "\udcff=\n"}], ids=["empty", "odd"])
def test_the_environment_and_the_arguments_arrive_untouched(host: ShimHost, env: dict[str, str]) -> None:
    code = """if True:
    print([open(f"/proc/self/{name}", "rb").read() for name in ("environ", "cmdline")], flush=True)
"""
    argv = [*python(code), "", "a b", "-x"]
    host.start(argv, env=env)
    host.started()
    environ, cmdline = ast.literal_eval(host.read_data_until_end().decode())
    assert environ == b"".join(os.fsencode(f"{name}={value}\0") for name, value in env.items())
    assert cmdline == b"".join(os.fsencode(f"{argument}\0") for argument in argv)


def test_a_program_without_a_slash_is_found_on_the_path_of_the_environment(host: ShimHost) -> None:
    (host.folder / "hello").write_text("#!/bin/sh\necho hello\n")
    (host.folder / "hello").chmod(0o755)
    host.start(["hello"], env={"PATH": f"/nonexistent:{host.folder}"})
    host.started()
    assert host.read_data_until_end() == b"hello\n"


def test_without_a_path_the_program_is_found_on_a_default_one_and_sees_none(host: ShimHost) -> None:
    host.start(["env"], env={"ONLY": "this"})
    host.started()
    assert host.read_data_until_end() == b"ONLY=this\n"
    host.start(["chroot", "--version"], env={})  # which is in /usr/sbin
    host.started()
    assert host.read_data_until_end().startswith(b"chroot ")


def test_the_worker_has_the_default_signal_mask_and_dispositions(host: ShimHost) -> None:
    blocks = (
        "import os, signal, sys; signal.pthread_sigmask(0, range(1, 32)); os.execv(sys.argv[1], sys.argv[1:])"
    )
    host.prefix = ("/bin/sh", "-c", 'trap "" INT HUP TERM PIPE; exec "$@"', "sh", *python(blocks))
    host.start(["/bin/cat", "/proc/self/status"], env={})
    host.started()
    fields = dict(line.split(":\t", 1) for line in host.read_data_until_end().decode().splitlines())
    assert [int(fields[name], 16) for name in ("SigBlk", "SigIgn", "SigCgt")] == [0, 0, 0]


@needs_root
def test_a_worker_of_the_same_user_cannot_look_into_the_shim_but_others_can_look_into_it(
    host: ShimHost,
) -> None:
    copy = host.folder / "shim"
    shutil.copy(host.shim, copy)
    host.shim = str(copy)
    host.prefix = ("/usr/bin/setpriv", "--reuid=1000", "--regid=1000", "--clear-groups")
    # The colleague stands for jcmd: of the same user, not related.
    look = "&& echo open || echo closed"
    code = f'ls /proc/$PPID/fd >&2 {look}; sh -c "ls /proc/$$/fd >&2" {look}'
    host.start(["/bin/sh", "-c", code], env={"PATH": "/usr/bin:/bin"})
    host.started()
    assert host.read_data_until_end().split() == [b"closed", b"open"]


# ---- failures --------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", ["/nonexistent/tool", "nonexistent-tool"])
def test_a_missing_program_is_told_at_once(host: ShimHost, program: str) -> None:
    host.start([program], env=ENVIRONMENT)
    assert host.failure() == (errno.ENOENT, 127)
    assert f"cannot run the worker's program ({program}): No such file" in host.own_stderr()


def test_a_program_that_may_not_be_executed_is_told_apart(host: ShimHost) -> None:
    (host.folder / "tool").write_text("#!/bin/sh\n")
    host.start([str(host.folder / "tool")], env=ENVIRONMENT)
    assert host.failure() == (errno.EACCES, 127)


def test_a_stderr_pipe_that_nobody_reads_is_an_error_and_no_endless_wait(host: ShimHost) -> None:
    host.close_stderr()
    host.start(["/bin/true"], env=ENVIRONMENT)
    assert host.failure() == (errno.ENXIO, 127)
    assert "cannot open the pipe for standard error" in host.own_stderr()


def test_without_a_socket_the_shim_says_so_and_fails(shim: str, tmp_path: Path) -> None:
    for path, reason in (
        (tmp_path / "nothing-here", "No such file"),
        (tmp_path / ("x" * 200), "File name too long"),
    ):
        done = subprocess.run([shim, path, "/dev/null", "/bin/true"], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (125, done.stderr)
        assert done.stderr.startswith(f"shim: cannot connect to {path}: {reason}")


def test_too_few_arguments_are_answered_with_the_usage(shim: str) -> None:
    done = subprocess.run([shim, "socket", "fifo"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (125, "usage: shim SOCKET STDERR_FIFO PROGRAM [ARGS...]\n")


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
    assert host.read_data(6) == b"ready "
    host.process.send_signal(signal.Signals[name])
    assert host.read_data(6) == b"caught"
    assert host.process.poll() is None
    host.data.send(b"x")
    assert host.end() == (3, 3)


def test_a_host_that_is_gone_ends_neither_the_worker_nor_the_shim(host: ShimHost) -> None:
    gate = host.folder / "gate"
    os.mkfifo(gate)
    run(host, f"import os; os.read(os.open({str(gate)!r}, os.O_RDONLY), 1); os._exit(5)")
    host.close_connections()
    gate.write_bytes(b"x")
    assert host.process.wait(20) == 5


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
    pid, parent, alive = json.loads(host.read_data_until_end())
    assert (parent, alive) == (1, [1, pid])


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
    host.data.send(b"x")
    assert host.end() == (9, 9)
    assert host.read_data_until_end() == b""  # the straggler held the connection too


@needs_root
def test_process_1_forwards_a_signal_from_outside(host: ShimHost) -> None:
    run(host, "import os; os.write(1, b'ready'); os.read(0, 1)", in_namespace=True)
    assert host.read_data(5) == b"ready"
    os.kill(host.peer_pid(host.status), signal.SIGTERM)
    assert host.end() == (-signal.SIGTERM, 128 + signal.SIGTERM)


def test_the_shim_can_be_read_in_one_go() -> None:
    assert len(SOURCE.read_text().splitlines()) <= 120
