#!/usr/bin/env python3
"""What the wrapper costs: an echo worker driven directly on pipes and through the wrapper, alternately.

    .venv/bin/python benchmarks/overhead.py [--json FILE] [--requests N] [--rounds N] [--starts N]

Prints, for requests of 1 KB and 100 KB, one at a time and 8 in flight: latencies, their ratio, the
microseconds that the wrapper adds at p50 and p99, and requests a second; then the time from start to first
answer and the wrapper's memory. The worker is C (`echo_worker.c`), and so is a relay that only copies bytes:
the floor for anything that stands between caller and worker. Frames are encoded beforehand and answers
compared as bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import select
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from wrapper.worker_protocol import proto_framing
from wrapper.worker_protocol.messages import WorkRequest, WorkResponse

HERE = Path(__file__).resolve().parent
CACHE = HERE.parent / ".cache"

SIZES = {"1 KB": 1_000, "100 KB": 100_000}
IN_FLIGHT = 8
SHARE_OF_LARGE = 5
"""Large requests are this many times fewer."""
SILENCE_TIMEOUT_S = 30.0


class BenchmarkError(Exception):
    """The benchmark cannot go on; the text says why."""


@dataclass(frozen=True, slots=True)
class Load:
    """Frames to send, one for each slot, and which slot an answer (as bytes) belongs to."""

    frames: tuple[bytes, ...]
    slot_of_answer: dict[bytes, int]


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison. Times in microseconds, of one request."""

    size: str
    in_flight: int
    via: str
    direct_p50_us: float
    direct_p99_us: float
    p50_us: float
    p99_us: float
    ratio: float
    added_p50_us: float
    added_p99_us: float
    direct_per_second: float
    per_second: float
    cpu_us: float
    """Processor time of what stands between, for one request: hardly depends on the machine's load."""
    requests: int


class Line:
    """One started worker (or a wrapper around workers) and its pipes."""

    def __init__(self, argv: Sequence[str]) -> None:
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._in = self.process.stdin.fileno()
        self._out = self.process.stdout.fileno()
        self._poll = select.poll()
        self._poll.register(self._out, select.POLLIN | select.POLLHUP)

    def run(self, load: Load, count: int) -> list[int]:
        """Send `count` requests, as many at a time as the load has slots; returns nanoseconds of each."""
        return self._one_at_a_time(load, count) if len(load.frames) == 1 else self._many(load, count)

    def _one_at_a_time(self, load: Load, count: int) -> list[int]:
        (frame,), slot_of_answer, clock = load.frames, load.slot_of_answer, time.perf_counter_ns
        latencies = []
        for _ in range(count):
            began = clock()
            self._write(frame)
            data = self._read()
            while len(data) < data[0] + 1:
                data += self._read()
            latencies.append(clock() - began)
            if data not in slot_of_answer:
                raise BenchmarkError(f"an unexpected answer: {data!r}")
        return latencies

    def _many(self, load: Load, count: int) -> list[int]:
        frames, slot_of_answer, clock = load.frames, load.slot_of_answer, time.perf_counter_ns
        began_at = [0] * len(frames)
        latencies: list[int] = []
        sent = 0
        for slot in range(min(len(frames), count)):
            began_at[slot] = clock()
            self._write(frames[slot])
            sent += 1
        data = b""
        while len(latencies) < count:
            data += self._read()
            now = clock()
            while data and len(data) > data[0]:
                end = data[0] + 1
                slot = slot_of_answer.get(data[:end], -1)
                if slot < 0 or not began_at[slot]:
                    raise BenchmarkError(f"an unexpected answer: {data[:end]!r}")
                data = data[end:]
                latencies.append(now - began_at[slot])
                began_at[slot] = 0
                if sent < count:
                    began_at[slot] = clock()
                    self._write(frames[slot])
                    sent += 1
        return latencies

    def _write(self, frame: bytes) -> None:
        written = os.write(self._in, frame)
        while written < len(frame):
            written += os.write(self._in, frame[written:])

    def _read(self) -> bytes:
        # The time-out costs one system call, the same on both sides, and a hang would tell nobody anything.
        if not self._poll.poll(SILENCE_TIMEOUT_S * 1000):
            raise BenchmarkError(f"no answer for {SILENCE_TIMEOUT_S:.0f} s from {self.process.args!r}")
        data = os.read(self._out, 1 << 16)
        if not data:
            raise BenchmarkError(f"{self.process.args!r} ended with exit code {self.process.wait()}")
        return data

    def cpu_s(self) -> float:
        """Processor time of the process itself so far, without its children."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def resident_bytes(self) -> int:
        """Resident memory of the process itself, without its children."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def close(self) -> None:
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def make_load(size: int, in_flight: int) -> Load:
    """Requests of about `size` bytes, in the shape of a compiler's: few arguments, many inputs."""
    inputs: list[tuple[bytes, bytes]] = []
    request = WorkRequest.of(arguments=[b"@bazel-out/k8-fastbuild/bin/example/library.params"], inputs=inputs)
    while len(proto_framing.encode_request(request)) < size:
        path = b"bazel-out/k8-fastbuild/bin/example/dependency_%d.jar" % len(inputs)
        inputs.append((path, hashlib.sha256(path).hexdigest().encode()))
        request = WorkRequest.of(arguments=list(request.pb.arguments), inputs=inputs)
    body_bytes = len(request.pb.SerializeToString())
    frames = []
    slot_of_answer = {}
    for slot in range(in_flight):
        # One at a time is singleplex: Bazel sends no id then.
        request.pb.request_id = 0 if in_flight == 1 else slot + 1
        frames.append(proto_framing.encode_request(request))
        answer = WorkResponse.of(output=b"%d" % body_bytes, request_id=request.pb.request_id)
        slot_of_answer[proto_framing.encode_response(answer)] = slot
    return Load(tuple(frames), slot_of_answer)


def compare(
    size: str,
    via: str,
    direct_argv: Sequence[str],
    argv: Sequence[str],
    load: Load,
    *,
    rounds: int,
    requests: int,
) -> tuple[Row, int]:
    """One row, and the resident memory of what stands between at the end."""
    direct, between = Line(direct_argv), Line(argv)
    try:
        for line in (direct, between):
            line.run(load, max(200, len(load.frames) * 20))  # workers started, code paths warm
        times: dict[Line, list[int]] = {direct: [], between: []}
        seconds = {direct: 0.0, between: 0.0}
        cpu_s = -between.cpu_s()
        for round_number in range(rounds):
            for line in (direct, between) if round_number % 2 else (between, direct):
                began = time.perf_counter()
                times[line] += line.run(load, requests // rounds)
                seconds[line] += time.perf_counter() - began
        cpu_s += between.cpu_s()
        memory = between.resident_bytes()
    finally:
        direct.close()
        between.close()
    d50, d99 = percentile(times[direct], 50), percentile(times[direct], 99)
    b50, b99 = percentile(times[between], 50), percentile(times[between], 99)
    row = Row(
        size=size,
        in_flight=len(load.frames),
        via=via,
        direct_p50_us=d50,
        direct_p99_us=d99,
        p50_us=b50,
        p99_us=b99,
        ratio=b50 / d50,
        added_p50_us=b50 - d50,
        added_p99_us=b99 - d99,
        direct_per_second=len(times[direct]) / seconds[direct],
        per_second=len(times[between]) / seconds[between],
        cpu_us=cpu_s * 1e6 / len(times[between]),
        requests=len(times[between]),
    )
    return row, memory


def percentile(nanoseconds: Sequence[int], percent: int) -> float:
    """In microseconds."""
    ordered = sorted(nanoseconds)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)] / 1000


def first_answers(
    direct_argv: Sequence[str], argv: Sequence[str], load: Load, starts: int
) -> tuple[float, float]:
    """Medians of the milliseconds from start to first answer: directly, and through `argv`."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(starts):
        for which, command in enumerate((direct_argv, argv)):
            began = time.perf_counter()
            line = Line(command)
            try:
                line.run(load, 1)
                times[which].append((time.perf_counter() - began) * 1000)
            finally:
                line.close()
    return statistics.median(times[0]), statistics.median(times[1])


def build_echo_worker() -> str:
    """The compiled echo worker, in `.cache/`, named after its source."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise BenchmarkError("a C compiler is missing: apt-get install gcc libc6-dev")
    source = HERE / "echo_worker.c"
    program = CACHE / f"echo_worker-{hashlib.sha256(source.read_bytes()).hexdigest()[:12]}"
    if not program.exists():
        CACHE.mkdir(exist_ok=True)
        half_made = program.with_suffix(f".{os.getpid()}")
        done = subprocess.run(
            [compiler, "-O2", "-o", str(half_made), str(source)], check=False, capture_output=True, text=True
        )
        if done.returncode != 0:
            raise BenchmarkError(f"{compiler} cannot compile {source}:\n{done.stderr}")
        half_made.rename(program)
    return str(program)


def table(rows: Sequence[Row]) -> str:
    head = (
        "request",
        "in flight",
        "via",
        "direct p50",
        "p50",
        "ratio",
        "+p50 us",
        "+p99 us",
        "direct/s",
        "per s",
        "CPU us",
    )
    lines = [
        head,
        *(
            (
                row.size,
                str(row.in_flight),
                row.via,
                f"{row.direct_p50_us:.0f}",
                f"{row.p50_us:.0f}",
                f"{row.ratio:.2f}",
                f"{row.added_p50_us:+.0f}",
                f"{row.added_p99_us:+.0f}",
                f"{row.direct_per_second:,.0f}",
                f"{row.per_second:,.0f}",
                f"{row.cpu_us:.0f}",
            )
            for row in rows
        ),
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def measure(requests: int, rounds: int, starts: int) -> dict[str, object]:
    """All of it; the figures as plain values."""
    worker = [build_echo_worker(), "--persistent_worker"]
    wrapper = [sys.executable, "-m", "wrapper"]
    ways = {
        "C relay (the floor)": [worker[0], "--relay", *worker],
        "wrapper": [*wrapper, "--", *worker],
        "wrapper, multiplex tool": [*wrapper, "--tool-multiplex", "--", *worker],
    }
    rows = []
    memory = 0
    for size, size_bytes in SIZES.items():
        for in_flight in (1, IN_FLIGHT):
            load = make_load(size_bytes, in_flight)
            count = requests if size_bytes <= min(SIZES.values()) else requests // SHARE_OF_LARGE
            for via, argv in ways.items():
                if in_flight == 1 and via == "wrapper, multiplex tool":
                    continue
                row, resident = compare(size, via, worker, argv, load, rounds=rounds, requests=count)
                rows.append(row)
                if via == "wrapper":
                    memory = max(memory, resident)
                print(".", end="", file=sys.stderr, flush=True)
    direct_ms, wrapper_ms = first_answers(worker, ways["wrapper"], make_load(min(SIZES.values()), 1), starts)
    print(file=sys.stderr)
    return {
        "rows": [asdict(row) for row in rows],
        "table": table(rows),
        "first_answer_direct_ms": direct_ms,
        "first_answer_wrapper_ms": wrapper_ms,
        "first_answer_added_ms": wrapper_ms - direct_ms,
        "wrapper_resident_mb": memory / 1e6,
    }


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="overhead", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--requests", type=int, default=10_000, metavar="N", help="1 KB requests of one row")
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="alternations within a row")
    parser.add_argument("--starts", type=int, default=7, metavar="N", help="starts to take the median of")
    chosen = parser.parse_args(arguments)
    if chosen.starts < 1 or chosen.rounds < 1 or chosen.requests < chosen.rounds * SHARE_OF_LARGE:
        parser.error(f"--requests must be at least {SHARE_OF_LARGE} times --rounds, the others at least 1")
    try:
        figures = measure(chosen.requests, chosen.rounds, chosen.starts)
    except BenchmarkError as error:
        print(f"overhead: {error}", file=sys.stderr)
        return 1
    print(figures["table"])
    print(
        f"\nstart to first answer: directly {figures['first_answer_direct_ms']:.1f} ms, through the wrapper "
        f"{figures['first_answer_wrapper_ms']:.1f} ms: {figures['first_answer_added_ms']:+.1f} ms\n"
        f"the wrapper's resident memory: {figures['wrapper_resident_mb']:.1f} MB"
    )
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
