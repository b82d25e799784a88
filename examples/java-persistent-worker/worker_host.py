"""The other end of the worker protocol: starts a worker and sends it requests, as Bazel does.

Owns one worker process and the bytes to and from it. One thread, no asyncio: whoever calls `exchange`
waits for all answers. Knows nothing of what a request means.
"""

from __future__ import annotations

import os
import select
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from wrapper.errors import ProtocolError
from wrapper.worker_protocol import wire_format
from wrapper.worker_protocol.messages import WorkRequest, WorkResponse
from wrapper.worker_protocol.wire_format import WireFormat

READ_BYTES = 1 << 18
STDERR_TAIL_BYTES = 4000
CLOSE_TIMEOUT_S = 30.0


class HostError(Exception):
    """The worker did not do its part; the text says what, and ends with its stderr."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A response, how long it took from the request's first byte, and when it came (monotonic)."""

    response: WorkResponse
    latency_s: float
    arrived_at: float


class WorkerHost:
    """One running worker. Use it as a context manager: the worker is ended on the way out."""

    def __init__(
        self,
        argv: Sequence[str],
        *,
        protocol: WireFormat = WireFormat.PROTO,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._protocol = protocol
        self._decoder = wire_format.response_decoder(protocol)
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  # closed in `close`
        self.started_at = time.monotonic()
        self.process = subprocess.Popen(
            argv,
            cwd=cwd,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            bufsize=0,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._to_worker = self.process.stdin.fileno()
        self._from_worker = self.process.stdout.fileno()
        os.set_blocking(self._to_worker, False)
        self._next_id = 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.kill()

    def exchange(
        self,
        requests: Sequence[WorkRequest],
        *,
        in_flight: int | None = None,
        timeout_s: float = 120.0,
        on_answer: Callable[[Answer], None] | None = None,
    ) -> list[Answer]:
        """Send all requests and return their answers in the requests' order.

        With `in_flight` the requests get ids of their own and up to that many are unanswered at a time
        (multiplex); without it they go one at a time with id 0 (singleplex). `timeout_s` is the longest
        silence of the worker. Raises HostError if it is silent, ends, or answers what was not asked.
        """
        answers: list[Answer | None] = [None] * len(requests)
        open_requests: dict[int, tuple[int, float]] = {}
        unsent = memoryview(b"")
        sent = done = 0
        deadline = time.monotonic() + timeout_s
        while done < len(requests):
            while sent < len(requests) and len(open_requests) < (in_flight or 1):
                request = requests[sent]
                request.pb.request_id = 0 if in_flight is None else self._new_id()
                open_requests[request.pb.request_id] = (sent, time.monotonic())
                unsent = memoryview(bytes(unsent) + wire_format.encode_request(self._protocol, request))
                sent += 1
            unsent = self._move_bytes(unsent, deadline, timeout_s)
            while (response := self._next_response()) is not None:
                now = time.monotonic()
                opened = open_requests.pop(response.pb.request_id, None)
                if opened is None:
                    raise self._error(f"an answer with id {response.pb.request_id}, which nobody asked for")
                index, sent_at = opened
                answer = Answer(response, now - sent_at, now)
                answers[index] = answer
                done += 1
                deadline = now + timeout_s
                if on_answer is not None:
                    on_answer(answer)
        return [answer for answer in answers if answer is not None]

    def close(self) -> int:
        """End of input; waits for the worker's end and returns its exit code."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            return self.process.wait(CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise self._error(f"no end within {CLOSE_TIMEOUT_S:.0f} s after its input ended") from None
        finally:
            self.kill()

    def kill(self) -> None:
        """End the worker whatever it does. Safe to repeat."""
        if self.process.poll() is None:
            # TERM first: a wrapper must be able to end its own workers.
            self.process.terminate()
            try:
                self.process.wait(CLOSE_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self._stderr):
            if stream is not None:
                stream.close()

    def stderr_tail(self) -> str:
        """The last of what the worker wrote to its standard error."""
        size = os.fstat(self._stderr.fileno()).st_size
        tail = os.pread(self._stderr.fileno(), STDERR_TAIL_BYTES, max(0, size - STDERR_TAIL_BYTES))
        return tail.decode("utf-8", "replace")

    def _new_id(self) -> int:
        self._next_id += 1
        return self._next_id - 1

    def _move_bytes(self, unsent: memoryview, deadline: float, timeout_s: float) -> memoryview:
        """Wait until bytes can be moved in either direction, and move them; returns what is unsent."""
        wait_s = deadline - time.monotonic()
        if wait_s <= 0:
            raise self._error(f"no answer for {timeout_s:.0f} s")
        writable_wanted = [self._to_worker] if unsent else []
        readable, writable, _ = select.select([self._from_worker], writable_wanted, [], wait_s)
        if writable:
            try:
                unsent = unsent[os.write(self._to_worker, unsent) :]
            except BrokenPipeError:
                raise self._error("it closed its input") from None
        if readable:
            data = os.read(self._from_worker, READ_BYTES)
            if not data:
                raise self._error("it closed its output with requests unanswered")
            self._decoder.feed(data)
        return unsent

    def _next_response(self) -> WorkResponse | None:
        try:
            return self._decoder.next_message()
        except ProtocolError as error:
            raise self._error(f"its output is not the protocol: {error}") from error

    def _error(self, what: str) -> HostError:
        try:
            ended = f" (exit code {self.process.wait(0.5)})"
        except subprocess.TimeoutExpired:
            ended = ""
        return HostError(f"worker {self.process.args!r}{ended}: {what}\n{self.stderr_tail()}")
