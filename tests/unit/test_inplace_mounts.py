"""What of the node a worker in its host's execroot is shown: what links lead to, no more, decided once."""

from __future__ import annotations

from pathlib import Path

import pytest

from wrapper.pool.inplace import InplaceMounts, inplace_mounts


@pytest.fixture
def node(tmp_path: Path) -> Path:
    for folder in (
        "ws/src",
        "home/ws/src",
        "home/other/lib",
        "out/execroot/_main/bazel-out",
        "out/external/repo",
    ):
        (tmp_path / folder).mkdir(parents=True)
    return tmp_path


def read_only(cwd: Path) -> list[str]:
    first, *others = inplace_mounts(str(cwd))
    assert (first.host_path, first.path, first.read_only) == (str(cwd), str(cwd), False)
    assert all(mount.read_only and mount.host_path == mount.path for mount in others)
    return [mount.path for mount in others]


def test_the_folder_of_what_a_link_names_is_shown_so_that_new_entries_are_too(node: Path) -> None:
    execroot = node / "out/execroot/_main"
    (execroot / "src").symlink_to(node / "ws/src")
    assert read_only(execroot) == [str(node / "ws")]


def test_repositories_are_links_in_a_folder_of_their_own(node: Path) -> None:
    execroot = node / "out/execroot/_main"
    (execroot / "external").mkdir()
    (execroot / "external" / "repo").symlink_to(node / "out/external/repo")
    assert read_only(execroot) == [str(node / "out/external")]


def test_what_a_named_entry_leads_to_further_is_shown_alone_without_its_neighbours(node: Path) -> None:
    """A local repository may lie in somebody's home."""
    execroot = node / "out/execroot/_main"
    (node / "ws/lib").symlink_to(node / "home/other/lib")
    (execroot / "lib").symlink_to(node / "ws/lib")
    assert read_only(execroot) == [str(node / "home/other/lib"), str(node / "ws")]


def test_it_is_shown_where_the_link_says_also_if_that_is_behind_another_link(node: Path) -> None:
    execroot = node / "out/execroot/_main"
    (node / "linked").symlink_to(node / "ws")
    (execroot / "src").symlink_to(node / "linked/src")
    assert read_only(execroot) == [str(node / "linked")]


def test_half_of_the_machine_is_not_shown_because_a_link_leads_into_it(node: Path) -> None:
    execroot = node / "out/execroot/_main"
    (execroot / "lib").symlink_to("/usr/lib")
    (execroot / "all").symlink_to("/usr")
    assert read_only(execroot) == ["/usr"]


def test_links_that_lead_nowhere_in_a_circle_or_inside_add_nothing(node: Path) -> None:
    execroot = node / "out/execroot/_main"
    (execroot / "nowhere").symlink_to(node / "missing/entry")
    (execroot / "circle").symlink_to("circle")
    (execroot / "inside").symlink_to("bazel-out")
    assert read_only(execroot) == []


def test_a_sandboxed_workers_directory_shows_the_real_execroot_and_its_links_too(node: Path) -> None:
    (node / "out/execroot/_main/src").symlink_to(node / "ws/src")
    workdir = node / "out/bazel-workers/Javac-worker-1-workdir/_main"
    workdir.mkdir(parents=True)
    assert read_only(workdir) == [str(node / "out/execroot/_main"), str(node / "ws")]


def test_a_link_that_is_made_after_the_first_look_opens_nothing(node: Path) -> None:
    execroot = node / "out/execroot/_main"
    (execroot / "src").symlink_to(node / "ws/src")
    mounts = InplaceMounts()
    before = mounts.of(str(execroot))
    (execroot / "planted").symlink_to(node / "home/other/lib")
    assert mounts.of(str(execroot)) == before
    # What is gone is left out: an engine would refuse it.
    (node / "ws").rename(node / "gone")
    assert [mount.path for mount in mounts.of(str(execroot))] == [str(execroot)]
