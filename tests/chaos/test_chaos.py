"""Worker mode under attack: whatever happens to its workers, each request is answered exactly once.

With its own right answer, or with a diagnosis. Nothing is left at the end. What is done to whom is
drawn from CHAOS_SEED (printed; a new one each time if it is not set); when it happens is up to the
machine, so a seed repeats the blows, not the interleaving.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tests.support.raw_host import PATIENCE_S, RawHost, ask, cancel, echo_tool, until
from tests.workers.echo_worker import expected_output
from wrapper.worker_protocol.messages import WorkResponse

IN_FLIGHT = 24
DIAGNOSES = (69, 70, 75, 76)
FAULTS = ("--die", "--die=0", "--garbage", "--wrong-id")
ODDITIES = ("--answer-twice", "--leave-child", "--leave-daemon", "--leave-tmp=a/b", "--exit=3")


def seed() -> int:
    chosen = int(os.environ.get("CHAOS_SEED") or random.SystemRandom().randrange(1 << 32))
    print(f"CHAOS_SEED={chosen}")
    return chosen


@dataclass
class Sent:
    """What is known of a request whose answer is awaited."""

    arguments: tuple[str, ...]
    cancelled: bool = False

    def is_right(self, answer: WorkResponse) -> bool:
        words = [argument.encode() for argument in self.arguments]
        expected = expected_output(words)
        for word in words:
            if word.startswith(b"--big="):
                expected += b"\n" + b"x" * int(word[6:])
        exit_code = 3 if "--exit=3" in self.arguments else 0
        return (answer.pb.exit_code, answer.pb.output) == (exit_code, expected)


@dataclass
class Storm:
    """One run: sends, strikes, and judges every answer."""

    host: RawHost
    rng: random.Random
    multiplex: bool = False
    open: dict[int, Sent] = field(default_factory=dict)
    stopped: psutil.Process | None = None
    right: int = 0
    right_at_last_blow: int = -1
    failed: list[WorkResponse] = field(default_factory=list)
    killed: list[psutil.Process] = field(default_factory=list)

    def run(self, count: int) -> None:
        sent = 0
        while sent < count or self.open:
            while sent < count and len(self.open) < IN_FLIGHT:
                sent += 1
                self.send(sent)
            if sent == count:
                self.resume()  # the last ones may be with the worker that stands still
            for answer in self.host.receive(1):
                self.judge(answer)
            self.strike()

    def send(self, number: int) -> None:
        words = ["right", str(number)]
        dice = self.rng.random()
        if dice < 0.05:
            # Of several requests that a tool has, one answered under another's id cannot be told from it.
            words.append(self.rng.choice(FAULTS[: 3 if self.multiplex else 4]))
        elif dice < 0.15:
            words.append(self.rng.choice(ODDITIES))
        elif dice < 0.25:
            words.append(f"--big={self.rng.choice((10, 70_000, 3_000_000))}")
        if self.rng.random() < 0.3:
            words.append(f"--sleep-ms={self.rng.randrange(20)}")
        self.open[number] = Sent(tuple(words))
        self.host.send(ask(*words, request_id=number))

    def judge(self, answer: WorkResponse) -> None:
        request = self.open.pop(answer.pb.request_id, None)
        assert request is not None, f"{answer!r}: nobody waits for it"
        if request.is_right(answer):
            self.right += 1
        elif answer.pb.was_cancelled:
            assert request.cancelled, f"{answer!r} to {request}, which nobody cancelled"
        else:
            assert answer.pb.exit_code in DIAGNOSES, f"{answer!r} to {request}"
            assert answer.pb.output.startswith(b"nativelink_worker_wrapper: worker "), answer.pb.output
            self.failed.append(answer)

    def strike(self) -> None:
        dice = self.rng.random()
        if dice < 0.04:
            self.kill()
        elif dice < 0.07:
            self.resume()
            self.stop_one()
        elif dice < 0.12:
            self.resume()
        elif dice < 0.20 and self.open:
            number = self.rng.choice(sorted(self.open))
            self.open[number].cancelled = True
            self.host.send(cancel(number))
        elif dice < 0.22:
            self.host.send(cancel(self.rng.randrange(1 << 30)))

    def victim(self) -> psutil.Process | None:
        """A worker, if any; not one that is not its program yet.

        Until then vfork lets it share the wrapper's memory, and the wrapper waits: if it were stopped
        then, so would be the whole wrapper, and with it this test, which starts it again after an answer.

        After each blow the others show first that they serve: workers that die one after the other
        before they have served make the pool refuse what waits, which is another test's subject.
        """
        if self.right == self.right_at_last_blow:
            return None
        self.right_at_last_blow = self.right
        for pid in sorted(self.host.workers(), key=lambda _: self.rng.random()):
            try:
                process = psutil.Process(pid)
                if "wrapper" not in process.cmdline():
                    return process
            except psutil.NoSuchProcess:
                continue
        return None

    def kill(self) -> None:
        victim = self.victim()
        if victim is not None:
            self.killed.append(victim)
            _signal(victim, signal.SIGKILL)

    def stop_one(self) -> None:
        self.stopped = self.victim()
        if self.stopped is not None:
            _signal(self.stopped, signal.SIGSTOP)

    def resume(self) -> None:
        if self.stopped is not None:
            if self.rng.random() < 0.5:
                self.killed.append(self.stopped)
                _signal(self.stopped, signal.SIGKILL)
            _signal(self.stopped, signal.SIGCONT)
            self.stopped = None


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        pass


KINDS = {
    "echoes-ids": ((), ()),
    "echoes-none": (("--no-echo-ids",), ()),
    "multiplex": (("--multiplex",), ("--tool-multiplex", "4")),
    "json": (("--json",), ("--tool-protocol", "json")),
    "cancels": (("--cancel",), ("--tool-cancel",)),
}


def storm(kind: str, count: int, folder: Path, rng: random.Random) -> None:
    flags, options = KINDS[kind]
    with RawHost(echo_tool(*flags), *options, "--max-instances", "4", cwd=folder) as host:
        weather = Storm(host, rng, multiplex=kind == "multiplex")
        weather.run(count)
        assert weather.right > count // 10, [bytes(answer.pb.output) for answer in weather.failed[:20]]
        weather.resume()
        # Their deaths are known to the wrapper when it has reaped them.
        assert not psutil.wait_procs(weather.killed, timeout=PATIENCE_S)[1]
        # It still works, and holds no more than its live workers need.
        until(lambda: host.one("after").pb.exit_code == 0, "an end of the refusals")
        for number in range(10):
            assert host.one("after", str(number)).pb.exit_code == 0
        until(lambda: fds(host) <= 20 + 8 * len(host.workers()), "descriptors are closed")
        assert host.finish() == []
        host.assert_nothing_left()


def fds(host: RawHost) -> int:
    return int(psutil.Process(host.process.pid).num_fds())


@pytest.mark.parametrize("kind", KINDS)
def test_every_request_is_answered_once_whatever_happens_to_the_workers(tmp_path: Path, kind: str) -> None:
    storm(kind, 250, tmp_path, random.Random(f"{seed()} {kind}"))


@pytest.mark.nightly
@pytest.mark.parametrize("kind", KINDS)
def test_every_request_is_answered_once_in_a_long_storm(tmp_path: Path, kind: str) -> None:
    storm(kind, 5_000, tmp_path, random.Random(f"{seed()} {kind} long"))


def test_a_wrapper_killed_in_a_storm_leaves_no_process_and_only_its_private_directory(tmp_path: Path) -> None:
    rng = random.Random(seed())
    with RawHost(echo_tool(), "--max-instances", "4", cwd=tmp_path) as host:
        weather = Storm(host, rng)
        for number in range(1, IN_FLIGHT + 1):
            weather.open[number] = Sent(("--sleep-ms=20",))
            host.send(ask("--sleep-ms=20", request_id=number))
        host.receive(rng.randrange(1, IN_FLIGHT))
        host.children()
        host.process.kill()
        host.wait()
        until(lambda: not host.seen_alive(), "the workers have seen the end of their input")
        left = list(host.tmp.iterdir())
        assert [directory.name[:5] for directory in left] in ([], ["nlww-"])
        for directory in left:
            remove(directory)


def test_a_disk_that_is_full_for_the_logs_costs_no_request(tmp_path: Path) -> None:
    # No file of the wrapper, nor of its tool, may grow beyond 8 blocks.
    limited = ["/bin/sh", "-c", 'ulimit -f 8; exec "$@"', "sh"]
    argv = [*limited, sys.executable, "-m", "wrapper", "--log-dir", str(tmp_path / "logs")]
    with RawHost([], argv=[*argv, "--", *echo_tool()], cwd=tmp_path) as host:
        for number in range(1, 40):
            answer = host.one("--stderr=" + "noise" * 200, request_id=number)
            assert answer.pb.exit_code == 0
        assert host.one("--die", request_id=99).pb.exit_code == 70
        assert host.one("after").pb.exit_code == 0


def test_a_full_tmpdir_fails_the_request_that_fills_it_and_is_empty_for_the_next(tmp_path: Path) -> None:
    script = tmp_path / "filler"
    script.write_text(
        f"#!{sys.executable}\nimport os, resource\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))\n"
        "while data := os.read(0, 65536):\n"
        "    number = data[data.rindex(b'\\x18') + 1]\n"
        "    names = ','.join(os.listdir(os.environ['TMPDIR'])).encode()\n"
        "    code = 0\n"
        "    if b'fill' in data:\n"
        "        try:\n"
        "            with open(os.environ['TMPDIR'] + '/big', 'wb', 0) as file:\n"
        "                while True: file.write(b'x' * 4096)\n"
        "        except OSError: code = 5\n"
        "    body = bytes([8, code, 0x12, len(names)]) + names + bytes([0x18, number])\n"
        "    os.write(1, bytes([len(body)]) + body)\n"
    )
    script.chmod(0o755)
    with RawHost([str(script), "--persistent_worker"], "--max-instances", "1", cwd=tmp_path) as host:
        host.one("look")  # what is there when it takes its first request counts as its own
        for _ in range(5):
            assert host.one("fill").pb.exit_code == 5
            answer = host.one("look").pb
            assert (answer.exit_code, answer.output) == (0, b"")


def remove(directory: Path) -> None:
    for path in sorted(directory.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    directory.rmdir()
