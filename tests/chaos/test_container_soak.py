"""Thousands of actions on four containers while all around them fails: nothing is mixed up, nothing stays.

Faults: a worker killed or stopped (SIGSTOP), the engine killed and started again, the wrapper itself killed
with SIGKILL and started again; and of the actions themselves, /tmp filled, memory exhausted, daemons left.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.cri import WORKERS, container_pool, engine_is_empty, leftovers_on_node
from tests.support.engine import PrivateContainerd

pytestmark = pytest.mark.engine

ROOT = Path(__file__).resolve().parents[2]
DRIVER = Path(__file__).with_name("container_driver.py")
HOSTILE = ["/usr/bin/python3", "-I", "-S", f"{WORKERS}/hostile_worker.py", "--persistent_worker"]
AT_ONCE = 6
PATIENCE_S = 120.0


@dataclass
class Ledger:
    """What the drivers have told."""

    begun: set[int] = field(default_factory=set)
    ended: dict[int, str] = field(default_factory=dict)
    workers: list[int] = field(default_factory=list)
    done: bool = False
    lost: set[int] = field(default_factory=set)
    """With a driver when that was killed."""

    def take(self, line: str) -> None:
        what, _, rest = line.partition(" ")
        if what == "worker":
            self.workers.append(int(rest))
        elif what == "begin":
            self.begun.add(int(rest))
        elif what == "end":
            number, _, outcome = rest.partition(" ")
            assert int(number) not in self.ended, f"request {number} was answered twice"
            self.ended[int(number)] = outcome
        elif what == "done":
            self.done = True

    @property
    def in_flight(self) -> set[int]:
        return self.begun - self.ended.keys() - self.lost


class Soak:
    def __init__(self, engine: PrivateContainerd, folder: Path, total: int, seed: int) -> None:
        self.engine = engine
        self.folder = folder
        self.total = total
        self.random = random.Random(seed)
        self.ledger = Ledger()
        self.faults: dict[str, int] = {}
        self.config = folder / "pools.json5"
        document = container_pool(
            engine,
            folder,
            worker_command=HOSTILE,
            max_workers=4,
            isolation={"memory_limit_in_bytes": 256 << 20, "tmp_limit_mb": 16},
            lifecycle={"max_jobs_per_worker": 150},
            limits={"max_instances_per_key": 4, "start_instead_after_ms": 50},
        )
        self.config.write_text(json.dumps(document))
        blob = folder / "work" / "blob"
        blob.write_text("content of the blob")
        blob.chmod(0o444)
        self.blob = blob
        self.digest = hashlib.sha256(blob.read_bytes()).hexdigest()

    def run(self) -> None:
        next_number = 0
        while next_number < self.total:
            kill_at = next_number + self.random.randrange(300, 900)
            next_number = self._drive(next_number, kill_at)
        self._drive(self.total, None, count=0)  # a last start removes what the killed ones have left

    def _drive(self, first: int, kill_at: int | None, count: int | None = None) -> int:
        """Run a driver from `first` on, with faults; returns the first request that nobody has begun.

        It is killed when `kill_at` requests were answered in all, if it lives so long.
        """
        ledger = self.ledger
        ledger.done, ledger.workers = False, []
        count = self.total - first if count is None else count
        argv = [str(self.config), str(self.folder / "work"), str(first), str(count), str(AT_ONCE)]
        with (
            open(self.folder / "driver.log", "ab") as log,
            subprocess.Popen(
                [sys.executable, str(DRIVER), *argv],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            ) as driver,
        ):
            assert driver.stdout is not None
            next_fault = first + self.random.randrange(20, 60)
            heard = time.monotonic()
            for line in driver.stdout:
                ledger.take(line.rstrip("\n"))
                now, heard = time.monotonic(), time.monotonic()
                assert now - heard < PATIENCE_S
                if kill_at is not None and len(ledger.ended) >= kill_at:
                    self._count("wrapper killed")
                    driver.kill()
                    kill_at = None
                elif len(ledger.ended) >= next_fault and ledger.workers:
                    next_fault += self.random.randrange(20, 60)
                    self._fault()
            code = driver.wait()
        ledger.lost |= ledger.in_flight
        assert ledger.done or code == -signal.SIGKILL, self._log()
        return max(ledger.begun, default=-1) + 1

    def _fault(self) -> None:
        kind = self.random.choice(["kill", "kill", "stop", "engine killed", "engine restarted"])
        self._count(kind)
        if kind == "engine killed":
            self.engine.kill()
            self.engine.start()
        elif kind == "engine restarted":
            self.engine.restart()
        else:
            number = signal.SIGKILL if kind == "kill" else signal.SIGSTOP
            try:
                os.kill(self.random.choice(self.ledger.workers[-4:]), number)
            except ProcessLookupError:
                pass

    def _count(self, kind: str) -> None:
        self.faults[kind] = self.faults.get(kind, 0) + 1

    def _log(self) -> str:
        return (self.folder / "driver.log").read_text(errors="replace")[-4000:]

    def check(self) -> None:
        ledger = self.ledger
        wrong = {number: said for number, said in ledger.ended.items() if said.startswith("WRONG")}
        assert wrong == {}
        assert ledger.ended.keys() | ledger.lost >= set(range(self.total)), "a request was never answered"
        failed = {number: said for number, said in ledger.ended.items() if said != "ok"}
        own_fault = {number for number in failed if number % 211 == 17}
        bound = AT_ONCE * sum(self.faults.values())
        assert len(failed.keys() - own_fault) <= bound, (failed, self.faults)
        assert len(ledger.lost) <= AT_ONCE * self.faults.get("wrapper killed", 0)
        assert len(self.faults) == 5, f"not every fault happened: {self.faults}"
        assert hashlib.sha256(self.blob.read_bytes()).hexdigest() == self.digest
        assert leftovers_on_node(self.folder) == []
        assert engine_is_empty(self.engine)
        assert sorted(path.name for path in (self.folder / "work").iterdir()) == sorted(
            {"blob", ".nativelink_worker_wrapper"}
            | {
                f"action-{number}"
                for number in ledger.lost
                if (self.folder / f"work/action-{number}").exists()
            }
        )


@pytest.mark.parametrize(
    "total", [3_000, pytest.param(10_000, marks=pytest.mark.nightly)], ids=["short", "long"]
)
def test_whatever_fails_around_them_actions_get_their_own_answers(
    engine: PrivateContainerd, tmp_path: Path, total: int
) -> None:
    soak = Soak(engine, tmp_path, total, seed=20_261_125)
    soak.run()
    soak.check()
