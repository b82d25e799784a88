"""Random trees, changed by a worker in random ways: what is given back is what the worker left, sealed."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.support.action_world import HOST_ID, IS_ROOT, ActionWorld, Seen, as_worker, look, opened
from wrapper.execroot.action_execroot import Strategy

NAMES = st.sampled_from(["a", "b", "c", "new\nline", "\udcff", ".hidden"])
PATHS = st.lists(NAMES, min_size=1, max_size=4).map("/".join)
FILES = st.tuples(PATHS, st.sampled_from(["", "one", "two", "-> a", "-> /etc/passwd", "-> ../..", None]))
CHANGES = st.one_of(
    st.tuples(st.just("write"), PATHS, st.sampled_from(["made", ""])),
    st.tuples(st.just("replace"), PATHS, st.just("again")),
    st.tuples(st.just("mkdir"), PATHS, st.just("")),
    st.tuples(st.just("remove"), PATHS, st.just("")),
    st.tuples(st.just("rename"), PATHS, PATHS),
    st.tuples(st.just("link"), PATHS, PATHS),
    st.tuples(st.just("symlink"), PATHS, st.sampled_from(["a", "/etc", "../x"])),
    st.tuples(st.just("chmod"), PATHS, st.sampled_from(["0", "700", "777", "4755"])),
    st.tuples(st.just("utime"), PATHS, st.just("")),
)


def change(what: str, path: str, value: str) -> None:
    if what == "write":
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        Path(path).write_text(value)
    elif what == "replace":
        os.unlink(path)
        Path(path).write_text(value)
    elif what == "mkdir":
        os.makedirs(path)
    elif what == "remove":
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            os.unlink(path)
    elif what == "rename":
        os.rename(path, value)
    elif what == "link":
        os.link(path, value, follow_symlinks=False)
    elif what == "symlink":
        os.symlink(value, path)
    elif what == "chmod":
        if IS_ROOT and not os.path.islink(path):  # else it may do what it likes with inputs too
            os.chmod(path, int(value, 8))
    else:
        info = os.stat(path)
        os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns), follow_symlinks=False)


def build(world: ActionWorld, name: str, files: list[tuple[str, str | None]]) -> Path:
    tree: dict[str, str | None] = {}
    for path, content in files:
        above = {"/".join(path.split("/")[:length]) for length in range(1, path.count("/") + 1)}
        is_blocked = any(tree.get(part) is not None for part in above)
        if path not in tree and not is_blocked and not any(other.startswith(path + "/") for other in tree):
            tree[path] = content
    return world.make_action(tree, name)


def shape(tree: dict[str, Seen]) -> dict[str, tuple[str, bytes]]:
    return {path: (seen.kind, seen.content) for path, seen in tree.items()}


@pytest.mark.parametrize("strategy", list(Strategy), ids=lambda strategy: str(strategy.value))
def test_what_is_given_back_is_what_the_worker_left(tmp_path: Path, strategy: Strategy) -> None:
    world = ActionWorld(tmp_path)
    execroot = world.execroot(strategy)
    numbers = itertools.count()

    @settings(max_examples=150, suppress_health_check=list(HealthCheck))
    # The new file gets the inode of the link, and another name under which it is sealed first.
    @example([("a", "-> a")], [("replace", "a", "again"), ("write", "a", "made"), ("link", "a", "b")])
    @given(st.lists(FILES, max_size=12), st.lists(CHANGES, max_size=12))
    def play(files: list[tuple[str, str | None]], changes: list[tuple[str, str, str]]) -> None:
        action = build(world, f"action{next(numbers)}", files)
        before, blobs = look(action), world.blobs()
        with opened(action) as fd:
            staged = execroot.stage(fd)
        assert shape(look(execroot.path)) == shape(before)
        with as_worker(execroot.path):
            for one in changes:
                with contextlib.suppress(OSError):
                    change(*one)
        left = look(execroot.path)
        staged.collect()
        after = look(action)
        given_back = shape(after)
        if strategy is Strategy.RENAME:
            assert given_back == shape(left)
        else:  # what was only deleted in the mirror is still there
            assert shape(left).items() <= given_back.items()
            assert set(given_back) - set(left) <= set(before)
        for path, seen in after.items():
            assert seen.uid == HOST_ID, path
            assert seen.kind == "link" or seen.mode & 0o022 == 0, path
            if IS_ROOT and seen.kind == "file":
                assert seen.mode in (0o444, 0o555), path
        assert world.blobs() == blobs
        assert os.listdir(execroot.path) == []
        shutil.rmtree(action)

    play()
    execroot.remove()
