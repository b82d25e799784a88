"""A worker host that may do everything wrong: any bytes, any time, any end.

Owns one wrapper process and its three streams. Where `worker_host.py` of the example plays a good host,
this one is for the tests of what a bad one, or a bad tool, leads to.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from wrapper.worker_protocol.messages import WorkRequest, WorkResponse
from wrapper.worker_protocol.wire_format import WireFormat, encode_request, response_decoder

WORKERS = Path(__file__).resolve().parents[1] / "workers"
PATIENCE_S = 60.0
"""How long anything may take before it counts as a hang."""


def echo_tool(*flags: str) -> list[str]:
    """The command of the scriptable worker."""
    return [sys.executable, "-I", "-S", str(WORKERS / "echo_worker.py"), *flags, "--persistent_worker"]


def until(condition: Callable[[], object], what: str, *, within_s: float = PATIENCE_S) -> None:
    """Wait until something holds that nothing announces."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_s:.0f} s: {what}"
        time.sleep(0.005)


def ask(*arguments: str | bytes, request_id: int = 0, sandbox_dir: str = "") -> WorkRequest:
    """A request in plain words."""
    return WorkRequest.of(
        arguments=[os.fsencode(argument) for argument in arguments],
        request_id=request_id,
        sandbox_dir=os.fsencode(sandbox_dir),
    )


def cancel(request_id: int) -> WorkRequest:
    return WorkRequest.of(request_id=request_id, cancel=True)


def configured(folder: Path, sections: str) -> tuple[str, ...]:
    """Options for a pool with these sections, as JSON5 without the outer braces."""
    file = folder / "pools.json5"
    file.write_text(f"{{pools: [{{name: 'p', language: 'custom(x)', worker_command: ['x'], {sections}}}]}}")
    return "--config", str(file)


class RawHost:
    """The wrapper in front of `tool`, as a context manager: at the end nothing of it may be left.

    `argv` instead of `tool`: the whole command line of the wrapper. `env`: the whole environment, to
    which a TMPDIR of the test's own is added. `stdin` and `stdout`: descriptors instead of our pipes.
    """

    def __init__(
        self,
        tool: Sequence[str],
        *options: str,
        cwd: Path,
        upstream: WireFormat = WireFormat.PROTO,
        env: Mapping[str, str] | None = None,
        argv: Sequence[str] | None = None,
        stdin: int = subprocess.PIPE,
        stdout: int = subprocess.PIPE,
    ) -> None:
        self.upstream = upstream
        self.tmp = cwd / "host-tmp"
        self.tmp.mkdir(exist_ok=True)
        self._decoder = response_decoder(upstream)
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__
        self.raw = b""
        """What came on stdout, the first MiB of it."""
        self.process = subprocess.Popen(
            argv or [sys.executable, "-m", "wrapper", *options, "--", *tool],
            cwd=cwd,
            env={**(os.environ if env is None else env), "TMPDIR": str(self.tmp)},
            stdin=stdin,
            stdout=stdout,
            stderr=self._stderr,
            bufsize=0,
        )
        self._seen: dict[int, psutil.Process] = {}
        self._last_words = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.children()
            if kind is None and self.process.poll() is None:
                self.close_stdin()
                self.wait()
            if kind is None:
                self.assert_nothing_left()
        finally:
            if kind is not None:
                print(self.stderr())  # pytest shows it with the failure
            self.children()
            self.process.kill()
            self.process.wait()
            for child in self._seen.values():
                try:
                    child.kill()
                except psutil.NoSuchProcess:
                    pass
            self._last_words = self.stderr()
            for stream in (self.process.stdin, self.process.stdout, self._stderr):
                if stream is not None:
                    stream.close()

    # ---- to the wrapper ----------------------------------------------------------------------------

    @property
    def _to(self) -> int:
        assert self.process.stdin is not None
        return self.process.stdin.fileno()

    @property
    def _from(self) -> int:
        assert self.process.stdout is not None
        return self.process.stdout.fileno()

    def send(self, *requests: WorkRequest) -> None:
        """Whole frames."""
        self.send_bytes(b"".join(encode_request(self.upstream, request) for request in requests))

    def send_bytes(self, data: bytes) -> None:
        """Any bytes; answers that come meanwhile are kept, so that neither side can wait for the other."""
        os.set_blocking(self._to, False)
        unsent = memoryview(data)
        deadline = time.monotonic() + PATIENCE_S
        while unsent:
            readable, writable, _ = select.select([self._from], [self._to], [], 1.0)
            if readable and not self._read():
                raise AssertionError(f"the wrapper ended while it was sent requests:\n{self.stderr()}")
            if writable:
                unsent = unsent[os.write(self._to, unsent) :]
            assert time.monotonic() < deadline, "the wrapper does not read"

    def try_to_send_bytes(self, data: bytes, *, patience_s: float = 1.0) -> int:
        """As much as is taken without reading anything, until nothing is for a while; returns how much."""
        os.set_blocking(self._to, False)
        unsent = memoryview(data)
        try:
            while unsent and select.select([], [self._to], [], patience_s)[1]:
                unsent = unsent[os.write(self._to, unsent) :]
        except BrokenPipeError:
            pass  # the wrapper has seen enough
        return len(data) - len(unsent)

    def close_stdin(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()

    def close_stdout(self) -> None:
        if self.process.stdout is not None:
            self.process.stdout.close()

    def signal(self, number: signal.Signals) -> None:
        self.children()
        self.process.send_signal(number)

    # ---- from the wrapper --------------------------------------------------------------------------

    def _read(self) -> bytes:
        data = os.read(self._from, 1 << 18)
        if len(self.raw) < 1 << 20:
            self.raw += data
        self._decoder.feed(data)
        return data

    def receive(self, count: int, *, within_s: float = PATIENCE_S) -> list[WorkResponse]:
        """The next `count` answers, in the order in which they come."""
        answers: list[WorkResponse] = []
        deadline = time.monotonic() + within_s
        while len(answers) < count:
            answer = self._decoder.next_message()
            if answer is not None:
                answers.append(answer)
                continue
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._from], [], [], left)[0]:
                raise AssertionError(f"{len(answers)} of {count} answers came:\n{self.stderr()}")
            if not self._read():
                raise AssertionError(f"the wrapper ended after {len(answers)} answers:\n{self.stderr()}")
        return answers

    def exchange(self, *requests: WorkRequest) -> list[WorkResponse]:
        """Send all and receive as many answers; none may be left over. In the order in which they come."""
        self.send(*requests)
        answers = self.receive(len(requests))
        assert self._decoder.next_message() is None
        return answers

    def one(self, *arguments: str | bytes, request_id: int = 0, sandbox_dir: str = "") -> WorkResponse:
        """One request, one answer with its id."""
        (answer,) = self.exchange(ask(*arguments, request_id=request_id, sandbox_dir=sandbox_dir))
        assert answer.pb.request_id == request_id
        return answer

    def rest(self) -> list[WorkResponse]:
        """All answers up to the end of the stream, which must not come in the middle of one."""
        answers: list[WorkResponse] = []
        deadline = time.monotonic() + PATIENCE_S
        while True:
            while (answer := self._decoder.next_message()) is not None:
                answers.append(answer)
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._from], [], [], left)[0]:
                raise AssertionError(f"the wrapper did not end:\n{self.stderr()}")
            if not self._read():
                self._decoder.end_of_stream()
                return answers

    def stderr(self) -> str:
        """All that the wrapper wrote there; also after the end."""
        if self._stderr.closed:
            return self._last_words
        size = os.fstat(self._stderr.fileno()).st_size
        return os.pread(self._stderr.fileno(), size, 0).decode("utf-8", "replace")

    # ---- the processes -----------------------------------------------------------------------------

    def children(self) -> list[psutil.Process]:
        """All live descendants; each one ever seen must be gone at the end."""
        try:
            found = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        for child in found:
            self._seen[child.pid] = child
        return [child for child in found if _is_alive(child)]  # a tool need not reap what we killed

    def workers(self) -> list[int]:
        """Pids of the wrapper's own live children."""
        return sorted(child.pid for child in self.children() if _parent(child) == self.process.pid)

    def rss_mib(self) -> float:
        return float(psutil.Process(self.process.pid).memory_info().rss) / (1 << 20)

    def wait(self, *, within_s: float = PATIENCE_S) -> int:
        """The wrapper's exit code, once it has ended."""
        try:
            return self.process.wait(within_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end within {within_s:.0f} s:\n{self.stderr()}") from None

    def finish(self, expected_exit_code: int = 0) -> list[WorkResponse]:
        """End of input: the remaining answers, after a clean end."""
        self.children()
        self.close_stdin()
        answers = self.rest()
        assert self.wait() == expected_exit_code, self.stderr()
        return answers

    def seen_alive(self) -> list[psutil.Process]:
        """Those of all processes ever seen that still live."""
        return [child for child in self._seen.values() if _is_alive(child)]

    def assert_nothing_left(self) -> None:
        """No process that we ever saw, and no temporary file, outlives the wrapper."""
        alive = self.seen_alive()
        assert not alive, f"processes are left: {alive}\n{self.stderr()}"
        assert not list(self.tmp.iterdir()), f"temporary files are left: {list(self.tmp.rglob('*'))}"


def _parent(process: psutil.Process) -> int:
    try:
        return int(process.ppid())
    except psutil.NoSuchProcess:
        return 0


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def outputs(answers: Iterable[WorkResponse]) -> dict[int, bytes]:
    """Output by id, for answers with distinct ids that all are successes."""
    found: dict[int, bytes] = {}
    for answer in answers:
        assert answer.pb.exit_code == 0, answer.pb.output.decode("utf-8", "replace")
        assert answer.pb.request_id not in found, f"id {answer.pb.request_id} was answered twice"
        found[answer.pb.request_id] = answer.pb.output
    return found
