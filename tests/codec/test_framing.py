"""What holds for both formats: chunking, errors, limits, and work that is linear in the bytes."""

from __future__ import annotations

import ctypes
import itertools
import re
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wrapper.errors import SHOWN_BYTES, ProtocolError
from wrapper.worker_protocol.messages import WorkRequest, WorkResponse
from wrapper.worker_protocol.wire_format import (
    WireFormat,
    encode_request,
    encode_response,
    request_decoder,
    response_decoder,
)

Drain = Callable[[Any, Iterable[bytes]], list[Any]]
BOTH = list(WireFormat)
DECODERS: list[Callable[..., Any]] = [request_decoder, response_decoder]

INT32 = st.integers(-(2**31), 2**31 - 1)
TEXT = st.one_of(st.text(max_size=40), st.sampled_from(["{", '"', '\\"', "}{", "\u2028", "a" * 300])).map(
    str.encode
)
REQUESTS = st.builds(
    WorkRequest.of,
    arguments=st.lists(TEXT, max_size=6),
    inputs=st.lists(st.tuples(TEXT, st.binary(max_size=40)), max_size=4),
    request_id=INT32,
    cancel=st.booleans(),
    verbosity=INT32,
    sandbox_dir=TEXT,
)
RESPONSES = st.builds(
    WorkResponse.of, exit_code=INT32, output=TEXT, request_id=INT32, was_cancelled=st.booleans()
)
CUTS = st.lists(st.integers(0, 2000), max_size=12)


def cut(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(min(at, len(data)) for at in cuts), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


@given(st.sampled_from(BOTH), st.lists(REQUESTS, max_size=5), CUTS)
def test_requests_come_out_as_they_went_in_however_the_stream_is_cut(
    drain: Drain, spoken: WireFormat, requests: list[WorkRequest], cuts: list[int]
) -> None:
    stream = b"".join(encode_request(spoken, request) for request in requests)
    decoder = request_decoder(spoken)
    assert drain(decoder, cut(stream, cuts)) == requests
    assert not decoder.mid_frame
    decoder.end_of_stream()


@given(st.sampled_from(BOTH), st.lists(RESPONSES, max_size=5), CUTS)
def test_responses_come_out_as_they_went_in_however_the_stream_is_cut(
    drain: Drain, spoken: WireFormat, responses: list[WorkResponse], cuts: list[int]
) -> None:
    stream = b"".join(encode_response(spoken, response) for response in responses)
    decoder = response_decoder(spoken)
    assert drain(decoder, cut(stream, cuts)) == responses
    decoder.end_of_stream()


@given(REQUESTS)
def test_a_request_survives_the_way_through_the_other_format(drain: Drain, request: WorkRequest) -> None:
    for spoken in BOTH:
        [request] = drain(request_decoder(spoken), [encode_request(spoken, request)])
    [again] = drain(request_decoder(WireFormat.PROTO), [encode_request(WireFormat.PROTO, request)])
    assert again == request


@pytest.mark.parametrize("spoken", BOTH)
def test_a_frame_split_at_every_byte_gives_the_same_messages(drain: Drain, spoken: WireFormat) -> None:
    first = WorkRequest.of(arguments=[b'--x={"', b"\\"], inputs=[(b"a", b"\xff")], request_id=1)
    second = WorkRequest.of(arguments=[b"y" * 200], request_id=2)
    stream = encode_request(spoken, first) + encode_request(spoken, second)
    for at in range(len(stream)):
        assert drain(request_decoder(spoken), [stream[:at], stream[at:]]) == [first, second]


@pytest.mark.parametrize("spoken", BOTH)
def test_bytes_after_a_message_wait_for_the_rest_of_theirs(drain: Drain, spoken: WireFormat) -> None:
    frame = encode_response(spoken, WorkResponse.of(exit_code=1, output=b"out", request_id=300))
    decoder = response_decoder(spoken)
    assert len(drain(decoder, [frame + frame[:3]])) == 1
    assert decoder.mid_frame
    assert len(drain(decoder, [frame[3:]])) == 1
    assert not decoder.mid_frame


@given(st.sampled_from(BOTH), st.sampled_from(DECODERS), st.binary(max_size=300), CUTS)
def test_random_bytes_raise_nothing_but_protocol_errors(
    drain: Drain, spoken: WireFormat, new_decoder: Callable[..., Any], data: bytes, cuts: list[int]
) -> None:
    decoder = new_decoder(spoken, 200)
    error = None
    try:
        drain(decoder, cut(data, cuts))
        decoder.end_of_stream()
    except ProtocolError as raised:
        error = raised
    if error is not None:
        assert 0 <= error.offset <= len(data)
        assert data[error.offset :].startswith(error.seen)


JSON_BITS = [
    *('{"', '":', "{", "}", "[", "]", '"', ",", ":", "\\", "requestId", "inputs", "arguments", "exitCode"),
    *("null", "true", "-1", "1e999", "NaN", "\\ud800", "é", "digest", '"path":', " ", "\n", "\x00", "[[[["),
]


@given(st.sampled_from(DECODERS), st.lists(st.sampled_from(JSON_BITS), max_size=25).map("".join), CUTS)
def test_text_that_is_nearly_json_raises_nothing_but_protocol_errors(
    drain: Drain, new_decoder: Callable[..., Any], text: str, cuts: list[int]
) -> None:
    outcomes: list[tuple[list[Any], int | None]] = []
    for chunks in ([text.encode()], cut(text.encode(), cuts), [bytes((byte,)) for byte in text.encode()]):
        decoder = new_decoder(WireFormat.JSON, 200)
        try:
            messages = drain(decoder, chunks)
            decoder.end_of_stream()
            outcomes.append((messages, None))
        except ProtocolError as error:
            outcomes.append(([], error.offset))
    assert outcomes[0] == outcomes[1] == outcomes[2]


@given(REQUESTS, st.integers(0, 400), st.integers(0, 255), st.sampled_from(BOTH))
def test_a_frame_with_one_byte_changed_raises_nothing_but_protocol_errors(
    drain: Drain, request: WorkRequest, at: int, byte: int, spoken: WireFormat
) -> None:
    frame = bytearray(encode_request(spoken, request))
    frame[at % len(frame)] = byte
    decoder = request_decoder(spoken, 10_000)
    try:
        drain(decoder, [bytes(frame)])
        decoder.end_of_stream()
    except ProtocolError:
        pass


@pytest.mark.parametrize("spoken", BOTH)
def test_messages_before_a_bad_frame_come_out_and_the_error_stays(spoken: WireFormat) -> None:
    good = encode_response(spoken, WorkResponse.of(exit_code=3, request_id=1))
    decoder = response_decoder(spoken)
    decoder.feed(good + good + (b"]" if spoken is WireFormat.JSON else b"\x02\x0a\x05") + good)
    assert decoder.next_message() == WorkResponse.of(exit_code=3, request_id=1)
    assert decoder.next_message() == WorkResponse.of(exit_code=3, request_id=1)
    with pytest.raises(ProtocolError) as first:
        decoder.next_message()
    # In JSON the bad frame begins after the newline of the one before it.
    assert first.value.offset == 2 * len(good)
    decoder.feed(good)
    for call in (decoder.next_message, decoder.end_of_stream):
        with pytest.raises(ProtocolError) as again:
            call()
        assert again.value is first.value
    assert decoder.frame_overdue(5) is first.value
    assert not decoder.mid_frame


def test_an_error_says_where_what_was_expected_and_the_first_bytes() -> None:
    decoder = response_decoder(WireFormat.PROTO)
    decoder.feed(b"\x02\x08\x01" + b"\x64" + b"\xff" * 100)
    decoder.next_message()
    with pytest.raises(ProtocolError) as caught:
        decoder.next_message()
    assert caught.value.offset == 3
    assert caught.value.seen == b"\x64" + b"\xff" * (SHOWN_BYTES - 1)
    assert "at byte 3: expected a protobuf message of 100 bytes" in str(caught.value)


# Protobuf


def test_a_single_zero_byte_is_an_answer_with_every_field_at_its_default(drain: Drain) -> None:
    assert drain(response_decoder(WireFormat.PROTO), [b"\0"]) == [WorkResponse.of()]
    assert encode_response(WireFormat.PROTO, WorkResponse.of()) == b"\0"
    assert drain(request_decoder(WireFormat.PROTO), [b"\0\0"]) == [WorkRequest.of()] * 2


def test_explicit_zeros_are_accepted(drain: Drain) -> None:
    assert drain(response_decoder(WireFormat.PROTO), [bytes.fromhex("08 0800 1200 1800 2000")]) == [
        WorkResponse.of()
    ]


def test_unknown_protobuf_fields_pass_through(drain: Drain) -> None:
    frame = bytes.fromhex("0b 0a0161 7a03616263 f80107")
    [request] = drain(request_decoder(WireFormat.PROTO), [frame])
    assert list(request.pb.arguments) == [b"a"]
    assert encode_request(WireFormat.PROTO, request) == frame


@pytest.mark.parametrize("padded", ["83 00", "83 80 00", "83 80 80 80 00"])
def test_a_length_padded_with_zeros_is_accepted_up_to_five_bytes(drain: Drain, padded: str) -> None:
    frame = bytes.fromhex(padded) + bytes.fromhex("0a0161")
    for chunks in ([frame], [bytes((byte,)) for byte in frame]):
        assert drain(request_decoder(WireFormat.PROTO), chunks) == [WorkRequest.of(arguments=[b"a"])]


@pytest.mark.parametrize("header", ["83 80 80 80 80 00", "ff ff ff ff ff", "ff ff ff ff 7f"])
def test_a_longer_length_is_an_error_as_soon_as_it_is_seen(header: str) -> None:
    decoder = request_decoder(WireFormat.PROTO, 1 << 40)
    decoder.feed(bytes.fromhex(header)[:5])
    with pytest.raises(ProtocolError, match="a varint of at most 5 bytes"):
        decoder.next_message()


def test_an_announced_length_above_the_limit_is_an_error_before_the_frame_comes() -> None:
    decoder = request_decoder(WireFormat.PROTO)
    decoder.feed(bytes.fromhex("81 80 80 20"))
    with pytest.raises(
        ProtocolError, match=re.escape("at most 67108864 bytes (these bytes announce 67108865)")
    ):
        decoder.next_message()
    decoder = request_decoder(WireFormat.PROTO, 100)
    decoder.feed(b"\x64")
    assert decoder.next_message() is None
    decoder = request_decoder(WireFormat.PROTO, 99)
    decoder.feed(b"\x64")
    with pytest.raises(ProtocolError):
        decoder.next_message()


@pytest.mark.parametrize(
    ("stream", "words"),
    [
        ("80", "not the end of the stream in the middle of it"),
        ("05 0a", "a whole frame of 6 bytes, not the end of the stream after 2"),
        ("05", "a whole frame of 6 bytes, not the end of the stream after 1"),
    ],
)
def test_a_truncated_frame_is_an_error_at_the_end_of_the_stream(stream: str, words: str) -> None:
    decoder = request_decoder(WireFormat.PROTO)
    decoder.feed(bytes.fromhex(stream))
    assert decoder.next_message() is None
    assert decoder.mid_frame
    with pytest.raises(ProtocolError, match=words):
        decoder.end_of_stream()


def test_text_on_stdout_is_named_as_text_when_its_frame_is_overdue_or_cut() -> None:
    decoder = response_decoder(WireFormat.PROTO)
    decoder.feed(b"hello world\n")
    assert decoder.next_message() is None  # `h` announces 104 bytes
    assert decoder.mid_frame
    error = decoder.frame_overdue(5.0)
    assert error.seen == b"hello world\n"
    assert "of a frame of 105 bytes, of which 12 have come, within 5 s" in str(error)
    assert "looks like text" in str(error)
    assert decoder.mid_frame, "a question changes nothing"
    with pytest.raises(ProtocolError, match="looks like text"):
        decoder.end_of_stream()


def test_an_overdue_length_is_named_as_one() -> None:
    decoder = response_decoder(WireFormat.PROTO)
    decoder.feed(b"\xff")
    assert decoder.next_message() is None
    assert "the rest of the length of a frame, within 0.5 s" in str(decoder.frame_overdue(0.5))


def test_text_that_happens_to_parse_is_not_taken_for_a_success() -> None:
    text = b"\x02(1"  # a length, and a field number 5 that nobody knows
    decoder = response_decoder(WireFormat.PROTO)
    decoder.feed(text)
    with pytest.raises(ProtocolError, match="not text"):
        decoder.next_message()
    decoder = response_decoder(WireFormat.PROTO)
    decoder.feed(bytes.fromhex("04 2805 0801"))  # unknown, but beside a known field
    assert decoder.next_message() is not None


# Linear work. Times of one run are compared with one another, never with a clock's absolute value.


def _seconds(decoder: Any, data: bytes, chunk: int) -> float:
    begin = time.process_time()
    for at in range(0, len(data), chunk):
        decoder.feed(data[at : at + chunk])
        while decoder.next_message() is not None:
            pass
    assert not decoder.mid_frame
    return time.process_time() - begin


@pytest.fixture
def one_heap() -> Iterator[None]:
    """Large buffers come from the heap and stay in it, whatever the process did before: no page faults."""
    libc = ctypes.CDLL(None)
    mmap_threshold, trim_threshold = -3, -1  # malloc.h
    libc.mallopt(mmap_threshold, 1 << 28)
    libc.mallopt(trim_threshold, 1 << 28)
    yield
    libc.mallopt(mmap_threshold, 128 << 10)
    libc.mallopt(trim_threshold, 128 << 10)


def _seconds_to_keep(data: bytes, chunk: int) -> float:
    """What it takes to do nothing but put the pieces together, once, and to copy them, once."""
    begin = time.process_time()
    kept = bytearray()
    for at in range(0, len(data), chunk):
        kept += data[at : at + chunk]
    bytes(kept)
    return time.process_time() - begin


@pytest.mark.parametrize(
    "new_stream",
    [
        pytest.param(
            lambda size: encode_request(WireFormat.PROTO, WorkRequest.of(arguments=[b"x" * size])),
            id="one big proto frame",
        ),
        pytest.param(
            lambda size: (
                encode_request(WireFormat.PROTO, WorkRequest.of(arguments=[b"x" * 97])) * (size // 100)
            ),
            id="many small proto frames",
        ),
        pytest.param(lambda size: b'{"arguments":["' + b"x" * size + b'"]}', id="one big JSON string"),
        pytest.param(lambda size: b'{"arguments":["' + b"\\n" * (size // 2) + b'"]}', id="escapes"),
        pytest.param(lambda size: b'{"a":[' + b'{"b":"c"},' * (size // 10) + b"0]}", id="JSON inputs"),
        pytest.param(lambda size: b'{"a":[' + b'{"b":{}},' * (size // 9) + b"0]}", id="nested objects"),
        pytest.param(lambda size: b'{"x":"%s"}' % (b"y" * 91) * (size // 100), id="many small JSON frames"),
        pytest.param(lambda size: b"{}" + b" " * size, id="white space"),
    ],
)
def test_four_times_the_bytes_take_no_more_than_about_four_times_the_work(
    new_stream: Callable[[int], bytes],
    one_heap: None,
) -> None:
    small, large = new_stream(200_000), new_stream(800_000)
    spoken = WireFormat.JSON if small.startswith(b"{") else WireFormat.PROTO

    def ratio(chunk: int) -> float:
        # The best of several: what else runs on the machine can only make a run slower.
        few = min(_seconds(request_decoder(spoken), small, chunk) for _ in range(3))
        many = min(_seconds(request_decoder(spoken), large, chunk) for _ in range(3))
        return many / max(few, 1e-6)

    def allowed(chunk: int) -> float:
        # Quadratic work would give 16. But memory itself is not linear: whether a buffer of this size is
        # mapped anew each time, and each page of it faulted in, depends on what the process did before.
        few = min(_seconds_to_keep(small, chunk) for _ in range(3))
        many = min(_seconds_to_keep(large, chunk) for _ in range(3))
        return 9 * max(1.0, many / max(few, 1e-6) / 4)

    for chunk in (500, 65536):  # one more try for a machine that stumbled
        assert ratio(chunk) < allowed(chunk) or ratio(chunk) < allowed(chunk)


def test_a_big_frame_is_parsed_once_however_many_chunks_it_comes_in() -> None:
    for spoken in BOTH:
        calls: list[int] = []
        decoder: Any = request_decoder(spoken)
        parse = decoder._parse
        decoder._parse = lambda frame, parse=parse, calls=calls: calls.append(1) or parse(frame)
        frame = encode_request(spoken, WorkRequest.of(arguments=[b"x" * 1_000_000]))
        for at in range(0, len(frame), 1000):
            decoder.feed(frame[at : at + 1000])
            decoder.next_message()
        assert len(calls) == 1
