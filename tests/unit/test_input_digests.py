"""Digests of inputs: of each file once, of nothing outside, and never one that is not the file's."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from wrapper import input_digests
from wrapper.errors import RequestRefused
from wrapper.files import DIRECTORY, remove_tree
from wrapper.input_digests import InputDigests

OLD_NS = 1_000_000_000 * 10**9


def digest(content: str | bytes) -> bytes:
    data = content.encode() if isinstance(content, str) else content
    return hashlib.sha256(data).hexdigest().encode()


def write(path: Path, content: str, mtime_ns: int = OLD_NS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    os.utime(path, ns=(mtime_ns, mtime_ns))
    return path


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    made = tmp_path / "action"
    made.mkdir()
    return made


@pytest.fixture
def fd(tree: Path) -> Iterator[int]:
    opened = os.open(tree, DIRECTORY)
    before = len(os.listdir("/proc/self/fd"))
    yield opened
    assert len(os.listdir("/proc/self/fd")) == before
    os.close(opened)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One entry for each time that a file was hashed."""
    calls: list[Any] = []
    digest_of = InputDigests._hash

    def counted(fd: int, size: int) -> Any:
        calls.append(size)
        return digest_of(fd, size)

    monkeypatch.setattr(InputDigests, "_hash", staticmethod(counted))
    return calls


def test_every_file_is_there_once_with_the_digest_of_its_content_in_order(tree: Path, fd: int) -> None:
    for name in ("b/c/d.txt", "a.txt", "b/a.txt", "b.txt", "b/é →.txt"):
        write(tree / name, name)
    (tree / "empty" / "folder").mkdir(parents=True)
    names = ["a.txt", "b.txt", "b/a.txt", "b/c/d.txt", "b/é →.txt"]
    assert InputDigests().inputs_of(fd) == [(name, digest(name)) for name in names]


def test_a_large_file_has_the_digest_of_all_of_it(tree: Path, fd: int) -> None:
    content = os.urandom(3 * (1 << 20) + 17)
    (tree / "a").write_bytes(content)
    (tree / "none").touch()
    assert InputDigests().inputs_of(fd) == [("a", digest(content)), ("none", digest(""))]


def test_a_file_is_hashed_once_however_many_actions_have_it(
    tree: Path, fd: int, tmp_path: Path, hashed: list[Any]
) -> None:
    blob = write(tmp_path / "blob", "content")
    digests = InputDigests()
    for name in ("a", "b", "c"):
        os.link(blob, tree / name)
        assert dict(digests.inputs_of(fd))[name] == digest("content")
    assert len(hashed) == 1
    assert len(digests) == 1


@pytest.mark.parametrize("what", ["content and time", "time alone", "size alone", "another file"])
def test_a_file_that_changed_is_hashed_again(tree: Path, fd: int, what: str) -> None:
    digests = InputDigests()
    file = write(tree / "a", "one")
    assert digests.inputs_of(fd) == [("a", digest("one"))]
    if what == "another file":
        write(tree / "new", "two")
        os.rename(tree / "new", file)
    else:
        write(file, "three" if what == "size alone" else "two", OLD_NS + (what != "size alone"))
    assert digests.inputs_of(fd) == [("a", digest(file.read_text()))]


def test_a_file_of_just_now_or_later_is_not_remembered(tree: Path, fd: int, hashed: list[Any]) -> None:
    """Its inode may be given to a file that is made at the very time that it claims to be from."""
    now = [OLD_NS]
    digests = InputDigests(now_ns=lambda: now[0])
    for mtime_ns in (OLD_NS, OLD_NS - 1_000_000_000, OLD_NS + 10**15):
        write(tree / "a", "one", mtime_ns)
        digests.inputs_of(fd)
    assert len(digests) == 0
    now[0] = OLD_NS + 10**15 + 3_000_000_000
    digests.inputs_of(fd)
    digests.inputs_of(fd)
    assert len(hashed) == 4
    assert len(digests) == 1


def test_the_real_clock_is_the_default(tree: Path, fd: int) -> None:
    digests = InputDigests()
    write(tree / "a", "one", time.time_ns())
    digests.inputs_of(fd)
    assert len(digests) == 0
    write(tree / "a", "one", time.time_ns() - 60 * 10**9)
    digests.inputs_of(fd)
    assert len(digests) == 1


def test_the_files_that_were_not_used_for_longest_are_forgotten(
    tree: Path, fd: int, hashed: list[Any]
) -> None:
    digests = InputDigests(2)
    for name in "ab":
        write(tree / name, name)
        digests.inputs_of(fd)
    os.rename(tree / "b", tree.parent / "b")
    digests.inputs_of(fd)  # a is used, b is not
    write(tree / "c", "c")
    digests.inputs_of(fd)
    digests.inputs_of(fd)
    assert len(digests) == 2
    assert len(hashed) == 3
    os.rename(tree.parent / "b", tree / "b")
    assert digests.inputs_of(fd) == [(name, digest(name)) for name in "abc"]
    assert len(hashed) > 3


def test_a_link_is_the_file_that_it_leads_to_if_that_is_the_actions_own(tree: Path, fd: int) -> None:
    write(tree / "a/b/file", "x")
    (tree / "a/near").symlink_to("b/file")
    (tree / "a/twice").symlink_to("near")
    (tree / "a/b/around").symlink_to("../../a/b/../b/file")
    assert InputDigests().inputs_of(fd) == [
        (name, digest("x")) for name in ("a/b/around", "a/b/file", "a/near", "a/twice")
    ]


@pytest.mark.parametrize(
    "target",
    [
        "../secret",
        "/etc/passwd",
        "missing",
        "link",
        "folder",
        "through/file",
        "fifo",
        "../action/file",
        "/file",
        "x" * 300,
    ],
)
def test_any_other_link_is_left_out(tree: Path, fd: int, tmp_path: Path, target: str) -> None:
    write(tmp_path / "secret", "secret")
    write(tree / "file", "x")
    (tree / "folder").mkdir()
    (tree / "through").symlink_to("folder")
    write(tree / "folder/file", "y")
    os.mkfifo(tree / "fifo")
    (tree / "link").symlink_to(target)
    assert InputDigests().inputs_of(fd) == [("file", digest("x")), ("folder/file", digest("y"))]


def test_an_absolute_link_into_the_actions_own_directory_is_left_out(tree: Path, fd: int) -> None:
    """Where the worker runs, it leads nowhere."""
    file = write(tree / "file", "x")
    (tree / "link").symlink_to(file)
    assert InputDigests().inputs_of(fd) == [("file", digest("x"))]


def test_a_long_chain_of_links_is_left_out(tree: Path, fd: int) -> None:
    write(tree / "l00", "x")
    for n in range(1, 30):
        (tree / f"l{n:02}").symlink_to(f"l{n - 1:02}")
    found = dict(InputDigests().inputs_of(fd))
    assert set(found.values()) == {digest("x")}
    assert "l02" in found
    assert "l29" not in found


def test_a_name_that_cannot_be_sent_is_left_out(tree: Path, fd: int) -> None:
    os.mkdir(os.fsencode(tree) + b"/\xff")
    write(tree / os.fsdecode(b"\xff") / "file", "x")
    write(tree / os.fsdecode(b"\xfe"), "x")
    write(tree / "a", "x")
    assert InputDigests().inputs_of(fd) == [("a", digest("x"))]


def test_a_deep_tree_needs_no_more_descriptors_or_stack(tree: Path, fd: int) -> None:
    here = fd
    for _ in range(2000):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", DIRECTORY, dir_fd=here)
        if here != fd:
            os.close(here)
        here = below
    os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.close(here)
    try:
        assert InputDigests().inputs_of(fd) == [("d/" * 2000 + "file", digest(""))]
    finally:
        remove_tree(str(tree / "d"))  # pytest's own way of deleting it is recursive


def test_the_number_of_inputs_is_bounded(tree: Path, fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_digests, "MAX_ENTRIES", 5)
    for n in range(5):
        write(tree / str(n), "x")
    assert len(InputDigests().inputs_of(fd)) == 5
    (tree / "sub").mkdir()
    with pytest.raises(RequestRefused, match="more than 5 inputs"):
        InputDigests().inputs_of(fd)


def test_a_file_that_grows_meanwhile_is_read_as_far_as_it_was(tree: Path, fd: int) -> None:
    (tree / "a").write_bytes(b"x")
    os.truncate(tree / "a", 1 << 22)
    read = os.read
    taken = 0

    def read_and_grow(source: int, count: int) -> bytes:
        nonlocal taken
        with open(tree / "a", "ab") as more:
            more.write(b"y" * (1 << 20))
        data = read(source, count)
        taken += len(data)
        return data

    digests = InputDigests(now_ns=lambda: 1 << 62)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "read", read_and_grow)
        digests.inputs_of(fd)
    assert taken == 1 << 22
    assert len(digests) == 0


def test_a_tree_that_is_changed_meanwhile_shows_nothing_from_outside(
    tree: Path, fd: int, tmp_path: Path
) -> None:
    write(tmp_path / "outside" / "f", "secret")
    write(tree / "d" / "f", "mine")
    (tree / "link").symlink_to("../outside")
    done = threading.Event()

    def swap() -> None:
        while not done.is_set():
            for source, target in (("d", "spare"), ("link", "d"), ("d", "link"), ("spare", "d")):
                os.rename(tree / source, tree / target)

    swapper = threading.Thread(target=swap)
    swapper.start()
    digests = InputDigests()
    seen: set[bytes] = set()
    try:
        for turn in range(1_000_000):
            if turn > 1000 and seen:
                break
            seen.update(found for _, found in digests.inputs_of(fd))
    finally:
        done.set()
        swapper.join()
    assert seen == {digest("mine")}


def test_several_threads_may_ask_at_once(tree: Path) -> None:
    for n in range(50):
        write(tree / str(n), str(n))
    digests = InputDigests(10)
    expected = sorted((str(n), digest(str(n))) for n in range(50))
    wrong: list[object] = []

    def ask() -> None:
        fd = os.open(tree, DIRECTORY)
        try:
            for _ in range(30):
                found = digests.inputs_of(fd)
                if found != expected:
                    wrong.append(found)
        except BaseException as error:  # noqa: BLE001 - told below
            wrong.append(error)
        finally:
            os.close(fd)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(digests) == 10
