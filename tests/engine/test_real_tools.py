"""Real tools in warm containers, on actions' directories as NativeLink makes them: Java, Node.js."""

from __future__ import annotations

import json
import os
import shutil
import stat
import zipfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest

from tests.e2e.driver import (
    QUICK_JVM,
    REPOSITORY,
    fetched,
    java_builder_command,
    java_builder_request,
    request,
)
from tests.support.cri import WORKERS, container_pool, engine_is_empty, leftovers_on_node
from tests.support.engine import PrivateContainerd
from tests.support.loop import eventually, run_async
from wrapper import PoolCreateOptions, WarmWorkerPoolManager, WorkRequest, load_config
from wrapper.errors import WorkerStartFailed
from wrapper.events import Event, EventKind

import demo_input  # isort: skip  # the driver has put the example and tools/ on sys.path
from fetch_java_tools import java_builder  # isort: skip
from fetch_npm_workers import npm_workers  # isort: skip

pytestmark = pytest.mark.engine

COMPILES = 50
REQUESTS = 20
GC_EVERY = 5


class Pool:
    """One pool of containers, the directories of its actions, and what has happened."""

    def __init__(self, folder: Path, manager: WarmWorkerPoolManager) -> None:
        self.folder = folder
        self.manager = manager
        self.events: list[Event] = []
        self._actions = 0
        manager.events.subscribe(self.events.append)

    def of(self, kind: EventKind) -> list[Event]:
        return [event for event in self.events if event.kind is kind]

    def action(self, files: Mapping[str, str]) -> Path:
        """An action's directory: its inputs are read-only hard links to blobs, `out` is there already."""
        self._actions += 1
        directory = self.folder / "work" / f"action{self._actions}"
        (directory / "out").mkdir(parents=True)
        for name, text in files.items():
            blob = self.folder / "cas" / f"{self._actions}-{name.replace('/', '-')}"
            blob.parent.mkdir(exist_ok=True)
            blob.write_text(text)
            blob.chmod(0o444)
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(blob, directory / name)
        return directory

    async def run(self, ask: WorkRequest, files: Mapping[str, str]) -> tuple[Path, str]:
        """Run a request that must succeed; its directory and output. The inputs must be as they were."""
        directory = self.action(files)
        inodes = {name: (directory / name).stat().st_ino for name in files}
        response = (await self.manager.run("pool", ask, directory=str(directory))).pb
        output = response.output.decode()
        assert response.exit_code == 0, output
        for name, text in files.items():
            info = (directory / name).stat()
            assert (info.st_ino, stat.S_IMODE(info.st_mode)) == (inodes[name], 0o444)
            assert (directory / name).read_text() == text
        return directory, output

    def assert_one_worker_served_all(self) -> None:
        assert len(self.of(EventKind.WORKER_STARTED)) == 1
        assert self.manager.metrics().recycled_workers == 0
        assert not self.of(EventKind.CLEANING_FAILED)
        assert not self.of(EventKind.STRAY_OUTPUT)

    async def garbage_was_collected(self, times: int) -> None:
        """The last time may still be under way: it is after the answer."""
        await eventually(lambda: len(self.of(EventKind.GARBAGE_COLLECTED)) >= times)
        assert not self.of(EventKind.GARBAGE_COLLECTION_FAILED)
        for event in self.of(EventKind.GARBAGE_COLLECTED):
            assert event.numbers["after_bytes"] > 0


MakePool = Callable[..., AbstractAsyncContextManager[Pool]]


@pytest.fixture
def pool_of(engine: PrivateContainerd, tmp_path: Path) -> Iterator[MakePool]:
    """Makes one pool; afterwards nothing of it may be left in the engine or on the node."""

    @asynccontextmanager
    async def make(
        command: list[str], *, see: Mapping[str | Path, str] | None = None, **changes: object
    ) -> AsyncIterator[Pool]:
        document = container_pool(
            engine, tmp_path, worker_command=[*command, "--persistent_worker"], max_workers=1, **changes
        )
        mounts = document["pools"][0]["isolation"]["mounts"]
        mounts += [{"host_path": str(path), "path": place} for path, place in (see or {}).items()]
        file = tmp_path / "pools.json5"
        file.write_text(json.dumps(document))
        async with WarmWorkerPoolManager(PoolCreateOptions(load_config(file))) as manager:
            yield Pool(tmp_path, manager)

    yield make
    assert engine_is_empty(engine)
    assert leftovers_on_node(tmp_path) == []


def programs(name: str) -> str:
    path = shutil.which(name)
    assert path is not None, f"{name} is missing"
    return path


def numbered(number: int) -> str:
    return f'public class C{number} {{ public static String text() {{ return "is-{number}-"; }} }}\n'


def test_the_examples_java_worker_compiles_action_after_action_and_its_garbage_is_collected(
    pool_of: MakePool,
) -> None:
    demo_input.CACHE.mkdir(parents=True, exist_ok=True)
    jar = demo_input.worker_jar(demo_input.find_jdk())
    # What it writes is there, with its pid, until the next cleaning: so it ran after the last request.
    cleanup = "echo {worker_pid} $(cat /proc/{worker_pid}/comm) > /tmp/cleaned"

    async def main() -> None:
        async with pool_of(
            [programs("java"), *QUICK_JVM, "-jar", "/opt/java-worker.jar"],
            see={jar: "/opt/java-worker.jar"},
            language="jvm",
            lifecycle={"gc_job_frequency": GC_EVERY},
            warmup={"post_job_cleanup": [{"argv": ["/bin/sh", "-c", cleanup]}]},
        ) as pool:
            for number in range(REQUESTS):
                source = f"src/C{number}.java"
                directory, output = await pool.run(request("-d", "out", source), {source: numbered(number)})
                assert output == ""
                assert b"is-%d-" % number in (directory / "out" / f"C{number}.class").read_bytes()
                assert len(list((directory / "out").iterdir())) == 1
            await pool.garbage_was_collected(REQUESTS // GC_EVERY)
            async with pool.manager.lease("pool") as lease:
                process = lease._connection.process
                left = Path(f"/proc/{process.pid}/root", "tmp", "cleaned").read_text().split()
                assert left[1] == "java"
                inner = Path(f"/proc/{process.pid}/status").read_text().partition("NSpid:")[2].splitlines()[0]
                assert left[0] == inner.split()[-1]
            pool.assert_one_worker_served_all()

    run_async(main())


def test_javabuilder_compiles_fifty_actions_in_a_row_each_its_own_jar(pool_of: MakePool) -> None:
    jar = fetched(java_builder)

    async def main() -> None:
        async with pool_of(
            java_builder_command(programs("java"), "/opt/java_tools/JavaBuilder_deploy.jar"),
            see={jar.parent: "/opt/java_tools"},
            language="jvm",
            lifecycle={"gc_job_frequency": 25},
        ) as pool:
            for number in range(COMPILES):
                source, output = f"src/C{number}.java", f"out/libc{number}.jar"
                directory, _ = await pool.run(
                    java_builder_request(source, output, f"//numbers:c{number}"), {source: numbered(number)}
                )
                with zipfile.ZipFile(directory / output) as made:
                    classes = [name for name in made.namelist() if name.endswith(".class")]
                    assert classes == [f"C{number}.class"]
                    assert b"is-%d-" % number in made.read(classes[0])
            await pool.garbage_was_collected(COMPILES // 25)
            pool.assert_one_worker_served_all()

    run_async(main(), timeout_s=300)


def test_rollup_bundles_each_actions_own_modules_under_the_same_paths(pool_of: MakePool) -> None:
    """Same paths, other content: a module that a worker kept from the action before would be seen."""
    modules = fetched(npm_workers) / "node_modules"

    async def main() -> None:
        async with pool_of(
            [programs("node"), "--expose-gc", "/opt/npm/node_modules/@bazel/rollup/index.js"],
            see={modules: "/opt/npm/node_modules"},
            language="nodejs",
            lifecycle={"gc_job_frequency": GC_EVERY},
        ) as pool:
            for number in range(REQUESTS):
                directory, _ = await pool.run(
                    request("--format", "cjs", "--output.file", "out/bundle.js", "main.js"),
                    {
                        "part.js": f"export const part = 'part of {number}';\n",
                        "main.js": "import { part } from './part.js';\nconsole.log(part);\n",
                    },
                )
                text = (directory / "out" / "bundle.js").read_text()
                assert f"'part of {number}'" in text
                assert "import" not in text
            await pool.garbage_was_collected(REQUESTS // GC_EVERY)
            pool.assert_one_worker_served_all()

    run_async(main())


def test_a_worker_on_the_bazel_worker_library_answers_each_action_with_its_own_log(
    pool_of: MakePool, tmp_path: Path
) -> None:
    modules = fetched(npm_workers) / "node_modules"
    tool = tmp_path / "shout"
    tool.mkdir()
    shutil.copy(REPOSITORY / "tests" / "npm" / "shout_worker.js", tool)
    (tool / "node_modules").symlink_to("/opt/npm/node_modules")

    async def main() -> None:
        async with pool_of(
            [programs("node"), "--expose-gc", "/opt/shout/shout_worker.js"],
            see={modules: "/opt/npm/node_modules", tool: "/opt/shout"},
            language="nodejs",
            lifecycle={"gc_job_frequency": GC_EVERY},
        ) as pool:
            for number in range(REQUESTS):
                quiet, loud = f"quiet{number}.txt", f"out/loud{number}.txt"
                directory, output = await pool.run(request(quiet, loud), {quiet: f"text número {number}\n"})
                assert output.strip() == f"shouted {quiet}"
                assert (directory / loud).read_text() == f"TEXT NÚMERO {number}\n"
            await pool.garbage_was_collected(REQUESTS // GC_EVERY)
            pool.assert_one_worker_served_all()

    run_async(main())


ECHO = ["/usr/bin/python3", "-I", "-S", f"{WORKERS}/echo_worker.py"]


def sh(script: str, timeout_s: float = 30) -> dict[str, object]:
    return {"argv": ["/bin/sh", "-c", script], "timeout_s": timeout_s}


def test_warm_up_commands_run_in_the_container_before_the_verification_that_needs_them(
    pool_of: MakePool,
) -> None:
    async def main() -> None:
        warmup = {
            "commands": [sh("mkdir /tmp/warm"), sh("echo of worker {worker_pid} > /tmp/warm/file")],
            "verification": [sh("grep 'of worker [0-9]' /tmp/warm/file && kill -0 {worker_pid}")],
        }
        async with pool_of(ECHO, warmup=warmup) as pool:
            for number in range(3):  # what the warm-up has made is the worker's own, and stays
                await pool.run(request(f"--write=out/{number}"), {"input.txt": "text"})
            (done,) = pool.of(EventKind.WARMUP_DONE)
            assert {"preload_s", "verify_s", "total_s"} <= set(done.numbers)
            assert not pool.of(EventKind.LEFTOVERS_REMOVED)
            pool.assert_one_worker_served_all()

    run_async(main())


@pytest.mark.parametrize(
    ("warmup", "how"),
    [
        ({"commands": [sh("echo no compiler here; exit 3")]}, "exit code 3"),
        ({"verification": [sh("echo no compiler here >&2; exit 4")]}, "exit code 4"),
        ({"verification": [sh("echo no compiler here; sleep 1000", 0.5)]}, "timed out"),
        ({"verification": [{"argv": ["/no compiler here"]}]}, "exit code 127"),
    ],
    ids=["command", "verification", "time-out", "no-program"],
)
def test_a_warm_up_that_fails_stops_the_container_says_why_and_makes_the_pool_unhealthy(
    pool_of: MakePool, warmup: dict[str, object], how: str
) -> None:
    async def main() -> None:
        warmup_with_limit = {**warmup, "unhealthy_after": 2}
        async with pool_of(ECHO, warmup=warmup_with_limit, min_warm_workers=1) as pool:
            with pytest.raises(WorkerStartFailed) as failed:
                await pool.run(request("x"), {"input.txt": "text"})
            assert how in failed.value.report()
            assert "no compiler here" in failed.value.report()
            # The minimum goes on trying, less and less often.
            await eventually(lambda: pool.of(EventKind.POOL_UNHEALTHY))
            assert not pool.manager.is_healthy("pool")
            assert how in pool.of(EventKind.POOL_UNHEALTHY)[0].detail
            assert "2 starts in a row" in pool.of(EventKind.POOL_UNHEALTHY)[0].detail
            assert len(pool.of(EventKind.WORKER_STOPPED)) >= 1
            assert not pool.of(EventKind.WORKER_READY)

    run_async(main())


def test_a_cleanup_that_fails_ends_the_worker_and_not_the_request(pool_of: MakePool) -> None:
    async def main() -> None:
        warmup = {"post_job_cleanup": [sh("echo cannot tidy {worker_pid}; exit 5")]}
        async with pool_of(ECHO, warmup=warmup) as pool:
            await pool.run(request("one"), {"input.txt": "text"})
            await eventually(lambda: pool.of(EventKind.WORKER_STOPPED))
            failed = pool.of(EventKind.CLEANING_FAILED)
            assert "exit code 5: cannot tidy" in failed[-1].detail
            assert "{worker_pid}" not in failed[-1].detail.partition("exit code")[2]
            await pool.run(request("two"), {"input.txt": "text"})
            assert len(pool.of(EventKind.WORKER_STARTED)) == 2

    run_async(main())
