"""A worker that answers with the very bytes of its request, and with a field that nobody knows.

Run as `python3 -I -S mirror_worker.py proto|json`. One request at a time; it echoes no ids.
"""

from __future__ import annotations

import json
import os
import sys


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def read_exactly(count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = os.read(0, count - len(data))
        if not more:
            os._exit(0)
        data += more
    return data


def serve_proto() -> None:
    while True:
        length = shift = 0
        while True:
            byte = read_exactly(1)[0]
            length |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        body = read_exactly(length)
        answer = b"\x12" + varint(len(body)) + body + b"\xa0\x06\x07"  # output; field 100 = 7
        os.write(1, varint(len(answer)) + answer)


def serve_json() -> None:
    text, decoder = "", json.JSONDecoder()
    while True:
        try:
            _, end = decoder.raw_decode(text := text.lstrip())
        except ValueError:
            data = os.read(0, 1 << 16)
            if not data:
                return
            text += data.decode()
            continue
        answer = {"exitCode": 0, "output": text[:end], "fromTheFuture": {"a": [7]}}
        text = text[end:]
        os.write(1, json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    serve_json() if sys.argv[1] == "json" else serve_proto()
