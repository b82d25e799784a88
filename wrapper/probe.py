"""`probe -- TOOL ARGS`: a conformance test for anybody's worker.

Owns the checks and what their outcomes mean; the conversation is `probe_worker.py`'s. Each check has a worker
of its own, so that what one of them breaks is no other's outcome. Rules are those of Bazel's worker protocol,
and what
hosts of workers do (docs/worker-mode.md).
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import TextIO

from wrapper.errors import RuntimeUnavailable, WorkerStartFailed
from wrapper.probe_worker import ProbeWorker
from wrapper.runtime.base import Language, WorkerSpec
from wrapper.runtime.local_process import LocalProcessRuntime
from wrapper.worker_protocol.messages import WorkRequest, WorkResponse
from wrapper.worker_protocol.wire_format import WireFormat

WARM_REQUESTS = 20
MEMORY_REQUESTS = 200
GROWTH_ALLOWED = 1.5
"""Resident memory after all requests over that after a quarter of them."""
END_TIMEOUT_S = 5.0
SETTLE_S = 0.1
STRANGER = b"--nlww-probe-no-such-option"
"""An argument that no tool knows: its request is another one, which most tools answer with an error."""


class Outcome(Enum):
    GOOD = "ok"
    NOTE = "note"
    """Worth knowing; a host can live with it."""
    BAD = "BAD"
    """A build with this worker can hang, fail or be wrong."""


@dataclass(frozen=True, slots=True)
class Verdict:
    check: str
    outcome: str
    says: str


@dataclass(frozen=True, slots=True)
class ProbeOptions:
    spec: WorkerSpec
    arguments: tuple[bytes, ...]
    """Of the request that every check sends."""
    inputs: tuple[tuple[bytes, bytes], ...] = ()
    touch: tuple[str, ...] = ()
    """Files whose modification time is moved between two requests."""
    timeout_s: float = 60.0
    """For one answer."""


async def probe(options: ProbeOptions, out: TextIO, *, as_json: bool) -> int:
    """Run all checks and print their verdicts; 0: a worker, 1: one with faults, 2: none.

    Raises WorkerStartFailed if the program cannot be run at all.
    """
    found: list[Verdict] = []

    def tell(verdict: Verdict) -> None:
        found.append(verdict)
        if not as_json:
            out.write(f"{verdict.outcome:<4} {verdict.check}: {verdict.says}\n")
            out.flush()

    runtime = LocalProcessRuntime()
    try:
        speaks = await _Probe(options, runtime, tell).run()
    finally:
        await runtime.close()
    bad = [verdict for verdict in found if verdict.outcome == Outcome.BAD.value]
    code = 2 if not speaks else 1 if bad else 0
    summary = {0: "a persistent worker", 1: f"a persistent worker with {len(bad)} faults", 2: "no worker"}[
        code
    ]
    if as_json:
        json.dump(
            {"summary": summary, "exit_code": code, "verdicts": [asdict(one) for one in found]}, out, indent=1
        )
        out.write("\n")
    else:
        out.write(f"{' '.join(options.spec.argv)} is {summary}.\n")
    return code


class _Probe:
    def __init__(
        self, options: ProbeOptions, runtime: LocalProcessRuntime, tell: Callable[[Verdict], None]
    ) -> None:
        self._options = options
        self._runtime = runtime
        self._tell = tell
        self._format = WireFormat.PROTO

    async def run(self) -> bool:
        """Whether it speaks the protocol at all."""
        formats = [one for one in WireFormat if await self._speaks(one)]
        if not formats:
            self._say("formats", Outcome.BAD, "neither proto nor JSON: it is no persistent worker")
            return False
        self._format = formats[0]
        names = {WireFormat.PROTO: "proto", WireFormat.JSON: "JSON"}
        self._say("formats", Outcome.GOOD, " and ".join(names[one] for one in formats))
        for check in (
            self._latency,
            self._ids,
            self._two_at_once,
            self._cancel,
            self._same_again,
            self._moved_times,
            self._digests,
            self._stray_output,
            self._memory,
        ):
            await self._alone(check)
        for what in ("EOF", "SIGTERM"):
            await self._end(what)
        return True

    def _say(self, check: str, outcome: Outcome, says: str) -> None:
        self._tell(Verdict(check, outcome.value, says))

    def _request(self, *more: bytes, request_id: int = 0, cancel: bool = False) -> WorkRequest:
        if cancel:
            return WorkRequest.of(request_id=request_id, cancel=True)
        return WorkRequest.of(
            arguments=[*self._options.arguments, *more], inputs=self._options.inputs, request_id=request_id
        )

    async def _start(self) -> ProbeWorker:
        return await ProbeWorker.start(self._runtime, self._options.spec, self._format)

    async def _alone(self, check: Callable[[ProbeWorker], Awaitable[None]]) -> None:
        """Run a check with a worker of its own; one that dies in it is a verdict."""
        try:
            worker = await self._start()
        except (WorkerStartFailed, RuntimeUnavailable) as error:
            self._say("start", Outcome.BAD, f"it started before, and does not now: {error.message}")
            return
        try:
            await check(worker)
        finally:
            await worker.stop()

    async def _ask(self, worker: ProbeWorker, check: str, request: WorkRequest) -> WorkResponse | None:
        answer, _ = await worker.ask(request, self._options.timeout_s)
        if answer is None:
            self._say(check, Outcome.BAD, _silence(worker, self._options.timeout_s))
        return answer

    # ---- the checks ------------------------------------------------------------------------------------

    async def _speaks(self, wire_format: WireFormat) -> bool:
        worker = await ProbeWorker.start(self._runtime, self._options.spec, wire_format)
        try:
            await worker.send(self._request())
            deadline = time.monotonic() + self._options.timeout_s
            idle = 0
            while (
                time.monotonic() < deadline and idle < 6
            ):  # one that waits for the rest of a frame does nothing
                before = worker.worker.cpu_s()
                answer = await worker.answer(0.5)
                if answer is not None:
                    return True
                if worker.garbage or worker.has_died:
                    return False
                idle = idle + 1 if worker.worker.cpu_s() == before else 0
            return False
        finally:
            await worker.stop()

    async def _latency(self, worker: ProbeWorker) -> None:
        answer, first_s = await worker.ask(self._request(), self._options.timeout_s)
        if answer is None:
            self._say("latency", Outcome.BAD, _silence(worker, self._options.timeout_s))
            return
        warm = []
        for _ in range(WARM_REQUESTS):
            answer, seconds = await worker.ask(self._request(), self._options.timeout_s)
            if answer is None:
                self._say("latency", Outcome.BAD, _silence(worker, self._options.timeout_s))
                return
            warm.append(seconds)
        median_s = statistics.median(warm)
        self._say(
            "latency",
            Outcome.GOOD,
            f"{first_s * 1000:.0f} ms to the first answer, {median_s * 1000:.1f} ms when it is warm "
            f"({first_s / median_s:.0f} times less)",
        )

    async def _ids(self, worker: ProbeWorker) -> None:
        answer = await self._ask(worker, "request ids", self._request(request_id=17))
        if answer is None:
            return
        seen = answer.pb.request_id
        if seen == 17:
            self._say("request ids", Outcome.GOOD, "echoed")
        elif seen == 0:
            self._say(
                "request ids",
                Outcome.NOTE,
                "not echoed: singleplex only, and a late answer looks like the next",
            )
        else:
            self._say("request ids", Outcome.BAD, f"17 was answered as {seen}")

    async def _two_at_once(self, worker: ProbeWorker) -> None:
        for request_id in (1, 2):
            await worker.send(self._request(request_id=request_id))
        seen: list[int] = []
        for _ in range(2):
            answer = await worker.answer(self._options.timeout_s)
            if answer is None:
                says = f"singleplex only: of two requests {len(seen)} was answered, {_silence(worker, 0)}"
                self._say("two at once", Outcome.NOTE, says)  # no host sends it two unless it is told to
                return
            seen.append(answer.pb.request_id)
        if sorted(seen) == [1, 2]:
            self._say(
                "two at once", Outcome.GOOD, "each is answered under its id: it may be used as multiplex"
            )
        else:
            ids = " and ".join(map(str, seen))
            self._say("two at once", Outcome.NOTE, f"answered as {ids}: singleplex only")

    async def _cancel(self, worker: ProbeWorker) -> None:
        await worker.send(self._request(request_id=1))
        await worker.send(self._request(request_id=1, cancel=True))
        answer = await worker.answer(self._options.timeout_s)
        if answer is None:
            self._say("cancel", Outcome.BAD, f"after a cancel: {_silence(worker, self._options.timeout_s)}")
            return
        second = await worker.answer(SETTLE_S)
        if second is not None:
            self._say("cancel", Outcome.NOTE, "a cancel is answered beside its request: do not enable it")
        elif answer.pb.was_cancelled:
            self._say("cancel", Outcome.GOOD, "understood")
        else:
            self._say("cancel", Outcome.NOTE, "ignored, the request was answered as ever: do not enable it")

    async def _same_again(self, worker: ProbeWorker) -> None:
        """State that leaks from one request into the next: the same twice, then another one in between."""
        first = await self._ask(worker, "state", self._request())
        again = await self._ask(worker, "state", self._request()) if first else None
        if first is None or again is None:
            return
        if _said(first) != _said(again):
            self._say(
                "state", Outcome.BAD, f"the same request twice: first {_shown(first)}, then {_shown(again)}"
            )
            return
        other = await self._ask(worker, "state", self._request(STRANGER))
        after = await self._ask(worker, "state", self._request()) if other else None
        if other is None or after is None:
            return
        if _said(after) != _said(first):
            self._say(
                "state",
                Outcome.BAD,
                f"another request in between changes the answer: first {_shown(first)}, then {_shown(after)}",
            )
            return
        self._say("state", Outcome.GOOD, "the same request has the same answer, also after another one")

    async def _moved_times(self, worker: ProbeWorker) -> None:
        if not self._options.touch:
            return
        first = await self._ask(worker, "moved times", self._request())
        for path in self._options.touch:
            os.utime(path)
        after = await self._ask(worker, "moved times", self._request()) if first else None
        if first is None or after is None:
            return
        if _said(after) == _said(first):
            self._say(
                "moved times", Outcome.GOOD, "inputs of the same content with new times: the same answer"
            )
        else:
            self._say(
                "moved times", Outcome.BAD, f"new times of inputs change {_shown(first)} to {_shown(after)}"
            )

    async def _digests(self, worker: ProbeWorker) -> None:
        answer = await self._ask(worker, "digests", self._request())
        if answer is None:
            return
        text = answer.pb.output.lower()
        if answer.pb.exit_code and b"digest" in text and not self._options.inputs:
            self._say("digests", Outcome.NOTE, f"it wants the digests of its inputs: {_shown(answer)}")
        else:
            self._say("digests", Outcome.GOOD, "not asked for")

    async def _stray_output(self, worker: ProbeWorker) -> None:
        for request_id in (1, 2, 3):
            if await self._ask(worker, "stray output", self._request(request_id=request_id)) is None:
                return
        stray = await worker.answer(SETTLE_S)
        if worker.garbage:
            self._say(
                "stray output", Outcome.BAD, f"bytes on stdout that are no answer: {worker.garbage[:60]!r}"
            )
        elif stray is not None:
            self._say("stray output", Outcome.BAD, f"an answer that nobody asked for: {_shown(stray)}")
        else:
            self._say("stray output", Outcome.GOOD, "none")

    async def _memory(self, worker: ProbeWorker) -> None:
        early = 0
        for number in range(MEMORY_REQUESTS):
            if await self._ask(worker, "memory", self._request()) is None:
                return
            if number == MEMORY_REQUESTS // 4:
                early = worker.worker.memory_bytes()
        late = worker.worker.memory_bytes()
        says = (
            f"{early >> 20} MiB after {MEMORY_REQUESTS // 4} requests, {late >> 20} after {MEMORY_REQUESTS}"
        )
        grows = early and late / early > GROWTH_ALLOWED and late - early > 16 << 20
        self._say("memory", Outcome.NOTE if grows else Outcome.GOOD, says)

    async def _end(self, what: str) -> None:
        worker = await self._start()
        try:
            if await self._ask(worker, what, self._request()) is None:
                return
            status, seconds = await worker.ends_after(what, END_TIMEOUT_S)
            if status is None:
                self._say(
                    what, Outcome.BAD, f"it still runs {END_TIMEOUT_S:g} s after that: hosts wait for its end"
                )
            else:
                self._say(what, Outcome.GOOD, f"it ends with {status} after {seconds * 1000:.0f} ms")
        finally:
            await worker.stop()


def _said(answer: WorkResponse) -> tuple[int, bytes]:
    return answer.pb.exit_code, answer.pb.output


def _shown(answer: WorkResponse) -> str:
    text = answer.pb.output[:80].decode("utf-8", "replace")
    return f"exit code {answer.pb.exit_code} with {text!r}"


def _silence(worker: ProbeWorker, timeout_s: float) -> str:
    if worker.garbage:
        return f"bytes on stdout that are no answer: {worker.garbage[:60]!r}"
    if worker.has_died:
        return f"it died: {worker.how_it_ended()}"
    return f"no answer within {timeout_s:g} s" if timeout_s else "no answer"


def options_of(
    tool: Sequence[str], cwd: str, *, inputs: Sequence[str], touch: Sequence[str], timeout_s: float
) -> ProbeOptions:
    """A tool's command line split as Bazel splits it: flagfiles are the request's. Raises ConfigError."""
    from wrapper.flagfiles import Argument, expand
    from wrapper.input_digests import InputDigests
    from wrapper.runtime.spawn import resolve_program

    startup: list[str] = []
    arguments: list[Argument] = []
    for word in tool:
        (arguments.append(Argument.of(word)) if _is_requests(word) else startup.append(word))
    fd = os.open(cwd, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        texts = expand(arguments, fd)
        digests = dict(InputDigests().inputs_of(fd)) if inputs else {}
    finally:
        os.close(fd)
    env = {name: value for name, value in os.environ.items() if name != "TMPDIR"}
    program = resolve_program(startup[0], env, cwd)
    name = os.path.basename(program)
    language = {"java": Language.JVM, "node": Language.NODEJS}.get(name, Language.CUSTOM)
    spec = WorkerSpec(name, (program, *startup[1:], "--persistent_worker"), env, cwd, language)
    return ProbeOptions(
        spec,
        tuple(os.fsencode(text) for text in texts),
        tuple((os.fsencode(path), digests.get(path, b"")) for path in inputs),
        tuple(touch),
        timeout_s,
    )


def _is_requests(word: str) -> bool:
    return word.startswith(("@", "-flagfile=", "--flagfile=")) and word not in (
        "@",
        "-flagfile=",
        "--flagfile=",
    )


def run(options: ProbeOptions, out: TextIO, *, as_json: bool) -> int:
    return asyncio.run(probe(options, out, as_json=as_json))
