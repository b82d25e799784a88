"""Who the daemon, NativeLink and the workers are: as root, with capabilities only, and all the same user."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.test_daemon import TOOL, echo_pool
from tests.support import daemon as daemon_module
from tests.support.action_world import needs_root
from tests.support.client import FRAMES
from tests.support.daemon import HOST_ID, Daemon, Node
from tests.support.loop import run_async

pytestmark = [pytest.mark.e2e, needs_root]

ROOT = Path(__file__).resolve().parents[2]
DAEMON_ID = 3000
CAPABILITIES = "chown,setuid,setgid,kill,lease,dac_override,fowner"
PACKAGES = ["annotated_types", "google", "json5", "psutil", "pydantic", "pydantic_core"]
PACKAGES += ["typing_extensions", "typing_inspection", "uvloop"]


@pytest.fixture(scope="module")
def library() -> Iterator[Path]:
    """The product and what it needs, where every user can read it."""
    folder = Path(tempfile.mkdtemp(prefix="nlww-library-"))
    folder.chmod(0o755)
    shutil.copytree(ROOT / "wrapper", folder / "wrapper", ignore=shutil.ignore_patterns("__pycache__"))
    for name in PACKAGES:
        found = importlib.util.find_spec(name)
        assert found is not None, name
        if found.submodule_search_locations:
            source = Path(next(iter(found.submodule_search_locations)))
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            assert found.origin is not None
            shutil.copy(found.origin, folder)
    yield folder
    shutil.rmtree(folder)


class UserDaemon(Daemon):
    """A daemon as another user."""

    def __init__(self, node: Node, document: dict[str, Any], library: Path, *prefix: str) -> None:
        super().__init__(node, document)
        self.library = library
        self.prefix = prefix
        self.config.chmod(0o644)
        self.log.touch()

    def start(self) -> UserDaemon:
        python = "/usr/bin/python3"
        assert os.path.exists(python), "Debian's python3 is missing"
        command = [python, "-m", "wrapper", "serve", "--config", str(self.config), "--socket", self.socket]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.prefix, *command],
                cwd="/",
                env={
                    "PYTHONPATH": str(self.library),
                    "PATH": "/usr/bin:/bin",
                    "PYTHONDONTWRITEBYTECODE": "1",
                },
                stdin=subprocess.DEVNULL,
                stderr=log,
                stdout=log,
            )
        return self


def as_user(uid: int, *more: str) -> tuple[str, ...]:
    return ("setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", *more)


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Node]:
    monkeypatch.setattr(daemon_module, "HOST_ID", getattr(request, "param", HOST_ID))
    with Node() as made:
        yield made


async def serves(daemon: Daemon, node: Node, owner: int) -> None:
    """Ten actions, each with its outputs the host's; and one that is ended in time."""
    for number in range(10):
        cwd = node.action({"flags": f"--write=out/{number}\n", "src/A": "class A"})
        code, _ = await daemon.run(cwd, TOOL, "@flags")
        assert code == 0
        info = os.stat(cwd / "out" / str(number))
        assert (info.st_uid, info.st_mode & 0o7777) == (owner, 0o444)
        for path in [cwd, *cwd.rglob("*")]:
            assert path.lstat().st_uid == owner, path
            assert path.lstat().st_mode & 0o022 == 0, path
    frames = await daemon.ask(node.action({"flags": "--hang\n"}), TOOL, "@flags", timeout_ms=200)
    assert frames[-1][0] == FRAMES.FAILURE
    assert (await daemon.run(node.action({"flags": "a\n"}), TOOL, "@flags"))[0] == 0


@pytest.mark.parametrize("node", [0], indirect=True)
def test_nativelink_as_root(node: Node) -> None:
    with Daemon(node, node.document(echo_pool(node))) as daemon:
        run_async(serves(daemon, node, 0))


def test_nativelink_as_another_user_and_the_daemon_with_capabilities_only(node: Node, library: Path) -> None:
    os.chown(node.folder, DAEMON_ID, DAEMON_ID)
    caps = ",".join(f"+{name}" for name in CAPABILITIES.split(","))
    prefix = as_user(DAEMON_ID, f"--inh-caps={caps}", f"--ambient-caps={caps}", f"--bounding-set=-all,{caps}")
    document = node.document(echo_pool(node))
    document["state_dir"] = str(node.folder / "state")
    with UserDaemon(node, document, library, *prefix) as daemon:
        assert daemon.process is not None
        status = Path(f"/proc/{daemon.process.pid}/status").read_text()
        assert f"Uid:\t{DAEMON_ID}" in status
        run_async(serves(daemon, node, HOST_ID))


def test_all_the_same_user_who_is_trusted(node: Node, library: Path) -> None:
    """Nothing protects the inputs then: docs/nativelink.md says so. Outputs are sealed all the same."""
    os.chown(node.folder, HOST_ID, HOST_ID)
    document = node.document(echo_pool(node))
    del document["pools"][0]["isolation"]
    with UserDaemon(node, document, library, *as_user(HOST_ID)) as daemon:
        run_async(serves(daemon, node, HOST_ID))


def test_without_the_capabilities_a_daemon_says_what_is_missing(node: Node, library: Path) -> None:
    os.chown(node.folder, DAEMON_ID, DAEMON_ID)
    for lacking in CAPABILITIES.split(","):
        caps = ",".join(f"+{name}" for name in CAPABILITIES.split(",") if name != lacking)
        prefix = as_user(DAEMON_ID, f"--inh-caps={caps}", f"--ambient-caps={caps}")
        daemon = UserDaemon(node, node.document(echo_pool(node)), library, *prefix).start()
        assert daemon.process is not None
        assert daemon.process.wait(30) == 78
        assert f"lacks for that: CAP_{lacking.upper()}." in daemon.log.read_text()


def test_the_interpreter_of_these_tests_is_that_of_the_packages() -> None:
    version = subprocess.run(["/usr/bin/python3", "-V"], capture_output=True, text=True).stdout.split()[1]
    assert version.split(".")[:2] == [str(part) for part in sys.version_info[:2]]
