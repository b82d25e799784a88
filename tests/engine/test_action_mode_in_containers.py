"""Action mode with pools of containers: a whole node, a real engine, the client as it is installed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.driver import QUICK_JVM
from tests.node.node import NodeAction
from tests.node.warm_node import KEY, WarmNode
from tests.support.cri import WORKERS, container_pool, engine_is_empty
from tests.support.engine import PrivateContainerd

import demo_input  # isort: skip  # the driver has put the example on sys.path

pytestmark = pytest.mark.engine

PYTHON = "/usr/bin/python3"


@contextmanager
def warm_containers(engine: PrivateContainerd, tmp_path: Path, **changes: Any) -> Iterator[WarmNode]:
    """A node whose one pool is of containers."""
    (pool,) = container_pool(engine, tmp_path, **changes)["pools"]
    pool.pop("execroot")
    warm = WarmNode({**pool, "keys": ["key"]})
    with warm:
        yield warm
    assert engine_is_empty(engine)


def in_place(warm: WarmNode, *lines: str, **fields: Any) -> NodeAction:
    """An action of the pool's own command."""
    return warm.action(*lines, tool=["action_worker.py"], **fields)


def test_actions_of_a_pools_own_command(engine: PrivateContainerd, tmp_path: Path) -> None:
    command = [PYTHON, "-I", "-S", f"{WORKERS}/action_worker.py", "--persistent_worker"]
    pool = {"worker_command": command, "min_warm_workers": 1, "tools": [{"pattern": "action_worker.py"}]}
    with warm_containers(engine, tmp_path, **pool) as warm:
        for number in range(5):
            action = in_place(
                warm, "upper src/a out/A", "print-count", inputs={"src/a": b"text"}, outputs=["out/A"]
            )
            result = warm.node.run(action)
            assert (result.outputs, result.stderr) == ({"out/A": b"TEXT"}, str(number + 1).encode()), result
        late = warm.node.run(in_place(warm, "sleep 60", timeout_s=0.5))
        assert late.timed_out
        again = warm.node.run(in_place(warm, "write out/x x", outputs=["out/x"]))
        assert again.outputs == {"out/x": b"x"}


def test_a_tool_among_the_inputs_is_started_in_a_container_and_stays(
    engine: PrivateContainerd, tmp_path: Path
) -> None:
    pool = {"worker_command": [], "tools": [{"pattern": "action_worker.py"}]}
    with warm_containers(engine, tmp_path, **pool) as warm:
        text = (warm.tools / "action_worker.py").read_bytes()
        for number in range(4):
            action = warm.action(
                "print-count",
                f"write out/x {number}",
                tool=[PYTHON, "-I", "-S", "tool/action_worker.py"],
                inputs={"tool/action_worker.py": text},
                outputs=["out/x"],
            )
            result = warm.node.run(action)
            assert result.outputs == {"out/x": str(number).encode()}, result
            assert result.stderr == str(number + 1).encode()


def test_what_an_action_does_in_a_container_reaches_nothing_of_the_node(
    engine: PrivateContainerd, tmp_path: Path
) -> None:
    command = [PYTHON, "-I", "-S", f"{WORKERS}/action_worker.py", "--persistent_worker"]
    pool = {"worker_command": command, "tools": [{"pattern": "action_worker.py"}]}
    with warm_containers(engine, tmp_path, **pool) as warm:
        precious = warm.folder / "precious"
        precious.write_text("precious")
        precious.chmod(0o666)
        warm.node.run(in_place(warm, f"write {precious} overwritten"))  # goes into a /tmp of its own
        assert precious.read_text() == "precious"
        assert warm.node.run(in_place(warm, "copy flags flags")).exit_code == 1
        assert warm.node.run(in_place(warm, "write src/a x", inputs={"src/a": b"a"})).exit_code == 1


def test_a_killed_daemons_containers_are_removed_by_the_next(
    engine: PrivateContainerd, tmp_path: Path
) -> None:
    command = [PYTHON, "-I", "-S", f"{WORKERS}/action_worker.py", "--persistent_worker"]
    pool = {"worker_command": command, "min_warm_workers": 1, "tools": [{"pattern": "action_worker.py"}]}
    with warm_containers(engine, tmp_path, **pool) as warm:
        assert warm.node.run(in_place(warm, "print-count")).stderr == b"1"
        assert warm.daemon.process is not None
        warm.daemon.process.kill()
        warm.daemon.process.wait()
        warm.daemon.start().wait_ready()
        assert warm.node.run(in_place(warm, "print-count")).stderr == b"1"


def test_javac_in_a_warm_container_compiles_what_nativelink_sends(
    engine: PrivateContainerd, tmp_path: Path
) -> None:
    demo_input.CACHE.mkdir(parents=True, exist_ok=True)
    jar = demo_input.worker_jar(demo_input.find_jdk())
    java = shutil.which("java")
    assert java is not None
    command = [java, *QUICK_JVM, "-jar", "/opt/java-worker.jar", "--persistent_worker"]
    pool: dict[str, Any] = {
        "worker_command": command,
        "language": "jvm",
        "tools": [{"pattern": "java-worker.jar"}],
    }
    (made,) = container_pool(engine, tmp_path, **pool)["pools"]
    made.pop("execroot")
    made["isolation"]["mounts"].append({"host_path": str(jar), "path": "/opt/java-worker.jar"})
    with WarmNode({**made, "keys": ["key"]}) as warm:
        for number in range(10):
            source = f"public class C{number} {{ public static int n() {{ return {number}; }} }}\n".encode()
            action = NodeAction(
                [java, "-jar", "java-worker.jar", "@flags"],
                {"flags": f"-d\nout\nsrc/C{number}.java\n".encode(), f"src/C{number}.java": source},
                outputs=[f"out/C{number}.class"],
                properties=KEY,
            )
            result = warm.node.run(action)
            assert result.exit_code == 0, result
            assert result.outputs[f"out/C{number}.class"][:4] == b"\xca\xfe\xba\xbe"
        assert warm.daemon.log.read_text().count("worker started") == 1
    assert engine_is_empty(engine)
