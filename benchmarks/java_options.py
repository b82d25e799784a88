#!/usr/bin/env python3
"""What each JVM option does to a Java worker: its first answer, its first hundred, its steady state, its memory.

    .venv/bin/python benchmarks/java_options.py [--only WORD] [--rounds N] [--json FILE]

The example's Java worker compiles the example's own sources, as on a node that gives it 2 GiB. Each option is
measured right after a worker without options, and compared with that one: whoever else uses the machine slows
both. The figures of `docker/README.md` are from here.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "examples" / "java-persistent-worker"))

import demo_input  # noqa: E402
import worker_host  # noqa: E402

from wrapper.errors import WrapperError  # noqa: E402
from wrapper.worker_protocol.messages import WorkRequest  # noqa: E402

NODE = ("-XX:MaxRAM=2g",)
"""For every worker: what the JVM would find in a container of that limit."""
C1, SERIAL = "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC"
CDS = "-XX:SharedArchiveFile={archive}"
OPTIONS: dict[str, tuple[str, ...]] = {
    "nothing (how far chance goes)": (),
    "-XX:+TieredCompilation": ("-XX:+TieredCompilation",),
    C1: (C1,),
    "-XX:+UseG1GC": ("-XX:+UseG1GC",),
    "-XX:MaxGCPauseMillis=200": ("-XX:MaxGCPauseMillis=200",),
    "-XX:+UseStringDeduplication": ("-XX:+UseStringDeduplication",),
    "-XX:+AlwaysPreTouch": ("-XX:+AlwaysPreTouch",),
    "-XX:InitiatingHeapOccupancyPercent=45": ("-XX:InitiatingHeapOccupancyPercent=45",),
    "-XX:MaxRAMPercentage=75.0": ("-XX:MaxRAMPercentage=75.0",),
    SERIAL: (SERIAL,),
    "the archive (AppCDS)": (CDS,),
    "the first eight together": (
        "-XX:+TieredCompilation",
        C1,
        "-XX:+UseG1GC",
        "-XX:MaxGCPauseMillis=200",
        "-XX:+UseStringDeduplication",
        "-XX:+AlwaysPreTouch",
        "-XX:InitiatingHeapOccupancyPercent=45",
        "-XX:MaxRAMPercentage=75.0",
    ),
    "C1, serial collector": (C1, SERIAL),
    "C1, serial collector, archive": (C1, SERIAL, CDS),
    "C1, serial collector, archive, 75 %": (C1, SERIAL, CDS, "-XX:MaxRAMPercentage=75.0"),
}
EARLY_REQUESTS = 100
REQUESTS = 300
STEADY_REQUESTS = 50


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one worker. `first_s` is from its start, the others are without it."""

    first_s: float
    early_s: float
    steady_s: float
    resident_mib: float
    peak_mib: float


class Tool:
    """The worker, what it compiles, and the archive of its classes."""

    def __init__(self, folder: Path) -> None:
        demo_input.CACHE.mkdir(parents=True, exist_ok=True)
        self._jdk = demo_input.find_jdk()
        self._jar = demo_input.worker_jar(self._jdk)
        self._input = demo_input.prepare("own", 1000, self._jdk, lambda _text: None)
        self._folder = folder
        self._archive = folder / "worker.jsa"
        classes = folder / "worker.classlist"
        self._exchange((f"-XX:DumpLoadedClassList={classes}",), 10)
        argv = [
            "-Xshare:dump",
            f"-XX:SharedClassListFile={classes}",
            f"-XX:SharedArchiveFile={self._archive}",
        ]
        subprocess.run([self._jdk.java, *argv, "-cp", str(self._jar)], check=True, stdout=subprocess.DEVNULL)

    def measure(self, options: Sequence[str]) -> Figures:
        return self._exchange([option.format(archive=self._archive) for option in options], REQUESTS)

    def _exchange(self, options: Sequence[str], count: int) -> Figures:
        argv = [self._jdk.java, *NODE, *options, "-jar", str(self._jar), "--persistent_worker"]
        actions = self._input.actions
        requests = [
            WorkRequest.of(
                arguments=[
                    word.encode()
                    for word in (*actions[i % len(actions)].arguments, "-d", str(self._folder / "out"))
                ]
            )
            for i in range(count)
        ]
        with worker_host.WorkerHost(argv, cwd=self._input.folder) as host:
            answers = host.exchange(requests)
            status = Path(f"/proc/{host.process.pid}/status").read_text()
        for answer in answers:
            if answer.response.pb.exit_code:
                raise SystemExit(answer.response.pb.output.decode())
        memory = dict(re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB$", status, re.MULTILINE))
        latencies = [answer.latency_s for answer in answers]
        return Figures(
            answers[0].arrived_at - host.started_at,
            sum(latencies[1:EARLY_REQUESTS]),
            statistics.median(latencies[-STEADY_REQUESTS:]),
            int(memory["VmRSS"]) / 1024,
            int(memory["VmHWM"]) / 1024,
        )


def _row(name: str, pairs: Sequence[tuple[Figures, Figures]]) -> str:
    def median(value: str) -> float:
        return statistics.median(getattr(figures, value) for _, figures in pairs)

    def change(value: str) -> str:
        ratio = statistics.median(getattr(after, value) / getattr(before, value) for before, after in pairs)
        return f"{(ratio - 1) * 100:+4.0f} %"

    return (
        f"| {name:<37} | {median('first_s') * 1000:5.0f} ms {change('first_s')} "
        f"| {median('early_s') * 1000:6.0f} ms {change('early_s')} "
        f"| {median('steady_s') * 1000:5.1f} ms {change('steady_s')} "
        f"| {median('resident_mib'):4.0f} MiB {change('resident_mib')} |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="java_options", description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", metavar="WORD", help="options whose name holds WORD")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="pairs of workers for each option")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    given = parser.parse_args()
    chosen = {name: options for name, options in OPTIONS.items() if given.only in name}
    if not chosen or given.rounds < 1:
        parser.error(f"nothing to measure; --only is a part of one of: {', '.join(OPTIONS)}")
    pairs: dict[str, list[tuple[Figures, Figures]]] = {name: [] for name in chosen}
    with tempfile.TemporaryDirectory() as folder:
        try:
            tool = Tool(Path(folder))
            tool.measure(())  # the machine's caches
            for _ in range(given.rounds):
                for name, options in chosen.items():
                    pairs[name].append((tool.measure(()), tool.measure(options)))
        except (WrapperError, demo_input.DemoError, worker_host.HostError) as error:
            print(f"java_options: {error}", file=sys.stderr)
            return 1
    print(f"| option {'':<30} | start to first answer | the next {EARLY_REQUESTS - 1} | steady | resident |")
    print("|---|---|---|---|---|")
    for name in chosen:
        print(_row(name, pairs[name]))
    if given.json:
        given.json.write_text(
            json.dumps(
                {
                    name: [[{slot: getattr(f, slot) for slot in f.__slots__} for f in pair] for pair in found]
                    for name, found in pairs.items()
                }
            )
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
