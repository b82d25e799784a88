#!/usr/bin/env python3
"""Atheris: whatever a client sends, in whatever pieces, the daemon's decoder raises only ProtocolError.

And what it accepts is what it says it is: encoded again it is the same bytes. `run` starts it. An input is
one byte for the size of the pieces, and the stream; or, if that byte is odd, the body of a request without
its header, which the fuzzer would seldom get right.
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports():
    from wrapper.client_protocol import MAGIC, ActionRequest, RequestDecoder, encode_request
    from wrapper.errors import ProtocolError


def decode(stream: bytes, piece: int) -> ActionRequest | str:
    """The request, "incomplete", or where the error is."""
    decoder = RequestDecoder()
    found: ActionRequest | None = None
    try:
        for at in range(0, len(stream), piece):
            found = decoder.feed(stream[at : at + piece]) or found
    except ProtocolError as error:
        return f"error at byte {error.offset}"
    return found or "incomplete"


def test_one_input(data: bytes) -> None:
    if not data:
        return
    stream = data[1:]
    if data[0] % 2:
        stream = MAGIC + len(stream).to_bytes(4, "little") + stream
    whole = decode(stream, len(stream) or 1)
    pieces = decode(stream, data[0] // 2 % 16 + 1)
    if whole != pieces:
        raise AssertionError(f"whole: {whole!r}, in pieces: {pieces!r}")
    if isinstance(whole, ActionRequest) and encode_request(whole) != stream:
        raise AssertionError(f"{whole!r} is encoded as other bytes")


if __name__ == "__main__":
    atheris.Setup(sys.argv, test_one_input)
    atheris.Fuzz()
