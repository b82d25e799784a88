"""A tool that does what its flagfile says, as a persistent worker or once: the outputs are the same.

Run as `python3 -I -S action_worker.py [--json] [--persistent_worker] @FLAGS`. Lines of the flagfile:
copy IN OUT, upper IN OUT, write OUT TEXT, link TARGET OUT, mkdir DIR, print TEXT, exit N, sleep S, spin S,
crash, garbage, leave-process, need-digest PATH. `print-count` prints how many requests it has served, and is
for tests of workers only.
"""

from __future__ import annotations

import os
import sys
import time


class Crash(Exception):
    pass


def perform(lines: list[str], digests: dict[str, bytes], served: int) -> tuple[int, str]:
    """Exit code and output."""
    said: list[str] = []
    for line in lines:
        word, _, rest = line.partition(" ")
        first, _, second = rest.partition(" ")
        if word in ("copy", "upper"):
            with open(first, "rb") as source:
                data = source.read()
            put(second, data.upper() if word == "upper" else data)
        elif word == "write":
            put(first, second.encode())
        elif word == "link":
            os.makedirs(os.path.dirname(second) or ".", exist_ok=True)
            os.symlink(first, second)
        elif word == "mkdir":
            os.makedirs(first)
        elif word == "print":
            said.append(rest)
        elif word == "print-count":
            said.append(str(served))
        elif word == "exit":
            return int(first), "\n".join(said)
        elif word == "sleep":
            time.sleep(float(first))
        elif word == "spin":
            until = time.monotonic() + float(first)
            while time.monotonic() < until:
                pass
        elif word == "crash":
            raise Crash
        elif word == "garbage":
            os.write(1, b"\xff this is not the protocol\n" * 3)
            raise Crash
        elif word == "leave-process":
            leave_process()
        elif word == "need-digest":
            if not digests.get(first):
                return 3, f"the digest of {first} is missing"
        elif word:
            return 2, f"unknown command {word!r}"
    return 0, "\n".join(said)


def put(path: str, data: bytes) -> None:
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "wb") as target:
        target.write(data)


def leave_process() -> None:
    """A daemon of its own session that keeps nothing of ours open but its working directory."""
    if os.fork() == 0:
        os.setsid()
        null = os.open("/dev/null", os.O_RDWR)
        for fd in range(3):
            os.dup2(null, fd)
        time.sleep(3)
        os._exit(0)


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


class ProtoStream:
    """WorkRequests in, WorkResponses out, length-delimited protobuf."""

    def __init__(self) -> None:
        self.data = b""

    def _fill(self, count: int) -> bool:
        while len(self.data) < count:
            more = os.read(0, 1 << 20)
            if not more:
                return False
            self.data += more
        return True

    def read(self) -> tuple[int, list[str], dict[str, bytes]] | None:
        at = 1
        while True:
            if not self._fill(at):
                return None
            if self.data[at - 1] < 128:
                break
            at += 1
        length, at = self.number(self.data, 0)
        if not self._fill(at + length):
            return None
        body, self.data = self.data[at : at + length], self.data[at + length :]
        request_id, arguments, digests = 0, [], {}
        for field, value in self.fields(body):
            if field == 1:
                arguments.append(os.fsdecode(value))
            elif field == 2:
                parts = dict(self.fields(value))
                digests[os.fsdecode(parts.get(1, b""))] = parts.get(2, b"")
            elif field == 3:
                request_id = value
        return request_id, arguments, digests

    def fields(self, body: bytes):  # type: ignore[no-untyped-def]
        at = 0
        while at < len(body):
            tag, at = self.number(body, at)
            value, at = self.number(body, at)
            if tag & 7 == 2:
                yield tag >> 3, body[at : at + value]
                at += value
            else:
                yield tag >> 3, value

    @staticmethod
    def number(data: bytes, at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            byte = data[at]
            value |= (byte & 127) << shift
            shift += 7
            at += 1
            if byte < 128:
                return value, at

    def write(self, request_id: int, code: int, output: str) -> None:
        text = output.encode()
        body = b"\x08" + varint(code) + b"\x12" + varint(len(text)) + text + b"\x18" + varint(request_id)
        os.write(1, varint(len(body)) + body)


class JsonStream:
    """The same as JSON, one object a line."""

    def read(self) -> tuple[int, list[str], dict[str, bytes]] | None:
        import json

        line = sys.stdin.readline()
        if not line.strip():
            return None
        request = json.loads(line)
        digests = {one["path"]: one.get("digest", "").encode() for one in request.get("inputs", [])}
        return request.get("requestId", 0), request.get("arguments", []), digests

    def write(self, request_id: int, code: int, output: str) -> None:
        import json

        answer = {"exitCode": code, "output": output, "requestId": request_id}
        os.write(1, json.dumps(answer).encode() + b"\n")


def serve(stream: ProtoStream | JsonStream) -> None:
    served = 0
    while (request := stream.read()) is not None:
        served += 1
        request_id, lines, digests = request
        try:
            code, output = perform(lines, digests, served)
        except OSError as error:
            code, output = 1, str(error)
        stream.write(request_id, code, output)


def once(arguments: list[str]) -> int:
    lines: list[str] = []
    for argument in arguments:
        if argument.startswith("@"):
            with open(argument[1:], encoding="utf-8") as file:
                lines += file.read().splitlines()
    try:
        code, output = perform(lines, {}, 0)
    except OSError as error:
        code, output = 1, str(error)
    sys.stderr.write(output)
    return code


def main() -> int:
    arguments = sys.argv[1:]
    try:
        if "--persistent_worker" in arguments:
            serve(JsonStream() if "--json" in arguments else ProtoStream())
            return 0
        return once(arguments)
    except Crash:
        return 86


if __name__ == "__main__":
    sys.exit(main())
