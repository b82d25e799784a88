"""What a request leaves behind is gone before the next one; garbage is collected in real JVMs and in node."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from tests.support.raw_host import RawHost, configured, echo_tool, until
from tests.workers.echo_worker import expected_output


@pytest.mark.parametrize("what", ["--leave-child", "--leave-daemon"])
def test_processes_that_a_request_leaves_are_killed_after_its_answer(tmp_path: Path, what: str) -> None:
    with RawHost(echo_tool("--own-child"), "-v", "--max-instances", "1", cwd=tmp_path) as host:
        host.one("warm")
        (worker,) = host.workers()
        until(lambda: len(host.children()) == 2, "the worker and its own child")
        for _ in range(3):
            assert host.one(what).pb.output == expected_output([what.encode()])
            until(lambda: len(host.children()) == 2, "what was left is gone, its own child is not")
        assert host.workers() == [worker]
        assert "leftovers removed" in host.stderr()


def test_files_that_a_request_leaves_in_tmpdir_are_removed_and_the_workers_own_are_not(
    tmp_path: Path,
) -> None:
    with RawHost(echo_tool("--own-tmp", "own/file"), "--max-instances", "1", cwd=tmp_path) as host:
        (tmpdir,) = [Path(host.one("--print-env=TMPDIR").pb.output.decode().splitlines()[1])]
        assert tmpdir.is_relative_to(host.tmp)
        for name in ("left", "deep/er/left", "own/too"):
            host.one(f"--leave-tmp={name}")
            # The next answer comes from a worker that was cleaned.
            host.one("next")
            assert sorted(str(p.relative_to(tmpdir)) for p in tmpdir.rglob("*")) == ["own", "own/file"]


def test_the_configured_cleanup_runs_after_each_job_in_the_workers_environment(tmp_path: Path) -> None:
    command = ["/bin/sh", "-c", "test -d $TMPDIR && echo $NLWW_WORKER_PID >> cleaned"]
    options = configured(tmp_path, f"warmup: {{post_job_cleanup: [{{argv: {command!r}, timeout_s: 20}}]}}")
    with RawHost(echo_tool(), *options, "--max-instances", "1", cwd=tmp_path) as host:
        for _ in range(3):
            host.one("x")
        cleaned = tmp_path / "cleaned"
        until(lambda: cleaned.exists() and len(cleaned.read_text().split()) == 3, "cleaned three times")
        until(lambda: cleaned.read_text().split() == [str(pid) for pid in host.workers()] * 3, "its own pid")


def test_a_cleanup_that_never_succeeds_costs_the_worker_not_the_requests(tmp_path: Path) -> None:
    options = configured(tmp_path, "warmup: {post_job_cleanup: [{argv: ['/bin/false'], timeout_s: 20}]}")
    with RawHost(echo_tool(), *options, "-v", "--max-instances", "1", cwd=tmp_path) as host:
        for number in range(2):
            assert host.one(str(number)).pb.exit_code == 0
        assert "cleaning failed" in host.stderr()
        assert "(could not be cleaned)" in host.stderr()


def test_warm_up_and_verification_run_before_the_first_request_and_their_failure_is_told(
    tmp_path: Path,
) -> None:
    warm = "warmup: {commands: [{argv: ['/bin/sh', '-c', 'echo warm > warmed']}]}"
    with RawHost(echo_tool(), *configured(tmp_path, warm), cwd=tmp_path) as host:
        assert host.one("--read=warmed").pb.output.endswith(b"\nwarm\n")
    broken = "warmup: {verification: [{argv: ['/bin/sh', '-c', 'echo not today; exit 4']}]}"
    with RawHost(echo_tool(), *configured(tmp_path, broken), cwd=tmp_path) as host:
        failed = host.one("x").pb
        assert failed.exit_code == 69
        assert b"not today" in failed.output
        assert b"exit code 4" in failed.output


def test_a_worker_is_replaced_after_its_number_of_jobs_without_a_request_lost(tmp_path: Path) -> None:
    options = configured(tmp_path, "lifecycle: {max_jobs_per_worker: 3}")
    with RawHost(echo_tool(), *options, "--max-instances", "1", cwd=tmp_path) as host:
        counts = [host.one("--count").pb.output.split(b"count:")[1] for _ in range(7)]
        assert counts == [b"1", b"2", b"3", b"1", b"2", b"3", b"1"]


JAVA_ECHO = """
import java.io.*;
public class Echo {
  public static void main(String[] args) throws Exception {
    InputStream in = System.in; OutputStream out = System.out;
    int length;
    while ((length = in.read()) >= 0) {
      in.readNBytes(length);
      byte[] junk = new byte[1 << 20];
      out.write(new byte[] {3, 0x12, 1, 'k'}); out.flush();
    }
  }
}
"""
NODE_ECHO = """
const fs = require('fs'), buffer = Buffer.alloc(65536);
process.stdin.on('data', () => fs.writeSync(1, Buffer.from([3, 0x12, 1, 0x6b])));
process.stdin.on('end', () => process.exit(0));
"""


@pytest.mark.parametrize("language", ["jvm", "nodejs"])
def test_garbage_is_collected_in_the_workers_own_process_at_its_cadence(
    tmp_path: Path, language: str
) -> None:
    program = shutil.which("java" if language == "jvm" else "node")
    assert program is not None, "a JDK and node are needed"
    source = tmp_path / ("Echo.java" if language == "jvm" else "echo.js")
    source.write_text(JAVA_ECHO if language == "jvm" else NODE_ECHO)
    quick = ["-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC"] if language == "jvm" else []
    tool = [program, *quick, str(source), "--persistent_worker"]
    options = configured(tmp_path, "lifecycle: {gc_job_frequency: 4}")
    options = (*options, "--language", language, "--max-instances", "1", "-v")
    with RawHost(tool, *options, cwd=tmp_path) as host:
        for number in range(1, 13):
            assert host.one("x", request_id=number).pb.output == b"k"
        (worker,) = host.workers()
        until(lambda: host.stderr().count("garbage collected") == 3, "three collections in twelve jobs")
        assert " after=" in host.stderr()
        assert host.workers() == [worker]
    assert "failed" not in host.stderr()


def test_a_pool_with_check_health_proves_itself_before_it_accepts_anything(tmp_path: Path) -> None:
    options = configured(tmp_path, "check_health: true")
    with RawHost(echo_tool(), *options, "-v", cwd=tmp_path) as host:
        until(lambda: "health" in host.stderr(), "the proof")
        assert host.one("x").pb.exit_code == 0
    with RawHost([sys.executable, "-c", "pass", "--persistent_worker"], *options, cwd=tmp_path) as host:
        assert host.rest() == []
        assert host.wait() != 0
        assert "not healthy" in host.stderr()
