"""Plain processes as another user than ours: who they are, and that all of it works for them."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.action_world import WORKER_ID, needs_root
from tests.support.loop import run_async
from tests.unit.test_garbage_collection import JAVA_SOURCE, NODE_SOURCE, read_some
from wrapper.runtime.base import CommandSpec, Language, User, WorkerSpec
from wrapper.runtime.local_process import LocalProcessRuntime, LocalWorker

pytestmark = needs_root

USER = User(WORKER_ID, WORKER_ID)
CAT = "import sys\nfor line in sys.stdin.buffer: sys.stdout.buffer.write(line); sys.stdout.flush()"


@pytest.fixture
def folder() -> Iterator[Path]:
    """One that other users may enter."""
    path = Path(tempfile.mkdtemp(prefix="nlww-test-"))
    path.chmod(0o711)
    yield path
    shutil.rmtree(path)


def worker_of(
    folder: Path, argv: tuple[str, ...], language: Language, *, user: User | None = USER
) -> WorkerSpec:
    return WorkerSpec("w", argv, {"PATH": os.environ["PATH"]}, str(folder), language, user=user)


async def answering(folder: Path, spec: WorkerSpec) -> tuple[LocalProcessRuntime, LocalWorker]:
    runtime = LocalProcessRuntime(tmp_base=str(folder))
    worker = await runtime.start(spec)
    os.write(worker.stdin_fd, b"!\n")
    worker.first_request_sent()
    assert (await asyncio.wait_for(read_some(worker), 20)).startswith(b"!")
    worker.first_answer_seen()
    return runtime, worker


def status_of(pid: int) -> dict[str, list[str]]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.split() for name, _, value in (line.partition(":") for line in lines)}


def test_it_is_that_user_without_other_groups_and_its_temporary_folder_is_its_own(folder: Path) -> None:
    async def main() -> None:
        python = shutil.which("python3", path="/usr/bin:/bin:/usr/local/bin") or sys.executable
        spec = worker_of(folder, (python, "-I", "-S", "-c", CAT), Language.CUSTOM)
        runtime, worker = await answering(folder, spec)
        try:
            status = status_of(worker.pid)
            assert status["Uid"] == status["Gid"] == [str(WORKER_ID)] * 4
            assert status["Groups"] == []
            assert status["CapEff"] == ["0000000000000000"]
            assert os.stat(worker.tmpdir).st_uid == WORKER_ID
            done = await worker.run(CommandSpec(("/bin/sh", "-c", 'id -u; id -G; touch "$TMPDIR/x"'), 20))
            assert done.ok, done
            assert done.output.split() == [b"1000", b"1000"]
            assert (await worker.remove_leftovers()).files == ("x",)
            with pytest.raises(PermissionError):
                _as_somebody_else(worker.tmpdir)
        finally:
            await worker.stop(5)
            await runtime.close()
        assert list(folder.iterdir()) == []

    run_async(main())


def _as_somebody_else(path: str) -> None:
    os.seteuid(WORKER_ID + 1)
    try:
        os.listdir(path)
    finally:
        os.seteuid(0)


def test_garbage_is_collected_in_a_jvm_of_another_user(folder: Path) -> None:
    (folder / "Echo.java").write_text(JAVA_SOURCE)
    subprocess.run(["javac", "-d", folder, folder / "Echo.java"], check=True)

    async def main() -> None:
        spec = worker_of(folder, (shutil.which("java") or "java", "-cp", str(folder), "Echo"), Language.JVM)
        runtime, worker = await answering(folder, spec)
        try:
            report = await worker.collect_garbage()
            assert report is not None
            assert report.after_bytes > 0
        finally:
            await worker.stop(20)
            await runtime.close()
        assert sorted(path.name for path in folder.iterdir()) == ["Echo.class", "Echo.java"]

    run_async(main())


def test_garbage_is_collected_in_a_node_of_another_user(folder: Path) -> None:
    async def main() -> None:
        spec = worker_of(folder, (shutil.which("node") or "node", "-e", NODE_SOURCE), Language.NODEJS)
        runtime, worker = await answering(folder, spec)
        try:
            assert await worker.collect_garbage() is not None
        finally:
            await worker.stop(20)
            await runtime.close()
        assert list(folder.iterdir()) == []

    run_async(main())
