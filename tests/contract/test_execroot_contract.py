"""What an execroot for actions promises, whatever its strategy."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.action_world import (
    HOST_ID,
    IS_ROOT,
    WORKER_ID,
    ActionWorld,
    Seen,
    as_worker,
    look,
    needs_root,
    opened,
)
from wrapper.errors import ConfigError, RequestRefused, RuntimeUnavailable
from wrapper.execroot import own_directory
from wrapper.execroot.action_execroot import ActionExecroot, Collected, Strategy
from wrapper.files import remove_tree

INPUTS = {
    "src/a/A.java": "class A",
    "src/a/B.java": "class B",
    "src/b/C.java": "class C",
    "bin/tool!": "#!",
    "bin/lib": "-> ../src",
    "out/gen": None,
    "flags": "-g",
}


@pytest.fixture(params=list(Strategy), ids=lambda strategy: str(strategy.value))
def strategy(request: pytest.FixtureRequest) -> Strategy:
    assert isinstance(request.param, Strategy)
    return request.param


@pytest.fixture
def world(tmp_path: Path) -> ActionWorld:
    return ActionWorld(tmp_path)


@pytest.fixture
def execroot(world: ActionWorld, strategy: Strategy) -> Iterator[ActionExecroot]:
    made = world.execroot(strategy)
    yield made
    made.remove()
    assert list(world.base.iterdir()) == []


def write(path: str, content: str = "made", mode: int = 0o644) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(content)
    Path(path).chmod(mode)


def paths(root: Path | str) -> set[str]:
    return set(look(root))


def run(execroot: ActionExecroot, action: Path, *works: str) -> Collected:
    """Stage, let the worker do these pieces of code, collect."""
    with opened(action) as fd:
        staged = execroot.stage(fd)
    with as_worker(execroot.path):
        for work in works:
            exec(work, {"os": os, "write": write, "shutil": shutil, "Path": Path})
    return staged.collect()


def test_inputs_are_seen_and_outputs_given_back_sealed_and_the_inode_stays(
    world: ActionWorld, execroot: ActionExecroot
) -> None:
    inode = os.stat(execroot.path).st_ino
    for number in range(3):
        action = world.make_action(INPUTS, f"action{number}")
        blobs = world.blobs()
        before = look(action)
        with opened(action) as fd:
            staged = execroot.stage(fd)
        seen = look(execroot.path)
        assert {path: (s.kind, s.content) for path, s in seen.items()} == {
            path: (s.kind, s.content) for path, s in before.items()
        }
        with as_worker(execroot.path):
            write("out/gen/A.class", "code")
            write("out/gen/run", "code", 0o700)
            write("src/a/new", "beside inputs")
            write("new/deep/er/file")
            write("top")
        assert staged.collect() == Collected(outputs=5)
        after = look(action)
        assert {path: after[path] for path in before} == before
        assert after["out/gen/A.class"] == Seen("file", b"code", 0o444, HOST_ID)
        assert after["out/gen/run"] == Seen("file", b"code", 0o555, HOST_ID)
        assert after["src/a/new"] == Seen("file", b"beside inputs", 0o444, HOST_ID)
        assert after["new/deep"] == Seen("dir", b"", 0o755, HOST_ID)
        assert len(after) == len(before) + 8
        assert os.listdir(execroot.path) == []
        assert os.stat(execroot.path).st_ino == inode
        assert world.blobs() == blobs


def test_an_execroot_is_private_and_the_workers_own(execroot: ActionExecroot) -> None:
    info = os.stat(execroot.path)
    assert (info.st_mode & 0o7777, info.st_uid, info.st_gid) == (0o750, WORKER_ID, WORKER_ID)
    assert execroot.working_directory == execroot.path


def test_inputs_are_the_same_files_and_nothing_is_copied_on_one_mount(
    world: ActionWorld, execroot: ActionExecroot
) -> None:
    action = world.make_action(INPUTS)
    inode = os.stat(action / "flags").st_ino
    with opened(action) as fd:
        staged = execroot.stage(fd)
    assert os.stat(os.path.join(execroot.path, "flags")).st_ino == inode
    staged.collect()
    assert os.stat(action / "flags").st_ino == inode


def test_a_file_made_directly_after_staging_is_seen_whatever_the_clock(
    world: ActionWorld, execroot: ActionExecroot, monkeypatch: pytest.MonkeyPatch
) -> None:
    action = world.make_action(INPUTS)
    for number in range(40):
        if number == 20:  # as if every directory had been changed in the present tick
            monkeypatch.setattr(own_directory, "file_system_clock_ns", lambda fd: 0)
        assert run(execroot, action, f"write('src/b/{number}')").outputs == 1
        assert os.stat(action / f"src/b/{number}").st_uid == HOST_ID


def test_a_directory_changed_in_the_present_tick_gets_a_time_of_the_past(
    world: ActionWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    execroot = world.execroot()
    monkeypatch.setattr(own_directory, "file_system_clock_ns", lambda fd: 0)
    with opened(world.make_action(INPUTS)) as fd:
        staged = execroot.stage(fd)
    assert os.stat(os.path.join(execroot.path, "src/b")).st_mtime == 1e9
    staged.collect()
    execroot.remove()


def test_replaced_inputs_are_outputs_also_when_they_get_the_same_inode(
    world: ActionWorld, execroot: ActionExecroot
) -> None:
    action = world.make_action(INPUTS)
    for blob in world.store.iterdir():
        blob.unlink()  # the inode numbers of inputs are free as soon as the worker unlinks them
    collected = run(
        execroot,
        action,
        "for path in ('src/a/A.java', 'flags'): os.unlink(path); write(path, 'mine')",
    )
    assert (collected.outputs == 2) >= IS_ROOT
    for path in ("src/a/A.java", "flags"):
        assert look(action)[path].content == b"mine"
        assert look(action)[path].uid == HOST_ID


def test_a_worker_may_delete_move_and_replace_what_it_was_given(
    world: ActionWorld, execroot: ActionExecroot, strategy: Strategy
) -> None:
    action = world.make_action(INPUTS)
    before = look(action)
    run(
        execroot,
        action,
        "os.unlink('src/a/B.java')",
        "os.rename('src/b', 'out/moved')",
        "os.unlink('flags'); write('flags/now', 'a directory')",
        "os.rmdir('out/gen'); write('out/gen', 'a file')",
        "os.unlink('bin/lib'); os.symlink('elsewhere', 'bin/lib')",
    )
    after = look(action)
    assert after["out/moved/C.java"] == before["src/b/C.java"]
    assert after["out/moved"] == Seen("dir", b"", 0o755, HOST_ID)
    assert after["flags/now"].content == b"a directory"
    assert after["out/gen"] == Seen("file", b"a file", 0o444, HOST_ID)
    assert after["bin/lib"].content == b"elsewhere"
    if strategy is Strategy.RENAME:  # a mirror's original keeps what was only deleted there
        assert not {"src/a/B.java", "src/b"} & set(after)
    assert {seen.uid for seen in after.values()} == {HOST_ID}


def test_modes_of_directories_and_files_are_made_fit(world: ActionWorld, execroot: ActionExecroot) -> None:
    action = world.make_action(INPUTS)
    run(
        execroot,
        action,
        "write('closed/in/file', mode=0); os.chmod('closed/in', 0); os.chmod('closed', 0)",
        "write('out/suid', mode=0o4777); write('out/gen/open', mode=0o666); os.chmod('out', 0o2777)",
        "os.utime('out', (1, 1))",
    )
    after = look(action)
    assert after["closed/in"].mode == 0o755
    assert after["closed/in/file"].mode == 0o444
    assert after["out/suid"].mode == 0o555
    assert after["out/gen/open"].mode == 0o444
    assert after["out"].mode == 0o755


def test_links_into_the_execroot_become_relative_and_others_stay_as_they_are(
    world: ActionWorld, execroot: ActionExecroot
) -> None:
    action = world.make_action(INPUTS)
    root = execroot.path
    links = {
        "top": (f"{root}/src/a", "src/a"),
        "out/gen/deep": (f"{root}/src/a/A.java", "../../src/a/A.java"),
        "out/gen/root": (f"{root}//./", "../.."),
        "whole": (root, "."),
        "inside": (f"{root}/src/../flags", "src/../flags"),
        "leaves": (f"{root}/../x", f"{root}/../x"),
        "similar": (f"{root}x/y", f"{root}x/y"),
        "etc": ("/etc/passwd", "/etc/passwd"),
        "up": ("../../../up", "../../../up"),
    }
    works = [f"os.symlink({target!r}, {path!r})" for path, (target, _) in links.items()]
    collected = run(execroot, action, *works)
    after = look(action)
    assert {path: after[path].content.decode() for path in links} == {
        path: expected for path, (_, expected) in links.items()
    }
    assert {after[path].uid for path in links} == {HOST_ID}
    assert (collected.outputs, collected.links_rewritten) == (len(links), 5)


def test_links_are_seen_from_where_the_worker_sees_its_execroot(
    world: ActionWorld, strategy: Strategy
) -> None:
    execroot = world.execroot(strategy, seen_as="/execroot")
    action = world.make_action(INPUTS)
    run(execroot, action, "os.symlink('/execroot/flags', 'src/a/link')")
    assert os.readlink(action / "src/a/link") == "../../flags"
    execroot.remove()


def test_what_no_action_can_have_as_output_is_removed_and_told(
    world: ActionWorld, execroot: ActionExecroot
) -> None:
    action = world.make_action(INPUTS)
    with opened(action) as fd:
        staged = execroot.stage(fd)
    with as_worker(execroot.path), socket.socket(socket.AF_UNIX) as listener:
        os.mkfifo("src/a/fifo")
        listener.bind("out/socket")
        write("out/file")
    collected = staged.collect()
    assert (collected.outputs, collected.removed) == (1, 2)
    assert sorted(collected.removed_paths) == ["out/socket", "src/a/fifo"]
    assert not {"out/socket", "src/a/fifo"} & paths(action)


ODD_NAMES = ["new\nline", " ", "-rf", "\udcff\udcfe", "x" * 255, "*", "é", "..."]


def test_odd_names_are_names_like_others(world: ActionWorld, execroot: ActionExecroot) -> None:
    inputs: dict[str, str | None] = {f"{name}/{name}": "in" for name in ODD_NAMES}
    action = world.make_action(inputs)
    run(execroot, action, *(f"write({f'{name}/out{name[:200]}'!r})" for name in ODD_NAMES))
    assert {f"{name}/out{name[:200]}" for name in ODD_NAMES} | set(inputs) <= paths(action)


def go_down(levels: int, owner: int) -> None:
    """Make directories in each other and go there; the path may become longer than any that can be opened."""
    for _ in range(levels):
        os.mkdir("deeper")
        os.chdir("deeper")
        os.chown(".", owner, owner)


@pytest.fixture
def deep_action(world: ActionWorld) -> Iterator[Path]:
    """300 levels; removed by us, since what removes pytest's folders recurses."""
    action = world.make_action({"in": "in"})
    here = os.getcwd()
    os.chdir(action)
    go_down(300, HOST_ID)
    os.chdir(here)
    yield action
    remove_tree(str(action))


def test_trees_deeper_than_any_path_come_and_go(execroot: ActionExecroot, deep_action: Path) -> None:
    with opened(deep_action) as fd:
        staged = execroot.stage(fd)
    with as_worker(execroot.path):
        for _ in range(300):
            os.chdir("deeper")
        go_down(700, WORKER_ID)
        write("bottom")
    assert staged.collect().outputs == 1
    owners, bottom_owner = set(), -1
    here = os.getcwd()
    os.chdir(deep_action)
    try:
        for _ in range(1000):
            owners.add(os.stat(".").st_uid)
            os.chdir("deeper")
        bottom_owner = os.stat("bottom").st_uid
    finally:
        os.chdir(here)
    assert owners == {HOST_ID}
    assert bottom_owner == HOST_ID


def test_undo_gives_the_tree_back_as_it_came_and_the_execroot_goes_on(
    world: ActionWorld, execroot: ActionExecroot
) -> None:
    action = world.make_action(INPUTS)
    before = look(action)
    with opened(action) as fd:
        staged = execroot.stage(fd)
        with as_worker(execroot.path):
            write("src/a/new")
            write("new/dir/file")
            os.symlink("/etc", "link")
        staged.undo()
        staged.undo()
        assert staged.collect() == Collected()
        assert look(action) == before
        assert os.listdir(execroot.path) == []
        execroot.stage(fd).collect()
    assert look(action) == before


def test_abandon_gives_nothing_back_and_the_execroot_takes_no_more(
    world: ActionWorld, execroot: ActionExecroot, strategy: Strategy
) -> None:
    action = world.make_action(INPUTS)
    with opened(action) as fd:
        staged = execroot.stage(fd)
        with as_worker(execroot.path):
            write("out/file")
        staged.abandon()
        staged.abandon()
        assert staged.collect() == Collected()
        assert "out/file" not in paths(action)
        if strategy is Strategy.RENAME:
            assert paths(action) == set()
        with pytest.raises(RuntimeUnavailable, match="abandoned"):
            execroot.stage(fd)


def test_removing_an_execroot_with_an_action_in_it_leaves_nothing_open(
    world: ActionWorld, execroot: ActionExecroot
) -> None:
    with opened(world.make_action(INPUTS)) as fd:
        execroot.stage(fd)
        execroot.remove()
        execroot.remove()
        assert not os.path.exists(execroot.path)
        with pytest.raises(RuntimeUnavailable, match="removed"):
            execroot.stage(fd)


def test_one_action_at_a_time(world: ActionWorld, execroot: ActionExecroot) -> None:
    action, other = world.make_action(INPUTS), world.make_action({"x": "x"}, "other")
    with opened(action) as fd, opened(other) as other_fd:
        staged = execroot.stage(fd)
        with pytest.raises(RuntimeUnavailable, match="staged"):
            execroot.stage(other_fd)
        assert paths(other) == {"x"}
        staged.collect()


def test_what_a_worker_leaves_while_it_is_idle_is_no_obstacle_and_nobody_sees_it(
    world: ActionWorld, execroot: ActionExecroot
) -> None:
    with as_worker(execroot.path):
        write("src/a/A.java", "a trap")
        os.symlink("/etc", "flags")
        os.mkdir("closed", 0)
        os.chmod(".", 0o777)
    action = world.make_action(INPUTS)
    before = look(action)
    with opened(action) as fd:
        staged = execroot.stage(fd)
    assert os.stat(execroot.path).st_mode & 0o777 == 0o750
    assert paths(execroot.path) == set(before)
    staged.collect()
    assert look(action) == before


def test_an_empty_tree_is_a_tree(world: ActionWorld, execroot: ActionExecroot) -> None:
    action = world.make_action({})
    assert run(execroot, action) == Collected()
    assert run(execroot, action, "write('out')") == Collected(outputs=1)


# ---- the working directory -----------------------------------------------------------------------------


@pytest.fixture
def inner(world: ActionWorld, strategy: Strategy) -> Iterator[ActionExecroot]:
    made = world.execroot(strategy, working_directory=b"./src/a")
    yield made
    made.remove()


def test_the_working_directory_below_keeps_its_inode_and_its_content_changes(
    world: ActionWorld, inner: ActionExecroot
) -> None:
    assert inner.working_directory == os.path.join(inner.path, "src", "a")
    inode = os.stat(inner.working_directory).st_ino
    here = os.getcwd()
    os.chdir(inner.working_directory)
    try:
        for number in range(2):
            action = world.make_action(INPUTS, f"action{number}")
            before = look(action)
            with opened(action) as fd:
                staged = inner.stage(fd)
            assert sorted(os.listdir(".")) == ["A.java", "B.java"]
            assert os.path.exists("../b/C.java")
            assert paths(inner.path) == set(before)
            with as_worker(inner.working_directory):
                write("here")
                write("../beside")
                write("../../out/above")
                os.symlink(f"{inner.path}/flags", "link")
            collected = staged.collect()
            assert (collected.outputs, collected.links_rewritten) == (4, 1)
            after = look(action)
            assert {path: after[path] for path in before} == before
            assert {"src/a/here", "src/beside", "out/above", "src/a/link"} <= set(after)
            assert os.readlink(action / "src/a/link") == "../../flags"
            assert {seen.uid for seen in after.values()} == {HOST_ID}
            assert paths(inner.path) == {"src", "src/a"}
            assert os.stat(".").st_ino == inode
    finally:
        os.chdir(here)


def test_an_action_without_that_directory_gets_it_when_something_was_put_there(
    world: ActionWorld, inner: ActionExecroot
) -> None:
    action = world.make_action({"flags": "-g"})
    run(inner, action)
    assert paths(action) == {"flags"}
    run(inner, action, "write('src/a/out')")
    assert look(action)["src/a/out"] == Seen("file", b"made", 0o444, HOST_ID)
    assert look(action)["src"] == Seen("dir", b"", 0o755, HOST_ID)


@pytest.mark.parametrize("content", ["a file", "-> /etc"])
def test_a_working_directory_that_is_none_is_refused_and_nothing_changes(
    world: ActionWorld, inner: ActionExecroot, content: str
) -> None:
    action = world.make_action({"src/a": content, "flags": "-g"})
    before = look(action)
    with opened(action) as fd, pytest.raises(RequestRefused, match="cannot be moved"):
        inner.stage(fd)
    assert look(action) == before
    good = world.make_action(INPUTS, "good")
    assert run(inner, good, "write('src/a/out')").outputs == 1


def test_a_worker_that_replaces_its_working_directory_must_not_go_on(
    world: ActionWorld, inner: ActionExecroot
) -> None:
    action = world.make_action(INPUTS)
    with opened(action) as fd:
        staged = inner.stage(fd)
        with as_worker(inner.path):
            os.rename("src", "old")
            write("src/a/out")
        with pytest.raises(RuntimeUnavailable, match="working directory"):
            staged.collect()
        assert "src/a/out" not in paths(action)
        with pytest.raises(RuntimeUnavailable, match="unusable"):
            inner.stage(fd)


@pytest.mark.parametrize("bad", [b"/", b"/etc", b"..", b"a/../b", b"a\0b"])
def test_a_working_directory_outside_is_refused(world: ActionWorld, bad: bytes) -> None:
    with pytest.raises(RequestRefused, match="not a path below"):
        world.execroot(working_directory=bad)
    assert list(world.base.iterdir()) == []


# ---- mounts --------------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    """A folder on another file system."""
    path = Path("/dev/shm", f"nlww-{os.urandom(6).hex()}")
    path.mkdir()
    assert os.stat(path).st_dev != os.stat(tmp_path).st_dev, "this test needs two file systems"
    yield path
    shutil.rmtree(path)


def test_rename_across_file_systems_is_refused_with_a_hint_and_link_works(
    world: ActionWorld, elsewhere: Path, strategy: Strategy
) -> None:
    execroot = ActionExecroot.make(str(elsewhere), "worker", uid=WORKER_ID, gid=WORKER_ID, strategy=strategy)
    action = world.make_action(INPUTS)
    before = look(action)
    if strategy is Strategy.RENAME:
        with opened(action) as fd, pytest.raises(RequestRefused, match="use strategy link"):
            execroot.stage(fd)
        assert look(action) == before
        assert os.listdir(execroot.path) == []
    else:
        assert run(execroot, action, "write('out/gen/x', mode=0o755)").outputs == 1
        after = look(action)
        assert after.pop("out/gen/x") == Seen("file", b"made", 0o555, HOST_ID)
        assert after == before
    execroot.remove()


def test_one_mount_is_told_from_two(world: ActionWorld, elsewhere: Path) -> None:
    ActionExecroot.check_same_mount(str(world.base), str(world.host))
    with pytest.raises(ConfigError, match="use strategy link"):
        ActionExecroot.check_same_mount(str(elsewhere), str(world.host))
    with pytest.raises(ConfigError, match="nothing can be renamed"):
        ActionExecroot.check_same_mount(str(world.base), str(world.host / "missing"))
    assert [*world.base.iterdir(), *world.host.iterdir(), *elsewhere.iterdir()] == []


@needs_root
def test_two_bind_mounts_of_one_file_system_are_two_mounts(world: ActionWorld) -> None:
    code = (
        "import sys; from wrapper.execroot.action_execroot import ActionExecroot as E\n"
        "try: E.check_same_mount(*sys.argv[1:])\n"
        "except Exception as error: print(error)"
    )
    shown = subprocess.run(
        [
            *("unshare", "--mount", "sh", "-ec", 'mount --bind "$1" "$1"; shift; exec "$@"', "sh"),
            *(str(world.base), sys.executable, "-c", code, str(world.base), str(world.host)),
        ],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        check=True,
        capture_output=True,
        text=True,
    )
    assert "use strategy link" in shown.stdout


def test_a_directory_that_cannot_be_handed_over_is_refused_and_the_rest_comes_back(
    world: ActionWorld, execroot: ActionExecroot, monkeypatch: pytest.MonkeyPatch
) -> None:
    action = world.make_action(INPUTS)
    before = look(action)
    real = os.open

    def refuse(path: str, *args: int, **kwargs: int) -> int:
        if path == "gen":
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return real(path, *args, **kwargs)

    with opened(action) as fd, monkeypatch.context() as patched:
        patched.setattr(os, "open", refuse)
        with pytest.raises(RequestRefused, match="Input/output error"):
            execroot.stage(fd)
    assert look(action) == before
    assert os.listdir(execroot.path) == []
    assert run(execroot, action, "write('out/x')").outputs == 1


@needs_root
def test_directories_of_inputs_are_writable_but_their_times_and_modes_are_not_the_workers(
    world: ActionWorld,
) -> None:
    execroot = world.execroot()
    with opened(world.make_action(INPUTS)) as fd:
        staged = execroot.stage(fd)
    with as_worker(execroot.path):
        with pytest.raises(PermissionError):
            os.chmod("src/a", 0o700)
        with pytest.raises(PermissionError):
            os.utime("src/a", (1, 1))
        os.utime("out/gen", (1, 1))
        os.chmod("out/gen", 0o700)
    staged.collect()
    execroot.remove()
