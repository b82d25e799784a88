"""A conversation with one worker that takes nothing for granted: what was said, and when.

For `probe.py`. Unlike the pool's connection it judges nothing: answers come as they are, bytes that are no
answer are kept to be shown.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import deque

from wrapper.errors import ProtocolError
from wrapper.runtime.base import ExitStatus, WorkerSpec
from wrapper.runtime.local_process import LocalProcessRuntime, LocalWorker
from wrapper.worker_protocol.messages import WorkRequest, WorkResponse
from wrapper.worker_protocol.wire_format import WireFormat, request_encoder, response_decoder

_READ_BYTES = 64 * 1024


class ProbeWorker:
    """One started worker. Made by `start`; `stop` is owed."""

    def __init__(self, worker: LocalWorker, wire_format: WireFormat) -> None:
        self.worker = worker
        self.garbage = b""
        """The begin of what is not the protocol."""
        self._encode = request_encoder(wire_format)
        self._decoder = response_decoder(wire_format)
        self._answers: deque[WorkResponse] = deque()
        self._news = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(worker.stdout_fd, self._readable)
        worker.exited.add_done_callback(lambda _exited: self._news.set())

    @classmethod
    async def start(
        cls, runtime: LocalProcessRuntime, spec: WorkerSpec, wire_format: WireFormat
    ) -> ProbeWorker:
        """Raises WorkerStartFailed, RuntimeUnavailable."""
        return cls(await runtime.start(spec), wire_format)

    def _readable(self) -> None:
        try:
            data = os.read(self.worker.stdout_fd, _READ_BYTES)
        except BlockingIOError:
            return
        if not data:
            self._loop.remove_reader(self.worker.stdout_fd)
        elif self.garbage:
            self.garbage = (self.garbage + data)[:1024]
        else:
            try:
                self._decoder.feed(data)
                while (answer := self._decoder.next_message()) is not None:
                    self._answers.append(answer)
            except ProtocolError as error:
                self.garbage = error.seen or data[:1024]
        self._news.set()

    @property
    def has_died(self) -> bool:
        return self.worker.exited.done()

    def how_it_ended(self) -> str:
        """Its exit status, and the last line of its stderr."""
        status = str(self.worker.exited.result()) if self.has_died else "it lives"
        last = self.worker.stderr_tail().decode("utf-8", "replace").strip().rpartition("\n")[2]
        return f"{status}; its last line on stderr: {last}" if last else status

    async def send(self, request: WorkRequest) -> None:
        """All of it, or as much as it takes before it dies."""
        data = self._encode(request)
        while data and not self.has_died:
            try:
                data = data[os.write(self.worker.stdin_fd, data) :]
                self.worker.first_request_sent()
            except BlockingIOError:
                await asyncio.sleep(0.001)
            except BrokenPipeError:
                return

    async def answer(self, timeout_s: float) -> WorkResponse | None:
        """The next answer; None if there is none in time, or will never be."""
        deadline = time.monotonic() + timeout_s
        while not self._answers and not self.garbage:
            left = deadline - time.monotonic()
            if left <= 0 or self.has_died:
                return None
            self._news.clear()
            try:
                async with asyncio.timeout(left):
                    await self._news.wait()
            except TimeoutError:
                pass
        if not self._answers:
            return None
        self.worker.first_answer_seen()
        return self._answers.popleft()

    async def ask(self, request: WorkRequest, timeout_s: float) -> tuple[WorkResponse | None, float]:
        """The answer, and the seconds that it took."""
        begin = time.monotonic()
        await self.send(request)
        answer = await self.answer(timeout_s)
        return answer, time.monotonic() - begin

    async def ends_after(self, what: str, timeout_s: float) -> tuple[ExitStatus | None, float]:
        """How it ends after "EOF" or "SIGTERM", and after how long; None: it does not."""
        begin = time.monotonic()
        if what == "EOF":
            self.worker.close_stdin()
        else:
            os.kill(self.worker.pid, signal.SIGTERM)
        await asyncio.wait((self.worker.exited,), timeout=timeout_s)
        status = self.worker.exited.result() if self.has_died else None
        return status, time.monotonic() - begin

    async def stop(self) -> None:
        """End it, whatever it does."""
        if self.worker.stdout_fd >= 0:
            self._loop.remove_reader(self.worker.stdout_fd)
        await self.worker.stop(0.0)
