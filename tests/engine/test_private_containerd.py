"""The engine that tests share, and one of a test's own: what it can, and that it is gone without a trace."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from tests.support.engine import PrivateContainerd
from tests.support.loop import eventually, run_async
from tests.support.oci_image import HOST_IMAGE, PAUSE_IMAGE, host_mounts, pause_image, tree_image
from tests.support.raw_cri import Message, RawCri

pytestmark = pytest.mark.engine

SLEEP = ["/usr/bin/sleep", "1000"]
MEMORY_BYTES = 64 << 20
EXITED = 2
"""A state of a container, in the CRI's numbers."""


@pytest.fixture
def cri(engine: PrivateContainerd) -> Iterator[RawCri]:
    with RawCri(engine.socket) as cri:
        yield cri


@pytest.fixture
def pod(cri: RawCri, request: pytest.FixtureRequest) -> Iterator[tuple[str, Message]]:
    pod = cri.run_pod(request.node.name)
    yield pod
    cri.remove_pod(pod[0])


def test_the_engine_answers_and_has_the_images(cri: RawCri) -> None:
    name, version = cri.version()
    assert (name, version.split(".")[0]) == ("containerd", "1")
    assert [cri.has_image(image) for image in (HOST_IMAGE, PAUSE_IMAGE, "localhost/nlww/other:1")] == [
        True,
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["java", "-version"], "OpenJDK"),
        (["javac", "-version"], "javac"),
        (["node", "-p", "6*7"], "42"),
        (["/usr/bin/python3", "-c", "import ssl, zlib; print(6*7)"], "42"),
        (["sh", "-c", "id -un"], "worker"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_the_hosts_programs_run_over_the_image_of_the_host(
    cri: RawCri, pod: tuple[str, Message], command: list[str], said: str
) -> None:
    container = cri.start(pod, HOST_IMAGE, SLEEP, mounts=host_mounts())
    code, output = cri.execute(container, command)
    assert (code, said in output) == (0, True), output
    code, output = cri.execute(container, ["sh", "-c", "echo > /usr/written"])
    assert (code != 0, "Read-only" in output) == (True, True), output


def test_loopback_is_the_only_interface_and_it_works(cri: RawCri, pod: tuple[str, Message]) -> None:
    container = cri.start(pod, HOST_IMAGE, SLEEP, mounts=host_mounts())
    code = """
import os, socket
listener = socket.create_server(("127.0.0.1", 0))
socket.create_connection(listener.getsockname()).sendall(b"x")
assert listener.accept()[0].recv(1) == b"x"
print(*os.listdir("/sys/class/net"))
try:
    socket.create_connection(("192.0.2.1", 80), timeout=5)
except OSError as error:
    print(error.strerror)
"""
    exit_code, output = cri.execute(container, ["/usr/bin/python3", "-c", code])
    assert (exit_code, output) == (0, "lo\nNetwork is unreachable\n")


def test_a_memory_limit_is_enforced(cri: RawCri, pod: tuple[str, Message]) -> None:
    container = cri.start(pod, HOST_IMAGE, SLEEP, mounts=host_mounts(), memory_bytes=MEMORY_BYTES)
    code, output = cri.execute(
        container, ["/usr/bin/python3", "-c", f"print(len(bytearray({MEMORY_BYTES // 2})))"]
    )
    assert (code, output) == (0, f"{MEMORY_BYTES // 2}\n")
    code, output = cri.execute(
        container, ["/usr/bin/python3", "-c", f"bytearray(range(256)) * {MEMORY_BYTES // 128}"]
    )
    assert (code, output) == (128 + signal.SIGKILL, "")


def test_a_limit_of_processes_on_the_pods_cgroup_is_enforced(cri: RawCri) -> None:
    parent = f"/nlww-test-{os.getpid()}"
    hierarchy = Path("/sys/fs/cgroup/pids")
    if not hierarchy.exists():  # one hierarchy for all, since cgroup v2
        hierarchy = Path("/sys/fs/cgroup")
    group = hierarchy / parent[1:]
    group.mkdir()
    try:
        (group / "pids.max").write_text("30")
        pod = cri.run_pod("pids", cgroup_parent=parent)
        try:
            container = cri.start(pod, HOST_IMAGE, SLEEP, mounts=host_mounts())
            code = """
import os, time
children = 0
try:
    while children < 100:
        if os.fork() == 0:
            time.sleep(1000)
        children += 1
except BlockingIOError:
    print(10 < children < 30, flush=True)
os.kill(0, 9)
"""
            exit_code, output = cri.execute(container, ["/usr/bin/python3", "-c", code])
            assert (exit_code, output) == (128 + signal.SIGKILL, "True\n")
        finally:
            cri.remove_pod(pod[0])
    finally:
        for controller in Path("/sys/fs/cgroup").glob(f"*{parent}"):
            controller.rmdir()


@pytest.mark.parametrize("how", ["terminate", "kill"])
def test_containers_outlive_the_engine_and_the_next_one_knows_them(
    engine: PrivateContainerd, cri: RawCri, pod: tuple[str, Message], how: str
) -> None:
    container = cri.start(pod, HOST_IMAGE, ["/usr/bin/sleep", "1000"], mounts=host_mounts())
    cri.execute(container, ["sh", "-c", "echo here > /tmp/mark"])
    before = engine.pid
    getattr(engine, how)()
    with pytest.raises(grpc.RpcError):
        cri.version()
    engine.start()
    assert engine.pid != before
    with RawCri(engine.socket) as again:
        assert pod[0] in again.pods()
        assert again.execute(container, ["cat", "/tmp/mark"]) == (0, "here\n")


def test_an_image_is_made_of_any_folder(
    engine: PrivateContainerd, cri: RawCri, pod: tuple[str, Message], tmp_path: Path
) -> None:
    tree = tmp_path / "tree"
    (tree / "bin").mkdir(parents=True)
    source = "int main(int argc, char **argv) { return argc == 2 && argv[1][0] == 'x' ? 7 : 8; }"
    argv = ["cc", "-static", "-x", "c", "-", "-o", str(tree / "bin" / "tool")]
    subprocess.run(argv, input=source, text=True, check=True)
    tree_image(
        tmp_path / "image.tar",
        "localhost/nlww/made:1",
        tree,
        entrypoint=["tool", "x"],
        environment={"PATH": "/bin"},
    )
    engine.import_image(tmp_path / "image.tar", "localhost/nlww/made:1")
    container = cri.start(pod, "localhost/nlww/made:1", [])
    run_async(eventually(lambda: cri.status(container)[3] == [EXITED]))
    assert cri.status(container)[7] == [7]


def test_nothing_is_left_of_an_engine_that_is_stopped_with_its_pods_running(tmp_path: Path) -> None:
    own = PrivateContainerd()
    try:
        pause_image(tmp_path / "pause.tar")
        own.start()
        own.import_image(tmp_path / "pause.tar", PAUSE_IMAGE)
        with RawCri(own.socket) as cri:
            pods = [cri.run_pod(name)[0] for name in ("one", "two")]
        assert len(own.leftovers()) > 4
    finally:
        own.stop()
    own.stop()
    assert own.leftovers() == []
    for place in ("/sys/fs/cgroup", "/run/containerd", "/var/lib/cni"):
        names = [name for _, folders, files in os.walk(place) for name in (*folders, *files)]
        assert not [name for name in names if any(pod in name for pod in pods)]


def test_an_engine_that_cannot_start_shows_its_log() -> None:
    own = PrivateContainerd()
    try:
        (own.folder / "config.toml").write_text("this is no configuration\n")
        with pytest.raises(RuntimeError, match=r"containerd has ended with 1\n.*toml"):
            own.start()
    finally:
        own.stop()
    assert own.leftovers() == []
