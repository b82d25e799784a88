"""`probe` says of each worker what is true of it: misbehaving ones made for that, and real ones."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.driver import QUICK_JVM, REPOSITORY, fetched, java_builder_command

import demo_input  # isort: skip  # the driver has put the example and tools/ on sys.path
from fetch_java_tools import java_builder  # isort: skip
from fetch_npm_workers import npm_workers  # isort: skip

pytestmark = pytest.mark.e2e

ECHO = [sys.executable, "-I", "-S", str(REPOSITORY / "tests" / "workers" / "echo_worker.py")]
CHECKS = [
    "formats",
    "latency",
    "request ids",
    "two at once",
    "cancel",
    "state",
    "digests",
    "stray output",
    "memory",
]
CHECKS += ["EOF", "SIGTERM"]


def probe(
    tmp_path: Path, *tool: str, options: tuple[str, ...] = (), lines: str = "hello\n", timeout: str = "3"
) -> dict[str, Any]:
    """The verdicts by check, and "exit code"."""
    (tmp_path / "flags").write_text(lines)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "wrapper",
            "probe",
            "--json",
            "--timeout",
            timeout,
            *options,
            "--",
            *tool,
            "@flags",
        ],
        cwd=tmp_path,
        env={"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/local/bin:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.stdout, done.stderr
    document = json.loads(done.stdout)
    assert document["exit_code"] == done.returncode
    verdicts = {one["check"]: (one["outcome"], one["says"]) for one in document["verdicts"]}
    return {**verdicts, "exit code": done.returncode}


def test_a_good_worker_is_good_in_every_line(tmp_path: Path) -> None:
    found = probe(tmp_path, *ECHO, "--proto", "--cancel")
    assert found["exit code"] == 0
    assert [check for check in found if check != "exit code"] == CHECKS
    assert {outcome for outcome, _ in list(found.values())[:-1]} <= {"ok", "note"}
    assert found["formats"] == ("ok", "proto")


def test_its_format_is_found(tmp_path: Path) -> None:
    assert probe(tmp_path, *ECHO, "--json")["formats"] == ("ok", "JSON")


@pytest.mark.parametrize(
    "tool", [["/bin/cat"], ["/bin/true"], ["/bin/echo", "x"]], ids=["cat", "true", "echo"]
)
def test_what_is_no_worker_is_none(tmp_path: Path, tool: list[str]) -> None:
    found = probe(tmp_path, *tool)
    assert found["exit code"] == 2
    assert found["formats"][0] == "BAD"


@pytest.mark.parametrize(
    ("flags", "lines", "check", "outcome", "words"),
    [
        (["--no-echo-ids"], "", "request ids", "note", "not echoed"),
        (["--no-echo-ids"], "", "two at once", "note", "singleplex only"),
        ([], "--wrong-id\n", "request ids", "BAD", "17 was answered as 18"),
        ([], "--answer-twice\n", "stray output", "BAD", "an answer that nobody asked for"),
        (["--garbage-every", "3"], "", "stray output", "BAD", "no answer"),
        (["--die-every", "3"], "", "latency", "BAD", "it died"),
        ([], "--count\n", "state", "BAD", "the same request twice"),
        (["--ignore-eof"], "", "EOF", "BAD", "it still runs"),
        (["--ignore-sigterm"], "", "SIGTERM", "BAD", "it still runs"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_each_fault_is_named(
    tmp_path: Path, flags: list[str], lines: str, check: str, outcome: str, words: str
) -> None:
    found = probe(tmp_path, *ECHO, *flags, lines=lines or "hello\n")
    assert found[check][0] == outcome, found
    assert words in found[check][1], found
    assert found["exit code"] == (1 if outcome == "BAD" else 0)


def test_state_that_depends_on_times_is_found(tmp_path: Path) -> None:
    script = tmp_path / "stateful.py"
    text = Path(ECHO[-1]).read_text()
    (tmp_path / "input").write_text("x")
    assert "def perform" not in text
    script.write_text(
        text.replace('b"echo:" + b" ".join(', 'b"%d " % os.stat(\'input\').st_mtime_ns + b" ".join(')
    )
    found = probe(tmp_path, *ECHO[:-1], str(script), options=("--touch", "input"))
    assert found["moved times"][0] == "BAD"
    good = probe(tmp_path, *ECHO, options=("--touch", "input"))
    assert good["moved times"][0] == "ok"


def test_the_examples_java_worker_is_a_good_one(tmp_path: Path) -> None:
    demo_input.CACHE.mkdir(parents=True, exist_ok=True)
    jar = demo_input.worker_jar(demo_input.find_jdk())
    (tmp_path / "A.java").write_text("public class A {}\n")
    java = shutil.which("java")
    assert java is not None
    found = probe(tmp_path, java, *QUICK_JVM, "-jar", str(jar), lines="-d\nout\nA.java\n", timeout="30")
    assert found["exit code"] == 0, found
    assert found["formats"] == ("ok", "proto")
    assert found["two at once"][0] == "ok"


def test_javabuilder_is_a_good_one(tmp_path: Path) -> None:
    java = shutil.which("java")
    assert java is not None
    (tmp_path / "A.java").write_text("public class A {}\n")
    lines = ["--output", "a.jar", "--sources", "A.java", "--javacopts", "-g", "--", "--target_label", "//:a"]
    lines += ["--reduce_classpath_mode", "NONE"]
    command = java_builder_command(java, fetched(java_builder))
    found = probe(tmp_path, *command, lines="".join(f"{line}\n" for line in lines), timeout="30")
    assert found["exit code"] == 0, found
    assert found["formats"][1].startswith("proto")
    assert found["two at once"][0] == "ok"
    assert found["stray output"] == ("ok", "none")


def test_rollup_is_a_singleplex_worker_that_loses_a_second_request_in_flight(tmp_path: Path) -> None:
    node = shutil.which("node")
    assert node is not None
    modules = fetched(npm_workers) / "node_modules"
    (tmp_path / "main.js").write_text("console.log('x');\n")
    tool = [node, "--expose-gc", str(modules / "@bazel" / "rollup" / "index.js")]
    found = probe(tmp_path, *tool, lines="--format\ncjs\n--output.file\nbundle.js\nmain.js\n")
    assert found["exit code"] == 0, found
    assert found["formats"] == ("ok", "proto")
    assert found["request ids"] == ("ok", "echoed")
    assert found["two at once"][0] == "note"
    assert "of two requests 1 was answered" in found["two at once"][1]


def test_it_says_how_it_is_used() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "wrapper", "probe"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 64
    assert "after --" in done.stderr
