"""What an action costs in action mode, through a whole node, beside `/bin/true` as the action.

A node as NativeLink makes it (tests/node/), a real daemon, and a worker in C that answers at once. In one
run, alternately: `/bin/true` as the action, with nothing in front of it; the client in front of an action on
an idle warm worker, with 10 and with 1,001 inputs; the client in front of `/bin/true` without a key. Then
actions four at once. As root. (The client alone: `client.py`.)
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.node.node import NodeAction  # noqa: E402
from tests.node.warm_node import KEY, WarmNode  # noqa: E402

FILES = {"10 inputs": (10, 2), "1,001 inputs": (1001, 100)}
"""Of each tree: files and directories."""


def inputs_of(files: int, directories: int) -> dict[str, bytes]:
    """A flagfile and sources, in packages below five topmost directories."""
    places = [f"top{number % 5}/package{number}" for number in range(directories)]
    sources = {
        f"{places[number % directories]}/Source{number}.java": b"class A%d {}" % number
        for number in range(files - 1)
    }
    return {"flags": b"one\ntwo\n", **sources}


def compiled_worker(folder: Path) -> str:
    program = folder / "tools" / "echo_worker"
    source = ROOT / "benchmarks" / "echo_worker.c"
    subprocess.run(["cc", "-O2", "-o", program, source], check=True)
    return str(program)


def exec_phase_s(warm: WarmNode, action: NodeAction, *, plain: bool) -> float:
    """From the start of the action's process to its end, without preparing and deleting its directory."""
    node = warm.plain if plain else warm.node
    directory = node.prepare(action)
    try:
        begin = time.perf_counter()
        process = node.spawn(action, directory, str(directory / ("a" * 32)))
        process.communicate()
        seconds = time.perf_counter() - begin
        if process.returncode != 0:
            raise SystemExit(f"the action failed with {process.returncode}")
        return seconds
    finally:
        node.delete(directory)


def latencies(warm: WarmNode, worker: str, rounds: int) -> dict[str, Any]:
    actions = {
        "/bin/true": (NodeAction(["/bin/true"], inputs_of(10, 2)), True),
        "client, no key": (NodeAction(["/bin/true"], inputs_of(10, 2)), False),
    }
    for name, (files, directories) in FILES.items():
        action = NodeAction([worker, "@flags"], inputs_of(files, directories), properties=KEY)
        actions[name] = (action, False)
    taken: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(rounds + 3):
        for name, (action, plain) in actions.items():
            seconds = exec_phase_s(warm, action, plain=plain)
            if number >= 3:
                taken[name].append(seconds)
    return {name: statistics.median(times) * 1000 for name, times in taken.items()}


def throughput(warm: WarmNode, worker: str, count: int, at_once: int) -> float:
    """Actions a second, whole ones: with their directories made and deleted."""
    action = NodeAction([worker, "@flags"], inputs_of(10, 2), properties=KEY)

    def one(_number: int) -> None:
        result = warm.node.run(action)
        if result.exit_code != 0:
            raise SystemExit(f"an action failed: {result}")

    with ThreadPoolExecutor(at_once) as threads:
        list(threads.map(one, range(50)))
        begin = time.perf_counter()
        list(threads.map(one, range(count)))
        return count / (time.perf_counter() - begin)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=300, help="of each latency (default 300)")
    parser.add_argument("--actions", type=int, default=2000, help="for the throughput (default 2000)")
    parser.add_argument("--json", metavar="FILE", help="keep the figures")
    given = parser.parse_args()
    if os.geteuid() != 0:
        raise SystemExit("as root: the workers are another user's, as in production")
    pool = {"min_warm_workers": 4, "max_workers": 4, "tools": [{"pattern": "echo_worker"}]}
    warm = WarmNode(pool)
    worker = compiled_worker(warm.folder)
    warm.document["pools"][0]["worker_command"] = [worker, "--persistent_worker"]  # type: ignore[index]
    warm.daemon.configure(warm.document)
    with warm:
        figures: dict[str, Any] = {"latency, ms": latencies(warm, worker, given.rounds)}
        figures["actions a second, 4 at once"] = throughput(warm, worker, given.actions, 4)
    show(figures)
    if given.json:
        Path(given.json).write_text(json.dumps(figures, indent=2))
    return 0


def show(figures: dict[str, Any]) -> None:
    latency = figures["latency, ms"]
    floor = latency["/bin/true"]
    print(f"{'an action, p50':<22} {'ms':>7} {'over /bin/true':>15}")
    for name, milliseconds in latency.items():
        print(f"{name:<22} {milliseconds:7.2f} {milliseconds - floor:+15.2f}")
    print(f"actions a second, 4 at once: {figures['actions a second, 4 at once']:.0f}")


if __name__ == "__main__":
    sys.exit(main())
