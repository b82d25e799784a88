"""Action mode through a whole node: what comes out is what NativeLink would have got without it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.node.node import Link, NodeAction
from tests.node.warm_node import KEY, WarmNode
from tests.support.action_world import needs_root

pytestmark = [pytest.mark.e2e, needs_root]

both_clients = pytest.mark.parametrize("python_client", [False, True], ids=["native", "python"])


def same_as_plain(warm: WarmNode, action: NodeAction) -> None:
    """Exit code and outputs as without the wrapper."""
    result, plain = warm.node.run(action), warm.plain.run(action)
    assert (result.exit_code, result.outputs, result.error) == (plain.exit_code, plain.outputs, ""), result


@both_clients
def test_a_workers_outputs_are_those_of_a_plain_run(python_client: bool) -> None:
    with WarmNode(python_client=python_client) as warm:
        for number in range(5):
            action = warm.action(
                "upper src/a out/A",
                f"write out/deep/er {number}",
                "link A out/link",
                "mkdir out/empty",
                "print a warning",
                inputs={"src/a": f"text {number}".encode()},
                outputs=["out", "src/none"],
            )
            same_as_plain(warm, action)
        assert warm.was_served() == 1, "five actions, one warm worker"


@both_clients
def test_output_goes_to_stderr_and_the_code_is_passed_on(python_client: bool) -> None:
    with WarmNode(python_client=python_client) as warm:
        result = warm.node.run(warm.action("print said", "exit 7"))
        assert (result.exit_code, result.stdout, result.stderr) == (7, b"", b"said")


@pytest.mark.parametrize("why", ["no key", "no tool", "another key", "off", "never warm"])
def test_every_other_action_runs_as_it_always_did(why: str) -> None:
    with WarmNode(actions={"never_warm": ["*release*"]}) as warm:
        action = warm.action("write out/f x", "print said", "exit 3", outputs=["out/f"])
        if why == "no key":
            action.properties = {}
        elif why == "another key":
            action.properties = {"persistentWorkerKey": "unknown"}
        elif why == "no tool":
            action.argv = ["/bin/sh", "-c", "echo x > out/f; exit 3", "sh", "@flags"]
        elif why == "off":
            assert warm.daemon.command("off").returncode == 0
        else:
            action.argv = [*action.argv[:-1], "--mode=release", "@flags"]
            action.argv.remove("--mode=release")
            action.properties = {"persistentWorkerKey": "key"}
            action.env = {"X": "1"}
            action.argv = [*action.argv, "@release-flags"]
            action.inputs = {**action.inputs, "release-flags": b""}
        same_as_plain(warm, action)
        assert warm.was_served() == 0


@pytest.mark.parametrize(
    "options", [{"use_namespaces": True}, {"use_mount_namespace": True}], ids=["pid", "mount"]
)
def test_in_namespaces_of_its_own_the_client_is_served_too(options: Mapping[str, Any]) -> None:
    with WarmNode(**options) as warm:
        for _ in range(3):
            action = warm.action("copy src/a out/A", inputs={"src/a": b"text"}, outputs=["out/A"])
            result = warm.node.run(action)
            assert result.outputs == {"out/A": b"text"}, result
        assert warm.was_served() == 1


@pytest.mark.parametrize("owner", [0, 2000], ids=["root", "another user"])
def test_nativelink_may_be_root_or_somebody_else(owner: int) -> None:
    with WarmNode(owner=owner) as warm:
        for number in range(3):
            action = warm.action(
                "copy src/a out/A", f"write out/n {number}", inputs={"src/a": b"t"}, outputs=["out"]
            )
            result = warm.node.run(action)
            assert result.outputs == {"out/A": b"t", "out/n": str(number).encode()}, result


@pytest.mark.parametrize("strategy", ["rename", "link"])
def test_with_a_working_directory(strategy: str) -> None:
    with WarmNode({"execroot": {"strategy": strategy}}) as warm:
        for _ in range(2):
            action = NodeAction(
                [*warm.tool(), "@flags"],
                inputs={"sub/flags": b"copy ../top out/A\nwrite out/B b\n", "top": b"above"},
                outputs=["out"],
                properties=KEY,
                working_directory="sub",
            )
            same_as_plain(warm, action)


def test_input_links_and_an_empty_input_root_are_fine() -> None:
    with WarmNode() as warm:
        inputs: dict[str, bytes | Link] = {"flags": b"copy link out/A\n", "real": b"x", "link": Link("real")}
        same_as_plain(warm, NodeAction([*warm.tool(), "@flags"], inputs, outputs=["out/A"], properties=KEY))
        empty = NodeAction([*warm.tool(), "@flags"], properties=KEY)
        result = warm.node.run(empty)
        assert result.exit_code == 64
        assert b"flags" in result.stderr


@both_clients
def test_a_time_out_is_the_actions_and_the_next_is_served(python_client: bool) -> None:
    with WarmNode(python_client=python_client) as warm:
        assert warm.node.run(warm.action("print warm")).exit_code == 0
        result = warm.node.run(warm.action("sleep 30", timeout_s=0.3))
        assert result.timed_out
        assert result.attempts == 1
        assert warm.node.run(warm.action("print again")).stderr == b"again"


def test_a_worker_that_dies_is_an_action_that_nativelink_runs_again() -> None:
    with WarmNode() as warm:
        assert warm.node.run(warm.action("print warm")).exit_code == 0
        result = warm.node.run(warm.action("write out/x x", "crash", outputs=["out/x"]))
        # Three crashes open the circuit: the fourth attempt runs without a worker, and crashes for itself.
        assert (result.exit_code, result.attempts, result.outputs) == (86, 4, {"out/x": b"x"})
        assert b"not used for now" not in result.stderr


def test_with_lost_fail_it_is_the_actions_failure() -> None:
    with WarmNode(policy={"lost": "fail"}) as warm:
        assert warm.node.run(warm.action("print warm")).exit_code == 0
        result = warm.node.run(warm.action("crash"))
        assert (result.exit_code, result.attempts) == (70, 1)


def test_a_tool_that_is_no_worker_runs_once_with_its_tree_as_it_came() -> None:
    with WarmNode({"tools": [{"pattern": "no_worker"}]}) as warm:
        program = warm.tools / "no_worker"
        program.write_text("#!/bin/sh\n[ -e out/mark ] && exit 9\necho x > out/mark; echo not a worker\n")
        program.chmod(0o755)
        action = NodeAction([str(program), "@flags"], {"flags": b"x\n"}, outputs=["out/mark"], properties=KEY)
        for _ in range(2):
            result = warm.node.run(action)
            assert (result.exit_code, result.attempts, result.outputs) == (0, 1, {"out/mark": b"x\n"}), result


def test_a_tool_among_the_inputs_stays_warm_while_it_is_the_same() -> None:
    with WarmNode() as warm:
        text = (warm.tools / "action_worker.py").read_bytes()

        def run(tool: bytes) -> bytes:
            action = warm.action(
                "print-count",
                "write out/x x",
                tool=["/usr/bin/python3", "-I", "-S", "tool/action_worker.py"],
                inputs={"tool/action_worker.py": tool},
                outputs=["out/x"],
            )
            result = warm.node.run(action)
            assert result.outputs == {"out/x": b"x"}, result
            return result.stderr

        assert [run(text) for _ in range(3)] == [b"1", b"2", b"3"]
        assert run(text + b"# another\n") == b"1"
        assert run(text) == b"4"


def test_digests_are_sent_to_a_tool_that_says_that_it_misses_them() -> None:
    with WarmNode() as warm:
        action = warm.action("need-digest src/a", "write out/x x", inputs={"src/a": b"a"}, outputs=["out/x"])
        first = warm.node.run(action)
        assert (first.exit_code, first.attempts, first.outputs) == (0, 2, {"out/x": b"x"}), first
        assert warm.node.run(action).attempts == 1


def test_a_daemon_that_is_away_costs_nothing_but_warmth_and_is_used_again() -> None:
    with WarmNode() as warm:
        action = warm.action("write out/x x", "print-count", outputs=["out/x"])
        assert warm.node.run(action).stderr == b"1"
        assert warm.daemon.stop() == 0
        away = warm.node.run(action)
        assert (away.exit_code, away.outputs, away.stderr) == (0, {"out/x": b"x"}, b"0")
        warm.daemon.start().wait_ready()
        assert warm.node.run(action).stderr == b"1"


def test_a_daemon_that_is_killed_with_an_action_has_it_run_again() -> None:
    with WarmNode() as warm:
        assert warm.node.run(warm.action("print warm")).exit_code == 0
        action = warm.action("sleep 1", "write out/x x", outputs=["out/x"])
        results = []
        runner = threading.Thread(target=lambda: results.append(warm.node.run(action)))
        runner.start()
        taken = warm.folder.glob
        while not list(taken(".nativelink_worker_wrapper/generation-*/*/flags")):
            time.sleep(0.01)
        assert warm.daemon.process is not None
        warm.daemon.process.send_signal(signal.SIGKILL)
        warm.daemon.process.wait()
        runner.join()
        assert (results[0].exit_code, results[0].attempts, results[0].outputs) == (0, 2, {"out/x": b"x"})
        warm.daemon.start().wait_ready()


def test_a_process_that_an_action_left_behind_writes_into_nobodys_outputs() -> None:
    with WarmNode() as warm:
        for number in range(4):
            action = warm.action("leave-process", f"write out/x {number}", outputs=["out/x"])
            assert warm.node.run(action).outputs == {"out/x": str(number).encode()}


def test_supports_workers_is_refused_loudly() -> None:
    with WarmNode() as warm:
        done = warm.node.start_as_worker("tool")
        assert done.returncode == 64
        assert b"supports-workers=1" in done.stderr


def test_forged_variables_of_an_action_change_nothing_but_its_own_identity() -> None:
    with WarmNode() as warm:
        forged = {
            "NL_SIDE_CHANNEL": "/etc/passwd",
            "NL_ACTION_DIR": "/etc",
            "NL_TIMEOUT_MS": "999999999",
            "NL_WORKER_KEY": "key",
        }
        result = warm.node.run(warm.action("write out/x x", outputs=["out/x"], env=forged, properties={}))
        assert result.outputs == {"out/x": b"x"}
        passwd = Path("/etc/passwd").read_bytes()
        for _ in range(2):
            warm.node.run(warm.action("crash", env=forged))
        assert Path("/etc/passwd").read_bytes() == passwd


def test_an_action_that_speaks_to_the_daemon_itself_gains_nothing() -> None:
    """It runs as NativeLink's user, who may open the socket: with directories of others and of the system."""
    script = """
import array, os, socket, struct, sys
def ask(path):
    try: fd = os.open(path, os.O_RDONLY)
    except OSError: return "-"
    s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])
    strings = ["key", "", "", "action_worker.py", "@/etc/shadow"]
    body = struct.pack("<QII", 0, 2, 0) + b"".join(t.encode() + b"\\0" for t in strings)
    s.sendmsg([b"NLA1" + struct.pack("<I", len(body)) + body],
              [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])
    data = b""
    while part := s.recv(65536): data += part
    return data.decode("utf-8", "replace")
for path in ["/", "/etc", "..", "../..", "/proc/self", "/etc/passwd", "."]:
    print(path, ask(path)[:200].replace("\\n", " "))
"""
    with WarmNode() as warm:
        action = NodeAction(
            ["/usr/bin/python3", "-I", "-S", "-c", script, warm.socket], inputs={"x": b"x"}, properties={}
        )
        result = warm.node.run(action)
        assert result.exit_code == 0, result
        lines = result.stdout.decode().splitlines()
        assert len(lines) == 7
        assert b"root:" not in result.stdout
        for line in lines:
            assert line.split(" ", 1)[1][:1] in ("O", "F", "-", ""), line
        assert not os.path.exists("/execroot")


def test_many_at_once_each_get_what_is_theirs() -> None:
    with WarmNode({"max_workers": 4}) as warm, ThreadPoolExecutor(8) as threads:

        def one(number: int) -> None:
            action = warm.action(
                f"write out/{number} {number}",
                f"print {number}",
                f"exit {number % 3}",
                inputs={"src": str(number).encode()},
                outputs=["out"],
            )
            result = warm.node.run(action)
            assert (result.exit_code, result.stderr) == (number % 3, str(number).encode())
            assert result.outputs == {f"out/{number}": str(number).encode()}

        list(threads.map(one, range(200)))
