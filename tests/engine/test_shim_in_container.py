"""The shim where it belongs: process 1 of a hardened container that an engine has started."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.engine import PrivateContainerd
from tests.support.loop import eventually, run_async
from tests.support.oci_image import HOST_IMAGE, WORKER_UID, host_mounts
from tests.support.raw_cri import RawCri
from tests.support.shim_host import ShimHost
from wrapper.runtime.native import shim_path

pytestmark = pytest.mark.engine

WORKER = """
import os
if os.fork() == 0:
    os.setsid()
    os.execv("/usr/bin/sleep", ["sleep", "1000"])
with open("/dev/stderr", "wb") as again:
    again.write(b"%8d%8d" % (os.getpid(), os.getppid()))
while chunk := os.read(0, 1 << 16):
    while chunk:
        chunk = chunk[os.write(1, chunk):]
os._exit(5)
"""
EXITED = 2


@pytest.fixture
def cri(engine: PrivateContainerd) -> Iterator[RawCri]:
    with RawCri(engine.socket) as cri:
        yield cri


@pytest.fixture
def host() -> Iterator[ShimHost]:
    with ShimHost(shim_path()) as host:
        host.worker_uid = WORKER_UID
        yield host


@pytest.fixture
def container(cri: RawCri, host: ShimHost, request: pytest.FixtureRequest) -> Iterator[str]:
    """A container whose worker runs, with a straggler beside it."""
    pod = cri.run_pod(request.node.name)
    try:
        container = cri.start(
            pod,
            HOST_IMAGE,
            ["/nlww/shim", "/nlww/io/socket", "/usr/bin/python3", "-c", WORKER],
            mounts=host_mounts(),
            mounts_at={"/nlww/shim": shim_path(), "/nlww/io": str(host.folder)},
            hardened=True,
        )
        host.connected()
        host.started()
        yield container
    finally:
        cri.remove_pod(pod[0])


def namespace_pid(pid: int) -> int:
    """The process's pid in its container."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(dict(line.split(":\t", 1) for line in status.splitlines())["NSpid"].split()[-1])


def test_the_host_talks_to_the_worker_and_knows_it_by_its_own_pids(host: ShimHost, container: str) -> None:
    frame = os.urandom(1 << 20)
    assert host.exchange(frame) == frame
    inside = [namespace_pid(pid) for pid in (host.worker_pid, host.shim_pid)]
    assert list(map(int, host.read_stderr(16).split())) == inside
    assert inside[1] == 1


def test_the_worker_cannot_look_into_the_shim(cri: RawCri, host: ShimHost, container: str) -> None:
    worker = namespace_pid(host.worker_pid)
    assert host.read_stderr(16), "it has started, and has the files of its start open no more"
    assert cri.execute(container, ["sh", "-c", f"ls /proc/{worker}/fd"]) == (0, "0\n1\n2\n")
    code, output = cri.execute(container, ["sh", "-c", "ls /proc/1/fd"])
    assert (code != 0, "Permission denied" in output) == (True, True), output


def test_the_end_of_the_worker_is_told_at_once_and_is_the_containers(
    cri: RawCri, host: ShimHost, container: str
) -> None:
    host.close(host.stdin_fd)
    assert host.worker_end() == 5
    assert host.read_until_end() == b""  # the straggler, which held it too, is dead
    run_async(eventually(lambda: cri.status(container)[3] == [EXITED]))
    assert cri.status(container)[7] == [5]


def test_the_engines_own_stop_reaches_the_worker(cri: RawCri, host: ShimHost, container: str) -> None:
    cri.call("RuntimeService/StopContainer", [(1, container), (2, 20)])
    assert host.worker_end() == -signal.SIGTERM
    assert cri.status(container)[7] == [128 + signal.SIGTERM]
