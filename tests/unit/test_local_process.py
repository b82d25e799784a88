"""The process runtime on real processes: what the contract suite cannot ask of a fake."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.loop import eventually, run_async
from tests.workers.echo_worker import expected_output, parse_proto, varint
from wrapper.errors import RuntimeUnavailable, WorkerStartFailed
from wrapper.runtime import linux, process_tree
from wrapper.runtime.base import CommandSpec, ExitStatus, WorkerSpec
from wrapper.runtime.local_process import LocalProcessRuntime, LocalWorker

ECHO = str(Path(__file__).resolve().parents[1] / "workers" / "echo_worker.py")
PYTHON = (sys.executable, "-I", "-S")


@contextlib.asynccontextmanager
async def worker_of(
    tmp_path: Path, *argv: str, env: dict[str, str] | None = None, log_dir: Path | None = None
) -> AsyncIterator[LocalWorker]:
    base = Path(tempfile.mkdtemp(dir=tmp_path))
    runtime = LocalProcessRuntime(tmp_base=str(base), log_dir=str(log_dir) if log_dir else None)
    try:
        worker = await runtime.start(WorkerSpec("w", argv, env or {}, str(tmp_path)))
        try:
            yield worker
        finally:
            await worker.stop(5)
    finally:
        await runtime.close()
    assert list(base.iterdir()) == []
    assert runtime.own_children == set()


async def ask(worker: LocalWorker, *arguments: bytes) -> bytes:
    """One exchange with an echo worker; returns the frame's body."""
    body = b"".join(b"\x0a" + varint(len(a)) + a for a in arguments)
    data = varint(len(body)) + body
    loop = asyncio.get_running_loop()
    while data:
        try:
            data = data[os.write(worker.stdin_fd, data) :]
        except BlockingIOError:
            await asyncio.sleep(0.001)
        worker.first_request_sent()
    answer: asyncio.Future[bytes] = loop.create_future()

    def read() -> None:
        if not answer.done():
            answer.set_result(os.read(worker.stdout_fd, 1 << 20))

    loop.add_reader(worker.stdout_fd, read)
    try:
        return await asyncio.wait_for(answer, 20)
    finally:
        loop.remove_reader(worker.stdout_fd)
        worker.first_answer_seen()


def our_children() -> set[int]:
    """But for an engine that other tests of the same run share, and its shims."""
    return {
        pid
        for pid in process_tree.children(os.getpid())
        if b"containerd" not in Path(f"/proc/{pid}/comm").read_bytes()
    }


def alive(pid: int) -> bool:
    found = process_tree.read_stat(pid)
    return found is not None and not found.is_dead


def test_the_echo_worker_echoes(tmp_path: Path) -> None:
    async def main() -> None:
        async with worker_of(tmp_path, *PYTHON, ECHO) as worker:
            assert expected_output([b"a", b"b"]) in await ask(worker, b"a", b"b")

    run_async(main())
    assert parse_proto(b"\x0a\x01a\x18\x07").request_id == 7


def test_what_exists_when_the_first_request_is_read_is_the_workers_own(tmp_path: Path) -> None:
    async def main() -> None:
        argv = (*PYTHON, ECHO, "--own-child", "--own-tmp", "cache/index")
        async with worker_of(tmp_path, *argv) as worker:
            await ask(worker, b"hello")
            [own] = process_tree.children(worker.pid)
            assert not worker.leftovers()
            await ask(worker, b"--leave-child", b"--leave-tmp=cache/new")
            found = worker.leftovers()
            assert found.files == ("cache/new",)
            assert len(found.processes) == 1
            await worker.remove_leftovers()
            assert not alive(found.processes[0])
            assert alive(own)
            assert os.path.exists(os.path.join(worker.tmpdir, "cache/index"))

    run_async(main())


def test_a_shell_that_starts_the_tool_as_its_child_keeps_that_child(tmp_path: Path) -> None:
    async def main() -> None:
        script = f"{sys.executable} -I -S {ECHO}; true"
        async with worker_of(tmp_path, "/bin/sh", "-c", script) as worker:
            for _ in range(3):
                await ask(worker, b"hello")
                assert not worker.leftovers()
            await ask(worker, b"--leave-child")
            assert len(worker.leftovers().processes) == 1
            await worker.remove_leftovers()
            assert expected_output([b"still there"]) in await ask(worker, b"still there")

    run_async(main())


def test_a_request_larger_than_the_pipe_does_not_hide_the_moment_of_the_first_read(tmp_path: Path) -> None:
    async def main() -> None:
        async with worker_of(tmp_path, "/bin/sh", "-c", f"{sys.executable} -I -S {ECHO}; true") as worker:
            await ask(worker, b"x" * 300_000)
            assert not worker.leftovers()
            assert await ask(worker, b"y")

    run_async(main())


def test_a_daemon_in_its_own_session_with_an_empty_environment_is_found(tmp_path: Path) -> None:
    async def main() -> None:
        async with worker_of(tmp_path, *PYTHON, ECHO) as worker:
            await ask(worker, b"hello")
            await ask(worker, b"--leave-daemon", b"--leave-child")
            found = worker.leftovers()
            assert len(found.processes) == 2
            assert set((await worker.remove_leftovers()).processes) == set(found.processes)
            assert not any(alive(pid) for pid in found.processes)

    run_async(main())


def test_stop_ends_daemons_even_when_the_worker_died_before(tmp_path: Path) -> None:
    async def main() -> None:
        async with worker_of(tmp_path, *PYTHON, ECHO) as worker:
            await ask(worker, b"hello")
            await ask(worker, b"--leave-daemon", b"--leave-child")
            pids = worker.leftovers().processes
            assert len(pids) == 2
            os.kill(worker.pid, signal.SIGKILL)
            await asyncio.shield(worker.exited)
            assert worker.memory_bytes() > 0
            await worker.stop(0)
            assert not any(alive(pid) for pid in pids)

    run_async(main())


def test_a_daemon_that_is_older_than_the_first_request_ends_with_the_worker(tmp_path: Path) -> None:
    async def main() -> None:
        pids = []
        for _ in range(10):  # the shell forks as early as it can, to outrun our mark on it
            script = "(setsid sleep 1000 & echo $! >&2); exec cat"
            async with worker_of(tmp_path, "/bin/sh", "-c", script) as worker:
                assert await ask(worker, b"x")
                assert not worker.leftovers()
                pids.append(int(worker.stderr_tail()))
                assert alive(pids[-1])
        assert not any(alive(pid) for pid in pids)

    run_async(main())


def test_other_peoples_children_are_left_alone(tmp_path: Path) -> None:
    stranger = subprocess.Popen(["/bin/sleep", "1000"], start_new_session=True)

    async def main() -> None:
        async with (
            worker_of(tmp_path, *PYTHON, ECHO) as worker,
            worker_of(tmp_path, *PYTHON, ECHO) as neighbour,
        ):
            await ask(worker, b"hello")
            await ask(neighbour, b"hello")
            await ask(neighbour, b"--leave-daemon")
            assert not worker.leftovers()
            assert len(neighbour.leftovers().processes) == 1
            await worker.stop(0)
            assert len(neighbour.leftovers().processes) == 1
            assert alive(neighbour.pid)

    try:
        run_async(main())
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_the_tool_behind_a_shell_gets_the_grace_too(tmp_path: Path) -> None:
    async def main() -> None:
        said = tmp_path / "said"
        tool = (
            "import os, signal\n"
            f"def tidy(*_):\n open({str(said)!r}, 'w').close(); os._exit(0)\n"
            "signal.signal(signal.SIGTERM, tidy)\nos.write(1, b'up')\n"
            "while True: signal.pause()"
        )
        script = f'{sys.executable} -I -S -c "$TOOL"; true'
        async with worker_of(tmp_path, "/bin/sh", "-c", script, env={"TOOL": tool}) as worker:
            await ask(worker, b"are you up?")
            await worker.stop(20)
            assert said.exists()

    run_async(main())


def test_stop_leaves_no_file_even_in_directories_without_permissions(tmp_path: Path) -> None:
    async def main() -> None:
        script = 'mkdir -p "$TMPDIR/a/b/c"; touch "$TMPDIR/a/b/f"; chmod 000 "$TMPDIR/a/b" "$TMPDIR"; cat'
        async with worker_of(tmp_path, "/bin/sh", "-c", script) as worker:
            await ask(worker, b"x")

    run_async(main())


def test_the_environment_is_clean_and_the_tmpdir_private(tmp_path: Path) -> None:
    async def main() -> None:
        env = {"ONLY": "this", "TMPDIR": "/overridden"}
        async with worker_of(
            tmp_path, "/usr/bin/env", "sh", "-c", "env >&2; cat", env={"PATH": "/usr/bin:/bin", **env}
        ) as worker:
            await ask(worker, b"x")
            text = worker.stderr_tail().decode()
            variables = dict(line.split("=", 1) for line in text.splitlines())
            assert variables["ONLY"] == "this"
            assert set(variables) - {"PWD", "SHLVL", "_", "OLDPWD"} == {"ONLY", "PATH", "TMPDIR"}
            info = os.stat(variables["TMPDIR"])
            assert stat.S_IMODE(info.st_mode) == 0o700

    run_async(main())


def test_a_worker_inherits_no_descriptor_of_ours(tmp_path: Path) -> None:
    async def main() -> None:
        async with worker_of(tmp_path, *PYTHON, ECHO) as worker:
            await ask(worker, b"x")
            assert set(os.listdir(f"/proc/{worker.pid}/fd")) == {"0", "1", "2"}
            async with worker_of(tmp_path, *PYTHON, ECHO) as second:
                await ask(second, b"x")
                assert set(os.listdir(f"/proc/{second.pid}/fd")) == {"0", "1", "2"}
                await worker.stop(0)

    run_async(main())


def test_stderr_goes_to_the_tail_and_to_the_log_file(tmp_path: Path) -> None:
    logs = tmp_path / "logs"

    async def main() -> None:
        async with worker_of(tmp_path, *PYTHON, ECHO, "--stderr", "at start ", log_dir=logs) as worker:
            await ask(worker, b"--stderr=in request")
            await ask(worker, b"x")
            os.write(worker.stdin_fd, b"\x07\x0a\x05--die")
            await asyncio.shield(worker.exited)
            assert worker.stderr_tail() == b"at start in request\n"

    run_async(main())
    [file] = logs.iterdir()
    assert b"at start in request\n" in file.read_bytes()


def test_a_timed_out_command_and_all_it_started_are_killed(tmp_path: Path) -> None:
    async def main() -> None:
        async with worker_of(tmp_path, *PYTHON, ECHO) as worker:
            script = "echo $NLWW_WORKER_PID; setsid sleep 1000 & sleep 1000 & echo $!; sleep 1000"
            result = await worker.run(CommandSpec(("/bin/sh", "-c", script), 0.3))
            assert result.returncode is None
            pid, sleeper = result.output.split()
            assert int(pid) == worker.pid
            assert not alive(int(sleeper))
            assert our_children() == {worker.pid}

    run_async(main())


def test_a_cancelled_command_is_killed(tmp_path: Path) -> None:
    async def main() -> None:
        async with worker_of(tmp_path, *PYTHON, ECHO) as worker:
            for turns in (1, 2, 3, 6):
                running = asyncio.create_task(worker.run(CommandSpec(("/bin/sleep", "1000"), 1000)))
                for _ in range(turns):
                    await asyncio.sleep(0)
                running.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await running
                assert our_children() == {worker.pid}

    run_async(main())


def test_a_background_process_of_a_command_neither_holds_it_up_nor_survives(tmp_path: Path) -> None:
    async def main() -> None:
        async with worker_of(tmp_path, *PYTHON, ECHO) as worker:
            result = await worker.run(CommandSpec(("/bin/sh", "-c", "sleep 1000 & echo done"), 30))
            assert (result.returncode, result.output) == (0, b"done\n")
            assert our_children() == {worker.pid}

    run_async(main())


def test_a_commands_output_is_bounded(tmp_path: Path) -> None:
    async def main() -> None:
        async with worker_of(tmp_path, *PYTHON, ECHO) as worker:
            result = await worker.run(CommandSpec(("/bin/sh", "-c", "head -c 3000000 /dev/zero"), 30))
            assert result.returncode == 0
            assert len(result.output) == 65536

    run_async(main())


def test_a_gc_command_that_fails_is_an_error_with_its_output(tmp_path: Path) -> None:
    async def main() -> None:
        base = tmp_path / "base"
        base.mkdir()
        runtime = LocalProcessRuntime(tmp_base=str(base))
        for argv, ok in ((("/bin/true",), True), (("/bin/sh", "-c", "echo sorry; exit 3"), False)):
            spec = WorkerSpec("w", ("/bin/cat",), {}, "/", gc_command=CommandSpec(argv, 20))
            worker = await runtime.start(spec)
            if ok:
                report = await worker.collect_garbage()
                assert report is not None
                assert report.before_bytes > 0
            else:
                with pytest.raises(RuntimeUnavailable, match="sorry"):
                    await worker.collect_garbage()
            await worker.stop(1)
        await runtime.close()

    run_async(main())


def bad_start(tmp_path: Path, *argv: str, env: dict[str, str] | None = None, cwd: str | None = None) -> str:
    """The message of a start that must fail."""

    async def main() -> str:
        base = tmp_path / "base"
        base.mkdir(exist_ok=True)
        runtime = LocalProcessRuntime(tmp_base=str(base))
        with pytest.raises(WorkerStartFailed) as caught:
            await runtime.start(WorkerSpec("w", argv, env or {}, cwd or str(tmp_path)))
        assert [path for path in base.rglob("*") if path.name == "tmp"] == []
        await runtime.close()
        return caught.value.message

    return run_async(main())


def test_each_way_a_program_cannot_start_has_its_own_message(tmp_path: Path) -> None:
    def script(name: str, text: str, mode: int = 0o755) -> str:
        path = tmp_path / name
        path.write_text(text)
        path.chmod(mode)
        return str(path)

    assert "PATH of the worker's environment ('/nowhere')" in bad_start(
        tmp_path, "tool", env={"PATH": "/nowhere"}
    )
    assert "there is no program '/nowhere/tool'" in bad_start(tmp_path, "/nowhere/tool")
    assert "its file system is mounted noexec" in bad_start(tmp_path, script("plain", "x", 0o644))
    assert "exists but is not executable" in bad_start(tmp_path, "plain", env={"PATH": str(tmp_path)})
    assert "it is a directory" in bad_start(tmp_path, str(tmp_path / "base"))
    assert "the interpreter '/no/python' in its #! line" in bad_start(
        tmp_path, script("s", "#!/no/python -I\n")
    )
    assert "carriage return" in bad_start(tmp_path, script("crlf", "#!/bin/sh\r\n"))
    assert "no script with a #! line" in bad_start(tmp_path, script("text", "hello\n"))
    assert "is not an existing directory" in bad_start(tmp_path, "/bin/cat", cwd=str(tmp_path / "gone"))
    assert "use a parameter file" in bad_start(tmp_path, "/bin/cat", "x" * 3_000_000)
    assert "cannot be passed on" in bad_start(tmp_path, "/bin/cat", "a\0b")
    assert "empty" in bad_start(tmp_path)


def test_a_program_with_a_slash_is_found_from_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "tool").symlink_to("/bin/cat")

    async def main() -> None:
        async with worker_of(tmp_path, "bin/tool") as worker:
            assert b"x" in await ask(worker, b"x")

    run_async(main())


def test_a_start_without_descriptors_is_the_runtimes_failure_and_leaks_none(tmp_path: Path) -> None:
    async def main() -> None:
        base = tmp_path / "base"
        base.mkdir()
        runtime = LocalProcessRuntime(tmp_base=str(base))
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        before = set(os.listdir("/proc/self/fd"))
        highest = max(map(int, before))
        try:
            for spare in range(1, 16):
                resource.setrlimit(resource.RLIMIT_NOFILE, (highest + spare, hard))
                try:
                    worker = await runtime.start(WorkerSpec("w", ("/bin/cat",), {}, "/"))
                except RuntimeUnavailable:
                    continue
                finally:
                    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
                await worker.stop(1)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert set(os.listdir("/proc/self/fd")) == before
        await runtime.close()

    run_async(main())


def test_the_cursor_moves_when_a_process_is_created() -> None:
    cursor = linux.PidCursor()
    before = cursor.read()
    subprocess.run(["/bin/true"], check=True)
    if before is not None:  # None where /proc/loadavg is faked
        assert cursor.read() != before
    cursor.close()
    assert cursor.read() is None


def test_a_tag_is_inherited_by_descendants_and_still_there_in_a_zombie() -> None:
    tag = linux.new_tag()
    with subprocess.Popen(["/bin/sh", "-c", "read x; sleep 1000 & echo $!"], stdin=-1, stdout=-1) as shell:
        assert shell.stdin is not None
        assert shell.stdout is not None
        linux.set_tag(shell.pid, tag)
        shell.stdin.write(b"\n")
        shell.stdin.flush()
        grandchild = int(shell.stdout.readline())
        assert linux.tag_of(grandchild) == tag
        os.waitid(os.P_PID, shell.pid, os.WEXITED | os.WNOWAIT)
        assert linux.tag_of(shell.pid) == tag
        os.kill(grandchild, signal.SIGKILL)  # not ours: this process is no sub-reaper now
    assert linux.tag_of(os.getpid()) != tag


def test_a_process_that_another_thread_starts_at_the_same_moment_is_not_marked() -> None:
    started: list[subprocess.Popen[bytes]] = []
    has_started, may_end = threading.Event(), threading.Event()

    def start() -> None:
        started.append(subprocess.Popen(["/bin/sleep", "1000"]))
        has_started.set()
        may_end.wait(20)

    thread = threading.Thread(target=start)
    tag = linux.new_tag()
    with linux.inherited_tag(tag):
        thread.start()
        assert has_started.wait(20)
        own = subprocess.Popen(["/bin/sleep", "1000"])
    try:
        assert linux.tag_of(started[0].pid) == tag
        tree = process_tree.ProcessTree(own.pid, tag, set())
        assert tree.has_tag
        assert linux.tag_of(own.pid) == tag
        assert linux.tag_of(started[0].pid) != tag
    finally:
        may_end.set()
        thread.join()
        for process in (own, *started):
            process.kill()
            process.wait()


def test_a_dead_worker_is_stopped_with_its_own_status(tmp_path: Path) -> None:
    async def main() -> None:
        async with worker_of(tmp_path, *PYTHON, ECHO, "--exit-at-once", "5") as worker:
            worker.first_request_sent()
            assert await asyncio.shield(worker.exited) == ExitStatus(5)
            await eventually(lambda: worker.memory_bytes() == 0)

    run_async(main())
