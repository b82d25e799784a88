"""The command line: wrong usage, configurations, one-shot, limits, logs, and a stdout that stays clean."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.raw_host import RawHost, ask, echo_tool, outputs, until
from tests.workers.echo_worker import expected_output


def run(
    *arguments: str, cwd: Path, env: dict[str, str] | None = None, text: str = ""
) -> tuple[int, str, str]:
    """The wrapper with these arguments, to its end: exit code, stdout, stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "wrapper", *arguments],
        cwd=cwd,
        env=env,
        input=text,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout, done.stderr


def test_no_tool_an_unknown_option_and_impossible_numbers_are_wrong_usage(tmp_path: Path) -> None:
    for arguments, said in (
        ((), "no tool given"),
        (("--",), "no tool given"),
        (("--frobnicate", "--", "x"), "--frobnicate"),
        (("--max-instances", "0", "--", "x"), "at least 1"),
        (("--max-instances", "many", "--", "x"), "--max-instances"),
        (("--idle-timeout", "-1", "--", "x"), "positive"),
        (("--worker-protocol", "xml", "--", "x"), "xml"),
    ):
        code, out, err = run(*arguments, cwd=tmp_path)
        assert (code, out) == (64, ""), arguments
        assert said in err, arguments
        assert "Traceback" not in err


def test_a_missing_program_is_one_clear_error_for_each_request_or_at_once(tmp_path: Path) -> None:
    code, out, err = run("--", "no-such-tool", "--persistent_worker", cwd=tmp_path)
    assert (code, out) == (69, "")
    assert "no-such-tool" in err
    assert "PATH" in err
    with RawHost(["./missing", "--persistent_worker"], cwd=tmp_path) as host:
        for number in (1, 2):
            failed = host.one("x", request_id=number).pb
            assert failed.exit_code == 69
            assert b"missing" in failed.output


def test_a_program_that_is_not_executable_says_so(tmp_path: Path) -> None:
    (tmp_path / "tool").write_text("#!/bin/sh\n")
    with RawHost(["./tool", "--persistent_worker"], cwd=tmp_path) as host:
        failed = host.one("x").pb
        assert failed.exit_code == 69
        assert b"executable" in failed.output
    (tmp_path / "tool").write_text("#!/no/such/interpreter\n")
    (tmp_path / "tool").chmod(0o755)
    with RawHost(["./tool", "--persistent_worker"], cwd=tmp_path) as host:
        assert b"/no/such/interpreter" in host.one("x").pb.output


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file"),
        ("{pools: [", "pools.json5"),
        ("\xff\xfe", "pools.json5"),
        ("{pools: [{name: 'p', language: 'cobol'}]}", "pools[0].language"),
        ("{pools: [{name: 'p', language: 'jvm', max_workrs: 3}]}", "max_workers"),
        ("{pools: [{name: 'p', language: 'jvm', max_workers: 0}]}", "pools[0].max_workers"),
    ],
    ids=["missing", "cut", "binary", "impossible", "misspelt", "out-of-range"],
)
def test_a_configuration_that_cannot_be_used_is_named_with_file_and_field(
    tmp_path: Path, content: str | None, said: str
) -> None:
    file = tmp_path / "pools.json5"
    if content is not None:
        file.write_text(content, encoding="latin-1")
    code, out, err = run("--config", str(file), "--", "x", "--persistent_worker", cwd=tmp_path)
    assert (code, out) == (78, "")
    assert str(file) in err
    assert said.lower() in err.lower()
    assert "Traceback" not in err


def test_an_unreadable_configuration_is_named(tmp_path: Path) -> None:
    code, _, err = run("--config", str(tmp_path), "--", "x", "--persistent_worker", cwd=tmp_path)
    assert code == 78
    assert str(tmp_path) in err
    assert "Traceback" not in err


POOLS = """{pools: [
  {name: 'java', language: 'jvm', keys: ['java-*'], worker_command: ['x']},
  {name: 'echo', language: 'custom(echo)', keys: ['echo-*'], worker_command: TOOL, min_warm_workers: 1,
   env: {GREETING: 'hello'}, limits: {max_instances_per_key: 2}},
]}"""


def test_the_key_chooses_the_pool_whose_command_is_the_tool_if_none_is_given(tmp_path: Path) -> None:
    config = tmp_path / "pools.json5"
    config.write_text(POOLS.replace("TOOL", repr(echo_tool())))
    argv = [sys.executable, "-m", "wrapper", "--config", str(config), "--persistent-worker-key", "echo-1"]
    with RawHost([], argv=argv, cwd=tmp_path) as host:
        until(host.workers, "the minimum of warm workers, before any request")
        answer = host.one("--print-env=GREETING")
        assert answer.pb.output == expected_output([b"--print-env=GREETING"]) + b"\nhello"


@pytest.mark.parametrize("key", ["rust-1", ""])
def test_a_key_that_no_pool_serves_is_refused_with_the_keys_that_are(tmp_path: Path, key: str) -> None:
    config = tmp_path / "pools.json5"
    config.write_text(POOLS.replace("TOOL", "['x']"))
    options = ("--config", str(config), "--persistent-worker-key", key)
    code, _, err = run(*options, "--", "x", "--persistent_worker", cwd=tmp_path)
    assert code == 78
    assert "java-*" in err
    assert "echo-*" in err


def test_without_persistent_worker_the_wrapper_becomes_the_tool(tmp_path: Path) -> None:
    script = "import sys; print(sys.stdin.read(), *sys.argv[1:]); print('err', file=sys.stderr); sys.exit(3)"
    code, out, err = run("--", sys.executable, "-c", script, "a b", "--", cwd=tmp_path, text="in")
    assert (code, out, err) == (3, "in a b --\n", "err\n")
    code, _, _ = run("--", "/bin/sh", "-c", "kill -9 $$", cwd=tmp_path)
    assert code == -9


def test_one_shot_finds_the_program_on_path_and_names_what_it_cannot_run(tmp_path: Path) -> None:
    tool = tmp_path / "bin" / "mytool"
    tool.parent.mkdir()
    tool.write_text('#!/bin/sh\necho found "$@"\n')
    tool.chmod(0o755)
    env = {**os.environ, "PATH": f"{tool.parent}:{os.environ['PATH']}"}
    assert run("--", "mytool", "x", cwd=tmp_path, env=env) == (0, "found x\n", "")
    code, out, err = run("--", "no-such-tool", cwd=tmp_path)
    assert (code, out, "no-such-tool" in err) == (69, "", True)
    tool.chmod(0o644)
    code, _, err = run("--", "./bin/mytool", cwd=tmp_path)
    assert code == 69
    assert "Permission denied" in err
    code, _, err = run("--", "", cwd=tmp_path)
    assert code == 69
    assert "empty" in err


def test_a_clean_environment_without_path_is_enough(tmp_path: Path) -> None:
    assert run("--", "echo", "found", cwd=tmp_path, env={}) == (0, "found\n", "")
    with RawHost(["python3", *echo_tool()[1:]], cwd=tmp_path, env={}) as host:
        assert shutil.which("python3") is not None
        answer = host.one("--print-env=PATH")
        assert answer.pb.output.endswith(b"\n<unset>")


def test_an_idle_instance_is_stopped_after_the_timeout_and_the_next_request_gets_another(
    tmp_path: Path,
) -> None:
    with RawHost(echo_tool(), "--idle-timeout", "0.3", "-v", cwd=tmp_path) as host:
        host.one("x")
        (first,) = host.workers()
        until(lambda: not host.workers(), "the idle worker is gone")
        host.one("y")
        assert host.workers() != [first]
        assert "(idle timeout)" in host.stderr()


def test_log_dir_holds_what_the_tool_wrote_to_stderr(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    with RawHost(echo_tool(), "--log-dir", str(logs), cwd=tmp_path) as host:
        host.one("--stderr=for the log")
        host.finish()
        assert any("for the log" in file.read_text() for file in logs.iterdir())
        assert "for the log" not in host.stderr()


def test_nothing_but_answers_reaches_stdout_although_everything_prints(tmp_path: Path) -> None:
    # What a library of the wrapper prints: sitecustomize prints at any later import's whim.
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, os, sys, threading\n"
        "def shout():\n"
        "    while not stop.wait(0.01): print('printed'); os.write(1, b'written\\n'); sys.stdout.flush()\n"
        "stop = threading.Event()\n"
        "import wrapper.upstream as u\n"
        "claim = u.claim_stdio\n"
        "def claimed():\n"
        "    fds = claim(); thread.start(); return fds\n"
        "u.claim_stdio = claimed\n"
        "thread = threading.Thread(target=shout, daemon=True)\n"
        "atexit.register(stop.set)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with RawHost(echo_tool("--stderr", "tool"), "-vv", cwd=tmp_path, env=env) as host:
        for number in range(1, 20):
            answer = host.one("--sleep-ms=10", request_id=number)
            assert answer.pb.output == expected_output([b"--sleep-ms=10"])
        assert host.finish() == []
        assert "printed" in host.stderr()
        assert "written" in host.stderr()
    assert b"printed" not in host.raw


def test_a_second_wrapper_as_the_tool_works_too(tmp_path: Path) -> None:
    inner = [sys.executable, "-m", "wrapper", "--max-instances", "2", "--", *echo_tool()]
    with RawHost(inner, "--tool-multiplex", cwd=tmp_path) as host:
        answers = host.exchange(*[ask(str(n), request_id=n) for n in range(1, 31)])
        assert outputs(answers) == {n: expected_output([b"%d" % n]) for n in range(1, 31)}
