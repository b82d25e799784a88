"""Garbage collection inside a real JVM and a real Node.js, and nowhere near one that must not be asked."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from tests.support.loop import eventually, run_async
from wrapper.errors import RuntimeUnavailable
from wrapper.runtime import jvm_attach, node_gc
from wrapper.runtime.base import Language, WorkerSpec
from wrapper.runtime.local_process import LocalProcessRuntime, LocalWorker

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

NODE_SOURCE = """
let junk = [];
for (let i = 0; i < 200000; i++) junk.push({ i, s: 'x' + i });
process.stdin.on('data', (d) => { junk = null; process.stdout.write(d); });
"""


@pytest.fixture(scope="session")
def java_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("classes")
    if shutil.which("javac") is None:
        pytest.fail("these tests need a JDK: javac is not on PATH")
    (directory / "Echo.java").write_text(JAVA_SOURCE)
    subprocess.run(["javac", "-d", directory, directory / "Echo.java"], check=True)
    return directory


Body = Callable[[LocalWorker], Coroutine[Any, Any, None]]


def with_worker(tmp_path: Path, spec: WorkerSpec, body: Body) -> None:
    """Start the worker, wait for its first answer, run the test's body, stop the worker."""

    async def main() -> None:
        runtime = LocalProcessRuntime(tmp_base=str(tmp_path))
        worker = await runtime.start(spec)
        try:
            os.write(worker.stdin_fd, b"!")
            worker.first_request_sent()
            assert await read_some(worker) == b"!"
            worker.first_answer_seen()
            await body(worker)
        finally:
            await worker.stop(20)
            await runtime.close()

    run_async(main())


async def read_some(worker: LocalWorker) -> bytes:
    found = bytearray()

    def read() -> bool:
        try:
            found.extend(os.read(worker.stdout_fd, 65536))
        except BlockingIOError:
            return False
        return True

    await eventually(read)
    return bytes(found)


def java(java_classes: Path, *options: str) -> WorkerSpec:
    program = shutil.which("java") or "java"
    argv = (program, *options, "-XX:TieredStopAtLevel=1", "-cp", str(java_classes), "Echo")
    return WorkerSpec("java", argv, {}, str(java_classes), Language.JVM)


def test_a_jvm_collects_its_garbage_and_goes_on(tmp_path: Path, java_classes: Path) -> None:
    async def body(worker: LocalWorker) -> None:
        for _ in range(2):
            report = await worker.collect_garbage()
            assert report is not None
            assert report.before_bytes > 0
            assert report.after_bytes > 0
        histogram = await jvm_attach.jcmd(worker.pid, "GC.class_histogram")
        assert b"java.lang.String" in histogram
        with pytest.raises(RuntimeUnavailable, match="refused"):
            await jvm_attach.jcmd(worker.pid, "No.such.command")
        assert not worker.leftovers()
        os.write(worker.stdin_fd, b"?")
        assert await read_some(worker) == b"?"
        assert not any(name.startswith(".attach_pid") for name in os.listdir(worker.spec.cwd))

    with_worker(tmp_path, java(java_classes, "-XX:+UseG1GC"), body)


def test_a_jvm_behind_a_shell_is_found(tmp_path: Path, java_classes: Path) -> None:
    spec = java(java_classes)
    script = f"{' '.join(spec.argv)}; true"
    stub = WorkerSpec("stub", ("/bin/sh", "-c", script), {}, spec.cwd, Language.JVM)

    async def body(worker: LocalWorker) -> None:
        assert not worker.leftovers()
        assert await worker.collect_garbage() is not None
        assert not worker.leftovers()

    with_worker(tmp_path, stub, body)


@pytest.mark.parametrize("option", ["-Xrs", "-XX:+DisableAttachMechanism"])
def test_a_jvm_that_forbids_to_attach_is_never_signalled(
    tmp_path: Path, java_classes: Path, option: str
) -> None:
    async def body(worker: LocalWorker) -> None:
        # With -Xrs HotSpot opens its attach socket at start, so that no signal is needed.
        assert (await worker.collect_garbage() is None) == (option != "-Xrs")
        os.write(worker.stdin_fd, b"?")
        assert await read_some(worker) == b"?"  # alive, and no thread dump on its stdout
        assert not worker.exited.done()

    with_worker(tmp_path, java(java_classes, option), body)


def test_options_hidden_in_a_file_are_believed_to_forbid(tmp_path: Path, java_classes: Path) -> None:
    options = tmp_path / "options"
    options.write_text("-XX:+DisableAttachMechanism -XX:-UsePerfData")

    async def body(worker: LocalWorker) -> None:
        assert await worker.collect_garbage() is None
        os.write(worker.stdin_fd, b"?")
        assert await read_some(worker) == b"?"

    with_worker(tmp_path, java(java_classes, f"@{options}"), body)


def test_a_killed_jvm_leaves_nothing_in_tmp(tmp_path: Path, java_classes: Path) -> None:
    pids = []

    async def body(worker: LocalWorker) -> None:
        await worker.collect_garbage()
        pids.append(worker.pid)
        os.kill(worker.pid, 9)
        await asyncio.shield(worker.exited)

    with_worker(tmp_path, java(java_classes), body)
    left = [str(path) for path in Path("/tmp").glob(f"hsperfdata_*/{pids[0]}")]
    left += [str(path) for path in Path("/tmp").glob(f".*_pid{pids[0]}")]
    assert left == []


def test_a_process_that_is_no_jvm_has_no_garbage_to_collect(tmp_path: Path) -> None:
    async def body(worker: LocalWorker) -> None:
        assert await worker.collect_garbage() is None

    with_worker(tmp_path, WorkerSpec("cat", ("/bin/cat",), {}, "/", Language.JVM), body)


def node(tmp_path: Path, source: str = NODE_SOURCE, env: dict[str, str] | None = None) -> WorkerSpec:
    program = shutil.which("node")
    if program is None:
        pytest.fail("these tests need Node.js: node is not on PATH")
    script = tmp_path / "tool.js"
    script.write_text(source)
    return WorkerSpec("node", (program, str(script)), env or {}, str(tmp_path), Language.NODEJS)


def test_node_collects_its_garbage_and_goes_on(tmp_path: Path) -> None:
    async def body(worker: LocalWorker) -> None:
        for _ in range(2):
            assert await worker.collect_garbage() is not None
        assert not worker.leftovers()
        os.write(worker.stdin_fd, b"?")
        assert await read_some(worker) == b"?"

    with_worker(tmp_path, node(tmp_path), body)


def test_the_agent_keeps_no_node_alive(tmp_path: Path) -> None:
    async def main() -> None:
        runtime = LocalProcessRuntime(tmp_base=str(tmp_path))
        worker = await runtime.start(node(tmp_path, "setTimeout(() => {}, 1)"))
        assert (await asyncio.wait_for(asyncio.shield(worker.exited), 20)).returncode == 0
        assert worker.stderr_tail() == b""
        await worker.stop(0)
        await runtime.close()

    run_async(main())


def test_a_tool_that_took_the_agents_listener_away_is_not_signalled(tmp_path: Path) -> None:
    async def body(worker: LocalWorker) -> None:
        assert await worker.collect_garbage() is None
        assert not worker.exited.done()

    with_worker(tmp_path, node(tmp_path, "process.removeAllListeners();" + NODE_SOURCE), body)


def test_node_options_of_the_worker_are_kept(tmp_path: Path) -> None:
    source = "process.stdin.on('data', (d) => process.stdout.write(d)); console.error(globalThis.mine)"
    mine = tmp_path / "mine.js"
    mine.write_text("globalThis.mine = 'loaded'")

    async def body(worker: LocalWorker) -> None:
        assert b"loaded" in worker.stderr_tail()
        assert await worker.collect_garbage() is not None

    with_worker(tmp_path, node(tmp_path, source, {"NODE_OPTIONS": f"--require {mine}"}), body)


def test_a_node_behind_a_node_is_found_and_each_is_asked(tmp_path: Path) -> None:
    (tmp_path / "inner.js").write_text(NODE_SOURCE)
    source = "require('child_process').spawn(process.execPath, ['inner.js'], {stdio: 'inherit'})"

    async def body(worker: LocalWorker) -> None:
        assert await worker.collect_garbage() is not None
        assert not worker.leftovers()

    with_worker(tmp_path, node(tmp_path, source), body)


def test_lies_on_the_agents_pipe_harm_nobody(tmp_path: Path) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        listener = node_gc.NodeGc(str(tmp_path / "fifo"), loop)
        fd = os.open(tmp_path / "fifo", os.O_WRONLY)
        for text in (
            b"ready 1\n",
            b"ready x\ngc 1\n",
            b"\xff\n",
            b"gc 1 2 3\n",
            b"ready 999999999\n",
            b"x" * 60000,
        ):
            os.write(fd, text)
        os.write(fd, b"\n" + b"".join(b"ready %d\n" % os.getpid() for _ in range(100)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert await listener.collect([2, 3]) is False
        os.close(fd)
        listener.close()
        listener.close()

    run_async(main())
