"""WarmWorkerPoolManager with real processes: the echo worker, and the example's Java worker."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e.driver import REPOSITORY, request
from tests.support.loop import eventually, run_async
from wrapper import PoolCreateOptions, WarmWorkerPoolManager, WorkerOutcome, load_config
from wrapper.errors import WorkerDied, WorkerStartFailed
from wrapper.events import Event, EventKind

import demo_input  # isort: skip  # the driver has put the example on sys.path

ECHO = [sys.executable, "-I", "-S", str(REPOSITORY / "tests" / "workers" / "echo_worker.py")]
QUICK_JVM = ["-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-Xmx128m"]


class World:
    def __init__(self, manager: WarmWorkerPoolManager) -> None:
        self.manager = manager
        self.events: list[Event] = []
        manager.events.subscribe(self.events.append)

    def of(self, kind: EventKind) -> list[Event]:
        return [event for event in self.events if event.kind is kind]

    def pids(self) -> list[int]:
        return [int(event.detail.removeprefix("pid ")) for event in self.of(EventKind.WORKER_STARTED)]

    async def ask(self, *arguments: str, pool: str = "echo") -> tuple[int, str]:
        async with self.manager.lease(pool) as lease:
            pb = (await lease.execute(request(*arguments))).pb
        return pb.exit_code, pb.output.decode()

    async def until(self, **numbers: int) -> None:
        """Until the metrics have these values."""

        def reached() -> bool:
            metrics = self.manager.metrics()
            return all(getattr(metrics, name) == number for name, number in numbers.items())

        await eventually(reached)


@asynccontextmanager
async def world(folder: Path, *, log_dir: str | None = None, **fields: Any) -> AsyncIterator[World]:
    """A manager with one pool, from a file as a user would write it; at the end no process may be left."""
    pool = {"name": "echo", "language": "custom(python)", "worker_command": ECHO, "min_warm_workers": 0}
    path = folder / "pools.json5"
    path.write_text(json.dumps({"pools": [pool | fields]}))
    there = World(
        WarmWorkerPoolManager(PoolCreateOptions(load_config(path), cwd=str(folder), log_dir=log_dir))
    )
    try:
        async with there.manager:
            yield there
    finally:
        assert not [pid for pid in there.pids() if psutil.pid_exists(pid)]


# ---- the echo worker -------------------------------------------------------------------------------


def test_a_real_worker_serves_one_request_after_the_other(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path, check_health=True) as w:
            assert w.of(EventKind.HEALTH_CHECKED)
            for number in range(20):
                assert await w.ask(f"request {number}") == (0, f"echo:request {number}")
            assert await w.ask("--exit=3") == (3, "echo:--exit=3")
            await w.until(ready_workers=1, gets=22, cleans=22, prepares=2, recycled_workers=1)

    run_async(main())


def test_the_environment_of_a_worker_is_that_of_the_document_and_a_private_tmpdir(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_OF_THE_PROGRAM", "not for workers")

    async def main() -> None:
        async with world(tmp_path, env={"FLAVOUR": "plum"}) as w:
            assert (await w.ask("--print-env=FLAVOUR"))[1].endswith("\nplum")
            assert (await w.ask("--print-env=SECRET_OF_THE_PROGRAM"))[1].endswith("\n<unset>")
            tmpdir = (await w.ask("--print-env=TMPDIR"))[1].rpartition("\n")[2]
            assert os.path.isdir(tmpdir)
            assert (await w.ask("--print-cwd"))[1].endswith(f"\n{os.path.realpath(tmp_path)}")
        assert not os.path.exists(tmpdir)

    run_async(main())


def test_what_a_request_leaves_behind_is_gone_before_the_next_one(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            await w.ask("warm")
            for way in ("--leave-child", "--leave-daemon", "--leave-tmp=a/b"):
                await w.ask(way)
                await w.ask("next")
            assert len(w.of(EventKind.LEFTOVERS_REMOVED)) == 3
            assert sum(event.numbers["processes"] for event in w.of(EventKind.LEFTOVERS_REMOVED)) == 2
            assert len(w.pids()) == 1

    run_async(main())


def test_a_worker_killed_while_idle_is_replaced_before_anybody_notices(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path, min_warm_workers=1) as w:
            await w.until(ready_workers=1)
            os.kill(w.pids()[0], signal.SIGKILL)
            await w.until(ready_workers=1, recycled_workers=1)
            assert await w.ask("still there") == (0, "echo:still there")
            assert len(w.pids()) == 2

    run_async(main())


def test_a_worker_that_dies_with_a_request_tells_how_and_shows_its_stderr(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path, worker_command=[*ECHO, "--stderr", "about to give up"]) as w:
            with pytest.raises(WorkerDied, match="in the middle of a request: exit code 7") as died:
                await w.ask("--die=7")
            assert "about to give up" in died.value.report()
            assert await w.ask("again") == (0, "echo:again")

    run_async(main())


def test_a_missing_program_and_one_that_ends_at_once_are_told_apart(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path, worker_command=["no-such-program"]) as w:
            with pytest.raises(WorkerStartFailed, match="no program 'no-such-program'"):
                await w.manager.acquire("echo")
        async with world(tmp_path, worker_command=[*ECHO, "--exit-at-once", "5"]) as w:
            with pytest.raises(WorkerDied, match="exit code 5"):
                await w.ask("x")

    run_async(main())


def test_a_worker_serves_max_jobs_and_no_more(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path, lifecycle={"max_jobs_per_worker": 3}) as w:
            counts = [(await w.ask("--count"))[1].rpartition(":")[2] for _ in range(7)]
            assert counts == ["1", "2", "3", "1", "2", "3", "1"]
            await w.until(recycled_workers=2)

    run_async(main())


def test_a_failed_outcome_and_a_dropped_lease_end_the_process(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as w:
            lease = await w.manager.acquire("echo")
            lease.release(WorkerOutcome.FAILED)
            await w.until(recycled_workers=1)
            lease = await w.manager.acquire("echo")
            del lease
            await w.until(recycled_workers=2)
            assert not [pid for pid in w.pids() if psutil.pid_exists(pid)]

    run_async(main())


def test_a_script_that_was_changed_is_started_anew_and_one_that_was_only_linked_is_not(
    tmp_path: Path,
) -> None:
    async def main() -> None:
        script = tmp_path / "tool.py"
        script.write_bytes(Path(ECHO[-1]).read_bytes())
        async with world(tmp_path, worker_command=[*ECHO[:-1], "tool.py"]) as w:
            await w.ask("one")
            (tmp_path / "another-name").hardlink_to(script)  # changes its ctime
            await w.ask("two")
            assert len(w.pids()) == 1
            script.write_bytes(script.read_bytes() + b"\n# changed\n")
            await w.ask("three")
            assert len(w.pids()) == 2
            assert w.of(EventKind.WORKER_STOPPING)[0].detail == "tool changed"

    run_async(main())


def test_many_callers_each_get_their_own_answer(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path, max_workers=3, limits={"start_instead_after_ms": 50}) as w:
            answers = await asyncio.gather(*(w.ask(f"{n}", "--sleep-ms=5") for n in range(60)))
            assert [text for _, text in answers] == [f"echo:{n} --sleep-ms=5" for n in range(60)]
            assert 1 <= len(w.pids()) <= 3

    run_async(main())


def test_the_workers_stderr_goes_into_log_files_if_there_is_a_place_for_them(tmp_path: Path) -> None:
    async def main() -> None:
        logs = tmp_path / "logs"
        async with world(tmp_path, log_dir=str(logs)) as w:
            await w.ask("--stderr=heard you")
            await eventually(lambda: any("heard you" in path.read_text() for path in logs.iterdir()))

    run_async(main())


# ---- Java ------------------------------------------------------------------------------------------


def java_pool() -> dict[str, Any]:
    demo_input.CACHE.mkdir(parents=True, exist_ok=True)
    jdk = demo_input.find_jdk()
    command = [jdk.java, *QUICK_JVM, "-jar", str(demo_input.worker_jar(jdk)), "--persistent_worker"]
    return {"language": "jvm", "worker_command": command, "keys": ["java-*"]}


async def compile_one(w: World, folder: Path, number: int) -> None:
    name = f"C{number}"
    (folder / f"{name}.java").write_text(f"class {name} {{ int x = {number}; }}\n")
    assert await w.ask("-d", "out", f"{name}.java", pool="java-17") == (0, "")
    assert (folder / "out" / f"{name}.class").exists()


@pytest.mark.e2e
def test_a_java_pool_is_proven_kept_warm_collects_garbage_and_recycles(tmp_path: Path) -> None:
    async def main() -> None:
        lifecycle = {"max_jobs_per_worker": 12, "gc_job_frequency": 5}
        async with world(
            tmp_path, **java_pool(), check_health=True, min_warm_workers=1, max_workers=2, lifecycle=lifecycle
        ) as w:
            proven = w.manager.metrics()
            assert (proven.gets, proven.cleans, proven.recycled_workers) == (1, 1, 1)
            await w.until(ready_workers=1)  # the minimum is back after the proof
            for number in range(14):
                await compile_one(w, tmp_path, number)
            reasons = [event.detail for event in w.of(EventKind.WORKER_STOPPING)]
            assert reasons.count("max jobs") == 1
            await w.until(ready_workers=1, active_workers=0)
            collected = w.of(EventKind.GARBAGE_COLLECTED)
            assert len(collected) == 2  # after the 5th and the 10th job of the worker that served 12
            for event in collected:
                assert event.numbers["after_bytes"] > 10_000_000
                assert event.numbers["reclaimed_bytes"] >= 0
            assert not w.of(EventKind.GARBAGE_COLLECTION_FAILED)

    run_async(main())


@pytest.mark.e2e
def test_a_java_worker_above_its_memory_limit_is_replaced_after_a_collection(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path, **java_pool(), memory={"max_memory_mb": 10}) as w:
            await compile_one(w, tmp_path, 1)
            await w.until(recycled_workers=1)
            assert [event.detail for event in w.of(EventKind.WORKER_STOPPING)] == ["memory limit"]
            assert len(w.of(EventKind.GARBAGE_COLLECTED)) == 1
            await compile_one(w, tmp_path, 2)  # by another one

    run_async(main())
