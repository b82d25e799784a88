"""The seed of a tool that comes with actions: there when the worker is idle, away while an action is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.action_world import (
    WORKER_ID,
    ActionWorld,
    Hostile,
    as_worker,
    look,
    needs_root,
    opened,
)
from wrapper.errors import RuntimeUnavailable
from wrapper.execroot.action_execroot import ActionExecroot, Strategy
from wrapper.execroot.seed import SeedTree
from wrapper.execroot.tool_files import tool_identity

pytestmark = needs_root

TOOL = {"tools/bin/run": "#!/bin/sh", "tools/lib/a.jar": "jar", "flags": "-g", "out/gen": None}
ACTION = {"tools/bin/run": "#!/bin/sh", "src/A.java": "class A", "out/gen": None}


@pytest.fixture
def world(tmp_path: Path) -> ActionWorld:
    return ActionWorld(tmp_path)


@pytest.fixture
def seed(world: ActionWorld, tmp_path: Path) -> SeedTree:
    with opened(world.make_action(TOOL, "first")) as fd:
        return SeedTree.make(str(tmp_path / "seed"), fd)


@pytest.fixture(params=list(Strategy), ids=lambda strategy: str(strategy.value))
def execroot(world: ActionWorld, seed: SeedTree, request: pytest.FixtureRequest) -> Iterator[ActionExecroot]:
    made = ActionExecroot.make(
        str(world.base), "seeded", uid=WORKER_ID, gid=WORKER_ID, strategy=request.param, seed=seed
    )
    yield made
    made.remove()


def write(path: str, content: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(content)


def files_below(folder: str | Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text() for path in Path(folder).rglob("*") if path.is_file()
    }


FILES = {name: text for name, text in TOOL.items() if text is not None}


def test_an_idle_worker_sees_its_tool_and_cannot_change_it(execroot: ActionExecroot) -> None:
    assert files_below(execroot.path) == FILES
    with Hostile(execroot.path) as hostile:
        assert hostile.run("os.open('tools/bin/run', os.O_WRONLY)") == "EACCES"
        assert hostile.run("open('tools/bin/added', 'w')") == "EACCES"
        assert hostile.run("os.unlink('tools/lib/a.jar')") == "EACCES"


def test_an_action_sees_its_own_tree_only_and_the_tool_comes_back(
    world: ActionWorld, execroot: ActionExecroot
) -> None:
    for number in range(3):
        action = world.make_action(ACTION, f"action{number}")
        before = look(action)
        with opened(action) as fd:
            staged = execroot.stage(fd)
        assert files_below(execroot.path) == {k: v for k, v in ACTION.items() if v is not None}
        with as_worker(execroot.path):
            write("out/gen/A.class", "code")
        staged.collect()
        assert {path: look(action)[path] for path in before} == before
        assert (action / "out/gen/A.class").read_text() == "code"
        assert files_below(execroot.path) == FILES


def test_after_an_undo_the_tool_is_there_too(world: ActionWorld, execroot: ActionExecroot) -> None:
    action = world.make_action(ACTION)
    before = look(action)
    with opened(action) as fd:
        staged = execroot.stage(fd)
    assert staged.undo()
    assert look(action) == before
    assert files_below(execroot.path) == FILES


def test_after_an_action_that_cannot_be_staged_the_tool_is_there(
    execroot: ActionExecroot, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.touch()
    fd = os.open(file, os.O_RDONLY)
    try:
        with pytest.raises(Exception, match="cannot be moved"):
            execroot.stage(fd)
    finally:
        os.close(fd)
    assert files_below(execroot.path) == FILES


@pytest.mark.parametrize(
    "attack", ["os.rename('tools', 'away')", "os.rename('flags', 'x'); open('flags', 'w')"]
)
def test_a_worker_that_has_replaced_its_tool_takes_no_action(
    world: ActionWorld, execroot: ActionExecroot, attack: str
) -> None:
    with Hostile(execroot.path) as hostile:
        hostile.run(attack)
    action = world.make_action(ACTION)
    before = look(action)
    with opened(action) as fd, pytest.raises(RuntimeUnavailable):
        execroot.stage(fd)
    assert look(action) == before
    with opened(action) as fd, pytest.raises(RuntimeUnavailable):
        execroot.stage(fd)


def test_what_an_idle_worker_leaves_beside_its_tool_is_removed(
    world: ActionWorld, execroot: ActionExecroot
) -> None:
    with as_worker(execroot.path):
        write("left/behind", "x")
    action = world.make_action(ACTION)
    with opened(action) as fd:
        execroot.stage(fd).collect()
    assert not (action / "left").exists()
    assert files_below(execroot.path) == FILES


def test_evicted_blobs_stay_in_the_seed(world: ActionWorld, execroot: ActionExecroot) -> None:
    for path in world.store.iterdir():
        path.unlink()
    assert files_below(execroot.path) == FILES


def test_nothing_is_left_of_a_removed_one(
    world: ActionWorld, execroot: ActionExecroot, seed: SeedTree
) -> None:
    execroot.remove()
    seed.remove()
    assert list(world.base.iterdir()) == []
    assert not Path(seed.path).exists()


def test_with_a_working_directory_each_level_has_its_part(world: ActionWorld, seed: SeedTree) -> None:
    execroot = ActionExecroot.make(
        str(world.base), "below", uid=WORKER_ID, gid=WORKER_ID, working_directory=b"tools/bin", seed=seed
    )
    try:
        inode = os.stat(execroot.working_directory).st_ino
        assert files_below(execroot.path) == FILES
        action = world.make_action({"tools/bin/other": "x", "src/A": "a"})
        with opened(action) as fd:
            staged = execroot.stage(fd)
        assert files_below(execroot.path) == {"tools/bin/other": "x", "src/A": "a"}
        staged.collect()
        assert files_below(execroot.path) == FILES
        assert os.stat(execroot.working_directory).st_ino == inode
    finally:
        execroot.remove()


def identity(tree: Path, *argv: str) -> str:
    with opened(tree) as fd:
        return tool_identity(fd, argv)


def test_the_same_blobs_under_the_same_names_are_the_same_tool(world: ActionWorld) -> None:
    first, second = world.make_action(TOOL, "one"), world.make_action({**TOOL, "src/B": "b"}, "two")
    assert identity(first, "tools/bin/run") == identity(second, "tools/bin/run") != ""


@pytest.mark.parametrize(
    ("changed", "argv"),
    [
        ("tools/bin/run", ["tools/bin/run"]),
        ("tools/lib/a.jar", ["tools/bin/run"]),  # beside `bin`: a toolchain
        ("tools/lib/a.jar", ["/usr/bin/java", "-jar", "tools/lib/a.jar"]),
        ("tools/lib/a.jar", ["/usr/bin/java", "-cp", "x.jar:tools/lib/a.jar", "Main"]),
        ("tools/lib/a.jar", ["/usr/bin/java", "-javaagent:tools/lib/a.jar", "Main"]),
        ("tools/lib/a.jar", ["/usr/bin/node", "tools/lib"]),
    ],
)
def test_another_file_of_the_tool_is_another_tool(world: ActionWorld, changed: str, argv: list[str]) -> None:
    one, two = world.make_action(TOOL, "one"), world.make_action({**TOOL, changed: "other"}, "two")
    assert identity(one, *argv) != identity(two, *argv)


def test_files_that_are_no_part_of_the_tool_do_not_matter(world: ActionWorld) -> None:
    one, two = world.make_action(TOOL, "one"), world.make_action({**TOOL, "flags": "-O"}, "two")
    assert identity(one, "tools/bin/run") == identity(two, "tools/bin/run")


def test_runfiles_belong_to_the_tool(world: ActionWorld) -> None:
    tree = {"t/run": "x", "t/run.runfiles/lib.py": "one"}
    one, two = (
        world.make_action(tree, "one"),
        world.make_action({**tree, "t/run.runfiles/lib.py": "2"}, "two"),
    )
    assert identity(one, "t/run") != identity(two, "t/run")


@pytest.mark.parametrize(
    "argv", [["/usr/bin/javac", "-g"], ["javac"], ["/bin/sh", "-c", "/etc/passwd", "../x", ".."]]
)
def test_a_tool_of_the_nodes_own_has_no_files_in_the_tree(world: ActionWorld, argv: list[str]) -> None:
    assert identity(world.make_action(TOOL), *argv) == ""
