"""The harness does what was seen of NativeLink: each fact a test, with plain scripts as the entrypoint."""

from __future__ import annotations

import json
import os
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.node.cas import Cas
from tests.node.node import Link, Node, NodeAction
from tests.support.action_world import needs_root

pytestmark = needs_root

OWNER = 2000


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="nlww-harness-"))
    made.chmod(0o711)
    yield made
    shutil.rmtree(made)


def node_of(folder: Path, script: str | None = None, *, owner: int = 0, **options: object) -> Node:
    """A node whose entrypoint is this script; None: it has none."""
    entrypoint = None
    if script is not None:
        entrypoint = str(folder / "entrypoint")
        Path(entrypoint).write_text(f"#!/bin/sh\n{script}\n")
        Path(entrypoint).chmod(0o755)
    return Node(folder / "work", Cas(folder / "cas", owner), entrypoint, **options)  # type: ignore[arg-type]


def shell(script: str, **fields: object) -> NodeAction:
    return NodeAction(["/bin/sh", "-c", script], **fields)  # type: ignore[arg-type]


EXEC = 'exec "$@"'


def test_the_entrypoint_gets_the_command_line_as_its_arguments(folder: Path) -> None:
    result = node_of(folder, 'printf "%s|" "$@"').run(NodeAction(["a b", "", "@c"]))
    assert (result.exit_code, result.stdout) == (0, b"a b||@c|")


def test_stdin_is_the_null_device_and_the_group_its_own(folder: Path) -> None:
    result = node_of(folder, EXEC).run(
        shell("readlink /proc/self/fd/0; cut -d' ' -f5 /proc/$$/stat; echo $$")
    )
    null, group, pid = result.stdout.split()
    assert null == b"/dev/null"
    assert group == pid


def test_the_environment_is_cleared_then_the_nodes_then_the_actions_which_wins(folder: Path) -> None:
    os.environ["NLWW_LEAKED"] = "1"
    try:
        action = shell(
            "env", env={"PATH": "/mine:/usr/bin:/bin", "A": "1"}, properties={"persistentWorkerKey": "k"}
        )
        result = node_of(folder, EXEC).run(action)
    finally:
        del os.environ["NLWW_LEAKED"]
    env = dict(line.split("=", 1) for line in result.stdout.decode().splitlines())
    assert env["PATH"] == "/mine:/usr/bin:/bin"
    assert (env["A"], env["NL_WORKER_KEY"], env["NL_WORKER_TOOL"]) == ("1", "k", "")
    assert "NLWW_LEAKED" not in env
    assert len(os.path.basename(env["NL_SIDE_CHANNEL"])) == 32
    assert os.path.dirname(env["NL_SIDE_CHANNEL"]) == env["NL_ACTION_DIR"]


def test_each_action_has_a_new_directory_with_its_inputs_and_the_parents_of_its_outputs(folder: Path) -> None:
    node = node_of(folder, EXEC)
    action = shell(
        "pwd; find . | sort",
        inputs={"in/a": b"a", "in/l": Link("a")},
        outputs=["out/x/file", "top"],
        working_directory="",
    )
    first, second = node.run(action), node.run(action)
    assert first.stdout.splitlines()[1:] == [b".", b"./in", b"./in/a", b"./in/l", b"./out", b"./out/x"]
    assert first.stdout.splitlines()[0] != second.stdout.splitlines()[0]
    assert Path(first.stdout.splitlines()[0].decode()).name == "work"
    assert list(node.work_directory.iterdir()) == []


def test_inputs_are_hard_links_to_blobs_that_nobody_may_write(folder: Path) -> None:
    node = node_of(folder, EXEC)
    action = shell("stat -c '%h %a %u' a x", inputs={"a": b"a", "x": b"x"}, executables=["x"])
    assert node.run(action).stdout.splitlines() == [b"2 444 0", b"2 555 0"]
    assert node.cas.damage() == []


def test_a_write_to_an_input_by_root_damages_the_store(folder: Path) -> None:
    """Seen on the real one; and that the harness sees it."""
    node = node_of(folder, EXEC)
    node.run(shell("echo changed > a", inputs={"a": b"a"}))
    assert node.cas.damage()


def test_the_working_directory_is_below_the_actions(folder: Path) -> None:
    node = node_of(folder, EXEC)
    result = node.run(shell("pwd; echo x > out/f", working_directory="a/b", outputs=["out/f"]))
    assert Path(result.stdout.decode().strip()).parts[-3:] == ("work", "a", "b")
    assert result.outputs == {"out/f": b"x\n"}


def test_declared_outputs_are_taken_and_others_are_not(folder: Path) -> None:
    script = "echo f > out/f; mkdir -p tree/d tree/e; echo g > tree/d/g; ln -s d/g tree/l"
    script += "; ln -s /etc tree/abs; echo n > other"
    node = node_of(folder, EXEC)
    result = node.run(shell(script, outputs=["out/f", "tree", "missing"]))
    assert result.outputs == {"out/f": b"f\n", "tree/d/g": b"g\n", "tree/e": "directory", "tree/l": "-> d/g"}
    assert node.cas.damage() == []


def test_a_cancel_kills_the_one_process_and_its_children_survive(folder: Path) -> None:
    node = node_of(folder, '"$@" & echo $! > /tmp/nlww-child-$$; wait')
    marker = folder / "pid"
    action = shell(f"echo $$ > {marker}; exec sleep 3 >/dev/null 2>&1")
    result = node.run(action, cancel_after_s=0.3)
    assert result.cancelled
    assert result.exit_code is None
    pid = int(marker.read_text())
    assert Path(f"/proc/{pid}").exists()
    os.kill(pid, 9)
    for left in Path("/tmp").glob("nlww-child-*"):
        left.unlink()


def test_a_process_that_keeps_the_output_open_keeps_the_action_open(folder: Path) -> None:
    begin = time.monotonic()
    node_of(folder, EXEC).run(shell("sleep 0.7 & exit 0"))
    assert time.monotonic() - begin > 0.6


def test_with_a_pid_namespace_the_whole_tree_is_killed(folder: Path) -> None:
    node = node_of(folder, '"$@" & wait', use_namespaces=True)
    marker = folder / "alive"
    node.run(shell(f"while :; do touch {marker}; sleep 0.05; done"), cancel_after_s=0.5)
    marker.unlink()
    time.sleep(0.3)
    assert not marker.exists()


def test_with_a_mount_namespace_the_directory_is_on_another_mount(folder: Path) -> None:
    node = node_of(folder, EXEC, use_mount_namespace=True)
    result = node.run(
        shell("pwd; echo x > out/f; grep -c nlww-harness /proc/self/mountinfo", outputs=["out/f"])
    )
    assert result.outputs == {"out/f": b"x\n"}
    assert int(result.stdout.split()[-1]) >= 1


@pytest.mark.parametrize(
    ("text", "timed_out", "attempts"),
    [
        ('{"failure": "timeout"}', True, 1),
        ("", False, 4),
        ("not json", False, 4),
        ('{"failure": "x"}', False, 4),
    ],
)
def test_the_side_channel_file(folder: Path, text: str, timed_out: bool, attempts: int) -> None:
    node = node_of(folder, f"printf '%s' '{text}' > $NL_SIDE_CHANNEL; exit 3")
    result = node.run(NodeAction(["x"]))
    assert (result.timed_out, result.attempts, result.exit_code) == (timed_out, attempts, None)
    assert bool(result.error) == (attempts == 4)


def test_each_attempt_begins_with_the_inputs(folder: Path) -> None:
    count = folder / "count"
    script = f"cat a; rm a; echo x >> {count}; [ $(wc -l < {count}) -ge 3 ] && exit 0; : > $NL_SIDE_CHANNEL"
    result = node_of(folder, script).run(NodeAction(["x"], inputs={"a": b"a"}))
    assert (result.exit_code, result.attempts, result.stdout) == (0, 3, b"a")


def test_an_exit_code_is_the_actions_and_not_tried_again(folder: Path) -> None:
    result = node_of(folder, "exit 9").run(NodeAction(["x"]))
    assert (result.exit_code, result.attempts) == (9, 1)


def test_a_time_out_is_the_nodes_own_unless_it_is_handled_outside(folder: Path) -> None:
    node = node_of(folder, EXEC, timeout_handled_externally=False)
    result = node.run(NodeAction(["/bin/sleep", "30"], timeout_s=0.2))
    assert result.timed_out
    assert result.exit_code is None


def test_a_foreign_directory_sticks_and_a_foreign_output_is_an_error_unless_the_node_is_root(
    folder: Path,
) -> None:
    marker = folder / "go"
    node = node_of(folder, f'"$@"; while [ ! -e {marker} ]; do sleep 0.02; done', owner=OWNER)

    def interfere() -> None:
        while not (found := list(node.work_directory.glob("*/*/out"))):
            time.sleep(0.01)
        (found[0] / "made").mkdir()
        (found[0] / "f").write_text("somebody else's")
        marker.touch()

    other = threading.Thread(target=interfere)
    other.start()
    result = node.run(shell("exit 0", outputs=["out/f"]))
    other.join()
    assert "EPERM" in result.error
    assert node.stuck


def test_a_node_that_is_no_root_runs_its_entrypoint_as_itself(folder: Path) -> None:
    node = node_of(folder, EXEC, owner=OWNER)
    result = node.run(shell("id -u; id -G; stat -c %u . a", inputs={"a": b"a"}))
    assert result.stdout.split() == [b"2000"] * 4
    assert node.stuck == []


def test_blobs_may_be_evicted_while_an_action_has_them(folder: Path) -> None:
    node = node_of(folder, EXEC)
    directory = node.prepare(shell("true", inputs={"a": b"a"}))
    node.cas.evict(10)
    assert (directory / "work" / "a").read_bytes() == b"a"
    node.delete(directory)


def test_supports_workers_starts_the_entrypoint_as_a_worker_without_the_nodes_environment(
    folder: Path,
) -> None:
    done = node_of(folder, 'echo "$@"; env').start_as_worker("tool", "x")
    assert done.stdout.splitlines()[0] == b"tool x --persistent_worker"
    assert b"NL_ACTION_DIR" not in done.stdout


def test_a_start_of_the_node_empties_its_work_directory(folder: Path) -> None:
    node = node_of(folder)
    (node.work_directory / "left").mkdir()
    inode = node.work_directory.stat().st_ino
    again = Node(node.work_directory, node.cas, None)
    assert list(again.work_directory.iterdir()) == []
    assert stat.S_ISDIR(again.work_directory.stat().st_mode)
    assert inode


def test_its_environment_is_that_of_the_configuration() -> None:
    from tests.node.node import ENVIRONMENT

    root = Path(__file__).resolve().parents[2]
    document = json.loads((root / "nativelink-config.json").read_text())
    assert document["workers"][0]["local"]["additional_environment"] == ENVIRONMENT
