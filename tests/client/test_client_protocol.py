"""The daemon's side of the frames: any chunking equals whole, and what is wrong raises only ProtocolError."""

from __future__ import annotations

import itertools
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wrapper import client_protocol
from wrapper.client_protocol import (
    MAX_BODY_BYTES,
    MAX_MESSAGE_BYTES,
    MAX_NAME_BYTES,
    MAX_OUTPUT_BYTES,
    MAX_REASON_BYTES,
    MAX_STRINGS,
    MAX_TIMEOUT_MS,
    ActionRequest,
    Busy,
    End,
    Failure,
    FailureKind,
    OneShotReply,
    Output,
    Reply,
    ReplyDecoder,
    RequestDecoder,
    Taken,
    Waiting,
    encode_request,
    replies,
)
from wrapper.errors import SHOWN_BYTES, ProtocolError

# Any bytes but NUL, as the decoder returns them.
TEXT = st.binary(max_size=20).map(lambda b: b.replace(b"\0", b"").decode("utf-8", "surrogateescape"))
NAME = TEXT.map(lambda text: text.replace("=", "") or "N")
REQUESTS = st.builds(
    ActionRequest,
    argv=st.lists(TEXT, min_size=1, max_size=6).map(tuple),
    env=st.lists(st.tuples(NAME, TEXT), max_size=6).map(tuple),
    key=TEXT,
    tool=TEXT,
    protocol=TEXT,
    timeout_s=st.one_of(st.none(), st.integers(1, MAX_TIMEOUT_MS).map(lambda ms: ms / 1000)),
)
MESSAGES = st.text(max_size=20)
ENDINGS = st.one_of(
    st.builds(End, st.integers(-(2**31), 2**31 - 1)),
    st.builds(OneShotReply, MESSAGES),
    st.builds(Failure, st.sampled_from(FailureKind), MESSAGES, st.integers(1, 255)),
)
FRAMES = st.one_of(st.just(Waiting()), st.builds(Output, st.binary(min_size=1, max_size=30)))
CONVERSATIONS = st.builds(
    lambda waits, frames, ending: [*[Waiting()] * waits, Taken(), *frames, ending],
    st.integers(0, 3),
    st.lists(FRAMES, max_size=5),
    ENDINGS,
)
CUTS = st.lists(st.integers(0, 2000), max_size=12)


def cut(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(min(at, len(data)) for at in cuts), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


def encode(reply: Reply) -> bytes:
    match reply:
        case Waiting():
            return client_protocol.waiting()
        case Taken():
            return client_protocol.taken()
        case OneShotReply(reason):
            return client_protocol.one_shot(reason)
        case Busy(reason):
            return client_protocol.busy(reason)
        case Output(data):
            return client_protocol.output(data)
        case End(exit_code):
            return client_protocol.end(exit_code)
        case Failure(kind, message, exit_code):
            return client_protocol.failure(kind, message, exit_code)


def decode(chunks: list[bytes]) -> ActionRequest | None:
    decoder = RequestDecoder()
    found = [request for chunk in chunks if (request := decoder.feed(chunk)) is not None]
    return found[0] if found else None


# ---- requests --------------------------------------------------------------------------------------


@given(REQUESTS, CUTS)
def test_a_request_comes_out_as_it_went_in_however_the_stream_is_cut(
    request: ActionRequest, cuts: list[int]
) -> None:
    assert decode(cut(encode_request(request), cuts)) == request


@given(st.binary(max_size=200), CUTS)
def test_random_bytes_raise_nothing_but_protocol_errors(data: bytes, cuts: list[int]) -> None:
    for stream in (data, b"NLA1" + data, b"NLA1" + len(data).to_bytes(4, "little") + data):
        outcomes: list[int | None] = []
        for chunks in ([stream], cut(stream, cuts), [bytes((byte,)) for byte in stream]):
            try:
                decode(chunks)
                outcomes.append(None)
            except ProtocolError as error:
                outcomes.append(error.offset)
        assert outcomes[0] == outcomes[1] == outcomes[2]


@given(REQUESTS, st.integers(0, 400), st.integers(0, 255))
def test_a_request_with_one_byte_changed_raises_nothing_but_protocol_errors(
    request: ActionRequest, at: int, byte: int
) -> None:
    stream = bytearray(encode_request(request))
    stream[at % len(stream)] = byte
    try:
        decode([bytes(stream)])
    except ProtocolError:
        pass


def request(**values: Any) -> ActionRequest:
    return ActionRequest(**{"argv": ("x",), "env": (), "key": "k", **values})


def body(timeout_ms: int, argc: int, envc: int, *strings: bytes) -> bytes:
    """A request that need not be right."""
    counts = timeout_ms.to_bytes(8, "little") + argc.to_bytes(4, "little") + envc.to_bytes(4, "little")
    content = counts + b"".join(strings)
    return b"NLA1" + len(content).to_bytes(4, "little") + content


@pytest.mark.parametrize(
    ("stream", "words"),
    [
        (b"X", "begins with"),
        (b"NLA2", "begins with"),
        (b"NLA1\x0f\0\0\0", "the length of a request"),
        (b"NLA1\x01\0\x80\0", "the length of a request"),
        (b"NLA1\xff\xff\xff\xff", "the length of a request"),
        (body(MAX_TIMEOUT_MS + 1, 1, 0, b"\0\0\0x\0"), "time-out"),
        (body(0, 0, 0, b"\0\0\0"), "1 to 65536 arguments"),
        (body(0, 65537, 0, b"\0" * 65540), "1 to 65536 arguments"),
        (body(0, 1, 65537, b"\0" * 65541), "at most 65536 variables"),
        (body(0, 0xFFFFFFFF, 0xFFFFFFFF, b"\0"), "arguments"),
        (body(0, 1, 0), "4 strings"),
        (body(0, 1, 0, b"\0\0\0x"), "4 strings"),
        (body(0, 1, 0, b"\0\0\0\0x"), "4 strings"),
        (body(0, 1, 0, b"\0\0\0x\0\0"), "4 strings"),
        (body(0, 1, 1, b"\0\0\0x\0NAME\0"), "NAME=value"),
        (body(0, 1, 1, b"\0\0\0x\0=value\0"), "NAME=value"),
        (body(0, 1, 0, b"k" * 4097 + b"\0\0\0x\0"), "at most 4096 bytes"),
        (body(0, 1, 0, b"\0\0" + b"k" * 4097 + b"\0x\0"), "at most 4096 bytes"),
        (body(0, 1, 0, b"\0\0\0x\0") + b"!", "nothing after the request"),
    ],
)
def test_a_wrong_request_is_told_and_stays_wrong(stream: bytes, words: str) -> None:
    decoder = RequestDecoder()
    with pytest.raises(ProtocolError, match=words) as first:
        decoder.feed(stream)
    assert len(first.value.seen) <= SHOWN_BYTES
    for data in (b"x", b"", None):
        with pytest.raises(ProtocolError) as again:
            decoder.end_of_stream() if data is None else decoder.feed(data)
        assert again.value is first.value


def test_every_bound_can_be_reached() -> None:
    name = "é" * (MAX_NAME_BYTES // 2)
    largest = [
        request(timeout_s=MAX_TIMEOUT_MS / 1000),
        request(key=name, tool=name, protocol=name),
        request(argv=("",) * MAX_STRINGS, env=(("a", ""),) * MAX_STRINGS),
        request(argv=("x" * (MAX_BODY_BYTES - 16 - 5),)),
    ]
    for one in largest:
        assert decode([encode_request(one)]) == one


@pytest.mark.parametrize(
    "wrong",
    [
        {"timeout_s": (MAX_TIMEOUT_MS + 1) / 1000},
        {"key": "x" * (MAX_NAME_BYTES + 1)},
        {"argv": ()},
        {"argv": ("",) * (MAX_STRINGS + 1)},
        {"env": (("a", ""),) * (MAX_STRINGS + 1)},
        {"argv": ("x" * (MAX_BODY_BYTES - 16 - 4),)},
        {"argv": ("x\0y",)},
        {"env": (("", "x"),)},
        {"env": (("a=b", "x"),)},
    ],
)
def test_what_no_decoder_would_take_is_not_encoded(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"too large|NUL|no name"):
        encode_request(request(**wrong))


def test_a_request_that_does_not_end_is_an_error_at_the_end_of_the_stream() -> None:
    stream = encode_request(request())
    for length in range(len(stream)):
        decoder = RequestDecoder()
        assert decoder.feed(stream[:length]) is None
        assert not decoder.is_complete
        with pytest.raises(ProtocolError, match="a whole request"):
            decoder.end_of_stream()
    decoder = RequestDecoder()
    assert decoder.feed(stream) is not None
    assert decoder.is_complete
    decoder.end_of_stream()
    assert decoder.feed(b"") is None
    with pytest.raises(ProtocolError, match="nothing after the request") as caught:
        decoder.feed(b"more")
    assert caught.value.offset == len(stream)


def test_a_length_alone_takes_no_memory() -> None:
    decoder = RequestDecoder()
    decoder.feed(b"NLA1" + MAX_BODY_BYTES.to_bytes(4, "little"))
    tracemalloc.start()
    try:
        decoder.feed(b"x" * 1000)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


# ---- replies ---------------------------------------------------------------------------------------


@given(CONVERSATIONS, CUTS)
def test_replies_come_out_as_they_went_in_however_the_stream_is_cut(
    conversation: list[Reply], cuts: list[int]
) -> None:
    stream = b"".join(map(encode, conversation))
    assert replies(ReplyDecoder(), cut(stream, cuts)) == conversation
    decoder = ReplyDecoder()
    with pytest.raises(ProtocolError, match="nothing after the last frame"):
        replies(decoder, [stream + b"W"])
    assert decoder.is_over


@given(st.binary(max_size=200), CUTS)
def test_random_replies_raise_nothing_but_protocol_errors(data: bytes, cuts: list[int]) -> None:
    for stream in (data, b"T\0\0\0\0" + data):
        outcomes: list[int | None] = []
        for chunks in ([stream], cut(stream, cuts), [bytes((byte,)) for byte in stream]):
            try:
                replies(ReplyDecoder(), chunks)
                outcomes.append(None)
            except ProtocolError as error:
                outcomes.append(error.offset)
        assert outcomes[0] == outcomes[1] == outcomes[2]


def test_output_of_any_size_is_cut_into_frames() -> None:
    assert client_protocol.output(b"") == b""
    for size in (1, MAX_OUTPUT_BYTES, MAX_OUTPUT_BYTES + 1, 3 * MAX_OUTPUT_BYTES):
        data = bytes(size)
        frames = replies(ReplyDecoder(), [client_protocol.taken() + client_protocol.output(data)])[1:]
        assert len(frames) == -(-size // MAX_OUTPUT_BYTES)
        assert b"".join(frame.data for frame in frames if isinstance(frame, Output)) == data


def test_a_text_that_is_too_long_is_cut_between_characters() -> None:
    for encoded, most in (
        (client_protocol.one_shot("x" + "é" * MAX_REASON_BYTES), MAX_REASON_BYTES),
        (client_protocol.busy("x" + "é" * MAX_REASON_BYTES), MAX_REASON_BYTES),
        (client_protocol.failure(FailureKind.LOST, "x" + "é" * MAX_MESSAGE_BYTES), MAX_MESSAGE_BYTES),
    ):
        [reply] = replies(ReplyDecoder(), [encoded])
        assert not isinstance(reply, Waiting | Taken | Output | End)
        text = reply.message if isinstance(reply, Failure) else reply.reason
        assert text == "x" + "é" * ((most - 1) // 2)


@pytest.mark.parametrize(
    ("kind", "exit_code"), [(FailureKind.REFUSED, 0), (FailureKind.REFUSED, 256), (FailureKind.LOST, -1)]
)
def test_a_failure_cannot_look_like_a_success(kind: FailureKind, exit_code: int) -> None:
    with pytest.raises(ValueError, match="no exit code"):
        client_protocol.failure(kind, "x", exit_code)
