"""The private TMPDIR: whatever a tool puts there is seen, and removed without touching anything else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from wrapper.errors import RuntimeUnavailable
from wrapper.files import remove_tree
from wrapper.runtime.private_tmpdir import PrivateTmpdir, is_quick_to_remove


@pytest.fixture
def tmpdir(tmp_path: Path) -> PrivateTmpdir:
    return PrivateTmpdir(str(tmp_path / "private"))


def test_only_what_came_after_the_snapshot_is_new(tmpdir: PrivateTmpdir) -> None:
    root = Path(tmpdir.path)
    (root / "own" / "deep").mkdir(parents=True)
    (root / "own" / "file").write_text("x")
    tmpdir.take_as_own()
    assert tmpdir.added() == []
    (root / "own" / "file").write_text("changed")
    assert tmpdir.added() == []
    (root / "own" / "deep" / "new").write_text("x")
    (root / "new" / "sub").mkdir(parents=True)
    assert sorted(tmpdir.added()) == ["new", "own/deep/new"]
    assert sorted(tmpdir.added()) == ["new", "own/deep/new"]
    tmpdir.remove(tmpdir.added())
    assert tmpdir.added() == []
    assert (root / "own" / "file").exists()


def test_a_file_made_directly_after_a_look_is_seen_by_the_next(tmpdir: PrivateTmpdir) -> None:
    tmpdir.take_as_own()
    for number in range(200):  # within one tick of the file system's clock
        assert tmpdir.added() == []
        name = f"f{number}"
        (Path(tmpdir.path) / name).touch()
        assert tmpdir.added() == [name]
        tmpdir.remove([name])


def test_links_are_removed_and_never_followed(tmpdir: PrivateTmpdir, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    (precious / "dir").mkdir(parents=True)
    (precious / "dir" / "file").write_text("x")
    tmpdir.take_as_own()
    root = Path(tmpdir.path)
    (root / "link").symlink_to(precious)
    (root / "d").mkdir()
    (root / "d" / "up").symlink_to(precious / "dir")
    os.link(precious / "dir" / "file", root / "d" / "hard")
    tmpdir.remove(tmpdir.added())
    assert list(root.iterdir()) == []
    assert (precious / "dir" / "file").read_text() == "x"


def test_an_own_directory_swapped_for_a_link_does_not_lead_outside(
    tmpdir: PrivateTmpdir, tmp_path: Path
) -> None:
    root = Path(tmpdir.path)
    (root / "own").mkdir()
    tmpdir.take_as_own()
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("x")
    (root / "own").rmdir()
    (root / "own").symlink_to(precious)
    assert tmpdir.added() == ["own"]
    tmpdir.remove(["own"])
    assert (precious / "file").exists()
    (root / "own").symlink_to(precious)
    with pytest.raises(RuntimeUnavailable):
        tmpdir.remove(["own/file"])
    assert (precious / "file").exists()


def test_names_and_modes_do_not_matter(tmpdir: PrivateTmpdir) -> None:
    tmpdir.take_as_own()
    root = os.fsencode(tmpdir.path)
    for name in (b"\xff\xfe", b"new\nline", b"-rf", b" ", b"*", b"n" * 255):
        os.mkdir(os.path.join(root, name))
        with open(os.path.join(root, name, name), "w"):
            pass
        os.chmod(os.path.join(root, name), 0)
    os.mkfifo(os.path.join(root, b"pipe"))
    os.chmod(root, 0)
    assert len(tmpdir.added()) == 7
    tmpdir.remove(tmpdir.added())
    assert tmpdir.added() == []
    tmpdir.destroy()
    assert not os.path.exists(root)


def test_a_tree_of_any_depth_goes_with_few_descriptors(tmpdir: PrivateTmpdir) -> None:
    tmpdir.take_as_own()
    fd = os.open(tmpdir.path, os.O_RDONLY)
    for _ in range(3000):
        os.mkdir("deeper", dir_fd=fd)
        below = os.open("deeper", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    assert tmpdir.added() == ["deeper"]
    tmpdir.remove(["deeper"])
    assert os.listdir(tmpdir.path) == []


def test_wide_and_nested_trees_are_removed(tmpdir: PrivateTmpdir) -> None:
    tmpdir.take_as_own()
    root = Path(tmpdir.path)
    for a in range(20):
        for b in range(20):
            (root / "t" / str(a) / str(b)).mkdir(parents=True)
            (root / "t" / str(a) / str(b) / "f").touch()
    assert not is_quick_to_remove(tmpdir.path, tmpdir.added())
    tmpdir.remove(tmpdir.added())
    assert list(root.iterdir()) == []


def test_a_tool_that_removes_its_whole_tmpdir_gets_a_new_one(tmpdir: PrivateTmpdir, tmp_path: Path) -> None:
    tmpdir.take_as_own()
    os.rmdir(tmpdir.path)
    assert tmpdir.added() == []
    assert os.path.isdir(tmpdir.path)
    os.rmdir(tmpdir.path)
    os.symlink(tmp_path, tmpdir.path)
    tmpdir.remove(tmpdir.added())
    assert os.path.isdir(tmpdir.path)
    assert not os.path.islink(tmpdir.path)
    assert tmpdir.added() == []


def test_removing_what_is_gone_is_no_error(tmp_path: Path) -> None:
    remove_tree(str(tmp_path / "never"))
    remove_tree(str(tmp_path / "never" / "was"))
