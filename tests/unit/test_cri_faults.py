"""An engine that errs, is late or silent, goes away and comes back: nothing is left, nothing hangs."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from tests.fakes.scripted_engine import (
    CRI_O,
    ERROR,
    HANG,
    HANG_AFTERWARDS,
    LOST_ANSWER,
    Fault,
    ScriptedEngine,
)
from tests.support.cri import leftovers_on_node
from tests.support.loop import eventually, run_async
from tests.support.scripted_runtime import CAT, SHORT, ask, failure_of, needs_root, runtime_on, settings
from wrapper.errors import RuntimeUnavailable
from wrapper.runtime.cri_container import CriRuntime

pytestmark = needs_root

FAULTS = {"error": ERROR, "lost": LOST_ANSWER, "hang": HANG, "hang-afterwards": HANG_AFTERWARDS}
START_CALLS = ["ImageStatus", "RunPodSandbox", "CreateContainer", "StartContainer", "ContainerStatus"]
REMOVAL_CALLS = [
    "ListPodSandbox",
    "ListContainers",
    "StopContainer",
    "RemoveContainer",
    "StopPodSandbox",
    "RemovePodSandbox",
]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("call", START_CALLS)
def test_a_start_that_fails_at_a_call_leaves_nothing_and_says_where(
    call: str, fault: str, tmp_path: Path
) -> None:
    async def main() -> None:
        async with ScriptedEngine(CRI_O) as engine, runtime_on(engine, tmp_path, deadlines=SHORT) as runtime:
            await runtime.prepare()
            engine.script(call, FAULTS[fault])
            error = await failure_of(runtime.start(CAT))
            assert isinstance(error, RuntimeUnavailable)
            assert error.message.startswith(f"cri-o 1.2.3 at {engine.socket}: {call} (")
            said = {"error": "no space left", "lost": "connection reset"}.get(
                fault, "did not answer in 0.7 s"
            )
            assert said in error.message
            await eventually(lambda: engine.is_empty and runtime.removal.pending == 0)
            assert leftovers_of_workers(tmp_path) == []
            worker = await runtime.start(CAT)
            assert await ask(worker) == b"hello"
            await worker.stop(0)

    run_async(main())


def leftovers_of_workers(folder: Path) -> list[str]:
    """All but the folder of the process itself and the group of all its workers: they stay while it runs."""
    found = [one for one in leftovers_on_node(folder) if one.startswith("mount")]
    found += [str(path) for path in (folder / "state").glob("generation-*/*")]
    for group in leftovers_on_node(folder):
        path = group.removeprefix("group ")
        if path != group:
            found += [f"{path}/{name}" for name in os.listdir(path) if os.path.isdir(f"{path}/{name}")]
    return found


@pytest.mark.parametrize("does", [False, True], ids=["not-done", "done"])
@pytest.mark.parametrize("call", START_CALLS)
def test_a_start_that_is_cancelled_in_the_middle_of_a_call_leaves_nothing(
    call: str, does: bool, tmp_path: Path
) -> None:
    async def main() -> None:
        async with ScriptedEngine() as engine, runtime_on(engine, tmp_path, deadlines=SHORT) as runtime:
            await runtime.prepare()
            engine.script(call, HANG_AFTERWARDS if does else HANG)
            start = asyncio.create_task(runtime.start(CAT))
            await eventually(lambda: call in engine.names())
            start.cancel()
            with pytest.raises(asyncio.CancelledError):
                await start
            await eventually(lambda: not runtime._unwanted and runtime.removal.pending == 0)
            assert engine.is_empty
            assert leftovers_of_workers(tmp_path) == []

    run_async(main())


@pytest.mark.parametrize("call", START_CALLS)
def test_a_start_that_is_cancelled_and_then_succeeds_is_stopped(call: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with ScriptedEngine() as engine, runtime_on(engine, tmp_path) as runtime:
            await runtime.prepare()
            goes_on = asyncio.Event()
            engine.script(call, Fault(waits_for=goes_on))
            start = asyncio.create_task(runtime.start(CAT))
            await eventually(lambda: call in engine.names())
            start.cancel()
            await asyncio.sleep(0)
            goes_on.set()
            with pytest.raises(asyncio.CancelledError):
                await start
            assert engine.is_empty
            assert "StartContainer" in engine.names()

    run_async(main())


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("call", REMOVAL_CALLS)
def test_a_removal_is_tried_again_until_the_engine_has_done_it(call: str, fault: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with ScriptedEngine() as engine, runtime_on(engine, tmp_path, deadlines=SHORT) as runtime:
            worker = await runtime.start(CAT)
            engine.script(call, FAULTS[fault], FAULTS[fault])
            await worker.stop(0)
            assert worker.exited.done()
            await eventually(lambda: runtime.removal.pending == 0)
            assert engine.is_empty
            assert leftovers_of_workers(tmp_path) == []

    run_async(main())


def test_a_pod_that_the_engine_makes_after_all_is_removed_at_the_end(tmp_path: Path) -> None:
    async def main() -> None:
        async with ScriptedEngine() as engine:
            async with runtime_on(engine, tmp_path, deadlines=SHORT) as runtime:
                late = asyncio.Event()
                engine.script("RunPodSandbox", Fault(late=late))
                assert isinstance(await failure_of(runtime.start(CAT)), RuntimeUnavailable)
                assert runtime.removal.pending == 0
                late.set()
                await eventually(lambda: engine.pods)
            assert engine.is_empty

    run_async(main())


def test_a_running_worker_serves_and_ends_while_the_engine_is_away(tmp_path: Path) -> None:
    async def main() -> None:
        async with ScriptedEngine() as engine:
            patience = replace(SHORT, removal_s=0.3)
            async with runtime_on(engine, tmp_path, deadlines=patience) as runtime:
                first, second = await runtime.start(CAT), await runtime.start(CAT)
                await engine.go_away()
                assert await ask(first, b"still there") == b"still there"
                assert first.memory_bytes() > 0
                with pytest.raises(RuntimeUnavailable, match="there is no socket"):
                    await runtime.start(CAT)
                await first.stop(0)
                assert first.exited.done()
                assert runtime.removal.pending > 0
                await engine.come_back()
                assert await ask(second) == b"hello"
                await eventually(lambda: runtime.removal.pending == 0)
                assert len(engine.containers) == 1
                third = await runtime.start(CAT)
                await second.stop(0)
                await third.stop(0)
            assert engine.is_empty

    run_async(main())


def test_closing_while_the_engine_is_away_ends_and_the_next_process_removes(tmp_path: Path) -> None:
    async def main() -> None:
        async with ScriptedEngine() as engine:
            runtime = CriRuntime(settings(engine, tmp_path, deadlines=replace(SHORT, removal_s=0.2)))
            worker = await runtime.start(CAT)
            await engine.go_away()
            await worker.stop(0)
            await runtime.close()
            await engine.come_back()
            assert not engine.is_empty
            async with runtime_on(engine, tmp_path) as successor:
                await successor.prepare()
                assert engine.is_empty

    run_async(main())


def test_closing_while_the_engine_hangs_ends(tmp_path: Path) -> None:
    async def main() -> None:
        async with ScriptedEngine() as engine:
            runtime = CriRuntime(
                settings(engine, tmp_path, deadlines=replace(SHORT, call_s=1e6, removal_s=0.2))
            )
            engine.script("Version", HANG)
            start = asyncio.create_task(runtime.start(CAT))
            await eventually(lambda: "Version" in engine.names())
            start.cancel()
            await asyncio.wait([start])
            await runtime.close()
            with pytest.raises(RuntimeUnavailable, match="is closed"):
                await runtime.start(CAT)

    run_async(main())


@pytest.mark.parametrize("call", ["Version", "ListPodSandbox", "RuntimeConfig"])
def test_a_preparation_that_failed_is_tried_again(call: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with ScriptedEngine() as engine, runtime_on(engine, tmp_path) as runtime:
            engine.script(call, ERROR)
            with pytest.raises(RuntimeUnavailable, match=f"{call}: answered INTERNAL: no space left"):
                await runtime.start(CAT)
            worker = await runtime.start(CAT)
            await worker.stop(0)

    run_async(main())


def test_a_preparation_whose_caller_has_gone_may_fail_and_is_tried_again(tmp_path: Path) -> None:
    async def main() -> None:
        async with ScriptedEngine() as engine, runtime_on(engine, tmp_path) as runtime:
            fails = asyncio.Event()
            engine.script("Version", replace(ERROR, waits_for=fails))
            start = asyncio.create_task(runtime.start(CAT))
            await eventually(lambda: "Version" in engine.names())
            start.cancel()
            await asyncio.wait([start])
            fails.set()
            await eventually(lambda: runtime._preparing is None or runtime._preparing.done())
            worker = await runtime.start(CAT)
            await worker.stop(0)

    run_async(main())


def test_a_failed_pull_is_every_waiting_start_s_error_and_tried_again(tmp_path: Path) -> None:
    async def main() -> None:
        async with ScriptedEngine() as engine, runtime_on(engine, tmp_path) as runtime:
            await runtime.prepare()
            engine.images.clear()
            denied = Fault(code=grpc.StatusCode.UNKNOWN, details="401 unauthorized")
            engine.script("PullImage", denied)
            errors = await asyncio.gather(*(failure_of(runtime.start(CAT)) for _ in range(2)))
            assert all("PullImage" in str(error) and "401 unauthorized" in str(error) for error in errors)
            worker = await runtime.start(CAT)
            await worker.stop(0)

    run_async(main())
