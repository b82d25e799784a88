"""A worker's own execroot: what is moved where, and that an error leaves the sandbox as it was."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from wrapper.errors import RequestRefused, RuntimeUnavailable
from wrapper.execroot.worker_execroot import FOLDER, WorkerExecroot


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """A host's working directory with a tool, and one sandbox with two inputs."""
    (tmp_path / "tool").write_text("tool")
    sandbox = tmp_path / "__sandbox" / "1" / "_main"
    (sandbox / "pkg").mkdir(parents=True)
    (sandbox / "pkg" / "in").write_text("in")
    (sandbox / "top").write_text("top")
    return tmp_path


@pytest.fixture
def execroot(host: Path) -> Iterator[WorkerExecroot]:
    made = WorkerExecroot.make(str(host), 7)
    yield made
    made.remove()


SANDBOX = b"__sandbox/1/_main"


def tree(path: Path) -> list[str]:
    return sorted(str(p.relative_to(path)) for p in path.rglob("*"))


def test_while_idle_it_shows_links_to_the_hosts_entries_but_no_sandbox(execroot: WorkerExecroot) -> None:
    assert os.listdir(execroot.path) == ["tool"]
    assert Path(execroot.path, "tool").read_text() == "tool"
    assert os.stat(execroot.path).st_mode & 0o777 == 0o700


def test_inputs_go_in_and_come_back_with_outputs_and_the_inode_stays(
    host: Path, execroot: WorkerExecroot
) -> None:
    inode = os.stat(execroot.path).st_ino
    for _ in range(3):
        staged = execroot.stage(SANDBOX)
        assert {"pkg", "pkg/in", "top"} <= set(tree(Path(execroot.path)))
        assert not (host / "__sandbox/1/_main/top").exists()
        Path(execroot.path, "out").write_text("out")
        staged.collect()
        assert tree(host / "__sandbox/1/_main") == ["out", "pkg", "pkg/in", "top"]
        assert os.listdir(execroot.path) == ["tool"]
    assert os.stat(execroot.path).st_ino == inode


def test_collecting_twice_or_after_abandon_does_nothing(host: Path, execroot: WorkerExecroot) -> None:
    staged = execroot.stage(SANDBOX)
    staged.collect()
    staged.collect()
    staged = execroot.stage(SANDBOX)
    staged.abandon()
    staged.collect()
    staged.abandon()
    assert tree(host / "__sandbox/1/_main") == []


@pytest.mark.parametrize(
    "bad", [b"/", b"/etc", b"", b".", b"..", b"__sandbox/../x", b"nothing", b"tool", b"link/1"]
)
def test_what_is_no_sandbox_is_refused_and_changes_nothing(
    host: Path, execroot: WorkerExecroot, bad: bytes
) -> None:
    (host / "link").symlink_to(host / "__sandbox")
    before = tree(host)
    with pytest.raises(RequestRefused, match="sandbox_dir"):
        execroot.stage(bad)
    assert tree(host) == before


def test_what_the_tool_leaves_while_idle_is_no_obstacle_and_nobody_sees_it(
    host: Path, execroot: WorkerExecroot
) -> None:
    Path(execroot.path, "cache", "deep").mkdir(parents=True)
    Path(execroot.path, "cache", "deep", "file").write_text("x")
    Path(execroot.path, "lock").write_text("x")
    Path(execroot.path, "to-host").symlink_to(host / "__sandbox")
    staged = execroot.stage(SANDBOX)
    assert sorted(os.listdir(execroot.path)) == ["pkg", "top"]
    staged.collect()
    assert tree(host / "__sandbox/1/_main") == ["pkg", "pkg/in", "top"]


def fail_at(number: int, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    """Let the rename with this number fail, and only that one."""
    real, count = os.rename, 0

    def rename(*args: object, **kwargs: object) -> None:
        nonlocal count
        count += 1
        if count == number:
            raise OSError(error, os.strerror(error))
        real(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "rename", rename)


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("error", [errno.EXDEV, errno.EACCES])
def test_a_move_that_fails_half_way_in_is_undone(
    host: Path, execroot: WorkerExecroot, monkeypatch: pytest.MonkeyPatch, number: int, error: int
) -> None:
    before = tree(host)
    fail_at(number, monkeypatch, error)
    with pytest.raises(RequestRefused) as refused:
        execroot.stage(SANDBOX)
    assert ("another filesystem" in refused.value.message) == (error == errno.EXDEV)
    assert tree(host) == before
    execroot.stage(SANDBOX).collect()  # and the next one works
    assert tree(host) == before


def test_an_execroot_that_cannot_be_emptied_is_the_workers_fault_not_the_requests(
    host: Path, execroot: WorkerExecroot, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unlink(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "immutable")

    before = tree(host)
    monkeypatch.setattr(os, "unlink", unlink)
    with pytest.raises(RuntimeUnavailable, match="cannot be emptied"):
        execroot.stage(SANDBOX)
    monkeypatch.undo()
    assert tree(host) == before


def test_outputs_that_cannot_be_given_back_are_an_error_and_nothing_is_lost_silently(
    host: Path, execroot: WorkerExecroot
) -> None:
    staged = execroot.stage(SANDBOX)
    (host / "__sandbox/1/_main/pkg").mkdir()
    (host / "__sandbox/1/_main/pkg/squatter").write_text("x")
    with pytest.raises(RuntimeUnavailable, match="given back"):
        staged.collect()


def test_the_folder_goes_with_the_last_execroot_and_removing_twice_is_quiet(host: Path) -> None:
    one, two = WorkerExecroot.make(str(host), 1), WorkerExecroot.make(str(host), 2)
    assert one.path != two.path
    one.remove()
    one.remove()
    assert os.listdir(host / FOLDER) == [os.path.basename(two.path)]
    two.remove()
    assert not (host / FOLDER).exists()
    two.remove()


def test_a_folder_that_another_wrapper_removes_at_that_moment_is_made_again(
    host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, removed = os.mkdir, False

    def mkdir(path: str, *args: int, **kwargs: int) -> None:
        nonlocal removed
        if not removed and os.path.basename(os.path.dirname(path)) == FOLDER:
            removed = True
            os.rmdir(os.path.dirname(path))
        real(path, *args, **kwargs)

    monkeypatch.setattr(os, "mkdir", mkdir)
    WorkerExecroot.make(str(host), 1).remove()
    assert removed
