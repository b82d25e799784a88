"""What it costs to decide about an action, with many tool patterns and pools.

    python benchmarks/classification.py

Real command lines are classified against two configurations, alternately in one run: the smallest there is,
and one with 1,000 tool patterns and 100 pools. Printed: microseconds, and the ratio of the two. The
smallest is the floor: what the command line itself costs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from wrapper.action import ActionRules, classify
from wrapper.config import parse_config

JAVAC = (
    "external/local_jdk/bin/java",
    *(
        f"--add-exports=jdk.compiler/com.sun.tools.javac.{name}=ALL-UNNAMED"
        for name in ["api", "code", "comp", "file"]
    ),
    *(
        f"--add-opens=jdk.compiler/com.sun.tools.javac.{name}=ALL-UNNAMED"
        for name in ["main", "tree", "util"]
    ),
    "--patch-module=jdk.compiler=external/remote_java_tools/java_tools/jdk_compiler.jar",
    "-jar",
    "external/remote_java_tools/java_tools/JavaBuilder_deploy.jar",
    "@bazel-out/k8-fastbuild/bin/src/main/java/com/example/app/server/libserver.jar-0.params",
    "@bazel-out/k8-fastbuild/bin/src/main/java/com/example/app/server/libserver.jar-1.params",
)
COMMANDS = (
    JAVAC,
    ("bazel-out/k8-opt-exec-2B5CBBC6/bin/tools/team/generator_0500", "@bazel-out/k8-fastbuild/bin/a.params"),
    ("/usr/bin/gcc", "-c", "-o", "bazel-out/k8-fastbuild/bin/a.o", "@bazel-out/k8-fastbuild/bin/a.o.params"),
    ("/bin/bash", "-c", "source external/bazel_tools/tools/genrule/genrule-setup.sh; cat a > b"),
    ("external/bazel_tools/tools/test/test-setup.sh", "app/app_test"),
)


@dataclass(frozen=True, slots=True)
class Action:
    argv: tuple[str, ...]
    key: str
    tool: str = ""
    protocol: str = ""


def make_rules(pools: int, patterns: int, never_warm: int) -> ActionRules:
    """Rules of a configuration of this size. Patterns are of all kinds, and as like each other as can be."""
    kinds = (
        "*/tools/team/generator_{:04}",
        "generator_{:04}",
        "worker_{:04}*",
        "*_{:04}_deploy.jar",
        "t?ol[_-]{:04}",
    )
    document = {
        "pools": [
            {
                "name": f"pool{n}",
                "language": "jvm",
                "keys": [f"team-{n:03}-*"],
                "worker_command": [],
                "tools": [{"pattern": kinds[n % len(kinds)].format(n)}],
            }
            for n in range(pools)
        ],
        "actions": {
            "tools": [{"pattern": kinds[n % len(kinds)].format(n)} for n in range(patterns)],
            "never_warm": [f"*/k8-opt-{n:04}/*" for n in range(never_warm)],
        },
    }
    return ActionRules.from_config(parse_config(json.dumps(document), "benchmark"))


def time_one_us(rules: ActionRules, actions: list[Action], turns: int) -> float:
    """Microseconds of one classification: the mean over the command lines and turns."""
    began = time.perf_counter()
    for _ in range(turns):
        for action in actions:
            classify(action, rules)
    return (time.perf_counter() - began) * 1e6 / (turns * len(actions))


def measure(pools: int, patterns: int, rounds: int, turns: int) -> dict[str, float]:
    """Medians in µs for the smallest and the large configuration, alternately, and their ratio."""
    small, large = make_rules(1, 0, 0), make_rules(pools, patterns, 10)
    few = [Action(argv, "team-000-x") for argv in COMMANDS]
    many = [Action(argv, f"team-{pools - 1:03}-x") for argv in COMMANDS]
    floor_us, large_us = [], []
    for _ in range(rounds):
        floor_us.append(time_one_us(small, few, turns))
        large_us.append(time_one_us(large, many, turns))
    figures = {"floor_us": statistics.median(floor_us), "large_us": statistics.median(large_us)}
    worst = [statistics.median(time_one_us(large, [one], turns) for _ in range(rounds)) for one in many]
    return {**figures, "worst_us": max(worst), "ratio": figures["large_us"] / figures["floor_us"]}


def main() -> int:
    parser = argparse.ArgumentParser(prog="classification", description=__doc__.split("\n")[0])
    parser.add_argument("--pools", type=int, default=100, metavar="N")
    parser.add_argument("--patterns", type=int, default=1_000, metavar="N")
    parser.add_argument("--rounds", type=int, default=20, metavar="N")
    parser.add_argument("--turns", type=int, default=200, metavar="N", help="classifications of each a round")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    given = parser.parse_args()
    figures = measure(given.pools, given.patterns, given.rounds, given.turns)
    print(f"one pool, no patterns:              {figures['floor_us']:6.1f} us")
    size = f"{given.pools} pools, {given.patterns:,} patterns:"
    print(f"{size:<35} {figures['large_us']:6.1f} us (slowest command line: {figures['worst_us']:.1f} us)")
    print(f"ratio: {figures['ratio']:.2f} (at most 3)")
    if given.json:
        given.json.write_text(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
