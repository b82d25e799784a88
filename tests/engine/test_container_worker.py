"""One worker in a container of a real engine: its garbage, its memory, commands beside it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.cri import cri_settings, engine_is_empty, leftovers_on_node
from tests.support.engine import PrivateContainerd
from tests.support.loop import run_async
from tests.support.scripted_runtime import ask
from wrapper.errors import RuntimeUnavailable
from wrapper.runtime.base import CommandSpec, Language, Mount, WorkerSpec
from wrapper.runtime.cri_container import CriRuntime
from wrapper.runtime.cri_worker import ContainerWorker

pytestmark = pytest.mark.engine

JAVA_SOURCE = """
public class Echo {
    public static void main(String[] arguments) throws Exception {
        byte[][] junk = new byte[32][];
        for (int i = 0; i < junk.length; i++) {
            junk[i] = new byte[1 << 20];
            java.util.Arrays.fill(junk[i], (byte) 1);
        }
        junk = null;
        int b;
        while ((b = System.in.read()) >= 0) { System.out.write(b); System.out.flush(); }
    }
}
"""
NODE_SOURCE = "process.stdin.on('data', (d) => process.stdout.write(d));"
CAT = WorkerSpec("cat", ("/usr/bin/cat",), {}, "/")

Body = Callable[[ContainerWorker], Coroutine[Any, Any, None]]


def with_worker(engine: PrivateContainerd, folder: Path, spec: WorkerSpec, body: Body) -> None:
    """Start the worker, wait for its first answer, run the test's body, stop it; nothing may be left."""

    async def main() -> None:
        runtime = CriRuntime(cri_settings(engine, folder))
        try:
            worker = await runtime.start(spec)
            try:
                assert await ask(worker) == b"hello"
                worker.first_answer_seen()
                await body(worker)
            finally:
                await worker.stop(0)
                assert worker.memory_bytes() == 0
        finally:
            await runtime.close()

    run_async(main())
    assert engine_is_empty(engine)
    assert leftovers_on_node(folder) == []


@pytest.fixture(scope="session")
def java_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("classes")
    directory.chmod(0o755)  # the worker is another user
    if shutil.which("javac") is None:
        pytest.fail("these tests need a JDK: javac is not on PATH")
    (directory / "Echo.java").write_text(JAVA_SOURCE)
    subprocess.run(["javac", "-d", directory, directory / "Echo.java"], check=True)
    return directory


def test_a_jvm_s_garbage_is_collected_from_outside_of_its_container(
    engine: PrivateContainerd, tmp_path: Path, java_classes: Path
) -> None:
    argv = ("java", "-XX:+UseSerialGC", "-Xms64m", "-Xmx64m", "-Xlog:gc:stderr", "-cp", "/classes", "Echo")
    spec = WorkerSpec("java", argv, {}, "/", Language.JVM, mounts=(Mount(str(java_classes), "/classes"),))

    async def body(worker: ContainerWorker) -> None:
        assert worker.has_garbage
        assert worker.memory_bytes() > 32 << 20
        for _ in range(2):
            report = await worker.collect_garbage()
            assert report is not None
            assert report.before_bytes > 0
            assert report.after_bytes > 0
        assert b"(Diagnostic Command)" in worker.stderr_tail() or b"Pause Full" in worker.stderr_tail()
        assert not worker.leftovers(), "what the collection needed is not the request's"
        assert await ask(worker, b"alive") == b"alive"

    with_worker(engine, tmp_path, spec, body)


def test_a_node_worker_s_garbage_is_collected_inside_of_its_container(
    engine: PrivateContainerd, tmp_path: Path
) -> None:
    spec = WorkerSpec("node", ("node", "-e", NODE_SOURCE), {}, "/", Language.NODEJS)

    async def body(worker: ContainerWorker) -> None:
        assert worker.has_garbage
        report = await worker.collect_garbage()
        assert report is not None
        assert report.before_bytes > 0
        assert not worker.leftovers()

    with_worker(engine, tmp_path, spec, body)


def test_a_custom_worker_has_no_garbage_without_a_command(engine: PrivateContainerd, tmp_path: Path) -> None:
    async def body(worker: ContainerWorker) -> None:
        assert not worker.has_garbage
        assert await worker.collect_garbage() is None
        assert worker.memory_bytes() > 0

    with_worker(engine, tmp_path, CAT, body)


def test_commands_run_in_the_container_and_know_the_worker_s_pid(
    engine: PrivateContainerd, tmp_path: Path
) -> None:
    async def body(worker: ContainerWorker) -> None:
        command = CommandSpec(("/usr/bin/cat", "/proc/{worker_pid}/cmdline"), 20)
        result = await worker.run(command)
        assert result.ok
        assert result.output.split(b"\0")[0] == b"/usr/bin/cat"
        assert (await worker.run(CommandSpec(("/usr/bin/sh", "-c", "exit 9"), 20))).returncode == 9
        missing = await worker.run(CommandSpec(("/nowhere/missing",), 20))
        assert missing.returncode == 127
        assert missing.output

    with_worker(engine, tmp_path, CAT, body)


def test_a_command_that_takes_too_long_is_ended_and_the_worker_goes_on(
    engine: PrivateContainerd, tmp_path: Path
) -> None:
    async def body(worker: ContainerWorker) -> None:
        result = await worker.run(CommandSpec(("/usr/bin/sleep", "1000"), 0.5))
        assert result.returncode is None
        assert await ask(worker, b"alive") == b"alive"

    with_worker(engine, tmp_path, CAT, body)


def test_a_gc_command_knows_the_worker_s_pid_and_its_failure_is_said(
    engine: PrivateContainerd, tmp_path: Path
) -> None:
    async def body(worker: ContainerWorker) -> None:
        assert worker.has_garbage
        with pytest.raises(RuntimeUnavailable, match=r"ended with exit code 3: pid [2-9]"):
            await worker.collect_garbage()

    command = CommandSpec(("/usr/bin/sh", "-c", "echo pid {worker_pid}; exit 3"), 20)
    with_worker(engine, tmp_path, replace(CAT, gc_command=command), body)


def test_a_dead_worker_runs_no_command_and_has_no_memory(engine: PrivateContainerd, tmp_path: Path) -> None:
    async def body(worker: ContainerWorker) -> None:
        worker._link.close_stdin()
        await worker.exited
        assert worker.memory_bytes() == 0
        with pytest.raises(RuntimeUnavailable, match="is dead"):
            await worker.run(CommandSpec(("/usr/bin/true",), 20))
        with pytest.raises(RuntimeUnavailable, match="is dead"):
            await worker.collect_garbage()

    with_worker(engine, tmp_path, CAT, body)
