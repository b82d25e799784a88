"""nativelink_worker_wrapper.sh as an operator runs it, with a program in NativeLink's place."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.action_world import needs_root
from tests.support.daemon import PYTHON, Node

pytestmark = [pytest.mark.e2e, needs_root]

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "nativelink_worker_wrapper.sh"

FAKE = """\
#!/bin/sh
# Says what it was started with, and lives until it is told to end.
trap 'echo stopped >> "$STATE/log"; exit 7' TERM
echo "started $1" >> "$STATE/log"
cp "$1" "$STATE/config.json"
[ -S "$STATE/run/pool.sock" ] && echo "with a daemon" >> "$STATE/log"
while :; do sleep 0.05; done
"""


@pytest.fixture
def node() -> Iterator[Node]:
    with Node() as made:
        shutil.rmtree(made.work)
        (made.folder / "data").mkdir()
        made.work = made.folder / "data" / "work"
        program = made.folder / "nativelink"
        program.write_text(FAKE)
        program.chmod(0o755)
        command = [PYTHON, "-I", "-S", str(made.tools / "echo_worker.py")]
        pool = {"worker_command": command, "min_warm_workers": 1, "keys": ["java", "java-*"]}
        pool |= {"tools": [{"pattern": "echo_worker.py"}]}
        (made.folder / "pools.json5").write_text(json.dumps(made.document(pool)))
        yield made


def environment(node: Node) -> dict[str, str]:
    wrapper = node.folder / "wrapper"
    wrapper.write_text(f'#!/bin/sh\nexec {sys.executable} -m wrapper "$@"\n')
    wrapper.chmod(0o755)
    return {
        **os.environ,
        "NATIVELINK": str(node.folder / "nativelink"),
        "NATIVELINK_WORKER_WRAPPER": str(wrapper),
        "PYTHONPATH": str(ROOT),
        "STATE": str(node.folder),
    }


def options(node: Node, *more: str) -> list[str]:
    given = ["--scheduler-endpoint", "http://scheduler:50052", "--config", str(node.folder / "pools.json5")]
    given += ["--data-dir", str(node.folder / "data"), "--run-dir", str(node.folder / "run"), "--name", "n-"]
    return [str(SCRIPT), *given, *more]


def start(node: Node, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        options(node, *more), env=environment(node), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(node: Node, *more: str, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        options(node, *more), env={**environment(node), **changes}, capture_output=True, text=True, timeout=60
    )


def log_of(node: Node) -> str:
    log = node.folder / "log"
    return log.read_text() if log.exists() else ""


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def end(process: subprocess.Popen[str], signum: int = signal.SIGTERM) -> tuple[int, str]:
    process.send_signal(signum)
    _, errors = process.communicate(timeout=30)
    return process.returncode, errors


def daemon_pid(node: Node) -> int:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(node.folder / "run" / "pool.sock"))
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return int.from_bytes(credentials[:4], "little")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_nativelink_is_started_when_the_workers_are_warm_and_stopped_before_the_daemon(
    node: Node, signum: int
) -> None:
    process = start(node)
    eventually(lambda: "with a daemon" in log_of(node))
    pid = daemon_pid(node)
    code, errors = end(process, signum)
    assert code == 7, errors
    assert log_of(node).splitlines()[-1] == "stopped"
    assert errors.index("ready: every pool") < errors.index("SIGTERM: stopping")
    assert not Path(f"/proc/{pid}").exists()
    assert node.leftovers() == []


def test_its_configuration_names_this_node_and_the_entrypoint_works(node: Node) -> None:
    process = start(node, "--cas-endpoint", "grpc://cas:1", "--advertise-keys")
    eventually(lambda: "with a daemon" in log_of(node))
    document = json.loads((node.folder / "config.json").read_text())
    (worker,) = (one["local"] for one in document["workers"])
    assert worker["worker_api_endpoint"] == {"uri": "grpc://scheduler:50052"}
    assert worker["platform_properties"]["persistentWorkerKey"] == {"values": ["java"]}
    assert worker["work_directory"] == str(node.work)
    cwd = node.action({"flags": "hello\n"})
    done = subprocess.run(
        [worker["entrypoint"], "echo_worker.py", "@flags"],
        cwd=cwd,
        env={"NL_WORKER_KEY": "java", "NL_ACTION_DIR": str(cwd.parent)},
        capture_output=True,
    )
    end(process)
    assert (done.returncode, done.stderr) == (0, b"echo:hello"), done


def test_a_daemon_that_dies_is_started_again(node: Node) -> None:
    process = start(node)
    eventually(lambda: "with a daemon" in log_of(node))
    first = daemon_pid(node)
    os.kill(first, signal.SIGKILL)

    def is_back() -> bool:
        try:
            return daemon_pid(node) != first
        except OSError:
            return False

    eventually(is_back)
    assert end(process)[0] == 7
    assert node.leftovers() == []


def test_a_hang_up_makes_the_daemon_read_its_configuration_again(node: Node) -> None:
    process = start(node)
    eventually(lambda: "with a daemon" in log_of(node))
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    code, errors = end(process)
    assert code == 7
    assert "configuration read again" in errors


def test_without_nativelink_it_says_so_and_how_to_get_it(node: Node) -> None:
    done = run(node, NATIVELINK="no-such-nativelink")
    assert done.returncode == 69
    assert "no program no-such-nativelink on the PATH" in done.stderr
    assert "cargo" in done.stderr


def test_workers_that_cannot_start_stop_it_before_nativelink_is_started(node: Node) -> None:
    pool = {"worker_command": ["/nothing/there"], "min_warm_workers": 1}
    (node.folder / "pools.json5").write_text(json.dumps(node.document(pool)))
    done = run(node, "--ready-timeout", "1")
    assert done.returncode == 75
    assert "/nothing/there" in done.stderr
    assert log_of(node) == ""
    assert node.leftovers() == []


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (["--scheduler-endpoint", "nonsense"], 78, "http://HOST:PORT"),
        (["--config", "/nothing.json5"], 78, "/nothing.json5"),
        (["--data-dir", "/tmp/elsewhere-nlww"], 78, "actions.work_roots does not name"),
        (["--unknown"], 64, "--help explains"),
        (["--name"], 64, "wants a value"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_started(
    node: Node, more: list[str], code: int, words: str
) -> None:
    done = run(node, *more)
    assert done.returncode == code
    assert words in done.stderr
    assert log_of(node) == ""


def test_write_only_writes_and_starts_nothing(node: Node) -> None:
    done = run(node, "--write-only", NATIVELINK="no-such-nativelink")
    assert done.returncode == 0
    assert Path(done.stdout.strip()) == node.folder / "run" / "nativelink.json"
    assert Path(done.stdout.strip()).exists()


def test_help_tells_every_option() -> None:
    done = subprocess.run([SCRIPT, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    for option in ("--scheduler-endpoint", "--cas-endpoint", "--config", "--advertise-keys", "--write-only"):
        assert option in done.stdout
