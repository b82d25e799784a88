"""What it costs to stage an action's tree into a worker's execroot and to collect it, with both strategies.

Beside it the floor: a plain rename of the top-level entries, there and back. As root, the worker has
another uid, as in production; else everything belongs to whoever runs this. Medians; the last column is
processor time of stage and collect together, which others on the machine disturb less.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from wrapper.execroot.action_execroot import ActionExecroot, Strategy

T = TypeVar("T")
Times = tuple[float, float, float]
"""There, back, and processor time of both."""

WORKER_ID = 1000
TREES = {"10 files": (10, 2, 2), "1,001 files": (1001, 100, 5)}
"""Of each: files, directories, top-level entries."""


def make_tree(root: Path, files: int, directories: int, tops: int, store: Path) -> None:
    """Inputs as a host makes them: read-only hard links to a store."""
    root.mkdir()
    places = [root / f"top{number % tops}" / f"package{number}" for number in range(directories)]
    for place in places:
        place.mkdir(parents=True)
    for number in range(files):
        blob = store / f"{root.name}-{number}"
        blob.write_bytes(b"x" * 100)
        blob.chmod(0o444)
        os.link(blob, places[number % directories] / f"Source{number}.java")


def worker_writes(execroot: Path) -> None:
    """What the worker makes of it: three outputs, in two directories."""
    package = next(iter(sorted(execroot.iterdir()))) / "package0"
    for path in (package / "out.jar", package / "out.jdeps", execroot / "top1" / "out.params"):
        path.write_bytes(b"y" * 1000)
        if os.geteuid() == 0:
            os.chown(path, WORKER_ID, WORKER_ID)


def remove_outputs(tree: Path) -> None:
    for path in ("top0/package0/out.jar", "top0/package0/out.jdeps", "top1/out.params"):
        (tree / path).unlink()


def median_ms(turns: int, turn: Callable[[], Times]) -> Times:
    times = [turn() for _ in range(turns)]
    there, back, cpu = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
    return there, back, cpu


def timed(what: Callable[[], T]) -> tuple[T, float, float]:
    """The result, seconds that passed, and seconds of processor time."""
    cpu, begin = time.thread_time(), time.perf_counter()
    result = what()
    return result, time.perf_counter() - begin, time.thread_time() - cpu


def measure_strategy(base: Path, tree: Path, strategy: Strategy, turns: int) -> Times:
    ids = WORKER_ID if os.geteuid() == 0 else os.geteuid()
    execroot = ActionExecroot.make(str(base), "worker", uid=ids, gid=ids, strategy=strategy)

    def turn() -> Times:
        fd = os.open(tree, os.O_RDONLY | os.O_DIRECTORY)
        try:
            staged, stage_s, stage_cpu_s = timed(lambda: execroot.stage(fd))
            worker_writes(Path(execroot.path))
            collected, collect_s, collect_cpu_s = timed(staged.collect)
        finally:
            os.close(fd)
        assert collected.outputs == 3, collected
        remove_outputs(tree)
        return stage_s, collect_s, stage_cpu_s + collect_cpu_s

    try:
        turn()
        return median_ms(turns, turn)
    finally:
        execroot.remove()


def measure_floor(base: Path, tree: Path, turns: int) -> Times:
    there = base / "floor"
    there.mkdir()

    def move(source: Path, target: Path) -> None:
        source_fd, target_fd = os.open(source, os.O_RDONLY), os.open(target, os.O_RDONLY)
        for name in os.listdir(source_fd):
            os.rename(name, name, src_dir_fd=source_fd, dst_dir_fd=target_fd)
        os.close(source_fd)
        os.close(target_fd)

    def turn() -> Times:
        _, in_s, in_cpu_s = timed(lambda: move(tree, there))
        _, out_s, out_cpu_s = timed(lambda: move(there, tree))
        return in_s, out_s, in_cpu_s + out_cpu_s

    try:
        return median_ms(turns, turn)
    finally:
        there.rmdir()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=200, help="of each measurement (default: %(default)s)")
    parser.add_argument("--directory", help="where to make the trees (default: a temporary directory)")
    parser.add_argument("--json", metavar="FILE", help="keep the figures there")
    arguments = parser.parse_args()
    rows = []
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=arguments.directory)))
        base, store = root / "base", root / "store"
        base.mkdir()
        store.mkdir()
        for label, (files, directories, tops) in TREES.items():
            tree = root / label.replace(" ", "-")
            make_tree(tree, files, directories, tops, store)
            rows.append((label, "floor: plain rename", *measure_floor(base, tree, arguments.turns)))
            for strategy in Strategy:
                turns = arguments.turns if strategy is Strategy.RENAME else max(5, arguments.turns // 10)
                rows.append((label, strategy.value, *measure_strategy(base, tree, strategy, turns)))
            shutil.rmtree(tree)
    if arguments.json:
        names = ("tree", "how", "stage_ms", "collect_ms", "cpu_ms")
        figures = [dict(zip(names, row, strict=True)) for row in rows]
        Path(arguments.json).write_text(json.dumps(figures, indent=2) + "\n")
    print(f"{'tree':12} {'how':20} {'stage, ms':>10} {'collect, ms':>12} {'together':>9} {'CPU, ms':>8}")
    for tree_label, how, stage, collect, cpu in rows:
        print(f"{tree_label:12} {how:20} {stage:10.3f} {collect:12.3f} {stage + collect:9.3f} {cpu:8.3f}")


if __name__ == "__main__":
    main()
