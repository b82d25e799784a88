"""The demo: the same compilations as one process each and through a pool of warm workers, side by side.

Owns the order of the runs, the clock, the comparison and the closing table. What is compiled is
`demo_input.py`'s business, the protocol `worker_host.py`'s.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import demo_containers
import demo_input
from demo_input import Action, DemoError, DemoInput, Jdk
from progress import Progress
from worker_host import Answer, HostError, WorkerHost

from wrapper.worker_protocol.messages import WorkRequest

QUICK_JVM = ("-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC")
"""The JVM flags with which a short javac ends soonest: C1 only, serial GC. Both sides run with them."""
CONTAINER_HEAP = ("-XX:InitialRAMPercentage=6",)
"""A heap begins with 1.6 % of the memory that the JVM sees: enough on a whole machine, and in a container of
2 GiB so little that it collects all the time."""

FULL_ACTIONS, QUICK_ACTIONS = 124, 40
FULL_STEADY, QUICK_STEADY = 200, 60
STEADY_TAIL = 50
DEFAULT_FLAGS_SAMPLE = 24
ANSWER_TIMEOUT_S = 120.0


@dataclass(slots=True)
class Outcome:
    """What one way of running the actions took, and the digest of what each action wrote."""

    actions: int = 0
    wall_s: float = 0.0
    latencies_s: list[float] = field(default_factory=list)
    digests: dict[int, str] = field(default_factory=dict)


@dataclass(slots=True)
class PoolOutcome(Outcome):
    """The pool's run, and the further requests that show where it settles."""

    first_answer_s: float = 0.0
    """From the wrapper's start."""
    steady_latencies_s: list[float] = field(default_factory=list)
    steady_wall_s: float = 0.0
    steady_differences: int = 0


class Demo:
    """One run of the demo over one input."""

    def __init__(
        self, given: DemoInput, jdk: Jdk, at_once: int, outputs: Path, workers_uid: int | None = None
    ) -> None:
        self.given = given
        self.jdk = jdk
        self.at_once = at_once
        self.outputs = outputs
        self.workers_uid = workers_uid
        """Of the workers in containers; None: they run as we do."""

    def processes(self, label: str, numbers: Sequence[int], jvm_flags: Sequence[str], into: Outcome) -> None:
        """Run these actions as one javac process each, and add what that took to `into`."""
        flags = [f"-J{flag}" for flag in jvm_flags]
        folders = {number: self._output_folder(f"process-{number}") for number in numbers}

        def run(number: int) -> float:
            started = time.monotonic()
            argv = [self.jdk.javac, *flags, "-d", str(folders[number]), *self.given.actions[number].arguments]
            done = subprocess.run(
                argv,
                check=False,
                cwd=self.given.folder,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
            )
            if done.returncode != 0:
                said = done.stdout + done.stderr
                raise DemoError(_failed(self.given.actions[number], done.returncode, said))
            return time.monotonic() - started

        with Progress(label, len(numbers)) as progress, ThreadPoolExecutor(self.at_once) as executor:
            started = time.monotonic()
            for latency in executor.map(run, numbers):
                into.latencies_s.append(latency)
                progress.step()
            into.wall_s += time.monotonic() - started
        into.actions += len(numbers)
        for number, folder in folders.items():
            into.digests[number] = digest_of(folder)
            shutil.rmtree(folder)

    def pool(self, wrapper: Sequence[str], steady: int, expected: dict[int, str]) -> PoolOutcome:
        """Start the wrapper, run every action through it, then `steady` further requests.

        `expected` are the digests known so far, for the further requests; the actions' own are returned.
        """
        outcome = PoolOutcome(actions=len(self.given.actions))
        everything = list(range(len(self.given.actions)))
        with WorkerHost(wrapper, cwd=self.given.folder) as host:
            answers, outcome.digests = self._through(host, "warm pool, starts included", everything)
            arrivals = [answer.arrived_at for answer in answers]
            outcome.wall_s = max(arrivals) - host.started_at
            outcome.first_answer_s = min(arrivals) - host.started_at
            outcome.latencies_s = [answer.latency_s for answer in answers]
            again = [number % len(everything) for number in range(steady)]
            started = time.monotonic()
            answers, digests = self._through(host, "warm pool, steady state", again)
            outcome.steady_wall_s = max(answer.arrived_at for answer in answers) - started
            # In the order of their arrival, so that "the last 50" are the last.
            answers.sort(key=lambda answer: answer.arrived_at)
            outcome.steady_latencies_s = [answer.latency_s for answer in answers]
            known = {**outcome.digests, **expected}
            outcome.steady_differences = sum(
                digest != known[again[index]] for index, digest in digests.items()
            )
        return outcome

    def _through(
        self, host: WorkerHost, label: str, numbers: Sequence[int]
    ) -> tuple[list[Answer], dict[int, str]]:
        """Send these actions; returns the answers, and the digests by position in `numbers`."""
        folders = [self._output_folder(f"pool-{index}") for index in range(len(numbers))]
        requests = [
            WorkRequest.of(
                arguments=[
                    os.fsencode(argument)
                    for argument in ("-d", str(folder), *self.given.actions[number].arguments)
                ]
            )
            for number, folder in zip(numbers, folders, strict=True)
        ]
        with Progress(label, len(numbers)) as progress:
            answers = host.exchange(
                requests,
                in_flight=self.at_once,
                timeout_s=ANSWER_TIMEOUT_S,
                on_answer=lambda _answer: progress.step(),
            )
        for number, answer in zip(numbers, answers, strict=True):
            response = answer.response.pb
            if response.exit_code != 0:
                text = response.output.decode("utf-8", "replace")
                raise DemoError(_failed(self.given.actions[number], response.exit_code, text))
        digests = {}
        for index, folder in enumerate(folders):
            digests[index] = digest_of(folder)
            shutil.rmtree(folder)
        return answers, digests

    def _output_folder(self, name: str) -> Path:
        folder = self.outputs / name
        folder.mkdir()
        if self.workers_uid is not None:
            os.chown(folder, self.workers_uid, self.workers_uid)
        return folder


def digest_of(folder: Path) -> str:
    """SHA-256 over the paths and the bytes of all files below `folder`."""
    digest = hashlib.sha256()
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if not files:
        raise DemoError(f"an action that succeeded wrote nothing into {folder}")
    for path in files:
        data = path.read_bytes()
        digest.update(f"{path.relative_to(folder)}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()


def _failed(action: Action, exit_code: int, said: str) -> str:
    return f"the action {action.name} failed with exit code {exit_code}:\n{said[-4000:]}"


def report(
    given: DemoInput,
    at_once: int,
    pool: PoolOutcome,
    quick: Outcome,
    default: Outcome | None,
    runtime: str,
) -> dict[str, object]:
    """The figures of a whole run as plain values, times in seconds."""
    total = len(given.actions)
    differing = sorted(given.actions[n].name for n in range(total) if pool.digests[n] != quick.digests[n])
    tail = pool.steady_latencies_s[-STEADY_TAIL:]
    figures: dict[str, object] = {
        "input": given.description,
        "actions": total,
        "at_once": at_once,
        "runtime": runtime,
        "process_c1_s": quick.wall_s,
        "process_c1_median_s": statistics.median(quick.latencies_s),
        "pool_c1_s": pool.wall_s,
        "speed_up_like_with_like": quick.wall_s / pool.wall_s,
        "first_answer_after_start_s": pool.first_answer_s,
        "first_request_s": pool.latencies_s[0],
        "steady_median_s": statistics.median(tail),
        "steady_requests": len(pool.steady_latencies_s),
        "steady_per_second": len(pool.steady_latencies_s) / pool.steady_wall_s,
        "differing_actions": differing,
        "differing_steady_requests": pool.steady_differences,
        "identical": not differing and not pool.steady_differences,
    }
    if default is not None:
        estimate = default.wall_s / default.actions * total
        figures["process_default_sample"] = default.actions
        figures["process_default_sample_s"] = default.wall_s
        figures["process_default_median_s"] = statistics.median(default.latencies_s)
        figures["process_default_s"] = estimate
        figures["process_default_is_extrapolated"] = default.actions < total
        figures["speed_up_over_default_flags"] = estimate / pool.wall_s
    return figures


def table(figures: dict[str, object]) -> str:
    """The closing table of a run."""

    def number(name: str) -> float:
        value = figures[name]
        assert isinstance(value, int | float)
        return float(value)

    total = int(number("actions"))
    in_containers = " in containers" if figures["runtime"] == "cri" else ""
    rows = [("", "actions", "wall time", "an action", "pool is faster by")]
    if "process_default_s" in figures:
        sample = int(number("process_default_sample"))
        extrapolated = bool(figures["process_default_is_extrapolated"])
        rows.append(
            (
                "one process an action, default flags" + (" [1]" if extrapolated else ""),
                str(total),
                f"{'≈' if extrapolated else ''}{number('process_default_s'):.1f} s",
                f"{number('process_default_s') / total * 1000:.0f} ms",
                f"{number('speed_up_over_default_flags'):.1f} x",
            )
        )
    rows.append(
        (
            "one process an action, C1 + serial GC",
            str(total),
            f"{number('process_c1_s'):.1f} s",
            f"{number('process_c1_s') / total * 1000:.0f} ms",
            f"{number('speed_up_like_with_like'):.1f} x  (like with like)",
        )
    )
    rows.append(
        (
            f"warm pool{in_containers}, C1 + serial GC, worker starts included",
            str(total),
            f"{number('pool_c1_s'):.1f} s",
            f"{number('pool_c1_s') / total * 1000:.0f} ms",
            "",
        )
    )
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = [f"Input: {figures['input']}; {int(number('at_once'))} actions at a time.", ""]
    for row in rows:
        cells = [row[0].ljust(widths[0])] + [row[i].rjust(widths[i]) for i in (1, 2, 3)]
        lines.append("  ".join([*cells, row[4]]).rstrip())
    if figures.get("process_default_is_extrapolated"):
        lines.append(
            f"[1] extrapolated: {sample} of {total} actions were run, "
            f"in {number('process_default_sample_s'):.1f} s"
        )
    started = f"{number('first_answer_after_start_s') * 1000:.0f} ms after the wrapper was started"
    steady = (
        f"median of the last {STEADY_TAIL} of {int(number('steady_requests'))} further requests; "
        f"{number('steady_per_second'):.0f} a second"
    )
    lines += [
        "",
        f"first request    {number('first_request_s') * 1000:7.0f} ms  ({started})",
        f"steady state     {number('steady_median_s') * 1000:7.0f} ms  ({steady})",
        f"a process each   {number('process_c1_median_s') * 1000:7.0f} ms  (median, C1 + serial GC)",
        f"identical bytes: {'yes' if figures['identical'] else 'NO'}",
    ]
    return "\n".join(lines)


def options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="demo", description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="fewer actions, no run with default flags")
    parser.add_argument("--actions", type=int, metavar="N", help=f"how many actions (default {FULL_ACTIONS})")
    parser.add_argument("--instances", type=int, metavar="N", help="at most N workers")
    parser.add_argument("--input", choices=("auto", "maven", "own"), default="auto", help="what to compile")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    containers = parser.add_argument_group("workers in containers")
    containers.add_argument(
        "--runtime", choices=("process", "cri"), default="process", help="what a worker is (default process)"
    )
    containers.add_argument("--cri-socket", metavar="PATH", help="the container engine's CRI socket")
    containers.add_argument(
        "--container-image", metavar="REF", help="the image; this machine's JDK is mounted into it"
    )
    containers.add_argument(
        "--mount",
        metavar="PATH[:PLACE]",
        action="append",
        default=[],
        help="something else of this machine that the containers may read; may be repeated",
    )
    chosen = parser.parse_args(arguments)
    if chosen.runtime == "cri" and not (chosen.cri_socket and chosen.container_image):
        parser.error(demo_containers.HINT)
    if chosen.actions is None:
        chosen.actions = QUICK_ACTIONS if chosen.quick else FULL_ACTIONS
    for name in ("actions", "instances"):
        value = getattr(chosen, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1")
    return chosen


def run(chosen: argparse.Namespace) -> dict[str, object]:
    """Everything between the command line and the table."""
    jdk = demo_input.find_jdk()
    demo_input.CACHE.mkdir(parents=True, exist_ok=True)
    jar = demo_input.worker_jar(jdk)
    given = demo_input.prepare(chosen.input, chosen.actions, jdk, say)
    at_once = len(os.sched_getaffinity(0))
    cut = f"cut into {len(given.actions)} actions"
    say(f"Input: {given.description}, {cut}; {jdk.version}; {at_once} at a time.")
    wrapper = [sys.executable, "-m", "wrapper"]
    if chosen.instances is not None:
        wrapper += ["--max-instances", str(chosen.instances)]
    contained = chosen.runtime == "cri"
    heap = CONTAINER_HEAP if contained else ()
    tool = [jdk.java, *QUICK_JVM, *heap, "-jar", str(jar), "--persistent_worker"]

    everything = range(len(given.actions))
    half = len(everything) // 2
    # Where workers in containers run is where they may write.
    beside = given.folder if contained else demo_input.CACHE
    with tempfile.TemporaryDirectory(prefix="outputs.", dir=beside) as outputs:
        if contained:
            pools = demo_containers.document(
                chosen.cri_socket, chosen.container_image, tool, jdk, jar, chosen.mount
            )
            wrapper += ["--config", str(demo_containers.write(Path(outputs), pools))]
            os.chmod(outputs, 0o755)
        else:
            wrapper += ["--", *tool]
        demo = Demo(given, jdk, at_once, Path(outputs), demo_containers.UID if contained else None)
        # One half before the pool and one after it: a machine that slows down meanwhile slows both sides.
        quick = Outcome()
        demo.processes("one process an action, first half", everything[:half], QUICK_JVM, quick)
        pool = demo.pool(wrapper, QUICK_STEADY if chosen.quick else FULL_STEADY, quick.digests)
        demo.processes("one process an action, second half", everything[half:], QUICK_JVM, quick)
        default = None
        if not chosen.quick:
            # Spread over all actions, since neighbours are alike.
            step = max(1, len(everything) // DEFAULT_FLAGS_SAMPLE)
            default = Outcome()
            demo.processes("one process an action, default flags (a sample)", everything[::step], (), default)
    return report(given, at_once, pool, quick, default, chosen.runtime)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str]) -> int:
    chosen = options(arguments)
    try:
        figures = run(chosen)
    except (DemoError, HostError) as error:
        say(f"demo: {error}")
        return 1
    except KeyboardInterrupt:
        say("demo: stopped")
        return 130
    print(f"\n{table(figures)}", flush=True)
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(figures, indent=2) + "\n")
    if not figures["identical"]:
        say(f"demo: the outputs differ: {figures['differing_actions']}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
