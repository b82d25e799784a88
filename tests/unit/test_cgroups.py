"""Control groups of both versions, as folders of a test's own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from wrapper.errors import RuntimeUnavailable
from wrapper.runtime import cgroups
from wrapper.runtime.cgroups import ContainerGroup, Hierarchies, ParentGroup, groups_of, parse_mountinfo

V2 = "31 24 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot\n"
V1 = """\
22 1 254:0 / / rw,relatime - ext4 /dev/root rw
34 30 0:29 / /sys/fs/cgroup/cpu,cpuacct rw shared:12 - cgroup cgroup rw,cpu,cpuacct
35 30 0:30 / /sys/fs/cgroup/memory rw,relatime shared:13 - cgroup cgroup rw,memory
36 30 0:31 / /sys/fs/cgroup/pids rw,relatime - cgroup cgroup rw,pids
37 30 0:32 / /sys/fs/cgroup/systemd rw shared:14 master:2 - cgroup cgroup rw,xattr,name=systemd
"""
HYBRID = V1 + "38 30 0:33 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"


def test_version_2_is_one_tree_for_all() -> None:
    found = parse_mountinfo(V2)
    assert found == Hierarchies("/sys/fs/cgroup", {})
    assert found.roots == ["/sys/fs/cgroup"]
    assert found.path("pids", {"": "/a/b"}) == "/sys/fs/cgroup/a/b"
    assert found.path("memory", {"": "/"}) == "/sys/fs/cgroup"


def test_version_1_has_a_tree_for_each_controller() -> None:
    found = parse_mountinfo(V1)
    assert found.unified is None
    assert found.controllers["cpuacct"] == found.controllers["cpu"] == "/sys/fs/cgroup/cpu,cpuacct"
    assert found.controllers["systemd"] == "/sys/fs/cgroup/systemd"
    assert found.path("pids", {"pids": "/x", "memory": "/y"}) == "/sys/fs/cgroup/pids/x"
    assert found.path("memory", {"pids": "/x", "memory": "/y"}) == "/sys/fs/cgroup/memory/y"
    assert found.path("pids", {"": "/x"}) is None


def test_a_hybrid_counts_by_version_1_where_the_controller_is_there() -> None:
    found = parse_mountinfo(HYBRID)
    assert found.unified == "/sys/fs/cgroup/unified"
    assert found.path("pids", {"pids": "/x", "": "/y"}) == "/sys/fs/cgroup/pids/x"
    assert found.path("hugetlb", {"pids": "/x", "": "/y"}) == "/sys/fs/cgroup/unified/y"
    assert len(found.roots) == 5


@pytest.mark.parametrize("text", ["", "\n", "garbage\n", "1 2 3 - cgroup2 x rw\n" * 2])
def test_a_strange_table_of_mounts_is_no_error(text: str) -> None:
    assert not parse_mountinfo(text).controllers


def test_the_groups_of_a_process_are_read_and_those_of_none_are_none() -> None:
    assert groups_of(os.getpid())
    assert groups_of(2**30) == {}


@pytest.fixture
def unified(tmp_path: Path) -> Hierarchies:
    """A version 2 tree: the files that the kernel makes are there as far as writing goes."""
    root = tmp_path / "v2"
    for folder in (root, root / "parent"):
        folder.mkdir()
        (folder / "cgroup.subtree_control").touch()
    for folder in (root / "parent" / "1",):
        folder.mkdir()
        (folder / "pids.max").write_text("max\n")
    return Hierarchies(str(root))


def test_a_parent_in_version_2_hands_its_controllers_down(unified: Hierarchies) -> None:
    ParentGroup("/parent/1", unified).make(7)
    root = Path(unified.unified or "")
    assert (root / "parent" / "1" / "pids.max").read_text().startswith("7")
    for folder in (root, root / "parent"):
        assert "memory" in (folder / "cgroup.subtree_control").read_text()


def test_no_limit_makes_no_group(unified: Hierarchies) -> None:
    ParentGroup("/other/1", unified).make(None)
    assert not Path(unified.unified or "", "other").exists()


def test_a_group_that_cannot_be_made_names_the_option_and_the_place(tmp_path: Path) -> None:
    missing = Hierarchies(str(tmp_path / "missing"))
    with pytest.raises(RuntimeUnavailable, match=r"isolation\.pids_limit.*missing"):
        ParentGroup("/a/1", missing).make(7)
    with pytest.raises(RuntimeUnavailable, match="no control groups that count processes"):
        ParentGroup("/a/1", Hierarchies(None, {"memory": str(tmp_path)})).make(7)


def test_a_group_is_removed_from_every_tree_with_what_its_engine_forgot(tmp_path: Path) -> None:
    places = Hierarchies(str(tmp_path / "u"), {"pids": str(tmp_path / "p"), "memory": str(tmp_path / "m")})
    for root in places.roots:
        Path(root, "parent", "1", "container").mkdir(parents=True)
    Path(tmp_path / "m" / "parent" / "2").mkdir()
    assert sorted(ParentGroup("/parent", places).below()) == ["/parent/1", "/parent/2"]
    assert ParentGroup("/parent/1", places).remove() == []
    assert ParentGroup("/parent/1", places).remove() == []
    assert all(Path(root, "parent").exists() for root in places.roots)
    Path(tmp_path / "m" / "parent" / "2" / "in-use").touch()
    assert ParentGroup("/parent/2", places).remove() == [str(tmp_path / "m" / "parent" / "2")]


def group(tmp_path: Path, files: dict[str, str], parent_limit: str = "max") -> Path:
    folder = tmp_path / "parent" / "container"
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    (tmp_path / "parent" / "pids.max").write_text(parent_limit)
    return folder


def test_a_container_in_version_2_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "pids.max": "max\n",
        "memory.max": "67108864\n",
        "memory.stat": "anon 4096\nfile 99\n",
        "memory.events": "low 0\noom 3\noom_kill 2\n",
        "cgroup.procs": "12\n3\n12\n",
    }
    folder = group(tmp_path, files, "9\n")
    monkeypatch.setattr(cgroups, "groups_of", lambda _: {"": "/parent/container"})
    found = ContainerGroup(1, Hierarchies(str(tmp_path)))
    assert found.folder == str(folder)
    assert found.processes() == [3, 12]
    assert (found.pids_limit(), found.memory_limit_bytes()) == (9, 67108864)
    assert (found.resident_bytes(), found.oom_kills()) == (4096, 2)
    found.limit_parent(5)
    assert found.pids_limit() == 5


def test_a_container_in_version_1_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "pids.max": "4\n",
        "memory.limit_in_bytes": "9223372036854771712\n",
        "memory.stat": "rss 1\ntotal_rss 8192\n",
        "memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n",
    }
    group(tmp_path, files)
    place = str(tmp_path)
    monkeypatch.setattr(
        cgroups, "groups_of", lambda _: dict.fromkeys(("pids", "memory"), "/parent/container")
    )
    found = ContainerGroup(1, Hierarchies(None, {"pids": place, "memory": place}))
    assert (found.pids_limit(), found.memory_limit_bytes()) == (4, None)
    assert (found.resident_bytes(), found.oom_kills()) == (8192, 1)


def test_a_container_that_is_gone_has_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = group(tmp_path, {})
    monkeypatch.setattr(cgroups, "groups_of", lambda _: {"": "/parent/container"})
    found = ContainerGroup(1, Hierarchies(str(tmp_path)))
    folder.rmdir()
    assert found.processes() == []
    assert (found.resident_bytes(), found.oom_kills(), found.memory_limit_bytes()) == (0, 0, None)


def test_a_container_whose_group_is_not_visible_here_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeUnavailable, match="must see the machine's control groups"):
        ContainerGroup(2**30, Hierarchies(str(tmp_path)))
