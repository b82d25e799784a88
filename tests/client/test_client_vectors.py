"""`vectors.json` holds the clients and the daemon's side together: the same bytes mean the same to all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.client_world import ClientWorld
from wrapper.client_protocol import (
    ActionRequest,
    ReplyDecoder,
    RequestDecoder,
    encode_request,
)
from wrapper.errors import ProtocolError

VECTORS = json.loads(Path(__file__).with_name("vectors.json").read_text())
requests = pytest.mark.parametrize("vector", VECTORS["requests"], ids=lambda vector: vector["name"])
replies = pytest.mark.parametrize("vector", VECTORS["replies"], ids=lambda vector: vector["name"])
SIDE_CHANNELS = {
    None: None,
    "timeout": '{"failure": "timeout"}',
    "rerun": "nativelink_worker_entrypoint: the infrastructure failed, run this action again\n",
}
Vector = dict[str, Any]


def request_of(vector: Vector) -> ActionRequest:
    return ActionRequest(
        argv=tuple(vector["argv"]),
        env=tuple((name, value) for name, value in vector["env"]),
        key=vector["key"],
        tool=vector["tool"],
        protocol=vector["protocol"],
        timeout_s=vector["timeout_ms"] / 1000 or None,
    )


@requests
def test_the_daemon_reads_what_the_vectors_say(vector: Vector) -> None:
    assert RequestDecoder().feed(bytes.fromhex(vector["bytes"])) == request_of(vector)
    assert encode_request(request_of(vector)).hex() == vector["bytes"]


@requests
def test_a_client_sends_what_the_vectors_say(world: ClientWorld, vector: Vector) -> None:
    env = {
        "NL_WORKER_KEY": vector["key"],
        **dict(vector["env"]),
        "NL_WORKER_TOOL": vector["tool"],
        "NL_WORKER_PROTOCOL": vector["protocol"],
        "NL_TIMEOUT_MS": str(vector["timeout_ms"]),
        "NL_ACTION_DIR": "/tmp",
        "NL_SIDE_CHANNEL": "",
    }
    process = world.start(vector["argv"], env)
    expected = bytes.fromhex(vector["bytes"])
    received = b""
    connection = world.accept()
    while len(received) < len(expected) and (chunk := connection.socket.recv(1 << 16)):
        received += chunk
    assert received == expected
    assert process.poll() is None, "it waits for an answer"


@replies
def test_a_decoder_takes_replies_as_the_vectors_say(vector: Vector) -> None:
    data = bytes.fromhex(vector["bytes"])
    for chunks in ([data], [bytes((byte,)) for byte in data]):
        decoder = ReplyDecoder()
        seen = []
        try:
            for chunk in chunks:
                decoder.feed(chunk)
                while (reply := decoder.next_reply()) is not None:
                    seen.append(repr(reply))
        except ProtocolError:
            seen.append("error")
        assert seen == vector["replies"]


@pytest.mark.parametrize("at_once", [True, False], ids=["whole", "byte by byte"])
@replies
def test_a_client_does_what_the_vectors_say(world: ClientWorld, vector: Vector, at_once: bool) -> None:
    data = bytes.fromhex(vector["bytes"])
    process = world.start(["/bin/echo", "direct"])
    connection = world.accept()
    connection.request()
    try:
        connection.send(*([data] if at_once else [bytes((byte,)) for byte in data]))
    except BrokenPipeError:
        assert not at_once, "it may end as soon as it has understood"
    connection.close()
    ended = world.end(process)
    assert ended == (
        vector["code"],
        b"direct\n" if vector["runs_directly"] else b"",
        vector["stderr"].encode(),
    )
    assert world.side_channel() == SIDE_CHANNELS[vector["side_channel"]]


@pytest.mark.parametrize(
    "name", ["answered with output and an exit code", "timed out", "lost", "one-shot after TAKEN", "busy"]
)
def test_a_stream_that_ends_anywhere_never_makes_two_runs_of_a_taken_action(
    world: ClientWorld, name: str
) -> None:
    [vector] = [vector for vector in VECTORS["replies"] if vector["name"] == name]
    data = bytes.fromhex(vector["bytes"])
    for length in range(len(data)):
        decoder = ReplyDecoder()
        decoder.feed(data[:length])
        while decoder.next_reply() is not None:
            pass
        ended = world.converse(data[:length])
        assert ended.code == (75 if decoder.is_taken else 0), (length, ended)
        assert ended.stdout == (b"" if decoder.is_taken else b"direct\n"), (length, ended)
        assert world.side_channel() == SIDE_CHANNELS["rerun" if decoder.is_taken else None]


@pytest.mark.parametrize("name", ["answered with output and an exit code", "refused"])
def test_one_wrong_byte_anywhere_never_makes_two_runs_of_a_taken_action(
    world: ClientWorld, name: str
) -> None:
    [vector] = [vector for vector in VECTORS["replies"] if vector["name"] == name]
    for at in range(len(data := bytes.fromhex(vector["bytes"]))):
        wrong = data[:at] + bytes((data[at] ^ 0x55,)) + data[at + 1 :]
        decoder = ReplyDecoder()
        decoder.feed(wrong)
        try:
            while decoder.next_reply() is not None:
                pass
        except ProtocolError:
            pass
        ended = world.converse(wrong)
        assert ended.code >= 0
        assert ended.stdout == (b"" if decoder.is_taken or decoder.is_over else b"direct\n"), (at, ended)
