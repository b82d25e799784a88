"""`record`: which files of a request are kept, and that what cannot be recorded is left out and counted."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path

import pytest

from wrapper.errors import ConfigError
from wrapper.record import MAX_WAITING, Recorder
from wrapper.recording import RecordedRequests
from wrapper.worker_protocol.messages import WorkRequest


class Session:
    """One recording of requests that come from a working directory."""

    def __init__(self, tmp_path: Path, **limits: int) -> None:
        self.cwd = tmp_path / "cwd"
        self.cwd.mkdir()
        self.path = tmp_path / "a.rec"
        bounds = {"max_requests": 100, "max_bytes": 1 << 20, **limits}
        self.recorder = Recorder(str(self.path), tool="tool", trust_domain="d", cwd=str(self.cwd), **bounds)

    def file(self, name: str, text: str = "x") -> None:
        path = self.cwd / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def request(self, *arguments: str, inputs: tuple[str, ...] = (), sandbox_dir: str = "") -> None:
        self.recorder.accepted(
            WorkRequest.of(
                arguments=[os.fsencode(argument) for argument in arguments],
                inputs=[(os.fsencode(path), b"") for path in inputs],
                sandbox_dir=os.fsencode(sandbox_dir),
                request_id=5,
            )
        )

    def trees(self) -> list[tuple[set[bytes], frozenset[bytes]]]:
        """End it; the files and the directories of each recorded request."""
        self.recorder.ended()
        if not self.path.exists():
            return []
        recorded = RecordedRequests.load(str(self.path))
        recorded.close()
        assert (recorded.tool, recorded.trust_domain) == ("tool", "d")
        return [(set(each.tree.files), each.tree.directories) for each in recorded.requests]

    def files(self) -> list[set[bytes]]:
        return [files for files, _ in self.trees()]


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return Session(tmp_path)


def test_the_inputs_of_a_request_are_kept_and_what_only_lies_there_is_not(session: Session) -> None:
    for name in ("src/A.java", "lib/a.jar", "other"):
        session.file(name)
    session.request("other", inputs=("src/A.java", "./lib/a.jar"))
    assert session.files() == [{b"src/A.java", b"lib/a.jar"}]


def test_links_are_followed_as_hosts_lay_inputs_out(session: Session, tmp_path: Path) -> None:
    (tmp_path / "real").write_text("content")
    (session.cwd / "linked").symlink_to(tmp_path / "real")
    session.request(inputs=("linked",))
    assert session.files() == [{b"linked"}]
    recorded = RecordedRequests.load(str(session.path))
    (tmp_path / "out").mkdir()
    recorded.write_tree(recorded.requests[0].tree, str(tmp_path / "out"))
    recorded.close()
    assert (tmp_path / "out" / "linked").read_text() == "content"
    assert not (tmp_path / "out" / "linked").is_symlink()


def test_an_input_that_is_a_directory_is_kept_with_all_that_is_in_it(session: Session) -> None:
    session.file("classes/a/A.class")
    session.file("classes/B.class")
    session.request(inputs=("classes",))
    assert session.files() == [{b"classes/a/A.class", b"classes/B.class"}]


def test_without_inputs_the_files_that_arguments_and_flagfiles_name_are_kept(session: Session) -> None:
    for name in ("a.jar", "b.jar", "src/A.java", "src/B.java", "config", "unnamed"):
        session.file(name)
    session.file("flags", "src/B.java\n-d\nout/classes\n")
    (session.cwd / "out").mkdir()
    session.request(
        "-cp", "a.jar:b.jar", "src/A.java", "@flags", "--config=config", "../outside", "/etc/passwd"
    )
    ((files, directories),) = session.trees()
    assert directories == {b"out", b"src"}
    assert files == {b"a.jar", b"b.jar", b"src/A.java", b"src/B.java", b"config", b"flags"}


def test_the_directory_in_which_an_output_will_lie_is_kept(session: Session) -> None:
    (session.cwd / "out" / "deep").mkdir(parents=True)
    session.request("-o", "out/deep/result.js")
    assert session.trees() == [(set(), frozenset([b"out/deep"]))]


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        (("missing",), "an input cannot be read (No such file or directory)"),
        (("../outside",), "an input lies outside of the working directory"),
        (("/etc/passwd",), "an input lies outside of the working directory"),
        (("fifo",), "an input is no regular file"),
    ],
)
def test_a_request_whose_inputs_cannot_be_had_is_left_out_and_counted(
    session: Session, inputs: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(session.cwd / "fifo")
    session.file("good")
    session.request(inputs=inputs)
    session.request(inputs=("good",))
    assert session.files() == [{b"good"}]
    assert (
        f"recorded 1 requests, 1 bytes of inputs: {session.path}; 1 left out: {said}"
        in capsys.readouterr().err
    )


def test_a_request_that_names_the_working_directory_absolutely_is_left_out(
    session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    """Primed with it, a worker would write into the tree that it was recorded in."""
    session.request("-d", f"{session.cwd}/out")
    session.file("flags", f"-d\n{session.cwd}/out\n")
    session.request("@flags")
    assert session.trees() == []
    said = capsys.readouterr().err
    assert "2 left out: they name the working directory by its absolute path" in said
    assert "was not written" in said


def test_the_files_of_a_sandboxed_request_are_opened_before_they_are_moved_away(session: Session) -> None:
    session.file("__sandbox/1/_main/src/A.java", "sandboxed")
    session.file("src/A.java", "not this one")
    session.request(inputs=("src/A.java",), sandbox_dir="__sandbox/1/_main")
    shutil.rmtree(session.cwd / "__sandbox")
    assert session.files() == [{b"src/A.java"}]
    recorded = RecordedRequests.load(str(session.path))
    target = session.cwd / "target"
    target.mkdir()
    recorded.write_tree(recorded.requests[0].tree, str(target))
    recorded.close()
    assert (target / "src" / "A.java").read_text() == "sandboxed"


def test_a_sandbox_elsewhere_is_not_looked_at(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    session.request(inputs=("passwd",), sandbox_dir="../../../../../../etc")
    assert session.trees() == []
    assert "sandbox_dir is not below the working directory" in capsys.readouterr().err


@pytest.mark.parametrize("limits", [{"max_requests": 2}, {"max_bytes": 25}])
def test_what_there_is_no_room_for_is_left_out(
    tmp_path: Path, limits: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    session = Session(tmp_path, **limits)
    for number in range(5):
        session.file(f"f{number}", f"content {number}.")
        session.request(inputs=(f"f{number}",))
    assert session.files() == [{b"f0"}, {b"f1"}]
    assert "3 left out: no room left in the record" in capsys.readouterr().err


def test_a_slow_disk_makes_requests_be_left_out_not_wait(
    session: Session, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    go_on = threading.Event()
    add = session.recorder._writer.add

    def slow(*arguments: object) -> bool:
        assert go_on.wait(60)
        return bool(add(*arguments))  # type: ignore[arg-type]

    monkeypatch.setattr(session.recorder._writer, "add", slow)
    for _ in range(MAX_WAITING + 20):
        session.request("x")
    go_on.set()
    recorded = len(session.trees())
    assert MAX_WAITING <= recorded <= 100
    said = capsys.readouterr().err
    assert "left out: they came too quickly" in said


def test_a_place_that_cannot_be_written_to_is_an_error_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        Recorder(str(tmp_path / "no" / "a"), tool="", trust_domain="", max_requests=1, max_bytes=1, cwd="/")
    assert not [thread for thread in threading.enumerate() if thread.name == "recorder"]


def test_with_nothing_recorded_an_older_file_stays(tmp_path: Path) -> None:
    (tmp_path / "a.rec").write_text("older")
    Session(tmp_path).recorder.ended()
    assert (tmp_path / "a.rec").read_text() == "older"
