"""Record files: what is written is what is read, and whatever is wrong with one is said when it is opened."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from wrapper.errors import ConfigError, RuntimeUnavailable
from wrapper.recording import RecordedRequests, RecordWriter, Tree
from wrapper.worker_protocol.worker_protocol_pb2 import WorkRequest as PbWorkRequest

Files = dict[bytes, bytes]


def write(
    path: Path,
    *requests: tuple[tuple[bytes, ...], Files],
    directories: tuple[bytes, ...] = (),
    max_requests: int = 100,
    max_bytes: int = 1 << 20,
) -> list[bool]:
    """A record file of these requests: arguments and files; returns which of them there was room for."""
    room = []
    with RecordWriter(
        str(path), tool="tool", trust_domain="d", max_requests=max_requests, max_bytes=max_bytes
    ) as writer:
        for number, (arguments, files) in enumerate(requests):
            opened = []
            for name, content in files.items():
                source = path.parent / f"source-{number}-{hashlib.sha256(name).hexdigest()}"
                source.write_bytes(content)
                source.chmod(0o700 if name.startswith(b"bin") else 0o600)
                opened.append((name, source.open("rb")))
            pb = PbWorkRequest(arguments=arguments, request_id=7, sandbox_dir=b"__sandbox/1", verbosity=3)
            room.append(writer.add(pb, opened, directories))
            for _, file in opened:
                file.close()
        writer.finish()
    return room


def test_requests_and_their_files_come_back(tmp_path: Path) -> None:
    odd = b"odd\n\xff name"
    files = {b"src/A.java": b"class A {}", b"bin/tool": b"#!", odd: b"", b"src/B.java": b"class A {}"}
    write(tmp_path / "a.rec", ((b"-d", b"out"), files), ((b"x",), {}), directories=(b"out/deep",))
    recorded = RecordedRequests.load(str(tmp_path / "a.rec"))
    first, second = recorded.requests
    assert (recorded.tool, recorded.trust_domain, first.number, second.number) == ("tool", "d", 1, 2)
    assert (list(first.request().pb.arguments), first.pb.verbosity) == ([b"-d", b"out"], 3)
    assert (first.pb.request_id, first.pb.sandbox_dir) == (0, b"")
    target = tmp_path / "target"
    target.mkdir()
    recorded.write_tree(first.tree, str(target))
    recorded.close()
    found = {os.fsencode(p.relative_to(target)): p.read_bytes() for p in target.rglob("*") if p.is_file()}
    assert found == files
    assert (target / "out" / "deep").is_dir()
    assert os.access(target / "bin" / "tool", os.X_OK)
    assert (target / "src" / "A.java").stat().st_mode & 0o777 == 0o644


def test_a_content_is_kept_once_and_the_file_is_its_owners_alone(tmp_path: Path) -> None:
    write(tmp_path / "a.rec", ((), {b"a": b"x" * 1000, b"b": b"x" * 1000}), ((), {b"c": b"x" * 1000}))
    with tarfile.open(tmp_path / "a.rec") as archive:
        assert sum(name.startswith("blobs/") for name in archive.getnames()) == 1
    assert (tmp_path / "a.rec").stat().st_mode & 0o777 == 0o600


def test_a_copy_that_was_changed_does_not_change_the_record(tmp_path: Path) -> None:
    write(tmp_path / "a.rec", ((b"x",), {}))
    recorded = RecordedRequests.load(str(tmp_path / "a.rec"))
    recorded.requests[0].request().pb.arguments.append(b"y")
    assert list(recorded.requests[0].request().pb.arguments) == [b"x"]
    recorded.close()


def test_there_is_room_for_so_many_requests_and_bytes(tmp_path: Path) -> None:
    a, same, big = ((), {b"a": b"1" * 600}), ((), {b"b": b"1" * 600}), ((), {b"c": b"2" * 600})
    assert write(tmp_path / "a.rec", a, same, big, max_bytes=1000) == [True, True, False]
    assert write(tmp_path / "b.rec", a, same, big, max_requests=1) == [True, False, False]
    recorded = RecordedRequests.load(str(tmp_path / "a.rec"))
    assert [list(each.tree.files) for each in recorded.requests] == [[b"a"], [b"b"]]
    recorded.close()


def test_without_finish_nothing_is_left_and_what_was_there_stays(tmp_path: Path) -> None:
    (tmp_path / "a.rec").write_text("older")
    with RecordWriter(str(tmp_path / "a.rec"), tool="", trust_domain="", max_requests=1, max_bytes=1):
        assert len(list(tmp_path.iterdir())) == 2
    assert [p.read_text() for p in tmp_path.iterdir()] == ["older"]


def test_a_place_that_cannot_be_written_to_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written: No such file"):
        RecordWriter(str(tmp_path / "no" / "a.rec"), tool="", trust_domain="", max_requests=1, max_bytes=1)


def test_a_record_that_was_replaced_while_in_use_is_still_the_old_one(tmp_path: Path) -> None:
    write(tmp_path / "a.rec", ((), {b"f": b"old"}))
    recorded = RecordedRequests.load(str(tmp_path / "a.rec"))
    write(tmp_path / "a.rec", ((), {b"f": b"new"}))
    (tmp_path / "target").mkdir()
    recorded.write_tree(recorded.requests[0].tree, str(tmp_path / "target"))
    recorded.close()
    assert (tmp_path / "target" / "f").read_bytes() == b"old"


def test_a_record_cut_short_while_in_use_is_an_error_not_a_short_file(tmp_path: Path) -> None:
    write(tmp_path / "a.rec", ((), {b"f": b"x" * 5000}))
    recorded = RecordedRequests.load(str(tmp_path / "a.rec"))
    os.truncate(tmp_path / "a.rec", 1000)
    (tmp_path / "target").mkdir()
    with pytest.raises(RuntimeUnavailable, match="cut short while it was in use"):
        recorded.write_tree(recorded.requests[0].tree, str(tmp_path / "target"))
    recorded.close()


def test_trees_unite_unless_they_disagree() -> None:
    one = Tree({b"a": ("1", False), b"d/x": ("2", False)})
    assert one.united_with(Tree({b"a": ("1", False), b"b": ("3", True)})) == Tree(
        {b"a": ("1", False), b"d/x": ("2", False), b"b": ("3", True)}
    )
    assert one.united_with(Tree({b"a": ("9", False)})) is None
    assert one.united_with(Tree({b"a": ("1", True)})) is None
    assert one.united_with(Tree({b"d": ("1", False)})) is None  # a file where the other has a directory
    assert one.united_with(Tree({}, frozenset([b"a"]))) is None


# ---- what is wrong ---------------------------------------------------------------------------------


BLOB = b"content"
DIGEST = hashlib.sha256(BLOB).hexdigest()


def parts(tree: Any = None, **manifest: Any) -> dict[str, bytes]:
    """The members of a record file that is in order, but for what is given."""
    tree = tree or {"files": [["f", DIGEST, False]], "directories": []}
    head = {"format": 1, "tool": "t", "trust_domain": "", "requests": 1, "blobs": 1, **manifest}
    return {
        f"blobs/{DIGEST}": BLOB,
        "requests/0001/request.bin": PbWorkRequest(arguments=[b"x"]).SerializeToString(),
        "requests/0001/tree.json": json.dumps(tree).encode(),
        "manifest.json": json.dumps(head).encode(),
    }


def make(
    path: Path, members: dict[str, bytes], change: Callable[[tarfile.TarInfo], None] | None = None
) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            if change is not None:
                change(member)
            archive.addfile(member, io.BytesIO(content))


def file_at(name: str) -> dict[str, bytes]:
    return parts({"files": [[name, DIGEST, False]], "directories": []})


def link(member: tarfile.TarInfo) -> None:
    if member.name.startswith("blobs/"):
        member.type, member.linkname, member.size = tarfile.SYMTYPE, "/etc/passwd", 0


def test_the_parts_below_are_in_order_but_for_what_each_case_changes(tmp_path: Path) -> None:
    make(tmp_path / "a.rec", parts())
    RecordedRequests.load(str(tmp_path / "a.rec")).close()


WRONG: list[tuple[str, dict[str, bytes], str]] = [
    ("climbs", file_at("../x"), "'../x' is not a path below a working directory"),
    ("climbs inside", file_at("a/../../x"), "is not a path below"),
    ("absolute", file_at("/etc/cron.d/x"), "'/etc/cron.d/x' is not a path below"),
    ("empty path", file_at(""), "is not a path below"),
    ("dot", file_at("./x"), "is not a path below"),
    ("nul", file_at("a\0b"), "is not a path below"),
    (
        "climbing directory",
        parts({"files": [], "directories": ["a/.."]}),
        "'a/..' is not a path below",
    ),
    (
        "file and directory",
        parts({"files": [["a", DIGEST, False], ["a/b", DIGEST, False]], "directories": []}),
        "'a' is a file and a directory",
    ),
    (
        "unknown blob",
        parts({"files": [["a", "0" * 64, False]], "directories": []}),
        "the content of 'a' is not in the file",
    ),
    ("no tree", parts({"files": 5, "directories": []}), "tree.json is not a tree"),
    ("no tree at all", parts(["x"]), "tree.json is not an object"),
    ("half an entry", parts({"files": [["a"]], "directories": []}), "tree.json is not a tree"),
    ("newer", parts(format=2), "has format 2; this version reads 1"),
    ("no request", parts(requests=0), "says that it has 0 requests"),
    ("too many requests", parts(requests=1_000_000), "says that it has 1000000 requests"),
    ("true requests", parts(requests=True), "says that it has True requests"),
    ("one is missing", parts(requests=2), "requests/0002/request.bin is missing"),
    ("no trust domain", parts(trust_domain=None), "trust_domain is not a string"),
    ("no manifest", {"x": b""}, "has no manifest.json"),
    ("broken manifest", {"manifest.json": b"{"}, "manifest.json is not JSON"),
    ("deep manifest", {"manifest.json": b"[" * 100_000}, "manifest.json is not JSON"),
    ("changed blob", parts() | {f"blobs/{DIGEST}": b"changed"}, "another content than its name says"),
    ("no request inside", parts() | {"requests/0001/request.bin": b"\xff\xff"}, "is no WorkRequest"),
    ("a stranger", parts() | {"etc/passwd": b""}, "holds files that are no part of it"),
]


@pytest.mark.parametrize(("members", "said"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_what_is_wrong_with_a_record_file_is_said_when_it_is_opened(
    tmp_path: Path, members: dict[str, bytes], said: str
) -> None:
    path = tmp_path / "a.rec"
    make(path, members)
    with pytest.raises(ConfigError, match=f"^record file {re.escape(str(path))}: .*{re.escape(said)}"):
        RecordedRequests.load(str(path))


def test_a_link_in_a_record_file_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "a.rec", parts(), link)
    with pytest.raises(ConfigError, match="is not a regular file"):
        RecordedRequests.load(str(tmp_path / "a.rec"))


def test_a_file_that_is_missing_or_no_record_at_all_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        RecordedRequests.load(str(tmp_path / "a.rec"))
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        RecordedRequests.load(str(tmp_path))
    for content in (b"", b"hello", b"x" * 5000):
        (tmp_path / "b.rec").write_bytes(content)
        with pytest.raises(ConfigError, match=r"record file .*b\.rec: .*nativelink_worker_wrapper record"):
            RecordedRequests.load(str(tmp_path / "b.rec"))


def test_a_record_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.rec", ((b"x",), {b"f": b"y" * 3000}), ((), {b"g": b"z" * 3000}))
    whole = (tmp_path / "a.rec").read_bytes()
    end = whole.rindex(b'{"format"') + 1
    for size in range(0, end, 97):
        (tmp_path / "b.rec").write_bytes(whole[:size])
        with pytest.raises(ConfigError):
            RecordedRequests.load(str(tmp_path / "b.rec"))
