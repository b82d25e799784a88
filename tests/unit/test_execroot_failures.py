"""Whichever system call fails, or is interrupted, while an action is staged or collected: nothing is lost."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.action_world import HOST_ID, ActionWorld, as_worker, look, opened
from wrapper.errors import RequestRefused, RuntimeUnavailable
from wrapper.execroot.action_execroot import ActionExecroot, StagedAction, Strategy

INPUTS = {"src/a/A": "A", "src/a/B": "B", "src/w/C": "C", "out/gen": None, "top": "top", "link": "-> top"}
CALLS = (
    *(
        "chmod",
        "chown",
        "copy_file_range",
        "dup",
        "fchmod",
        "fchown",
        "fstat",
        "ftruncate",
        "link",
        "listdir",
    ),
    *(
        "lseek",
        "mkdir",
        "open",
        "readlink",
        "rename",
        "rmdir",
        "scandir",
        "stat",
        "symlink",
        "unlink",
        "utime",
    ),
)


class FailsOnce:
    """Lets the call of the system with this number fail; `was_reached` tells whether there was one."""

    def __init__(self, patch: pytest.MonkeyPatch, number: int, error: Callable[[], BaseException]) -> None:
        self.was_reached = False
        self.made = 0
        self._left = number
        self._error = error
        for name in CALLS:
            patch.setattr(os, name, self._wrap(getattr(os, name)))

    def _wrap(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.made += 1
            self._left -= 1
            if self._left == 0:
                self.was_reached = True
                raise self._error()
            return real(*args, **kwargs)

        return call


ERRORS: dict[str, Callable[[], BaseException]] = {
    "EIO": lambda: OSError(errno.EIO, os.strerror(errno.EIO)),
    "interrupt": KeyboardInterrupt,
}


@pytest.fixture(params=list(Strategy), ids=lambda strategy: str(strategy.value))
def world(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[ActionWorld]:
    made = ActionWorld(tmp_path)
    made.strategy = request.param
    yield made
    assert list(made.base.iterdir()) == []


@pytest.fixture(params=list(ERRORS))
def error(request: pytest.FixtureRequest) -> Callable[[], BaseException]:
    return ERRORS[request.param]


def worker_works(execroot: ActionExecroot) -> None:
    with as_worker(execroot.path):
        Path("out/gen/x").write_text("x")
        Path("out/new").mkdir()
        Path("out/new/y").write_text("y")
        Path("src/a/z").write_text("z")
        os.symlink(execroot.path + "/top", "src/w/absolute")


def contents(*trees: Path | str) -> set[bytes]:
    return {seen.content for tree in trees for seen in look(tree).values() if seen.kind == "file"}


def make(world: ActionWorld, number: int) -> tuple[ActionExecroot, Path]:
    execroot = world.execroot(working_directory=b"src/w")
    return execroot, world.make_action(INPUTS, f"action{number}")


def test_a_stage_that_fails_anywhere_leaves_the_tree_as_it_was(
    world: ActionWorld, error: Callable[[], BaseException]
) -> None:
    number, was_reached = 0, True
    while was_reached:
        number += 1
        execroot, action = make(world, number)
        before = look(action)
        staged: StagedAction | None = None
        failed: BaseException | None = None
        with opened(action) as fd, pytest.MonkeyPatch.context() as patch:
            fails = FailsOnce(patch, number, error)
            try:
                staged = execroot.stage(fd)
            except (RequestRefused, RuntimeUnavailable, KeyboardInterrupt) as caught:
                failed = caught
        was_reached = fails.was_reached
        if staged is not None:
            staged.undo()
        assert look(action) == before, f"call {number}"
        if staged is None and not isinstance(failed, RuntimeUnavailable):
            # The worker goes on, with an execroot that is empty and its own.
            assert sorted(look(execroot.path)) == ["src", "src/w"]
            with opened(action) as fd:
                execroot.stage(fd).collect()
            assert look(action) == before
        execroot.remove()
    assert number > 20


def test_a_collection_that_fails_anywhere_gives_back_nothing_unsealed_and_the_worker_must_not_go_on(
    world: ActionWorld, error: Callable[[], BaseException]
) -> None:
    number, was_reached = 0, True
    while was_reached:
        number += 1
        execroot, action = make(world, number)
        inputs = contents(action)
        with opened(action) as fd:
            staged = execroot.stage(fd)
            worker_works(execroot)
            failed: BaseException | None = None
            with pytest.MonkeyPatch.context() as patch:
                fails = FailsOnce(patch, number, error)
                try:
                    staged.collect()
                except (RuntimeUnavailable, KeyboardInterrupt) as caught:
                    failed = caught
            was_reached = fails.was_reached
            assert inputs <= contents(action, execroot.path), f"call {number}"
            for path, seen in look(action).items():
                assert seen.uid == HOST_ID, f"call {number}: {path}"
                assert seen.kind == "link" or seen.mode & 0o022 == 0, f"call {number}: {path}"
            if failed is None:
                assert contents(action) == inputs | {b"x", b"y", b"z"}, f"call {number}"
                assert sorted(look(execroot.path)) == ["src", "src/w"]
            else:
                with pytest.raises(RuntimeUnavailable, match="unusable"):
                    execroot.stage(fd)
        execroot.remove()
    assert number > 30


@pytest.mark.parametrize("strategy", [Strategy.RENAME])
def test_the_number_of_system_calls_does_not_depend_on_the_number_of_files(
    tmp_path: Path, strategy: Strategy
) -> None:
    world = ActionWorld(tmp_path)
    counts = []
    for files in (2, 50):
        inputs: dict[str, str | None] = {f"top/{d}/{f}": "x" for d in range(10) for f in range(files)}
        execroot, action = world.execroot(strategy), world.make_action(inputs, f"action{files}")
        with opened(action) as fd, pytest.MonkeyPatch.context() as patch:
            calls = FailsOnce(patch, 0, KeyboardInterrupt)
            execroot.stage(fd).collect()
            counts.append(calls.made)
        execroot.remove()
    assert counts[0] == counts[1]
    # Of each directory: open, look, hand over; open, lock, look.
    assert counts[0] <= 12 * 6 + 30


def test_an_undo_that_fails_is_quiet_and_the_execroot_takes_no_more(
    world: ActionWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    execroot, action = make(world, 1)
    with opened(action) as fd:
        staged = execroot.stage(fd)
        with monkeypatch.context() as patch:
            FailsOnce(patch, 3, ERRORS["EIO"])
            staged.undo()
        with pytest.raises(RuntimeUnavailable, match="unusable"):
            execroot.stage(fd)
    execroot.remove()
