"""The bytes between us and one worker: its pipes, its death, its frames' time-out.

Turns a WorkRequest into the one WorkResponse that belongs to it, or into an error that says why there
is none. Knows nothing of pools and leases: whoever made it is told once, through `on_lost`, that the
worker cannot be spoken to any more, before any request in flight is failed; and through `on_stray`
that it said something nobody asked for.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

from wrapper.errors import WorkerDied, WorkerProtocolError, WrapperError
from wrapper.pool.worker_states import StopReason
from wrapper.runtime.base import ExitStatus, WorkerProcess
from wrapper.worker_protocol.exchange import Answered, Broken, SentRequest, Stray, WorkerExchange
from wrapper.worker_protocol.messages import WorkRequest, WorkResponse

OnAnswer = Callable[[WorkResponse | WrapperError], None]
"""Called once, from the event loop, with the answer or with why there is none. Must not raise."""

READ_BYTES = 64 * 1024
"""Above 128 KiB each read would map and unmap its buffer: 18 µs, ten times the read itself."""
_EXIT_AFTER_EOF_S = 1.0
"""How long a worker that closed its stdout has to die, so that the error can tell how it did."""


class WorkerConnection:
    """See the module. `description` names the worker in errors."""

    def __init__(
        self,
        process: WorkerProcess,
        exchange: WorkerExchange,
        *,
        description: str,
        frame_timeout_s: float,
        on_lost: Callable[[StopReason, WrapperError], None],
        on_stray: Callable[[str], None],
    ) -> None:
        self.process = process
        self.exchange = exchange
        self._description = description
        self._frame_timeout_s = frame_timeout_s
        self._on_lost = on_lost
        self._on_stray = on_stray
        self.loop = asyncio.get_running_loop()
        self._answers: dict[SentRequest, OnAnswer] = {}
        self._unsent = bytearray()
        self._frame_timer: asyncio.TimerHandle | None = None
        self._eof_timer: asyncio.TimerHandle | None = None
        self._sent_any = False
        self._answered_any = False
        self._closed = False
        self.stdout_ended = False
        """It is dead, which will be known in a moment, or as good as."""
        self.strays = 0
        self._misdirected = 0
        """Strays that may be some request's answer under a wrong id."""
        self._last_stray = ""
        self.lost: WrapperError | None = None
        self.loop.add_reader(process.stdout_fd, self._readable)
        process.exited.add_done_callback(self._exited)

    def request(self, request: WorkRequest, on_answer: OnAnswer) -> SentRequest:
        """Send a request. It ends with its WorkResponse, WorkerDied or WorkerProtocolError.

        A callback, not a future: a task's two extra turns of the event loop cost as much as all the rest
        of a request. Raises RequestRefused if the request cannot be put into the tool's format (nothing
        was sent), and what the worker was lost with if it was.
        """
        if self.lost is not None:
            raise self.lost
        sent, frame = self.exchange.send(request)
        self._answers[sent] = on_answer
        self._write(frame)
        if not self._sent_any:
            self._sent_any = True
            self.process.first_request_sent()
        return sent

    def forget(self, sent: SentRequest) -> None:
        """Whoever sent this no longer wants the answer; its callback will not be called."""
        self._answers.pop(sent, None)

    def cancel(self, sent: SentRequest) -> None:
        """Ask the worker to cancel a request, which still will be answered."""
        if self.lost is None and sent in self._answers and not sent.cancel_sent:
            self._write(self.exchange.cancel(sent))

    def is_silent(self) -> bool:
        """Whether the worker has said nothing that it was not asked for, up to this very moment."""
        if self.lost is None and not self._closed:
            self._readable()
        # In the middle of a frame it may be answering one of a multiplex worker's other requests.
        speaking = self.exchange.mid_frame and not self.exchange.in_flight
        return self.lost is None and not (self.strays or self.stdout_ended or speaking)

    def close(self) -> None:
        """Stop listening. Requests in flight, if there are any, fail as if the worker had died."""
        if self._closed:
            return
        self._stop_listening()
        self._fail_all(WorkerDied(f"{self._description} was stopped while a request was with it"))

    # ---- from the worker ---------------------------------------------------------------------------

    def _readable(self) -> None:
        try:
            data = os.read(self.process.stdout_fd, READ_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self._lose(StopReason.CRASH, WorkerDied(f"{self._description}: cannot be read: {error}"))
            return
        if not data:
            self._end_of_stream()
            return
        self._take(data)

    def _take(self, data: bytes) -> None:
        answered, strays, broken = [], [], None
        for received in self.exchange.receive(data):
            if isinstance(received, Answered):
                answered.append(received)
            elif isinstance(received, Stray):
                strays.append(received)
            else:
                broken = received
        # Counted before anybody gets an answer: its worker is cleaned right then, and is not silent.
        self.strays += len(strays) + (broken is not None)
        for received in answered:
            self._answered(received)
        for received in strays:
            self._stray(received)
        if broken is not None:
            self._broken(broken)
            return
        if self._misdirected:
            self._give_up_waiting()
            if self.lost is not None:
                return
        if self.exchange.mid_frame:
            if self._frame_timer is None:
                self._frame_timer = self.loop.call_later(self._frame_timeout_s, self._frame_overdue)
        elif self._frame_timer is not None:
            self._frame_timer.cancel()
            self._frame_timer = None

    def _answered(self, received: Answered) -> None:
        if not self._answered_any:
            self._answered_any = True
            self.process.first_answer_seen()
        if self._frame_timer is not None:
            self._frame_timer.cancel()
            self._frame_timer = None
        on_answer = self._answers.pop(received.sent, None)
        if on_answer is not None:
            on_answer(received.response)

    def _stray(self, stray: Stray) -> None:
        """An answer that belongs to nobody.

        With ids that are echoed the requests in flight are safe: their answers are told apart. But it
        may have been meant for one of them, which will not be answered again then: see `_give_up_waiting`.
        """
        self._on_stray(stray.description)
        self._last_stray = stray.description
        self._misdirected += not stray.repeats
        self._give_up_waiting()

    def _give_up_waiting(self) -> None:
        """No more requests in flight than answers that came under no right id: better none than a hang.

        The worker takes no new requests after a stray (it is not silent), so the others are answered first.
        """
        if self._answers and len(self._answers) <= self._misdirected:
            error = f"{self._description} sent {self._last_stray}"
            self._lose(StopReason.PROTOCOL_ERROR, WorkerProtocolError(error, stderr_tail=self._tail()))

    def _broken(self, broken: Broken) -> None:
        error = WorkerProtocolError(f"{self._description}: {broken.description}", stderr_tail=self._tail())
        self._lose(StopReason.PROTOCOL_ERROR, error)

    def _frame_overdue(self) -> None:
        self._frame_timer = None
        self._broken(self.exchange.frame_overdue(self._frame_timeout_s))

    def _end_of_stream(self) -> None:
        self.loop.remove_reader(self.process.stdout_fd)
        self.stdout_ended = True
        if self._eof_timer is None:
            self._eof_timer = self.loop.call_later(_EXIT_AFTER_EOF_S, self._closed_its_stdout)

    def _closed_its_stdout(self) -> None:
        self._lose(
            StopReason.PROTOCOL_ERROR,
            WorkerProtocolError(f"{self._description} closed its stdout", stderr_tail=self._tail()),
        )

    def _exited(self, exited: asyncio.Future[ExitStatus]) -> None:
        if self._closed or self.lost is not None:
            return
        while not self.stdout_ended and self.lost is None:  # what it said before it died still counts
            try:
                data = os.read(self.process.stdout_fd, READ_BYTES)
            except OSError:
                break
            if not data:
                break
            self._take(data)
        if self.lost is not None:
            return
        busy = " in the middle of a request" if self._answers else ""
        message = f"{self._description} died{busy}: {exited.result()}"
        cut = self.exchange.cut()
        if cut is not None:
            message += f"; it was writing: {cut.message}"
        self._lose(StopReason.CRASH, WorkerDied(message, stderr_tail=self._tail()))

    # ---- to the worker -----------------------------------------------------------------------------

    def _write(self, frame: bytes) -> None:
        """One call for the whole frame if the pipe takes it: some tools lose a frame that comes in pieces."""
        if self._unsent:
            self._unsent += frame
            return
        written = self._write_some(frame)
        if written < len(frame) and self.lost is None:
            self._unsent += memoryview(frame)[written:]
            self.loop.add_writer(self.process.stdin_fd, self._writable)

    def _writable(self) -> None:
        written = self._write_some(self._unsent)
        if self.lost is not None:
            return
        del self._unsent[:written]
        if not self._unsent:
            self.loop.remove_writer(self.process.stdin_fd)

    def _write_some(self, data: bytes | bytearray) -> int:
        try:
            return os.write(self.process.stdin_fd, data)
        except BlockingIOError:
            return 0
        except OSError:
            # It closed its stdin or is dead. In both cases its death will tell more than EPIPE does.
            self._unsent.clear()
            self.loop.remove_writer(self.process.stdin_fd)
            if self._eof_timer is None:
                self._eof_timer = self.loop.call_later(_EXIT_AFTER_EOF_S, self._closed_its_stdin)
            return len(data)

    def _closed_its_stdin(self) -> None:
        self._lose(
            StopReason.PROTOCOL_ERROR,
            WorkerProtocolError(f"{self._description} closed its stdin", stderr_tail=self._tail()),
        )

    # ---- the end -----------------------------------------------------------------------------------

    def _lose(self, reason: StopReason, error: WrapperError) -> None:
        if self._closed or self.lost is not None:
            return
        self.lost = error
        self._stop_listening()
        self._on_lost(reason, error)
        self._fail_all(error)

    def _stop_listening(self) -> None:
        self._closed = True
        for timer in (self._frame_timer, self._eof_timer):
            if timer is not None:
                timer.cancel()
        if self.process.stdout_fd >= 0:
            self.loop.remove_reader(self.process.stdout_fd)
        if self.process.stdin_fd >= 0:
            self.loop.remove_writer(self.process.stdin_fd)
        self.process.exited.remove_done_callback(self._exited)

    def _fail_all(self, error: WrapperError) -> None:
        answers, self._answers = self._answers, {}
        for on_answer in answers.values():
            on_answer(error)

    def _tail(self) -> bytes:
        return self.process.stderr_tail()
