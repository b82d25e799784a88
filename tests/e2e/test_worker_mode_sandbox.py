"""`sandbox_dir`, laid out as Bazel does: a directory with links to the tool, and `__sandbox/<id>/_main`."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.support.raw_host import RawHost, ask, echo_tool, until
from wrapper.execroot.worker_execroot import FOLDER


class Workdir:
    """What `bazel-workers/X-multiplex-worker-N-workdir/_main` looks like."""

    def __init__(self, root: Path) -> None:
        self.execroot = root / "execroot"
        (self.execroot / "pkg").mkdir(parents=True)
        self.path = root / "workdir" / "_main"
        (self.path / "bazel-out" / "tool").mkdir(parents=True)
        (self.path / "bazel-out" / "tool" / "tool.py").symlink_to("/dev/null")
        (self.path / "secret").write_text("of the working directory")

    def sandbox(self, number: int, **inputs: str) -> str:
        """`inputs` by file name, as links to the execroot; returns the sandbox_dir."""
        name = f"__sandbox/{number}/_main"
        folder = self.path / name
        (folder / "pkg").mkdir(parents=True)
        for input_name, text in inputs.items():
            real = self.execroot / "pkg" / f"{number}-{input_name}"
            real.write_text(text)
            (folder / "pkg" / input_name).symlink_to(real)
        return name


@pytest.fixture
def workdir(tmp_path: Path) -> Workdir:
    return Workdir(tmp_path)


def lines(output: bytes) -> list[str]:
    return output.decode().splitlines()


def test_a_tool_that_knows_sandbox_dir_gets_it(workdir: Workdir) -> None:
    sandbox = workdir.sandbox(1, source="text")
    with RawHost(echo_tool(), "--tool-sandbox", cwd=workdir.path) as host:
        answer = host.one("--print-sandbox-dir", "--read=pkg/source", "--write=pkg/out", sandbox_dir=sandbox)
        assert lines(answer.pb.output)[1:] == [sandbox, "text"]
    assert (workdir.path / sandbox / "pkg" / "out").exists()
    assert not (workdir.path / FOLDER).exists()


def test_a_singleplex_tool_that_does_not_runs_in_an_execroot_of_its_own(workdir: Workdir) -> None:
    seen = set()
    with RawHost(echo_tool(), "--max-instances", "1", cwd=workdir.path) as host:
        for number in range(1, 6):
            sandbox = workdir.sandbox(number, source=f"text {number}")
            answer = host.one(
                *("--print-sandbox-dir", "--print-cwd", "--read=pkg/source", f"--write=pkg/out{number}"),
                request_id=number,
                sandbox_dir=sandbox,
            )
            _, cwd, sandbox_dir, text = lines(answer.pb.output)
            assert (sandbox_dir, text) == ("", f"text {number}")
            (pid,) = host.workers()
            seen.add((cwd, os.stat(f"/proc/{pid}/cwd").st_ino, pid))
            # What it wrote is in the sandbox again, with the inputs, and with nothing else.
            names = sorted(p.name for p in (workdir.path / sandbox).rglob("*"))
            assert names == sorted(["pkg", "source", f"out{number}"])
            assert os.readlink(workdir.path / sandbox / "pkg" / "source").startswith(str(workdir.execroot))
        assert len(seen) == 1, "neither the path nor the inode of its working directory ever changes"
        assert cwd.startswith(str(workdir.path / FOLDER))
        # While idle it shows what the host's directory shows, so that the tool can load what it loads late.
        assert sorted(os.listdir(cwd)) == ["bazel-out", "host-tmp", "secret"]
    assert not (workdir.path / FOLDER).exists()
    assert (workdir.path / "secret").read_text() == "of the working directory"


def test_no_input_or_output_of_another_request_is_visible(workdir: Workdir) -> None:
    with RawHost(echo_tool(), "--max-instances", "1", cwd=workdir.path) as host:
        one = workdir.sandbox(1, mine="first")
        host.one("--write=out", sandbox_dir=one)
        two = workdir.sandbox(2)
        for path in ("pkg/mine", "out", "secret", one + "/out", "bazel-out/tool/tool.py"):
            answer = host.one(f"--read={path}", sandbox_dir=two)
            assert b"No such file" in answer.pb.output, path
        # Without a sandbox the tool runs where the host does, on a worker of another key.
        answer = host.one("--read=secret", "--print-cwd")
        assert lines(answer.pb.output)[1:] == [str(workdir.path), "of the working directory"]


def test_several_sandboxed_requests_run_at_the_same_time_each_in_its_own(workdir: Workdir) -> None:
    requests = []
    for number in range(1, 25):
        sandbox = workdir.sandbox(number, source=f"text {number}")
        requests.append(
            ask(
                *("--sleep-ms=10", "--read=pkg/source", "--write=out"),
                request_id=number,
                sandbox_dir=sandbox,
            )
        )
    with RawHost(echo_tool(), "--max-instances", "3", cwd=workdir.path) as host:
        for answer in host.exchange(*requests):
            number = answer.pb.request_id
            assert lines(answer.pb.output)[1:] == [f"text {number}"]
            assert (workdir.path / f"__sandbox/{number}/_main/out").exists()
            assert (workdir.path / f"__sandbox/{number}/_main/pkg/source").read_text() == f"text {number}"
    assert not (workdir.path / FOLDER).exists()


@pytest.mark.parametrize(
    "bad",
    ["/tmp", "/", "..", "__sandbox/../../..", ".", "link/_main", "__sandbox/linked", "missing", "secret"],
)
def test_what_is_no_directory_below_the_working_directory_is_refused(workdir: Workdir, bad: str) -> None:
    outside = workdir.path.parent / "outside" / "_main"
    outside.mkdir(parents=True)
    (outside / "precious").write_text("stays")
    (workdir.path / "link").symlink_to(outside.parent)
    (workdir.path / "__sandbox").mkdir()
    (workdir.path / "__sandbox" / "linked").symlink_to(outside)
    with RawHost(echo_tool(), "--max-instances", "1", cwd=workdir.path) as host:
        answer = host.one("--print-cwd", request_id=8, sandbox_dir=bad).pb
        assert answer.exit_code == 64
        assert b"sandbox_dir" in answer.output
        assert host.one("fine", sandbox_dir=workdir.sandbox(1)).pb.exit_code == 0
    assert (outside / "precious").read_text() == "stays"
    assert not (workdir.path / FOLDER).exists()


def test_odd_names_come_back_as_they_went(workdir: Workdir) -> None:
    sandbox = workdir.path / workdir.sandbox(1)
    names = ["-rf", " ", "new\nline", os.fsdecode(b"\xff\xfe"), "é", ".hidden", "x" * 200]
    for name in names:
        (sandbox / name).mkdir()
        (sandbox / name / name).write_text("deep")
    (sandbox / "dangling").symlink_to("nowhere")
    (sandbox / "fifo").parent.mkdir(exist_ok=True)
    os.mkfifo(sandbox / "fifo")
    before = sorted(os.listdir(sandbox))
    with RawHost(echo_tool(), cwd=workdir.path) as host:
        assert b"deep" in host.one("--read=new\nline/new\nline", sandbox_dir="__sandbox/1/_main").pb.output
    assert sorted(os.listdir(sandbox)) == before


def test_a_sandbox_with_slashes_and_dots_too_many_is_the_same_sandbox(workdir: Workdir) -> None:
    workdir.sandbox(1, source="text")
    with RawHost(echo_tool(), cwd=workdir.path) as host:
        answer = host.one("--read=pkg/source", sandbox_dir="./__sandbox//1/./_main/")
        assert lines(answer.pb.output)[1:] == ["text"]


def test_a_worker_that_dies_in_a_sandbox_leaves_nothing_and_the_next_one_serves(workdir: Workdir) -> None:
    with RawHost(echo_tool(), "--max-instances", "1", cwd=workdir.path) as host:
        for number in range(1, 4):
            failed = host.one("--die", sandbox_dir=workdir.sandbox(number, source="x"))
            assert failed.pb.exit_code == 70
            served = host.one("--read=pkg/source", sandbox_dir=workdir.sandbox(number + 10, source="fine"))
            assert lines(served.pb.output)[1:] == ["fine"]
            assert len(os.listdir(workdir.path / FOLDER)) <= 2  # the live one's, one that is being stopped
        host.send(ask("--hang", request_id=1, sandbox_dir=workdir.sandbox(30)))
        until(host.workers, "a worker")
        host.process.terminate()
        host.rest()
        assert host.wait() == 0
    assert not (workdir.path / FOLDER).exists()
    assert (workdir.execroot / "pkg" / "1-source").read_text() == "x"  # links went, not what they mean


def test_a_multiplex_tool_that_does_not_know_it_is_refused_with_what_to_do(workdir: Workdir) -> None:
    with RawHost(echo_tool("--multiplex"), "--tool-multiplex", cwd=workdir.path) as host:
        answer = host.one("--read=secret", request_id=3, sandbox_dir=workdir.sandbox(1)).pb
        assert answer.exit_code == 64
        assert b"--tool-sandbox" in answer.output
        assert b"of the working directory" not in answer.output
        assert host.one("--read=secret").pb.output.endswith(b"of the working directory")


def test_a_tool_that_leaves_things_in_its_working_directory_still_gets_clean_sandboxes(
    workdir: Workdir,
) -> None:
    script = workdir.path / "untidy"
    script.write_text(
        "#!/usr/bin/env python3\nimport os, sys\n"
        "while data := os.read(0, 65536):\n"
        "    number = data[data.index(b'\\x18') + 1]\n"
        "    text = ' '.join(sorted(os.listdir('.'))).encode()\n"
        "    open('lock', 'w').close()\n"
        "    body = bytes([0x12, len(text)]) + text + bytes([0x18, number])\n"
        "    os.write(1, bytes([len(body)]) + body)\n"
        "    while not os.path.exists('secret'): pass\n"  # the sandbox is gone: it is idle
        "    os.makedirs('cache/deep'); open('cache/deep/file', 'w').close(); open('own', 'w').close()\n"
        "    open(os.environ['TMPDIR'] + '/../../idle', 'w').close()\n"
    )
    script.chmod(0o755)
    with RawHost(["./untidy", "--persistent_worker"], "--max-instances", "1", cwd=workdir.path) as host:
        for number in (1, 2, 3):
            answer = host.one("x", sandbox_dir=workdir.sandbox(number, source="x"))
            assert answer.pb.exit_code == 0, answer.pb.output.decode()
            assert answer.pb.output == b"pkg"
            assert sorted(os.listdir(workdir.path / f"__sandbox/{number}/_main")) == ["lock", "pkg"]
            (idle,) = [directory / "idle" for directory in host.tmp.iterdir()]
            until(idle.exists, "it has left things")
            idle.unlink()


def test_a_killed_wrapper_leaves_its_execroots_and_the_next_one_works_beside_them(workdir: Workdir) -> None:
    with RawHost(echo_tool(), cwd=workdir.path) as host:
        host.one("x", sandbox_dir=workdir.sandbox(1))
        workers = [psutil.Process(pid) for pid in host.workers()]
        host.process.kill()
        assert not psutil.wait_procs(workers, timeout=60)[1]
        host.wait()
        for directory in host.tmp.iterdir():
            subprocess.run(["rm", "-r", str(directory)], check=True)
    with RawHost(echo_tool(), cwd=workdir.path) as host:
        assert host.one("x", sandbox_dir=workdir.sandbox(2)).pb.exit_code == 0
