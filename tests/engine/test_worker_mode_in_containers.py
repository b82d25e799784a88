"""Worker mode with workers in containers: the host's execroot at the same paths, nothing else of the node."""

from __future__ import annotations

import json
import os
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.cri import WORKERS, container_pool, engine_is_empty, leftovers_on_node, stop_containers
from tests.support.engine import PrivateContainerd
from tests.support.oci_image import WORKER_UID
from tests.support.raw_host import RawHost, ask, until
from tests.workers.echo_worker import expected_output
from wrapper.execroot.worker_execroot import FOLDER
from wrapper.worker_protocol.wire_format import WireFormat

pytestmark = pytest.mark.engine

TOOL = ["/usr/bin/python3", "-I", "-S", f"{WORKERS}/hostile_worker.py", "--persistent_worker"]
DIED, USAGE, CONFIG, CANCELLED = 70, 64, 78, 75


class BazelTree:
    """An execroot as Bazel makes it: links into a workspace elsewhere, and a directory for the outputs."""

    def __init__(self, folder: Path, uid: int) -> None:
        self.folder = folder
        self.workspace = folder / "home" / "workspace"
        self.execroot = folder / "output_base" / "execroot" / "_main"
        (self.workspace / "src").mkdir(parents=True)
        (self.workspace / "src" / "Main.txt").write_text("text of Main")
        (self.workspace / "README").write_text("text of README")
        (self.execroot / "bazel-out" / "bin").mkdir(parents=True)
        for name in ("src", "README"):
            (self.execroot / name).symlink_to(self.workspace / name)
        (folder / "home" / "secret").write_text("of the node")
        for path in [self.execroot, *self.execroot.rglob("*"), self.workspace, *self.workspace.rglob("*")]:
            os.chown(path, uid, uid, follow_symlinks=False)

    def sandbox(self, number: int) -> str:
        """A sandbox with one input, as Bazel makes them: links to the real files."""
        name = f"__sandbox/{number}/_main"
        source = self.execroot / name / "src"
        source.mkdir(parents=True)
        (source / "Main.txt").symlink_to(self.workspace / "src" / "Main.txt")
        (source / f"{number}.txt").write_text(f"only of {number}")
        for path in [self.execroot / "__sandbox", *(self.execroot / "__sandbox").rglob("*")]:
            os.chown(path, WORKER_UID, WORKER_UID, follow_symlinks=False)
        return name


@pytest.fixture
def tree(tmp_path: Path) -> BazelTree:
    return BazelTree(tmp_path, WORKER_UID)


@pytest.fixture
def serving(engine: PrivateContainerd, tmp_path: Path, tree: BazelTree) -> Iterator[Callable[..., RawHost]]:
    """Starts the wrapper in the execroot; afterwards nothing of it is in the engine or on the node."""

    def start(
        *options: str, upstream: WireFormat = WireFormat.PROTO, uid: int | None = None, **changes: object
    ) -> RawHost:
        document = tmp_path / "pools.json5"
        document.write_text(
            json.dumps(
                container_pool(
                    engine,
                    tmp_path,
                    worker_command=[],
                    keys=["echo-*"],
                    execroot={"strategy": "inplace"},
                    isolation={"run_as_user": uid},
                    **changes,
                )
            )
        )
        configured = ("--config", str(document), "--persistent-worker-key", "echo-1")
        return RawHost(TOOL, *configured, *options, cwd=tree.execroot, upstream=upstream)

    yield start
    assert engine_is_empty(engine)
    assert leftovers_on_node(tmp_path) == []


def lines(output: bytes) -> list[str]:
    return output.decode().splitlines()[1:]


def test_inputs_are_read_behind_links_and_outputs_are_written_in_place_as_their_owner(
    serving: Callable[..., RawHost], tree: BazelTree
) -> None:
    with serving() as host:
        answer = host.one("--print-cwd", "--read=src/Main.txt", "--write=bazel-out/bin/out", request_id=3)
        assert lines(answer.pb.output) == [str(tree.execroot), "text of Main"]
        output = tree.execroot / "bazel-out" / "bin" / "out"
        assert output.read_bytes() == expected_output(
            [b"--print-cwd", b"--read=src/Main.txt", b"--write=bazel-out/bin/out"]
        )
        assert (output.stat().st_uid, output.stat().st_gid) == (WORKER_UID, WORKER_UID)
        # A top-level file is a link too, and what the host adds to its workspace later is there.
        assert lines(host.one("--read=README").pb.output) == ["text of README"]
        (tree.workspace / "src" / "New.txt").write_text("came later")
        assert lines(host.one("--read=src/New.txt").pb.output) == ["came later"]


def test_nothing_else_of_the_node_is_visible_and_the_sources_cannot_be_written(
    serving: Callable[..., RawHost], tree: BazelTree, tmp_path: Path
) -> None:
    with serving() as host:
        for path in (tree.folder / "home" / "secret", tmp_path / "pools.json5", "/etc/shadow", "/root"):
            answer = host.one(f"--run=result = os.stat({str(path)!r})").pb
            assert answer.output.startswith(b"failed: FileNotFoundError"), (path, answer.output)
        listed = host.one(f"--run=result = os.listdir({str(tree.folder / 'home')!r})").pb
        assert listed.output == b"['workspace']"
        for path in ("src/Main.txt", "src/new", tree.workspace / "new", "README"):
            answer = host.one(f"--run=open({str(path)!r}, 'a')").pb
            assert b"Read-only file system" in answer.output, (path, answer.output)
    assert (tree.workspace / "src" / "Main.txt").read_text() == "text of Main"


def test_a_link_that_an_action_leaves_opens_nothing_to_the_next_container(
    serving: Callable[..., RawHost], engine: PrivateContainerd, tree: BazelTree
) -> None:
    secret = tree.folder / "home" / "secret"
    with serving("--max-instances", "1") as host:
        host.one(f"--run=os.symlink({str(secret)!r}, 'planted')")
        assert (tree.execroot / "planted").read_text() == "of the node"
        stop_containers(engine)
        until(lambda: engine_is_empty(engine), "the stopped container is removed")
        assert b"No such file" in host.one("--read=planted").pb.output
        assert lines(host.one("--read=README").pb.output) == ["text of README"]


def test_external_repositories_and_the_real_execroot_of_a_sandboxed_worker_are_readable(
    engine: PrivateContainerd, serving: Callable[..., RawHost], tree: BazelTree, tmp_path: Path
) -> None:
    repository = tmp_path / "output_base" / "external" / "repo"
    repository.mkdir(parents=True)
    (repository / "tool.txt").write_text("text of a repository")
    (tree.execroot / "external").mkdir()
    (tree.execroot / "external" / "repo").symlink_to(repository)
    with serving() as host:
        assert lines(host.one("--read=external/repo/tool.txt").pb.output) == ["text of a repository"]
    workdir = tmp_path / "output_base" / "bazel-workers" / "X-worker-1-workdir" / "_main"
    source = workdir / "__sandbox" / "1" / "_main" / "src"
    source.mkdir(parents=True)
    (source / "Main.txt").symlink_to(tree.execroot / "src" / "Main.txt")
    for path in [workdir, *workdir.rglob("*")]:
        os.chown(path, WORKER_UID, WORKER_UID, follow_symlinks=False)
    options = ("--config", str(tmp_path / "pools.json5"))
    with RawHost(TOOL, *options, cwd=workdir) as host:
        answer = host.one("--read=src/Main.txt", sandbox_dir="__sandbox/1/_main")
        assert lines(answer.pb.output) == ["text of Main"]


def test_a_workspace_of_roots_is_refused_with_the_remedy_and_served_with_it(
    serving: Callable[..., RawHost], tree: BazelTree
) -> None:
    os.chown(tree.execroot, 0, 0)
    with serving() as host:
        assert host.wait() == CONFIG
        assert str(tree.execroot) in host.stderr()
        assert "belongs to root" in host.stderr()
        assert "isolation.run_as_user" in host.stderr()
    with serving(uid=WORKER_UID) as host:
        host.one("--write=bazel-out/bin/out")
    assert (tree.execroot / "bazel-out" / "bin" / "out").stat().st_uid == WORKER_UID


def test_sandboxed_requests_of_a_tool_that_does_not_know_them_see_their_own_inputs_alone(
    serving: Callable[..., RawHost], tree: BazelTree
) -> None:
    with serving("--max-instances", "1") as host:
        seen = set()
        for number in range(1, 4):
            sandbox = tree.sandbox(number)
            code = (
                "listed = sorted(os.listdir('.') + os.listdir('src')); "
                f"open('src/out{number}', 'w').close(); "
                f"result = os.getcwd(), listed, open('src/Main.txt').read(), open('src/{number}.txt').read()"
            )
            answer = host.one(f"--run={code}", request_id=number, sandbox_dir=sandbox).pb
            cwd, listed, main, own = eval(answer.output)  # the repr of plain values
            assert listed == sorted(["src", "Main.txt", f"{number}.txt"])
            assert (main, own) == ("text of Main", f"only of {number}")
            seen.add(cwd)
            names = sorted(path.name for path in (tree.execroot / sandbox / "src").iterdir())
            assert names == sorted(["Main.txt", f"{number}.txt", f"out{number}"])
            assert (tree.execroot / sandbox / "src" / f"out{number}").stat().st_uid == WORKER_UID
        assert len(seen) == 1
        assert seen.pop().startswith(str(tree.execroot / FOLDER))
        # One that comes without a sandbox gets a worker in the execroot itself.
        assert lines(host.one("--print-cwd").pb.output) == [str(tree.execroot)]
    assert not (tree.execroot / FOLDER).exists()


def test_json_upstream_and_several_requests_at_once_each_get_their_own_answer(
    serving: Callable[..., RawHost],
) -> None:
    with serving("--max-instances", "2", upstream=WireFormat.JSON) as host:
        requests = [ask(f"wörd{n}", "--sleep-ms=20", request_id=n) for n in range(1, 13)]
        for answer in host.exchange(*requests):
            words = [f"wörd{answer.pb.request_id}".encode(), b"--sleep-ms=20"]
            assert answer.pb.output == expected_output(words)


def hang(host: RawHost, tree: BazelTree, request_id: int) -> None:
    """Send a request that never ends, and wait until it is under way."""
    marker = tree.execroot / "bazel-out" / "under-way"
    marker.unlink(missing_ok=True)
    code = "import time; open('bazel-out/under-way', 'w').close(); time.sleep(1e6)"
    host.send(ask(f"--run={code}", request_id=request_id))
    until(marker.exists, "the request is under way")


def test_a_container_that_is_stopped_in_the_middle_of_a_request_is_a_diagnosis(
    serving: Callable[..., RawHost], engine: PrivateContainerd, tree: BazelTree
) -> None:
    with serving("--max-instances", "1") as host:
        hang(host, tree, 7)
        stop_containers(engine)
        (answer,) = host.receive(1)
        assert (answer.pb.request_id, answer.pb.exit_code) == (7, DIED)
        assert b"SIGKILL" in answer.pb.output, answer.pb.output
        # The next one is served, by a new container.
        assert host.one("fine", request_id=8).pb.output == expected_output([b"fine"])


def test_sigterm_in_the_middle_of_a_request_answers_it_and_leaves_no_container(
    serving: Callable[..., RawHost], engine: PrivateContainerd, tree: BazelTree
) -> None:
    with serving() as host:
        hang(host, tree, 5)
        assert not engine_is_empty(engine)
        host.signal(signal.SIGTERM)
        (answer,) = host.rest()
        assert (answer.pb.request_id, answer.pb.exit_code) == (5, CANCELLED)
        assert host.wait() == 0
        assert engine_is_empty(engine)


def test_at_the_end_of_input_all_is_answered_before_the_containers_go(
    serving: Callable[..., RawHost], engine: PrivateContainerd
) -> None:
    with serving("--max-instances", "2") as host:
        host.send(*(ask(f"word{number}", request_id=number) for number in range(1, 9)))
        answers = host.finish()
        assert sorted(answer.pb.request_id for answer in answers) == list(range(1, 9))
        assert {answer.pb.exit_code for answer in answers} == {0}
        assert engine_is_empty(engine)


def test_a_tool_that_the_container_does_not_have_is_named_with_the_image(
    serving: Callable[..., RawHost], engine: PrivateContainerd, tree: BazelTree, tmp_path: Path
) -> None:
    with serving() as ready:
        ready.close_stdin()
        assert ready.wait() == 0  # only its configuration is wanted
    options = ("--config", str(tmp_path / "pools.json5"))
    with RawHost(["/opt/no-such-tool", "--persistent_worker"], *options, cwd=tree.execroot) as host:
        answer = host.one("x").pb
        assert answer.exit_code == 69
        assert b"/opt/no-such-tool" in answer.output
        assert b"localhost/nlww/host:1" in answer.output


def test_what_is_written_has_the_owner_and_the_rights_that_the_tool_gave_it(
    serving: Callable[..., RawHost], tree: BazelTree
) -> None:
    with serving() as host:
        code = "os.mkdir('bazel-out/new'); open('bazel-out/new/f', 'w'); os.chmod('bazel-out/new/f', 0o755)"
        host.one(f"--run={code}")
    info = (tree.execroot / "bazel-out" / "new" / "f").stat()
    assert (info.st_uid, stat.S_IMODE(info.st_mode)) == (WORKER_UID, 0o755)
