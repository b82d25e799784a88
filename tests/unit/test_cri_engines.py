"""Where engines differ: the same runtime on a scripted CRI-O and a scripted containerd."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.fakes.scripted_engine import (
    CONTAINERD,
    CRI_O,
    IMAGE,
    IMAGE_ID,
    Container,
    Fault,
    ScriptedEngine,
)
from tests.support.cri import ISOLATION
from tests.support.loop import eventually, run_async
from tests.support.scripted_runtime import CAT, ask, needs_root, runtime_on
from wrapper.errors import RuntimeUnavailable, WorkerStartFailed
from wrapper.runtime.cgroups import groups_of
from wrapper.runtime.cri_engine import CriEngine
from wrapper.runtime.isolation import OWN_PROCESSES

pytestmark = needs_root

both = pytest.mark.parametrize("kind", [CRI_O, CONTAINERD])


@both
def test_a_worker_starts_serves_and_is_gone_on_either_engine(kind: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with ScriptedEngine(kind) as engine, runtime_on(engine, tmp_path) as runtime:
            worker = await runtime.start(CAT)
            assert await ask(worker) == b"hello"
            await worker.stop(0)
            assert engine.is_empty

    run_async(main())


@both
def test_the_container_group_is_found_whatever_the_engine_calls_it(kind: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with ScriptedEngine(kind) as engine, runtime_on(engine, tmp_path) as runtime:
            worker = await runtime.start(CAT)
            try:
                path = next(path for path in groups_of(worker.pid).values() if "/nlww-" in path)
                assert os.path.basename(path).startswith("crio-" if kind == CRI_O else "ctr-")
                assert worker.pid in worker._group.processes()
                assert worker.memory_bytes() > 0
            finally:
                await worker.stop(0)

    run_async(main())


@both
def test_a_container_is_killed_and_removed_before_its_pod_is_stopped(kind: str, tmp_path: Path) -> None:
    """Else CRI-O waits 59 s for a first process that ignores SIGTERM."""

    async def main() -> None:
        async with ScriptedEngine(kind) as engine, runtime_on(engine, tmp_path) as runtime:
            worker = await runtime.start(CAT)
            await worker.stop(0)
            wanted = ["StopContainer", "RemoveContainer", "StopPodSandbox", "RemovePodSandbox"]
            assert [name for name in engine.names() if name in wanted] == wanted
            assert engine.requests("StopContainer")[0].timeout == 0

    run_async(main())


def test_what_the_user_wrote_is_sent_along_with_the_id_of_the_image(tmp_path: Path) -> None:
    """CRI-O's signature policies look at it."""

    async def main() -> None:
        async with ScriptedEngine(CRI_O) as engine, runtime_on(engine, tmp_path) as runtime:
            worker = await runtime.start(CAT)
            await worker.stop(0)
            image = engine.requests("CreateContainer")[0].config.image
            assert (image.image, image.user_specified_image) == (IMAGE_ID, IMAGE)

    run_async(main())


def test_an_image_that_is_missing_is_pulled_once_for_all_who_wait(tmp_path: Path) -> None:
    async def main() -> None:
        async with ScriptedEngine(CRI_O) as engine, runtime_on(engine, tmp_path) as runtime:
            engine.images.clear()
            workers = await asyncio.gather(*(runtime.start(CAT) for _ in range(3)))
            for worker in workers:
                await worker.stop(0)
            assert engine.names().count("PullImage") == 1

    run_async(main())


def test_no_name_is_ever_asked_for_twice(tmp_path: Path) -> None:
    async def main() -> None:
        async with ScriptedEngine(CRI_O) as engine:
            for _ in range(2):
                async with runtime_on(engine, tmp_path) as runtime:
                    for _ in range(2):
                        await (await runtime.start(CAT)).stop(0)
            names = [request.config.metadata.name for request in engine.requests("RunPodSandbox")]
            uids = [request.config.metadata.uid for request in engine.requests("RunPodSandbox")]
            assert len(set(names)) == len(set(uids)) == len(names) == 4

    run_async(main())


@pytest.mark.parametrize(
    ("given", "call"), [("old_pod", "RunPodSandbox"), ("old_container", "CreateContainer")]
)
def test_what_somebody_else_has_made_is_refused_and_left_alone(given: str, call: str, tmp_path: Path) -> None:
    """For a name that it knows CRI-O answers with the old one's id, whatever was asked for."""

    async def main() -> None:
        async with ScriptedEngine(CRI_O) as engine:
            pod, container = engine.add_foreign()
            setattr(engine, given, pod.id if given == "old_pod" else container.id)
            async with runtime_on(engine, tmp_path) as runtime:
                with pytest.raises(RuntimeUnavailable, match=f"{call}.*somebody else has made"):
                    await runtime.start(CAT)
                assert engine.pods == {pod.id: pod}
                assert engine.containers == {container.id: container}
                assert not any(r.container_id == container.id for r in engine.requests("StopContainer"))

    run_async(main())


@both
def test_stopping_and_removing_what_is_gone_is_fine(kind: str) -> None:
    """containerd says NOT_FOUND, CRI-O OK."""

    async def main() -> None:
        async with ScriptedEngine(kind) as scripted:
            engine = CriEngine(scripted.socket)
            try:
                await engine.stop_container("unknown")
                await engine.remove_container("unknown")
                await engine.remove_pod("unknown")
            finally:
                await engine.close()

    run_async(main())


@both
def test_what_the_engine_lost_meanwhile_does_not_hinder_the_end(kind: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with ScriptedEngine(kind) as engine, runtime_on(engine, tmp_path) as runtime:
            worker = await runtime.start(CAT)
            container = next(iter(engine.containers.values()))
            engine._kill(container)
            engine.containers.clear()
            engine.pods.clear()
            await worker.stop(0)
            assert runtime.removal.pending == 0

    run_async(main())


def _by_runtime_config(engine: ScriptedEngine) -> None:
    engine.cgroup_driver = 0  # SYSTEMD


def _by_containerd_status(engine: ScriptedEngine) -> None:
    engine.cgroup_driver = None
    options = {"runtimes": {"runc": {"options": {"SystemdCgroup": True}}}}
    engine.info = {"config": json.dumps({"containerd": options, "systemdCgroup": False}, indent=1)}


def _by_cri_o_status(engine: ScriptedEngine) -> None:
    engine.cgroup_driver = None
    engine.info = {"config": json.dumps({"cgroup_manager": "systemd"})}


@pytest.mark.parametrize("told", [_by_runtime_config, _by_containerd_status, _by_cri_o_status])
def test_groups_under_systemd_are_named_as_slices_and_limited(
    told: Callable[[ScriptedEngine], None], tmp_path: Path
) -> None:
    async def main() -> None:
        async with ScriptedEngine(CRI_O) as engine:
            told(engine)
            async with runtime_on(engine, tmp_path) as runtime:
                worker = await runtime.start(CAT)
                try:
                    parent = engine.requests("RunPodSandbox")[0].config.linux.cgroup_parent
                    assert parent.endswith(".slice")
                    assert "/" not in parent
                    assert worker._group.pids_limit() == (ISOLATION.pids_limit or 0) + OWN_PROCESSES
                finally:
                    await worker.stop(0)

    run_async(main())


def test_an_engine_that_does_not_know_runtime_config_gets_paths(tmp_path: Path) -> None:
    async def main() -> None:
        async with ScriptedEngine() as engine:
            engine.cgroup_driver = None
            engine.info = {"config": json.dumps({"systemdCgroup": False})}
            async with runtime_on(engine, tmp_path) as runtime:
                worker = await runtime.start(CAT)
                await worker.stop(0)
                assert engine.requests("RunPodSandbox")[0].config.linux.cgroup_parent.startswith("/nlww-")

    run_async(main())


def test_an_engine_that_tells_no_pid_can_run_workers(tmp_path: Path) -> None:
    """What Status tells beside the standard fields is its own affair."""

    async def main() -> None:
        async with ScriptedEngine() as engine, runtime_on(engine, tmp_path) as runtime:
            engine.tells_pid = False
            worker = await runtime.start(CAT)
            assert await ask(worker) == b"hello"
            await worker.stop(0)

    run_async(main())


def test_an_old_engine_is_told_apart_from_a_broken_one() -> None:
    async def main() -> None:
        async with ScriptedEngine() as scripted:
            scripted.script("Version", Fault(code=grpc.StatusCode.UNIMPLEMENTED, details="unknown service"))
            engine = CriEngine(scripted.socket)
            try:
                with pytest.raises(RuntimeUnavailable, match=r"Version.*runtime\.v1 is needed"):
                    await engine.version()
                assert str(await engine.version()) == "containerd 1.2.3 (CRI v1)"
            finally:
                await engine.close()

    run_async(main())


def test_what_an_engine_does_not_enforce_is_found_out_and_undone(tmp_path: Path) -> None:
    """The scripted engine has no system call filter."""

    async def main() -> None:
        async with ScriptedEngine() as engine, runtime_on(engine, tmp_path, isolation=ISOLATION) as runtime:
            with pytest.raises(RuntimeUnavailable, match=r"isolation\.seccomp"):
                await runtime.start(CAT)
            assert engine.is_empty

    run_async(main())


@pytest.mark.parametrize(
    "limits", [{}, {"pids_limit": None}, {"memory_limit_bytes": None, "tmp_limit_bytes": None}]
)
def test_a_limit_that_is_switched_off_is_not_asked_for(limits: dict[str, Any], tmp_path: Path) -> None:
    async def main() -> None:
        isolation = replace(ISOLATION, seccomp=False, **limits)
        async with ScriptedEngine() as engine, runtime_on(engine, tmp_path, isolation=isolation) as runtime:
            worker = await runtime.start(CAT)
            try:
                asked = engine.requests("CreateContainer")[0].config.linux.resources.memory_limit_in_bytes
                assert asked == (isolation.memory_limit_bytes or 0)
                expected = isolation.pids_limit and isolation.pids_limit + OWN_PROCESSES
                assert worker._group.pids_limit() == expected
                assert os.path.ismount(worker._tmpdir.path) == (isolation.tmp_limit_bytes is not None)
            finally:
                await worker.stop(0)

    run_async(main())


def test_a_program_that_ends_at_once_is_a_failed_start_with_its_last_words(tmp_path: Path) -> None:
    async def main() -> None:
        spec = replace(CAT, argv=("/usr/bin/sh", "-c", "echo gone >&2; exit 3"))
        async with ScriptedEngine() as engine, runtime_on(engine, tmp_path) as runtime:
            status = Fault(waits_for=(slow := asyncio.Event()))  # it is looked at when it has ended
            engine.script("ContainerStatus", status)
            start = asyncio.create_task(runtime.start(spec))
            await eventually(lambda: engine.containers and ended(next(iter(engine.containers.values()))))
            slow.set()
            with pytest.raises(WorkerStartFailed, match=r"it ended at once \(exit code 3\)") as failed:
                await start
            assert b"gone" in failed.value.stderr_tail
            assert engine.is_empty

    run_async(main())


def ended(container: Container) -> bool:
    return container.process is not None and container.process.poll() is not None


def test_a_first_process_that_dies_before_it_reports_ends_the_wait(tmp_path: Path) -> None:
    async def main() -> None:
        spec = replace(CAT, cwd="/nowhere")  # the fake's set-up of the container fails
        async with ScriptedEngine() as engine, runtime_on(engine, tmp_path) as runtime:
            with pytest.raises(WorkerStartFailed, match="first process ended before it reported"):
                await runtime.start(spec)
            assert engine.is_empty

    run_async(main())
