"""Opening beneath a directory: the kernel's way and ours do the same, and neither leads out."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

from wrapper import files
from wrapper.files import DIRECTORY, REGULAR_FILE, open_beneath


class Opener(Protocol):
    def __call__(self, directory_fd: int, path: str, flags: int, /) -> int: ...


@pytest.fixture(params=["kernel", "by component"])
def opener(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Opener:
    if request.param == "by component":
        monkeypatch.setattr(files, "_openat2", lambda *_: -errno.ENOSYS)
    return open_beneath


@pytest.fixture
def top(tmp_path: Path) -> Iterator[int]:
    tree = tmp_path / "top"
    (tree / "a" / "b").mkdir(parents=True)
    (tree / "a" / "file").write_text("inside")
    (tmp_path / "outside").write_text("outside")
    (tree / "out").symlink_to("../outside")
    (tree / "absolute").symlink_to(tmp_path / "outside")
    (tree / "within").symlink_to("a/file")
    (tree / "a" / "up").symlink_to("..")
    (tree / "folder").symlink_to("a")
    (tree / "proc").symlink_to("/proc/self/root")
    os.mkfifo(tree / "fifo")
    fd = os.open(tree, DIRECTORY)
    yield fd
    os.close(fd)


def content(opener: Opener, top: int, path: str) -> bytes:
    fd = opener(top, path, REGULAR_FILE)
    try:
        return os.read(fd, 100)
    finally:
        os.close(fd)


def error_of(opener: Opener, top: int, path: str, flags: int = REGULAR_FILE) -> int:
    with pytest.raises(OSError) as caught:
        os.close(opener(top, path, flags))
    return caught.value.errno or 0


@pytest.mark.parametrize("path", ["a/file", "./a//file", "a/b/../file", "a/../a/file", "a/b/../../a/file"])
def test_a_file_beneath_is_opened_however_its_path_is_written(opener: Opener, top: int, path: str) -> None:
    assert content(opener, top, path) == b"inside"


@pytest.mark.parametrize(
    "path", ["../outside", "a/../../outside", "/etc/passwd", "..", "a/../..", "/", "./../top/a/file"]
)
def test_a_path_that_leads_out_is_refused(opener: Opener, top: int, path: str) -> None:
    assert error_of(opener, top, path) == errno.EXDEV


@pytest.mark.parametrize(
    "path", ["out", "absolute", "within", "a/up/a/file", "folder/file", "folder/", "proc/etc"]
)
def test_a_symbolic_link_is_refused_wherever_it_is_and_leads_to(opener: Opener, top: int, path: str) -> None:
    assert error_of(opener, top, path) == errno.ELOOP
    assert error_of(opener, top, path, os.O_PATH) == errno.ELOOP
    assert error_of(opener, top, path, os.O_RDONLY) == errno.ELOOP
    assert error_of(opener, top, path, os.O_RDONLY | os.O_DIRECTORY) == errno.ELOOP


def test_a_link_itself_can_be_pinned(opener: Opener, top: int) -> None:
    fd = opener(top, "out", os.O_PATH | os.O_NOFOLLOW)
    try:
        assert os.readlink("", dir_fd=fd) == "../outside"
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("path", "number"),
    [
        ("", errno.ENOENT),
        ("missing", errno.ENOENT),
        ("missing/x", errno.ENOENT),
        ("a/file/x", errno.ENOTDIR),
        ("a/file/", errno.ENOTDIR),
        ("a/file\0.txt", errno.EINVAL),
        ("x" * 300, errno.ENAMETOOLONG),
    ],
)
def test_what_is_not_there_is_said_to_be_missing(opener: Opener, top: int, path: str, number: int) -> None:
    assert error_of(opener, top, path) == number


def test_renames_elsewhere_on_the_machine_do_not_make_it_fail(
    top: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_openat2", lambda *_: -errno.EAGAIN)
    assert content(open_beneath, top, "a/b/../file") == b"inside"
    assert error_of(open_beneath, top, "a/../../outside") == errno.EXDEV


def test_the_kernels_way_is_taken_where_there_is_one(top: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise AssertionError("opened by component")

    monkeypatch.setattr(files, "_open_by_component", fail)
    assert content(open_beneath, top, "a/b/../file") == b"inside"


def test_a_descriptor_is_not_passed_on_to_other_programs(opener: Opener, top: int) -> None:
    fd = opener(top, "a/file", os.O_RDONLY)
    try:
        assert not os.get_inheritable(fd)
    finally:
        os.close(fd)


def test_a_fifo_without_a_writer_does_not_hold_us_up(opener: Opener, top: int) -> None:
    os.close(opener(top, "fifo", REGULAR_FILE))


def test_no_descriptor_is_left_whatever_happens(opener: Opener, top: int) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for path in ("a/b/../file", "a/b/missing", "a/../..", "a/up/x", "a/b"):
        try:
            os.close(opener(top, path, os.O_RDONLY))
        except OSError:
            pass
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_directory_that_is_swapped_for_a_link_never_leads_out(
    opener: Opener, top: int, tmp_path: Path
) -> None:
    tree = tmp_path / "top"
    (tmp_path / "trap").mkdir()
    (tmp_path / "trap" / "file").write_text("outside")
    (tree / "link").symlink_to("../trap")
    done = threading.Event()

    def swap() -> None:
        while not done.is_set():
            os.rename(tree / "a", tree / "spare")
            os.rename(tree / "link", tree / "a")
            os.rename(tree / "a", tree / "link")
            os.rename(tree / "spare", tree / "a")

    swapper = threading.Thread(target=swap)
    swapper.start()
    seen: set[bytes | int] = set()
    try:
        for turn in range(1_000_000):
            if turn > 3000 and {b"inside", errno.ELOOP} <= seen:
                break
            try:
                seen.add(content(opener, top, "a/file"))
            except OSError as error:
                seen.add(error.errno or 0)
    finally:
        done.set()
        swapper.join()
    assert seen <= {b"inside", errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.EAGAIN}
    assert {b"inside", errno.ELOOP} <= seen
