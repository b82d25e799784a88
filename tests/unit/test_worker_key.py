"""Identity (WorkerKey) and freshness (ToolFingerprint) of workers."""

from __future__ import annotations

import os
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path

import pytest

from wrapper.pool.worker_key import ToolFingerprint, WorkerKey

KEY = WorkerKey("pool", ("/bin/tool", "-v"), "/cwd", (("LANG", "C"),), persistent_worker_key="java")

DIFFERENCES: dict[str, object] = {
    "pool": "other",
    "argv": ("/bin/tool", "-w"),
    "cwd": "/elsewhere",
    "env": (("LANG", "de"),),
    "trust_domain": "tenant",
    "persistent_worker_key": "java-2",
    "protocol": "json",
    "multiplex": True,
    "own_execroot": True,
    "for_actions": True,
    "working_directory": "below",
    "tool": "another version",
}


# ---- identity --------------------------------------------------------------------------------------


def test_the_table_of_differences_has_every_field_of_the_identity() -> None:
    assert sorted(DIFFERENCES) == sorted(field.name for field in fields(WorkerKey) if field.compare)


@pytest.mark.parametrize("field", DIFFERENCES)
def test_a_difference_in_any_field_is_another_key(field: str) -> None:
    other = replace(KEY, **{field: DIFFERENCES[field]})  # type: ignore[arg-type]
    assert other != KEY
    assert len({KEY, other}) == 2


def test_equal_values_are_one_key_wherever_they_come_from() -> None:
    again = WorkerKey(
        "pool", ("/bin/" + "tool", "-v"), "/cwd", (("LANG", "C"),), persistent_worker_key="java"
    )
    assert again == KEY
    assert hash(again) == hash(KEY)
    assert {KEY: 1}[again] == 1


def test_words_that_are_cut_elsewhere_are_another_command() -> None:
    assert replace(KEY, argv=("a", "b c")) != replace(KEY, argv=("a b", "c"))


def test_a_key_does_not_change_and_does_not_show_its_hash() -> None:
    with pytest.raises(FrozenInstanceError):
        KEY.pool = "another"  # type: ignore[misc]
    assert "_hash" not in repr(KEY)


@pytest.mark.parametrize(
    ("key", "label"),
    [
        (KEY, "java"),
        (replace(KEY, persistent_worker_key=""), "tool"),
        (WorkerKey("pool", (), "/"), "pool"),
    ],
)
def test_the_label_is_what_tells_most(key: WorkerKey, label: str) -> None:
    assert key.label == label


# ---- freshness -------------------------------------------------------------------------------------


@pytest.fixture
def tool(tmp_path: Path) -> Path:
    path = tmp_path / "tool.jar"
    path.write_bytes(b"version 1")
    return path


def watched(*argv: str, cwd: Path) -> list[str]:
    return [os.path.basename(path) for path, _ in ToolFingerprint.of(argv, str(cwd)).files]


def of(tool: Path, *argv: str) -> ToolFingerprint:
    return ToolFingerprint.of(argv or (str(tool),), str(tool.parent))


def test_what_was_not_touched_has_not_changed(tool: Path) -> None:
    fingerprint = of(tool)
    assert fingerprint.changed() is None
    assert fingerprint == of(tool)


def test_other_content_another_time_and_another_file_are_changes(tool: Path) -> None:
    fingerprint = of(tool)
    tool.write_bytes(b"version 22")
    assert fingerprint.changed() == str(tool)
    fingerprint = of(tool)
    os.utime(tool, (1, 1))
    assert fingerprint.changed() == str(tool)
    fingerprint = of(tool)
    stat = tool.stat()
    other = tool.with_name("new")
    other.write_bytes(tool.read_bytes())
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.rename(tool)  # same size, same time, another inode
    assert fingerprint.changed() == str(tool)


def test_a_file_that_goes_or_comes_is_a_change(tool: Path) -> None:
    fingerprint = of(tool)
    tool.unlink()
    assert fingerprint.changed() == str(tool)
    missing = of(tool)
    assert missing.changed() is None
    tool.write_bytes(b"here I am")
    assert missing.changed() == str(tool)


def test_the_same_hard_link_is_the_same_content(tool: Path) -> None:
    """As a content-addressed store replaces a file by another link to the same blob."""
    fingerprint = of(tool)
    link = tool.with_name("link")
    os.link(tool, link)
    assert fingerprint.changed() is None  # though its ctime and link count have
    tool.unlink()
    link.rename(tool)
    assert fingerprint.changed() is None


def test_ctime_and_access_time_do_not_count(tool: Path) -> None:
    fingerprint = of(tool)
    before = tool.stat()
    while tool.stat().st_ctime_ns == before.st_ctime_ns:  # the file system's clock is a coarse one
        os.utime(tool, ns=(before.st_atime_ns + 10**9, before.st_mtime_ns))
    assert fingerprint.changed() is None


def test_a_link_is_followed_to_the_file(tool: Path) -> None:
    link = tool.with_name("link")
    link.symlink_to(tool.name)
    fingerprint = of(tool, str(link))
    tool.write_bytes(b"something else")
    assert fingerprint.changed() == str(link)


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["-jar", "tool.jar"], ["tool.jar"]),
        (["--lib=tool.jar"], ["tool.jar"]),
        (["-cp", "tool.jar:lib/b.jar:nothing.jar:"], ["tool.jar", "b.jar"]),
        (["--classpath=tool.jar:lib/b.jar"], ["tool.jar", "b.jar"]),
        (["-javaagent:tool.jar=verbose", "-Xbootclasspath/a:lib/b.jar"], ["tool.jar", "b.jar"]),
        (["@tool.jar", "-Dhome=nowhere:lib/b.jar"], ["tool.jar", "b.jar"]),
        (["lib"], []),
        (["--flag", "-tool.jar", "plain", "a=b"], []),
        (["tool.jar", "--lib=tool.jar"], ["tool.jar"]),
        (["--persistent_worker"], []),
    ],
)
def test_startup_arguments_that_name_files_are_watched(
    tool: Path, arguments: list[str], found: list[str]
) -> None:
    (tool.parent / "lib").mkdir()
    (tool.parent / "lib" / "b.jar").write_bytes(b"")
    assert watched("/usr/bin/java", *arguments, cwd=tool.parent) == ["java", *found]


def test_any_of_the_files_can_be_the_one_that_changed(tool: Path) -> None:
    library = tool.with_name("library.jar")
    library.write_bytes(b"library")
    fingerprint = of(tool, "java", "-cp", "tool.jar:library.jar", "Main")
    library.write_bytes(b"a new library")
    assert fingerprint.changed() == str(library)


def test_relative_names_count_from_the_workers_directory(
    tool: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "tool.jar").write_bytes(b"not this one")
    monkeypatch.chdir(elsewhere)
    assert of(tool, "./java", "-jar", "tool.jar").files[1][0] == str(tool)
