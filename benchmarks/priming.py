#!/usr/bin/env python3
"""What priming gains: the first real request of a new JVM worker, against the same request when it is warm.

    .venv/bin/python benchmarks/priming.py [--runtime process|cri] [--requests 0,1,5,20,50] [--rounds N]
        [--jvm-flag=FLAG] [--json FILE]

The example's Java worker (C1, serial GC) compiles the example's own sources. Requests are recorded as
`nativelink_worker_wrapper record` does it, a worker is primed with so many of them, and then compiles a
source that is not among them; its steady state is the median of the last of many runs of that request.
With `--runtime cri` the workers are in containers of a private containerd: needs root, containerd and runc.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "examples" / "java-persistent-worker"), str(HERE.parent)]

import demo_input  # noqa: E402

from tests.support.engine import PrivateContainerd, why_no_engine  # noqa: E402
from tests.support.oci_image import (  # noqa: E402
    HOST_IMAGE,
    PAUSE_IMAGE,
    host_image,
    host_mounts,
    pause_image,
)
from wrapper.errors import WrapperError  # noqa: E402
from wrapper.events import Event, EventKind  # noqa: E402
from wrapper.pool.lease import Lease  # noqa: E402
from wrapper.pool.limits import PoolLimits  # noqa: E402
from wrapper.pool.pool import WorkerPool  # noqa: E402
from wrapper.pool.settings import ExecrootSettings, PoolSettings, WarmupRules  # noqa: E402
from wrapper.pool.worker_key import WorkerKey  # noqa: E402
from wrapper.record import Recorder  # noqa: E402
from wrapper.runtime.base import Language, Mount, Runtime  # noqa: E402
from wrapper.runtime.cri_container import CriRuntime, CriSettings  # noqa: E402
from wrapper.runtime.isolation import Isolation  # noqa: E402
from wrapper.runtime.local_process import LocalProcessRuntime  # noqa: E402
from wrapper.worker_protocol.messages import WorkRequest  # noqa: E402

JVM_FLAGS = ("-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC")
MAX_PRIMED = 50
WARM_RUNS = 150
STEADY_RUNS = 30
TARGET_RATIO = 1.3
UID = 1000
SEEN_AS = "/execroot"


class Tool:
    """The worker, its requests, and the record file of some of them."""

    def __init__(self, folder: Path, jvm_flags: tuple[str, ...] = ()) -> None:
        demo_input.CACHE.mkdir(parents=True, exist_ok=True)
        jdk = demo_input.find_jdk()
        self.jar = demo_input.worker_jar(jdk)
        self.argv = (jdk.java, *JVM_FLAGS, *jvm_flags, "-jar", str(self.jar), "--persistent_worker")
        made = demo_input.prepare("own", MAX_PRIMED + 1, jdk, lambda _text: None)
        self.inputs = made.folder
        self.folder = folder
        *self.recorded, self.measured = made.actions[: MAX_PRIMED + 1]

    def request(self, action: demo_input.Action) -> WorkRequest:
        return WorkRequest.of(arguments=[word.encode() for word in (*action.arguments, "-d", "out")])

    def record(self, count: int) -> str:
        """A record file with so many requests."""
        path = str(self.folder / f"{count}.rec")
        recorder = Recorder(
            path,
            tool="javac",
            trust_domain="",
            max_requests=count,
            max_bytes=1 << 30,
            cwd=str(self.inputs),
        )
        for action in self.recorded[:count]:
            recorder.accepted(self.request(action))
        recorder.ended()
        return path


class Processes:
    """Workers as plain processes, whose requests come with a sandbox in their host's execroot."""

    def __init__(self, tool: Tool, count: int) -> None:
        self._host = tool.folder / f"host-{count}"
        self._host.mkdir(exist_ok=True)
        self.execroot = ExecrootSettings()
        names = ("PATH", "HOME")
        environment = tuple(sorted((name, os.environ[name]) for name in names if name in os.environ))
        self.key = WorkerKey("p", tool.argv, str(self._host), env=environment, own_execroot=True)

    def runtime(self) -> Runtime:
        return LocalProcessRuntime()

    @contextlib.contextmanager
    def staged(self, lease: Lease, inputs: Path) -> Iterator[None]:
        """The inputs are where the worker works."""
        assert lease.execroot is not None
        sandbox = self._host / "__sandbox" / str(lease.lease_id)
        shutil.copytree(inputs, sandbox)
        try:
            staged = lease.execroot.stage_sandbox(os.fsencode(sandbox.relative_to(self._host)))
            yield
            staged.collect()
        finally:
            shutil.rmtree(sandbox)


class Containers:
    """Workers in containers, whose requests come with an action's directory each."""

    def __init__(self, tool: Tool, engine: PrivateContainerd) -> None:
        self._work = tool.folder / "work"
        self._work.mkdir(exist_ok=True)
        self._settings = CriSettings(
            pool="p",
            socket=engine.socket,
            image=HOST_IMAGE,
            isolation=Isolation(run_as_user=UID, run_as_group=UID),
            mounts=tuple(Mount(path, path) for path in (*host_mounts(), str(tool.jar))),
            state_dir=str(tool.folder / "state"),
        )
        self.execroot = ExecrootSettings(
            base=str(self._work / ".p"), seen_as=SEEN_AS, uid=UID, gid=UID, in_container=True
        )
        self.key = WorkerKey("p", tool.argv, SEEN_AS, own_execroot=True, for_actions=True)

    def runtime(self) -> Runtime:
        return CriRuntime(self._settings)

    @contextlib.contextmanager
    def staged(self, lease: Lease, inputs: Path) -> Iterator[None]:
        """The inputs are where the worker works."""
        assert lease.execroot is not None
        directory = self._work / str(lease.lease_id)
        shutil.copytree(inputs, directory)
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            staged = lease.execroot.stage_action(fd)
            yield
            staged.collect()
        finally:
            os.close(fd)
            shutil.rmtree(directory)


async def compile_once(pool: WorkerPool, where: Processes | Containers, tool: Tool) -> float:
    """Seconds of one real request, from sending to the answer."""
    lease = await pool.acquire(where.key)
    try:
        with where.staged(lease, tool.inputs):
            began = time.perf_counter()
            answer = await lease.execute(tool.request(tool.measured))
            took_s = time.perf_counter() - began
        if answer.pb.exit_code:
            raise SystemExit(answer.pb.output.decode())
    finally:
        lease.release()
    return took_s


async def measure(tool: Tool, count: int, engine: PrivateContainerd | None) -> dict[str, float]:
    """One worker, primed with so many requests: its first real request, its steady state, its warm-up."""
    rules = WarmupRules(requests=(tool.record(count),) if count else (), max_s=600.0)
    where = Processes(tool, count) if engine is None else Containers(tool, engine)
    limits = PoolLimits(max_jobs_per_worker=None)
    settings = PoolSettings("p", limits, Language.JVM, warmup_rules=rules, execroot=where.execroot)
    pool = WorkerPool({"p": settings}, {"p": where.runtime()})
    done: list[Event] = []
    pool.events.subscribe(lambda event: done.append(event) if event.kind is EventKind.WARMUP_DONE else None)
    try:
        first_s = await compile_once(pool, where, tool)
        warm = [await compile_once(pool, where, tool) for _ in range(WARM_RUNS)]
    finally:
        await pool.close()
    numbers = done[0].numbers if done else {}
    if numbers.get("primed_failed"):
        raise SystemExit(f"{numbers['primed_failed']:.0f} recorded requests failed")
    return {
        "first_s": first_s,
        "steady_s": statistics.median(warm[-STEADY_RUNS:]),
        "primed": numbers.get("primed", 0.0),
        "prime_s": numbers.get("prime_s", 0.0),
        "gc_s": numbers.get("gc_s", 0.0),
        "memory_bytes": numbers.get("memory_bytes", 0.0),
    }


@contextlib.contextmanager
def engine_for(runtime: str) -> Iterator[PrivateContainerd | None]:
    """A private containerd with the image that the workers run in; None for plain processes."""
    if runtime == "process":
        yield None
        return
    reason = why_no_engine()
    if reason is not None:
        raise SystemExit(f"priming: {reason}")
    engine = PrivateContainerd()
    try:
        engine.start()
        for make, name in ((pause_image, PAUSE_IMAGE), (host_image, HOST_IMAGE)):
            archive = engine.folder / "image.tar"
            make(archive)
            engine.import_image(archive, name)
        yield engine
    finally:
        engine.stop()


def main() -> int:
    parser = argparse.ArgumentParser(prog="priming", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--runtime", choices=("process", "cri"), default="process", help="what a worker is (default process)"
    )
    parser.add_argument(
        "--requests", default="0,1,5,20,50", metavar="LIST", help="recorded requests a worker"
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="workers for each number")
    parser.add_argument(
        "--jvm-flag", action="append", default=[], metavar="FLAG", help="one more, for every worker"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    given = parser.parse_args()
    counts = [int(text) for text in given.requests.split(",")]
    rounds: dict[int, list[dict[str, float]]] = {count: [] for count in counts}
    with tempfile.TemporaryDirectory() as folder, engine_for(given.runtime) as engine:
        try:
            tool = Tool(Path(folder), tuple(given.jvm_flag))
            for _ in range(given.rounds):
                for count in counts:
                    rounds[count].append(asyncio.run(measure(tool, count, engine)))
        except (WrapperError, demo_input.DemoError) as error:
            print(f"priming: {error}", file=sys.stderr)
            return 1
    print("primed   first ms   steady ms   ratio   priming s   gc ms   (medians)")
    rows = []
    for count in counts:
        median = {name: statistics.median(f[name] for f in rounds[count]) for name in rounds[count][0]}
        # Each worker against itself: whoever else uses the machine slows both.
        ratio = statistics.median(f["first_s"] / f["steady_s"] for f in rounds[count])
        rows.append({"requests": count, "ratio": ratio, **median})
        print(
            f"{median['primed']:6.0f} {median['first_s'] * 1000:10.1f} {median['steady_s'] * 1000:11.1f}"
            f" {ratio:7.2f} {median['prime_s']:11.2f} {median['gc_s'] * 1000:7.0f}"
        )
    print(f"wanted: a ratio of at most {TARGET_RATIO} with {MAX_PRIMED}")
    if given.json:
        given.json.write_text(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
