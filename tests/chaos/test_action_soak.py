"""Thousands of actions of all kinds, eight at once, through a whole node whose daemon is killed now and then.

Each action's outcome is compared with what a run without the wrapper gives; afterwards nothing may be left
and no blob of the CAS changed.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

import pytest

from tests.node.node import NodeAction, NodeResult
from tests.node.warm_node import KEY, WarmNode
from tests.support.action_world import needs_root

pytestmark = needs_root

AT_ONCE = 8
KILLS_EVERY_S = 4.0
HASHED = 40
"""So many actions are also run without the wrapper, to check the expectations themselves."""


@dataclass
class Case:
    kind: str
    action: NodeAction
    exit_code: int
    outputs: dict[str, bytes | str]
    cancel_after_s: float | None = None

    def is_right(self, result: NodeResult) -> bool:
        """Its outputs are those of a plain run, or it failed with a reason."""
        if self.kind == "timing out":
            return result.timed_out or self._was_lost(result)
        if result.cancelled:
            return self.kind == "cancelled"
        if self._was_lost(result):
            return True
        return (result.exit_code, result.outputs, result.error) == (self.exit_code, self.outputs, "")

    @staticmethod
    def _was_lost(result: NodeResult) -> bool:
        return result.exit_code is None and bool(result.error) and result.attempts == 4


def make_case(warm: WarmNode, number: int, dice: random.Random) -> Case:
    kinds = ["worker"] * 60 + ["one-shot"] * 12 + ["failing"] * 12 + ["cancelled"] * 8 + ["timing out"]
    kind = dice.choice([*kinds, "crashing", "garbage", "leaving", "leaving", "inputs' tool"])
    lines = [f"upper src/{number % 7} out/upper", f"write out/deep/{number} {number}", "link upper out/link"]
    inputs = {f"src/{number % 7}": f"text {number % 7}".encode(), f"more/{number}": os.urandom(8)}
    outputs: dict[str, bytes | str] = {
        "out/upper": f"TEXT {number % 7}".encode(),
        f"out/deep/{number}": str(number).encode(),
        "out/link": "-> upper",
    }
    fields: dict[str, Any] = {"inputs": inputs, "outputs": ["out"]}
    if kind == "failing":
        code = 1 + number % 100
        return Case(kind, warm.action(*lines, f"exit {code}", **fields), code, outputs)
    if kind == "cancelled":
        lines.insert(dice.randrange(len(lines)), "sleep 0.02")
        after_s = dice.choice([0.0, 0.002, 0.005, 0.01, 0.03])
        return Case(kind, warm.action(*lines, **fields), 0, outputs, after_s * dice.random() * 2)
    if kind == "timing out":
        return Case(kind, warm.action("sleep 60", timeout_s=0.3, tool=warm.tool("--slow")), 0, {})
    if kind in ("crashing", "garbage"):
        word = "crash" if kind == "crashing" else "garbage"
        return Case(kind, warm.action(*lines, word, tool=warm.tool("--ill"), **fields), 86, outputs)
    if kind == "leaving":
        return Case(kind, warm.action(*lines, "leave-process", **fields), 0, outputs)
    if kind == "inputs' tool":
        tool = ["/usr/bin/python3", "-I", "-S", "tool/action_worker.py"]
        inputs["tool/action_worker.py"] = (warm.tools / "action_worker.py").read_bytes()
        return Case(kind, warm.action(*lines, tool=tool, **fields), 0, outputs)
    if kind == "one-shot":
        action = warm.action(**fields)
        script = f"mkdir -p out; printf {number} > out/n; exit {number % 3}"
        action.argv = ["/bin/sh", "-c", script]
        action.properties = dice.choice([{}, KEY])
        return Case(kind, action, number % 3, {"out/n": str(number).encode()})
    return Case(kind, warm.action(*lines, **fields), 0, outputs)


class Killer:
    """Kills the daemon every few seconds, and starts the next."""

    def __init__(self, warm: WarmNode, seed: int) -> None:
        self._warm = warm
        self._dice = random.Random(seed)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="killer")
        self.kills = 0

    def _run(self) -> None:
        while not self._over.wait(KILLS_EVERY_S * (0.5 + self._dice.random())):
            process = self._warm.daemon.process
            assert process is not None
            process.send_signal(signal.SIGKILL)
            process.wait()
            self.kills += 1
            time.sleep(self._dice.random() * 0.3)
            self._warm.daemon.start()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def soak(count: int, seed: int) -> None:
    with WarmNode({"max_workers": 4, "limits": {"max_instances_per_key": 3}}) as warm:
        dice = random.Random(seed)
        cases = [make_case(warm, number, dice) for number in range(count)]
        for case in cases[:HASHED]:
            if case.kind != "timing out":
                assert case.is_right(warm.plain.run(case.action)), case
        seen: Counter[str] = Counter()
        wrong: list[tuple[Case, NodeResult]] = []

        def one(case: Case) -> None:
            result = warm.node.run(case.action, cancel_after_s=case.cancel_after_s)
            seen[f"{case.kind}: {outcome_of(result)}"] += 1
            if not case.is_right(result):
                wrong.append((case, result))

        begin = time.monotonic()
        with Killer(warm, seed) as killer, ThreadPoolExecutor(AT_ONCE) as threads:
            for _ in threads.map(one, cases):
                assert not wrong, wrong[0]
        print(f"{count} actions in {time.monotonic() - begin:.0f} s, {killer.kills} daemons killed")
        for what, number in sorted(seen.items()):
            print(f"  {number:6} {what}")
        warm.daemon.wait_ready()
        assert seen["worker: 0"] > count / 4
        assert any(what.startswith("cancelled: cancelled") for what in seen)
        assert any(what.startswith("timing out: timed out") for what in seen)
        assert killer.kills or count < 2000
        text = warm.daemon.log.read_text()
        assert "an error of the wrapper's own" not in text
        assert "Traceback" not in text
        served = text.count("worker started")
        assert served
        processes = warm.folder / "state" / "processes"
        assert len(list(processes.iterdir())) <= 1, "what killed daemons left is gone"


def outcome_of(result: NodeResult) -> str:
    if result.cancelled:
        return "cancelled"
    if result.timed_out:
        return "timed out"
    if result.exit_code is None:
        return "lost four times"
    again = f", attempt {result.attempts}" if result.attempts > 1 else ""
    return f"{min(result.exit_code, 1) if result.exit_code != 86 else 86}{again}"


@pytest.mark.e2e
def test_two_thousand_actions_come_out_as_without_the_wrapper() -> None:
    soak(2_000, 1)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", [2, 3])
def test_ten_thousand_actions_come_out_as_without_the_wrapper(seed: int) -> None:
    soak(5_000, seed)
