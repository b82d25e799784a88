#!/usr/bin/env python3
"""What each JVM or Node.js option does to a worker: first answer, first hundred, steady state, memory.

    .venv/bin/python benchmarks/worker_options.py [java | typescript] [--only WORD] [--rounds N] [--json FILE]

The example's Java worker compiles the example's own sources, as in a container of 2 GiB; the TypeScript
worker of docker/ what its warm-up compiles. Each option is measured right after a worker without options, and
compared with that one. All but the first column is processor time, compiler and collector included: it hardly
depends on who else uses the machine, and on a busy node it is what counts. `docker/README.md` has figures.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

HERE = Path(__file__).resolve().parent
DOCKER = HERE.parent / "docker"
sys.path.insert(0, str(HERE.parent / "examples" / "java-persistent-worker"))

import demo_input  # noqa: E402
import worker_host  # noqa: E402

from wrapper.errors import WrapperError  # noqa: E402
from wrapper.worker_protocol.messages import WorkRequest  # noqa: E402
from wrapper.worker_protocol.wire_format import WireFormat  # noqa: E402

CONTROL = "nothing (how far chance goes)"
C1, SERIAL = "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC"
ARCHIVE = "-XX:SharedArchiveFile={archive}"
OLD_SPACE, SEMI_SPACE = "--max-old-space-size=4096", "--max-semi-space-size=128"
JAVA_SET = (
    "-XX:+TieredCompilation",
    C1,
    "-XX:+UseG1GC",
    "-XX:MaxGCPauseMillis=200",
    "-XX:+UseStringDeduplication",
    "-XX:+AlwaysPreTouch",
    "-XX:InitiatingHeapOccupancyPercent=45",
    "-XX:MaxRAMPercentage=75.0",
)
JAVA: dict[str, tuple[str, ...]] = {
    CONTROL: (),
    **{option: (option,) for option in JAVA_SET},
    "these eight together": JAVA_SET,
    SERIAL: (SERIAL,),
    "the archive (AppCDS)": (ARCHIVE,),
    "C1, serial collector": (C1, SERIAL),
    "C1, serial collector, archive": (C1, SERIAL, ARCHIVE),
}
TYPESCRIPT: dict[str, tuple[str, ...]] = {
    CONTROL: (),
    "--expose-gc": ("--expose-gc",),
    OLD_SPACE: (OLD_SPACE,),
    SEMI_SPACE: (SEMI_SPACE,),
    "--max-semi-space-size=32": ("--max-semi-space-size=32",),
    "these together (128)": ("--expose-gc", OLD_SPACE, SEMI_SPACE),
}
EARLY_REQUESTS = 100
STEADY_REQUESTS = 50


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one worker."""

    first_s: float
    """From its start to its first answer, by the clock."""
    early_cpu_s: float
    """Processor time of the first hundred requests, the start included."""
    steady_cpu_s: float
    """Processor time of one of the last requests."""
    resident_mib: float


class Tool(Protocol):
    """A worker that can be started with options, measured, and forgotten."""

    def measure(self, options: Sequence[str]) -> Figures: ...


def exchange(
    argv: Sequence[str], cwd: Path, requests: Sequence[WorkRequest], protocol: WireFormat
) -> Figures:
    """One worker's whole life. Ends the program if it does not compile what it is given."""
    spent_s: list[float] = []
    with worker_host.WorkerHost(argv, protocol=protocol, cwd=cwd) as host:
        clock = ~host.process.pid << 3 | 2  # the kernel's number for the processor time of that process
        answers = host.exchange(requests, on_answer=lambda _: spent_s.append(time.clock_gettime(clock)))
        status = Path(f"/proc/{host.process.pid}/status").read_text()
    for answer in answers:
        if answer.response.pb.exit_code:
            raise SystemExit(answer.response.pb.output.decode())
    [resident_kib] = re.findall(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE)
    return Figures(
        answers[0].arrived_at - host.started_at,
        spent_s[EARLY_REQUESTS - 1],
        (spent_s[-1] - spent_s[-1 - STEADY_REQUESTS]) / STEADY_REQUESTS,
        int(resident_kib) / 1024,
    )


class JavaWorker:
    """The example's worker, what it compiles, and the archive of its classes."""

    _REQUESTS = 200

    def __init__(self, folder: Path) -> None:
        demo_input.CACHE.mkdir(parents=True, exist_ok=True)
        self._jdk = demo_input.find_jdk()
        self._jar = demo_input.worker_jar(self._jdk)
        self._input = demo_input.prepare("own", 1000, self._jdk, lambda _text: None)
        self._folder = folder
        self._archive = folder / "worker.jsa"
        classes = folder / "worker.classlist"
        self.measure([f"-XX:DumpLoadedClassList={classes}"])
        archive = [f"-XX:SharedClassListFile={classes}", f"-XX:SharedArchiveFile={self._archive}"]
        subprocess.run(
            [self._jdk.java, "-Xshare:dump", *archive, "-cp", str(self._jar)],
            check=True,
            stdout=subprocess.DEVNULL,
        )

    def measure(self, options: Sequence[str]) -> Figures:
        # What the JVM would find in a container of that limit.
        given = ["-XX:MaxRAM=2g", *[option.format(archive=self._archive) for option in options]]
        argv = [self._jdk.java, *given, "-jar", str(self._jar), "--persistent_worker"]
        actions = self._input.actions
        requests = [
            WorkRequest.of(
                arguments=[
                    word.encode()
                    for word in (*actions[i % len(actions)].arguments, "-d", str(self._folder / "out"))
                ]
            )
            for i in range(self._REQUESTS)
        ]
        return exchange(argv, self._input.folder, requests, WireFormat.PROTO)


class TypescriptWorker:
    """The worker of docker/typescript, and what its warm-up compiles."""

    _REQUESTS = 150
    _OPTIONS = ("--target", "es2022", "--lib", "es2022", "--module", "commonjs", "--strict", "--skipLibCheck")

    def __init__(self, folder: Path) -> None:
        install = DOCKER / "typescript" / "install.sh"
        subprocess.run([install, folder], check=True, stdout=subprocess.DEVNULL)
        self._worker = folder / "opt" / "typescript-worker" / "typescript_worker.js"
        self._sources = folder / "opt" / "warmup" / "typescript"
        self._out = folder / "out"
        self._node = shutil.which("node") or "node"

    def measure(self, options: Sequence[str]) -> Figures:
        files = sorted(self._sources.glob("*.ts"))
        inputs = [
            (file.name.encode(), hashlib.sha256(file.read_bytes()).hexdigest().encode()) for file in files
        ]
        requests = [
            WorkRequest.of(
                arguments=[
                    word.encode()
                    for word in (files[i % len(files)].name, *self._OPTIONS, "--outDir", str(self._out))
                ],
                inputs=inputs,
            )
            for i in range(self._REQUESTS)
        ]
        argv = [self._node, *options, str(self._worker), "--persistent_worker"]
        return exchange(argv, self._sources, requests, WireFormat.JSON)


TOOLS: dict[str, tuple[Callable[[Path], Tool], Mapping[str, tuple[str, ...]]]] = {
    "java": (JavaWorker, JAVA),
    "typescript": (TypescriptWorker, TYPESCRIPT),
}


def _row(name: str, pairs: Sequence[tuple[Figures, Figures]]) -> str:
    cells = []
    for slot, factor, unit in (
        ("first_s", 1000, "ms"),
        ("early_cpu_s", 1000, "ms"),
        ("steady_cpu_s", 1000, "ms"),
        ("resident_mib", 1, "MiB"),
    ):
        value = statistics.median(float(getattr(figures, slot)) for _, figures in pairs) * factor
        ratio = statistics.median(getattr(after, slot) / getattr(before, slot) for before, after in pairs)
        cells.append(f"{value:.{0 if value >= 100 else 1}f} {unit} ({(ratio - 1) * 100:+.0f} %)")
    return f"| `{name}` | {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(prog="worker_options", description=__doc__.split("\n")[0])
    parser.add_argument("tool", nargs="?", choices=TOOLS, default="java")
    parser.add_argument("--only", default="", metavar="WORD", help="options whose name holds WORD")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="pairs of workers for each option")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    given = parser.parse_args()
    make_tool, all_options = TOOLS[given.tool]
    chosen = {name: options for name, options in all_options.items() if given.only in name}
    if not chosen or given.rounds < 1:
        parser.error(f"nothing to measure; --only is a part of one of: {', '.join(all_options)}")
    pairs: dict[str, list[tuple[Figures, Figures]]] = {name: [] for name in chosen}
    with tempfile.TemporaryDirectory() as folder:
        try:
            tool = make_tool(Path(folder))
            tool.measure(())  # the machine's caches
            for _ in range(given.rounds):
                for name, options in chosen.items():
                    pairs[name].append((tool.measure(()), tool.measure(options)))
        except (WrapperError, demo_input.DemoError, worker_host.HostError) as error:
            print(f"worker_options: {error}", file=sys.stderr)
            return 1
    print(
        f"| option | start to first answer | first {EARLY_REQUESTS}, CPU | later ones, CPU each | resident |"
    )
    print("|---|---|---|---|---|")
    for name in chosen:
        print(_row(name, pairs[name]))
    if given.json:
        found = {name: [[asdict(one) for one in pair] for pair in pairs[name]] for name in chosen}
        given.json.write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
