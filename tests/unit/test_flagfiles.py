"""Flagfiles: what Bazel would send, and nothing from anywhere but the action's own files."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wrapper import flagfiles
from wrapper.errors import RequestRefused
from wrapper.files import DIRECTORY
from wrapper.flagfiles import MAX_DEPTH, MAX_FILES, Argument, NotExpressible, expand


class Tree:
    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        self.fd = os.open(path, DIRECTORY)

    def write(self, name: str, content: str | bytes) -> Path:
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        return file

    def expand(self, *texts: str, working_directory: str = "") -> list[str]:
        return expand([Argument.of(text) for text in texts], self.fd, working_directory)

    def refusal(self, *texts: str, working_directory: str = "") -> str:
        with pytest.raises(RequestRefused) as caught:
            self.expand(*texts, working_directory=working_directory)
        assert caught.value.exit_code == 64
        return caught.value.message


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Tree]:
    made = Tree(tmp_path / "action")
    before = len(os.listdir("/proc/self/fd"))
    yield made
    assert len(os.listdir("/proc/self/fd")) == before
    os.close(made.fd)


# ---- what Bazel sends ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (b"", []),
        (b"a", ["a"]),
        (b"a\n", ["a"]),
        (b"a\nb", ["a", "b"]),
        (b"a\r\nb\r\n", ["a", "b"]),
        (b"a\rb\r", ["a", "b"]),
        (b"a\n\rb", ["a", "", "b"]),
        (b"\n", [""]),
        (b"\n\na\n\n", ["", "", "a", ""]),
        (b"  a b\t\n", ["  a b\t"]),
        (b"'a b' \"c\" \\d\n", ["'a b' \"c\" \\d"]),
        (b"#a\n--b=#c\n", ["#a", "--b=#c"]),
        (b"a\x0bb\x0cc\x1cd\xc2\x85e\xe2\x80\xa8f\n", ["a\x0bb\x0cc\x1cd\x85e\u2028f"]),
        ("ä→😀\n".encode(), ["ä→😀"]),
        (b"\xef\xbb\xbfa\n", ["\ufeffa"]),
        (b"a\0b\n", ["a\0b"]),
        (
            b"@@a\n@repo//b:c\n--flagfile=d\n-flagfile=e\n@\n",
            ["@@a", "@repo//b:c", "--flagfile=d", "-flagfile=e", "@"],
        ),
    ],
)
def test_lines_are_arguments_as_they_stand(tree: Tree, content: bytes, lines: list[str]) -> None:
    tree.write("a.params", content)
    assert tree.expand("@a.params") == lines


def test_each_flagfile_is_in_its_place(tree: Tree) -> None:
    tree.write("x/one.params", "1\n@x/two.params\n3\n")
    tree.write("x/two.params", "2\n")
    assert tree.expand("@@a", "@x/one.params", "--flagfile=b", "@x/two.params") == [
        "@@a",
        "1",
        "2",
        "3",
        "--flagfile=b",
        "2",
    ]


def test_an_argument_that_is_not_to_be_expanded_is_not_looked_at(tree: Tree) -> None:
    assert expand([Argument("@missing"), Argument("--x")], tree.fd) == ["@missing", "--x"]


text_lines = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=20)


@given(st.lists(text_lines.filter(lambda line: not flagfiles.is_flagfile(line)), max_size=6))
def test_any_lines_come_back_as_they_were_written(lines: list[str]) -> None:
    with TemporaryDirectory() as folder:
        Path(folder, "f").write_bytes("".join(f"{line}\n" for line in lines).encode())
        fd = os.open(folder, DIRECTORY)
        try:
            assert expand([Argument("@f", True)], fd) == lines
        finally:
            os.close(fd)


def test_a_hard_link_is_a_plain_file(tree: Tree, tmp_path: Path) -> None:
    blob = tmp_path / "blob"
    blob.write_text("a\n")
    os.link(blob, tree.path / "a.params")
    assert tree.expand("@a.params") == ["a"]


def test_paths_count_from_the_working_directory_and_may_lead_above_it_within_the_action(tree: Tree) -> None:
    tree.write("sub/dir/a.params", "a\n@../b.params\n")
    tree.write("sub/b.params", "b\n@../../c.params\n")
    tree.write("c.params", "c\n")
    assert tree.expand("@a.params", working_directory="sub/dir") == ["a", "b", "c"]
    assert "leads out" in tree.refusal("@../../../c.params", working_directory="sub/dir")


def test_one_file_may_be_named_more_than_once(tree: Tree) -> None:
    tree.write("a", "@b\n@b\n")
    tree.write("b", "x\n")
    assert tree.expand("@a", "@b", "@a") == ["x"] * 5


# ---- what is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/etc/shadow", "/", "/proc/self/environ"])
def test_an_absolute_path_is_refused(tree: Tree, path: str) -> None:
    assert "is an absolute path" in tree.refusal(f"@{path}")


def test_an_absolute_path_to_the_actions_own_file_is_refused_too(tree: Tree) -> None:
    file = tree.write("a", "a\n")
    assert "is an absolute path" in tree.refusal(f"@{file}")


@pytest.mark.parametrize("path", ["../secret", "x/../../secret", ".."])
def test_a_path_that_leads_out_is_refused(tree: Tree, tmp_path: Path, path: str) -> None:
    (tmp_path / "secret").write_text("secret\n")
    (tree.path / "x").mkdir()
    message = tree.refusal(f"@{path}")
    assert f"flagfile '{path}' leads out of the action's directory" in message


@pytest.mark.parametrize(
    "target", ["../secret", "/etc/shadow", "inside", "missing", "link", "/proc/self/fd/0"]
)
def test_a_symbolic_link_is_refused_wherever_it_leads(tree: Tree, tmp_path: Path, target: str) -> None:
    (tmp_path / "secret").write_text("secret\n")
    tree.write("inside", "a\n")
    (tree.path / "link").symlink_to(target)
    assert "flagfile 'link' is a symbolic link, or lies behind one" in tree.refusal("@link")


def test_a_file_behind_a_linked_directory_is_refused(tree: Tree, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "f").write_text("secret\n")
    (tree.path / "d").symlink_to("../elsewhere")
    assert "symbolic link" in tree.refusal("@d/f")


def test_a_missing_file_is_named_with_the_file_that_names_it(tree: Tree) -> None:
    tree.write("a", "x\n@b/c.params\n")
    assert tree.refusal("@b/c.params") == (
        "flagfile 'b/c.params' does not exist; it has to be an input of the action"
    )
    assert tree.refusal("@a").startswith("flagfile 'b/c.params', named in 'a', does not exist")


def test_what_is_no_regular_file_is_refused_at_once(tree: Tree) -> None:
    (tree.path / "folder").mkdir()
    os.mkfifo(tree.path / "fifo")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tree.path / "socket"))
    try:
        assert "is no regular file" in tree.refusal("@folder")
        assert "is no regular file" in tree.refusal("@fifo")
        assert "is no regular file" in tree.refusal("@socket")
    finally:
        listener.close()
    tree.write("file", "")
    assert "a part of its path is no directory" in tree.refusal("@file/x")


@pytest.mark.parametrize("path", ["a\0b", "x" * 300, "x/" * 3000])
def test_what_is_no_path_is_refused(tree: Tree, path: str) -> None:
    tree.write("a", f"@{path}\n")
    message = tree.refusal("@a")
    assert "named in 'a'" in message
    assert len(message) < 500


def test_a_file_that_names_itself_is_refused(tree: Tree) -> None:
    tree.write("a", "x\n@a\n")
    assert tree.refusal("@a") == "flagfiles hold each other: 'a' → 'a'"


def test_a_ring_of_files_is_refused_under_whatever_names(tree: Tree) -> None:
    tree.write("a", "@b\n")
    tree.write("b", "@c\n")
    os.link(tree.path / "a", tree.path / "c")
    assert tree.refusal("@a") == "flagfiles hold each other: 'a' → 'b' → 'c'"


def test_nesting_is_bounded(tree: Tree) -> None:
    for depth in range(MAX_DEPTH + 1):
        tree.write(f"f{depth}", f"{depth}\n@f{depth + 1}\n")
    tree.write(f"f{MAX_DEPTH}", "end\n")
    assert tree.expand("@f1")[-1] == "end"
    assert f"nested more than {MAX_DEPTH} deep: 'f0' → 'f1'" in tree.refusal("@f0")


def test_the_number_of_files_is_bounded_however_small_they_are(tree: Tree) -> None:
    tree.write("e", "")
    tree.write("most", "@e\n" * (MAX_FILES - 1))
    assert tree.expand("@most") == []
    tree.write("more", "@e\n" * MAX_FILES)
    assert f"more than {MAX_FILES} flagfiles" in tree.refusal("@more")


def test_the_number_of_arguments_is_bounded(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flagfiles, "MAX_ARGUMENTS", 5)
    tree.write("a", "\n" * 4)
    assert len(tree.expand("@a", "--x")) == 5
    assert "more than 5 arguments" in tree.refusal("@a", "--x", "--y")


def test_the_size_of_all_files_together_is_bounded(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flagfiles, "MAX_BYTES", 10)
    tree.write("a", "12345")
    assert tree.expand("@a", "@a") == ["12345", "12345"]
    assert "flagfile 'a' is too large" in tree.refusal("@a", "@a", "@a")


def test_a_huge_file_is_not_read_to_its_end(tree: Tree) -> None:
    tree.write("a", "x")
    os.truncate(tree.path / "a", 1 << 40)
    assert "is too large" in tree.refusal("@a")


def test_what_is_not_utf8_is_not_the_actions_error(tree: Tree) -> None:
    tree.write("a", b"fine\n\xff\n")
    with pytest.raises(NotExpressible, match="flagfile 'a', line 2: not UTF-8"):
        tree.expand("@a")


def test_a_file_that_is_swapped_for_a_link_never_shows_what_is_outside(tree: Tree, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret\n")
    tree.write("a", "mine\n")
    (tree.path / "link").symlink_to("../secret")
    linked = "flagfile 'a' is a symbolic link, or lies behind one"
    done = threading.Event()

    def swap() -> None:
        while not done.is_set():
            for source, target in (("a", "spare"), ("link", "a"), ("a", "link"), ("spare", "a")):
                os.rename(tree.path / source, tree.path / target)

    swapper = threading.Thread(target=swap)
    swapper.start()
    seen: set[str] = set()
    try:
        for turn in range(1_000_000):
            if turn > 2000 and {"mine", linked} <= seen:
                break
            try:
                seen.update(tree.expand("@a"))
            except RequestRefused as refused:
                seen.add(refused.message.partition(";")[0])
    finally:
        done.set()
        swapper.join()
    assert {"mine", linked} <= seen
    assert seen <= {"mine", linked, "flagfile 'a' does not exist"}


def test_a_file_that_grows_while_it_is_read_is_bounded(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tree.write("a", "x" * 100)
    read = os.read

    def read_and_grow(fd: int, count: int) -> bytes:
        with file.open("a") as more:
            more.write("y" * 100)
        return read(fd, min(count, 100))

    monkeypatch.setattr(flagfiles, "MAX_BYTES", 1000)
    monkeypatch.setattr(os, "read", read_and_grow)
    assert "is too large" in tree.refusal("@a")
