"""A worker that echoes its arguments, and misbehaves exactly as told. Standard library only.

Run it as `python3 -I -S echo_worker.py [flags]`. A good answer is exit code 0 and the output
`expected_output(arguments)`, so that a wrong answer, or an answer to another request, is seen.

Flags say what the worker does every so often; arguments of a request say what it does with that
request: --die[=CODE] --garbage --sleep-ms=N --exit=N --big=N --answer-twice --wrong-id --hang
--leave-child --leave-daemon --leave-tmp[=NAME] --stderr=TEXT --print-env=NAME --print-cwd
--read=PATH --write=PATH --count.
"""

from __future__ import annotations

import os
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:  # `typing` would double the time to start
    from collections.abc import Iterator
    from contextlib import AbstractContextManager


def expected_output(arguments: list[bytes]) -> bytes:
    """What a correct answer to a request without special arguments holds."""
    return b"echo:" + b" ".join(arguments)


class Request:
    """The fields of a WorkRequest that this worker looks at."""

    def __init__(self) -> None:
        self.arguments: list[bytes] = []
        self.inputs = 0
        self.request_id = 0
        self.cancel = False
        self.sandbox_dir = b""


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def read_varint(data: bytes, at: int) -> tuple[int, int] | None:
    value = shift = 0
    while at < len(data):
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
    return None


def must_varint(data: bytes, at: int) -> tuple[int, int]:
    found = read_varint(data, at)
    if found is None:
        raise ValueError("truncated message")
    return found


def parse_proto(data: bytes) -> Request:
    request, at = Request(), 0
    while at < len(data):
        key, at = must_varint(data, at)
        if key & 7 == 2:
            size, at = must_varint(data, at)
            value, at = data[at : at + size], at + size
            if key >> 3 == 1:
                request.arguments.append(value)
            elif key >> 3 == 2:
                request.inputs += 1
            elif key >> 3 == 6:
                request.sandbox_dir = value
        elif key & 7 == 0:
            number, at = must_varint(data, at)
            if key >> 3 == 3:
                request.request_id = number - (1 << 64) if number >> 63 else number
            elif key >> 3 == 4:
                request.cancel = bool(number)
        else:
            raise ValueError(f"wire type {key & 7}")
    return request


def proto_answer(exit_code: int, output: bytes, request_id: int, was_cancelled: bool) -> bytes:
    body = b""
    if exit_code:
        body += b"\x08" + varint(exit_code)
    if output:
        body += b"\x12" + varint(len(output)) + output
    if request_id:
        body += b"\x18" + varint(request_id)
    if was_cancelled:
        body += b"\x20\x01"
    return varint(len(body)) + body


class Worker:
    def __init__(self, flags: list[str]) -> None:
        self.json = False
        self.echo_ids = True
        self.multiplex = False
        self.cancel = False
        self.every: dict[str, int] = {}
        self.delay_s = 0.0
        self.always: set[str] = set()
        self.exit_code = 0
        self.newline = True
        self.count = 0
        self.cancelled: set[int] = set()
        self.running: set[int] = set()
        it = iter(flags)
        for flag in it:
            if flag in ("--persistent_worker", "--proto"):
                pass
            elif flag == "--json":
                self.json = True
            elif flag in ("--echo-ids", "--no-echo-ids"):
                self.echo_ids = flag == "--echo-ids"
            elif flag in ("--multiplex", "--cancel"):
                setattr(self, flag[2:], True)
            elif flag == "--no-newline":
                self.newline = False
            elif flag == "--die-after" or flag.endswith("-every"):
                self.every[flag[2:]] = int(next(it))
            elif flag == "--delay-ms":
                self.delay_s = int(next(it)) / 1000
            elif flag == "--start-delay-ms":
                time.sleep(int(next(it)) / 1000)
            elif flag in ("--leave-child", "--leave-daemon", "--leave-tmp"):
                self.always.add(flag)
            elif flag == "--stderr":
                sys.stderr.write(next(it))
                sys.stderr.flush()
            elif flag == "--exit-code":
                self.exit_code = int(next(it))
            elif flag == "--exit-at-once":
                os._exit(int(next(it)))
            elif flag == "--ignore-sigterm":
                import signal

                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            elif flag == "--ignore-eof":
                self.always.add(flag)
            elif flag == "--own-child":
                leave_child(False)
            elif flag == "--own-tmp":
                leave_tmp(next(it))
            elif flag == "--garbage-at-start":
                write(b"Hello from a chatty tool!\n")
            else:
                sys.stderr.write(f"echo_worker: unknown flag {flag!r}\n")
                os._exit(64)

    def due(self, what: str) -> bool:
        every = self.every.get(what)
        return every is not None and self.count % every == 0

    def requests(self) -> Iterator[Request]:
        if self.json:
            yield from self.json_requests()
            return
        pending = b""
        while True:
            head = read_varint(pending, 0)
            if head is not None and len(pending) >= sum(head):
                size, start = head
                yield parse_proto(pending[start : start + size])
                pending = pending[start + size :]
                continue
            data = os.read(0, 1 << 20)
            if not data:
                return
            pending += data

    def json_requests(self) -> Iterator[Request]:
        import json

        decoder = json.JSONDecoder()
        pending = ""
        while True:
            pending = pending.lstrip()
            try:
                message, end = decoder.raw_decode(pending)
            except ValueError:
                data = os.read(0, 1 << 20)
                if not data:
                    return
                pending += data.decode("utf-8", "surrogateescape")
                continue
            pending = pending[end:]
            request = Request()
            request.arguments = [a.encode("utf-8", "surrogateescape") for a in message.get("arguments", [])]
            request.inputs = len(message.get("inputs", []))
            request.request_id = message.get("requestId", 0)
            request.cancel = message.get("cancel", False)
            request.sandbox_dir = message.get("sandboxDir", "").encode("utf-8", "surrogateescape")
            yield request

    def frame(self, exit_code: int, output: bytes, request_id: int, was_cancelled: bool = False) -> bytes:
        if not self.echo_ids:
            request_id = 0
        if not self.json:
            return proto_answer(exit_code, output, request_id, was_cancelled)
        import json

        message: dict[str, object] = {"exitCode": exit_code, "output": output.decode("utf-8", "replace")}
        if request_id:
            message["requestId"] = request_id
        if was_cancelled:
            message["wasCancelled"] = True
        return json.dumps(message).encode() + (b"\n" if self.newline else b"")

    def handle(self, request: Request) -> None:
        self.count += 1
        count = self.count
        arguments = {a.split(b"=", 1)[0]: a.split(b"=", 1)[-1] for a in request.arguments if a[:2] == b"--"}
        if self.every.get("die-after", count) < count or self.due("die-every") or b"--die" in arguments:
            code = arguments.get(b"--die", b"")
            os._exit(int(code) if code.isdigit() else 9)
        if self.due("hang-every") or b"--hang" in arguments:
            time.sleep(1e6)
        if self.due("garbage-every") or b"--garbage" in arguments:
            write(b"\nException in thread main: this is not protocol\n")
            return
        if not self.wait(request, self.delay_s + int(arguments.get(b"--sleep-ms", b"0")) / 1000):
            write(self.frame(0, b"", request.request_id, True))
            return
        exit_code = int(arguments.get(b"--exit", b"%d" % self.exit_code))
        output = self.act(arguments, request)
        if b"--count" in arguments:
            output += b"\ncount:%d" % count
        if b"--big" in arguments:
            output += b"\n" + b"x" * int(arguments[b"--big"])
        answer = self.frame(exit_code, output, request.request_id + (b"--wrong-id" in arguments))
        if self.due("answer-twice-every") or b"--answer-twice" in arguments:
            answer += answer
        write(answer)

    def wait(self, request: Request, delay_s: float) -> bool:
        """False: cancelled meanwhile."""
        end = time.monotonic() + delay_s
        while (left := end - time.monotonic()) > 0:
            if request.request_id in self.cancelled:
                self.cancelled.discard(request.request_id)
                return False
            time.sleep(min(left, 0.002) if self.cancel else left)
        return True

    def act(self, arguments: dict[bytes, bytes], request: Request) -> bytes:
        output = expected_output(request.arguments)
        if b"--leave-child" in arguments or "--leave-child" in self.always:
            leave_child(False)
        if b"--leave-daemon" in arguments or "--leave-daemon" in self.always:
            leave_child(True)
        if b"--leave-tmp" in arguments or "--leave-tmp" in self.always:
            name = os.fsdecode(arguments.get(b"--leave-tmp", b"left"))
            leave_tmp(f"left-{self.count}" if name.startswith("--") else name)
        if b"--stderr" in arguments:
            os.write(2, arguments[b"--stderr"] + b"\n")
        if b"--print-env" in arguments:
            output += b"\n" + os.environb.get(arguments[b"--print-env"], b"<unset>")
        if b"--print-cwd" in arguments:
            output += b"\n" + os.getcwdb()
        if b"--print-sandbox-dir" in arguments:
            output += b"\n" + request.sandbox_dir
        if b"--read" in arguments:
            try:
                with open(os.path.join(request.sandbox_dir, arguments[b"--read"]), "rb") as file:
                    output += b"\n" + file.read()
            except OSError as error:
                output += b"\n" + str(error).encode()
        if b"--write" in arguments:
            with open(os.path.join(request.sandbox_dir, arguments[b"--write"]), "wb") as file:
                file.write(expected_output(request.arguments))
        return output

    def serve(self) -> None:
        threaded = self.multiplex or self.cancel
        if threaded:
            import threading
        for request in self.requests():
            if request.cancel:
                if self.cancel and request.request_id in self.running:
                    self.cancelled.add(request.request_id)
                continue
            if not threaded:
                self.handle(request)
                continue
            self.running.add(request.request_id)
            threading.Thread(target=self.handle_and_forget, args=(request,)).start()
        if "--ignore-eof" in self.always:
            time.sleep(1e6)

    def handle_and_forget(self, request: Request) -> None:
        try:
            self.handle(request)
        finally:
            self.running.discard(request.request_id)
            self.cancelled.discard(request.request_id)


def write(data: bytes) -> None:
    """All in one call if the pipe has room, so that answers of several threads do not mix."""
    with WRITE_LOCK:
        while data:
            data = data[os.write(1, data) :]


def leave_child(daemon: bool) -> None:
    """A child that outlives the request; as a daemon in a session of its own, with no environment."""
    read_end, write_end = os.pipe()
    if os.fork() == 0:
        os.close(read_end)
        if daemon:
            os.setsid()
            if os.fork() != 0:
                os._exit(0)
        null = os.open("/dev/null", os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.set_inheritable(write_end, False)
        os.execve("/bin/sleep", ["sleep", "100000"], {})
    os.close(write_end)
    os.read(read_end, 1)  # end of file: the child has become `sleep`
    os.close(read_end)
    if daemon:
        os.wait()


def leave_tmp(name: str) -> None:
    path = os.path.join(os.environ.get("TMPDIR", "/tmp"), name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as file:
        file.write("left behind\n")


class NoLock:
    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


WRITE_LOCK: AbstractContextManager[object] = NoLock()

if __name__ == "__main__":
    worker = Worker(sys.argv[1:])
    if worker.multiplex or worker.cancel:
        import threading

        WRITE_LOCK = threading.Lock()
    worker.serve()
