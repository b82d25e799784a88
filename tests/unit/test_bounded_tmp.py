"""A worker's /tmp on the node: as large as it may be, the worker's own, and gone whoever still uses it."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.scripted_runtime import needs_root
from wrapper.errors import RuntimeUnavailable
from wrapper.runtime.bounded_tmp import mount_bounded, mounts_below, unmount

pytestmark = needs_root


@pytest.fixture
def tmp(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "with space" / "tmp"
    path.mkdir(parents=True)
    mount_bounded(str(path), 1 << 20, 1000, 1001)
    yield path
    unmount(str(path))
    assert not os.path.ismount(path)


def test_it_is_the_worker_s_own_and_takes_no_devices(tmp: Path) -> None:
    info = tmp.stat()
    assert (info.st_uid, info.st_gid, stat.S_IMODE(info.st_mode)) == (1000, 1001, 0o700)
    assert os.statvfs(tmp).f_flag & os.ST_NOSUID
    assert os.statvfs(tmp).f_flag & os.ST_NODEV


def test_more_than_it_may_hold_does_not_fit(tmp: Path) -> None:
    with pytest.raises(OSError, match="No space left") as full:
        (tmp / "big").write_bytes(b"x" * (2 << 20))
    assert full.value.errno == errno.ENOSPC


def test_a_flood_of_empty_files_does_not_fit(tmp: Path) -> None:
    fits = os.statvfs(tmp).f_favail
    assert fits <= 1024
    for number in range(fits):
        (tmp / str(number)).touch()
    with pytest.raises(OSError, match="No space left"):
        (tmp / "one more").touch()


def test_it_is_found_below_its_folder_and_goes_while_it_is_used(tmp: Path) -> None:
    inner = tmp / "inner"
    inner.mkdir()
    mount_bounded(str(inner), 1 << 20, 1000, 1000)
    folder = str(tmp.parent)
    assert mounts_below(folder) == [str(inner), str(tmp)]
    with open(inner / "open", "w") as file:
        file.write("still used")
        for point in mounts_below(folder):
            unmount(point)
    assert mounts_below(folder) == []
    assert mounts_below(folder[:-1]) == []


def test_unmounting_what_is_not_mounted_is_fine(tmp_path: Path) -> None:
    unmount(str(tmp_path))
    unmount(str(tmp_path / "missing"))


def test_a_link_is_not_followed(tmp: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp)
    unmount(str(link))
    assert os.path.ismount(tmp)


def test_what_cannot_be_mounted_says_how_to_do_without(tmp_path: Path) -> None:
    with pytest.raises(RuntimeUnavailable, match=r"CAP_SYS_ADMIN.*isolation\.tmp_limit_mb: null"):
        mount_bounded(str(tmp_path / "missing"), 1 << 20, 1000, 1000)
