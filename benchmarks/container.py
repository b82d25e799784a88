#!/usr/bin/env python3
"""What a container costs over a plain process: the same echo worker in both, alternately, in one run.

    sudo .venv/bin/python benchmarks/container.py [--json FILE] [--requests N] [--starts N]

Starts a private containerd, so it needs root, containerd and runc. Prints, for plain processes and containers
side by side: from Acquire to the answer of an idle worker; the same with an action's directory staged and
collected; a cold start, beside the engine's own three calls; and 8 containers started one after the other and
together. The worker is C (`echo_worker.c`): what is measured is not its own time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from overhead import build_echo_worker, percentile  # noqa: E402

from tests.support.engine import PrivateContainerd, why_no_engine  # noqa: E402
from tests.support.oci_image import (  # noqa: E402
    HOST_IMAGE,
    PAUSE_IMAGE,
    host_image,
    host_mounts,
    pause_image,
)
from wrapper.action_runner import run_action  # noqa: E402
from wrapper.pool.limits import PoolLimits  # noqa: E402
from wrapper.pool.pool import WorkerPool  # noqa: E402
from wrapper.pool.settings import ExecrootSettings, PoolSettings  # noqa: E402
from wrapper.pool.worker_key import WorkerKey  # noqa: E402
from wrapper.runtime import cri_runtime_pb2 as cri  # noqa: E402
from wrapper.runtime.base import Mount, Runtime, WorkerSpec  # noqa: E402
from wrapper.runtime.cri_container import CriRuntime, CriSettings  # noqa: E402
from wrapper.runtime.isolation import Isolation  # noqa: E402
from wrapper.runtime.local_process import LocalProcessRuntime  # noqa: E402
from wrapper.worker_protocol.messages import WorkRequest  # noqa: E402

UID = 1000
SEEN_AS = "/execroot"
TOOLS = "/opt/tools"
TOGETHER = 8
KINDS = ("process", "container")


class Bench:
    """The two pools, their engine and their folders."""

    def __init__(self, folder: Path, engine: PrivateContainerd) -> None:
        self.folder = folder
        self.engine = engine
        tools = folder / "tools"
        tools.mkdir()
        shutil.copy(build_echo_worker(), tools / "echo_worker")
        self.tool = str(tools / "echo_worker")
        self.work = folder / "work"
        self.work.mkdir()
        self.settings = CriSettings(
            pool="container",
            socket=engine.socket,
            image=HOST_IMAGE,
            isolation=Isolation(run_as_user=UID, run_as_group=UID),
            mounts=(Mount(str(tools), TOOLS), *(Mount(path, path) for path in host_mounts())),
            state_dir=str(folder / "state"),
        )

    def pool(self) -> WorkerPool:
        limits = PoolLimits(max_jobs_per_worker=None, gc_job_frequency=None)
        settings, runtimes = {}, {}
        for kind in KINDS:
            contained = kind == "container"
            execroot = ExecrootSettings(
                base=str(self.work / f".{kind}"),
                seen_as=SEEN_AS if contained else "",
                uid=UID if contained else None,
                gid=UID if contained else None,
                in_container=contained,
            )
            settings[kind] = PoolSettings(name=kind, limits=limits, execroot=execroot)
            runtime: Runtime = CriRuntime(self.settings) if contained else LocalProcessRuntime()
            runtimes[kind] = runtime
        return WorkerPool(settings, runtimes)

    def key(self, kind: str) -> WorkerKey:
        program = f"{TOOLS}/echo_worker" if kind == "container" else self.tool
        return WorkerKey(kind, (program, "--persistent_worker"), SEEN_AS, own_execroot=True, for_actions=True)

    def action(self, files: int) -> str:
        """An action's directory with so many inputs: read-only hard links, five top-level entries."""
        blob = self.folder / "blob"
        if not blob.exists():
            blob.write_bytes(b"x" * 1000)
            blob.chmod(0o444)
        directory = Path(tempfile.mkdtemp(dir=self.work))
        folders = 100 if files > 100 else 5
        for number in range(files):
            folder = directory / f"top{number % 5}" / f"d{number % folders}"
            folder.mkdir(parents=True, exist_ok=True)
            os.link(blob, folder / f"input{number}")
        return str(directory)


async def latencies(bench: Bench, pool: WorkerPool, count: int, files: int | None) -> dict[str, list[int]]:
    """Nanoseconds from Acquire to the answer, for each kind, in alternating blocks."""
    request = WorkRequest.of(arguments=[b"a" * 1000])
    directories = {kind: None if files is None else bench.action(files) for kind in KINDS}
    found: dict[str, list[int]] = {kind: [] for kind in KINDS}
    for _ in range(10):
        for kind in KINDS:
            directory, key = directories[kind], bench.key(kind)
            fd = None if directory is None else os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
            for number in range(count // 10 + 5):
                began = time.perf_counter_ns()
                await run_action(pool, key, request, directory_fd=fd)
                if number >= 5:  # the first ones of a block find cold caches
                    found[kind].append(time.perf_counter_ns() - began)
            if fd is not None:
                os.close(fd)
    return found


async def cold_starts(bench: Bench, starts: int) -> dict[str, float]:
    """Milliseconds: the engine's own three calls for a bare container, and our whole start."""
    runtime = CriRuntime(bench.settings)
    calls, whole = [], []
    try:
        await runtime.prepare()
        image = await runtime.engine.ensure_image(HOST_IMAGE)
        for number in range(starts):
            calls.append(await _three_calls(bench, runtime, image, number))
            execroot = bench.folder / f"execroot-{number}"
            execroot.mkdir()
            began = time.perf_counter()
            worker = await runtime.start(_spec(execroot))
            whole.append(1000 * (time.perf_counter() - began))
            await worker.stop(0)
    finally:
        await runtime.close()
    engine, ours = statistics.median(calls), statistics.median(whole)
    return {"engine_ms": engine, "start_ms": ours, "added_ms": ours - engine}


def _spec(execroot: Path) -> WorkerSpec:
    argv = (f"{TOOLS}/echo_worker", "--persistent_worker")
    return WorkerSpec("echo", argv, {}, SEEN_AS, mounts=(Mount(str(execroot), SEEN_AS, read_only=False),))


async def _three_calls(bench: Bench, runtime: CriRuntime, image: str, number: int) -> float:
    """RunPodSandbox, CreateContainer, StartContainer, with the isolation that a worker gets."""
    name = f"bare-{number}"
    isolation = bench.settings.isolation
    pod = cri.PodSandboxConfig(
        metadata=cri.PodSandboxMetadata(name=name, uid=name, namespace="bench"),
        linux=cri.LinuxPodSandboxConfig(security_context=isolation.of_pod()),
    )
    container = cri.ContainerConfig(
        metadata=cri.ContainerMetadata(name="bare"),
        image=cri.ImageSpec(image=image),
        command=[f"{TOOLS}/echo_worker", "--persistent_worker"],
        mounts=[
            cri.Mount(container_path=mount.path, host_path=mount.host_path, readonly=True)
            for mount in bench.settings.mounts
        ],
        linux=isolation.of_container(),
    )
    began = time.perf_counter()
    pod_id = await runtime.engine.run_pod(pod)
    container_id = await runtime.engine.create_container(pod_id, container, pod)
    await runtime.engine.start_container(container_id)
    took_ms = 1000 * (time.perf_counter() - began)
    await runtime.engine.stop_container(container_id)
    await runtime.engine.remove_container(container_id)
    await runtime.engine.remove_pod(pod_id)
    return took_ms


async def together(bench: Bench) -> dict[str, float]:
    """Milliseconds until 8 containers are ready: one after the other, and all at once."""
    runtime = CriRuntime(bench.settings)
    took: dict[str, list[float]] = {"one_by_one": [], "together": []}
    try:
        await runtime.prepare()
        execroot = bench.folder / "execroot-shared"
        execroot.mkdir()
        for _ in range(3):
            began = time.perf_counter()
            workers = [await runtime.start(_spec(execroot)) for _ in range(TOGETHER)]
            took["one_by_one"].append(1000 * (time.perf_counter() - began))
            await asyncio.gather(*(worker.stop(0) for worker in workers))
            began = time.perf_counter()
            workers = await asyncio.gather(*(runtime.start(_spec(execroot)) for _ in range(TOGETHER)))
            took["together"].append(1000 * (time.perf_counter() - began))
            await asyncio.gather(*(worker.stop(0) for worker in workers))
    finally:
        await runtime.close()
    medians = {f"{name}_ms": statistics.median(times) for name, times in took.items()}
    return {**medians, "ratio": medians["together_ms"] / medians["one_by_one_ms"]}


async def measure(bench: Bench, requests: int, starts: int) -> dict[str, object]:
    pool = bench.pool()
    rows = []
    try:
        for title, files in (("no files", None), ("10 files", 10), ("1,001 files", 1001)):
            print(f"{title} …", file=sys.stderr, flush=True)
            found = await latencies(bench, pool, requests if files is None else requests // 4, files)
            p50 = {kind: percentile(found[kind], 50) for kind in KINDS}
            p99 = {kind: percentile(found[kind], 99) for kind in KINDS}
            rows.append(
                {
                    "what": title,
                    "process_p50_us": p50["process"],
                    "container_p50_us": p50["container"],
                    "added_p50_us": p50["container"] - p50["process"],
                    "added_p99_us": p99["container"] - p99["process"],
                }
            )
    finally:
        await pool.close()
    print("cold starts …", file=sys.stderr, flush=True)
    cold = await cold_starts(bench, starts)
    print(f"{TOGETHER} at once …", file=sys.stderr, flush=True)
    return {"requests": rows, "cold_start": cold, "together": await together(bench)}


def table(result: dict[str, object]) -> str:
    lines = [f"{'Acquire to answer':28} {'process p50':>12} {'container p50':>14} {'+p50':>8} {'+p99 us':>8}"]
    rows = result["requests"]
    assert isinstance(rows, list)
    lines += [
        f"{row['what']:28} {row['process_p50_us']:12.0f} {row['container_p50_us']:14.0f} "
        f"{row['added_p50_us']:+9.0f} {row['added_p99_us']:+9.0f}"
        for row in rows
    ]
    cold, many = result["cold_start"], result["together"]
    assert isinstance(cold, dict)
    assert isinstance(many, dict)
    lines += [
        "",
        (
            f"cold start: the engine's three calls {cold['engine_ms']:.0f} ms, a worker in all "
            f"{cold['start_ms']:.0f} ms: {cold['added_ms']:+.0f} ms"
        ),
        (
            f"{TOGETHER} containers: one after the other {many['one_by_one_ms']:.0f} ms, together "
            f"{many['together_ms']:.0f} ms: {100 * many['ratio']:.0f} %"
        ),
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--starts", type=int, default=10)
    given = parser.parse_args(arguments)
    reason = why_no_engine()
    if reason is not None:
        print(f"container.py: {reason}", file=sys.stderr)
        return 69
    engine = PrivateContainerd()
    with tempfile.TemporaryDirectory(prefix="nlww-bench-") as name:
        folder = Path(name)
        try:
            engine.start()
            for make, image in ((pause_image, PAUSE_IMAGE), (host_image, HOST_IMAGE)):
                make(folder / "image.tar")
                engine.import_image(folder / "image.tar", image)
            result = asyncio.run(measure(Bench(folder, engine), given.requests, given.starts))
        finally:
            engine.stop()
    print(table(result))
    if given.json:
        Path(given.json).write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
