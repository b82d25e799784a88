"""Telling JSON from protobuf by the first bytes of a stream."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wrapper.worker_protocol.messages import WorkRequest
from wrapper.worker_protocol.wire_format import WireFormat, detect, encode_request

JSON, PROTO = WireFormat.JSON, WireFormat.PROTO


@pytest.mark.parametrize(
    ("head", "found"),
    [
        (b"", None),
        (b"{", None),
        (b"{}", JSON),
        (b"{ \r\n\t}", None),
        (b"{ \r\n\t}\n", JSON),
        (b"{ \r\n\t}\x00", PROTO),
        (b'{"', None),
        (b'{"arguments', None),
        (b'{"arguments"', None),
        (b'{"arguments" \n', None),
        (b'{"arguments":', JSON),
        (b'{\n  "request_id" :', JSON),
        (b"{\n", None),
        (b"{\n\x0c--out=x", PROTO),
        (b"{\n\n--output=x", PROTO),  # an argument of ten bytes
        (b'{\n"--output=', PROTO),  # an argument of 34 bytes
        (b'{\n"', None),
        (b'{"a b"', PROTO),
        (b'{"1', PROTO),
        (b'{""', PROTO),
        (b'{"a"}', PROTO),
        (b'{"\xc3\xa9', PROTO),
        (b"{[", PROTO),
        (b"{{", PROTO),
        (b"{\x12", PROTO),
        (b"\x00", PROTO),
        (b"\x02\x20\x01", PROTO),
        (b" {}", PROTO),
        (b"hello", PROTO),
        (b"{" + b" " * 255, None),
        (b"{" + b" " * 256, PROTO),
        (b'{"' + b"a" * 254, None),
        (b'{"' + b"a" * 255, JSON),
    ],
)
def test_a_head_decides_or_stays_open(head: bytes, found: WireFormat | None) -> None:
    assert detect(head) is found


@pytest.mark.parametrize(
    ("head", "found"), [(b"", PROTO), (b"{", PROTO), (b"{ ", PROTO), (b'{"requ', JSON), (b"{}", JSON)]
)
def test_the_end_of_the_stream_decides_what_was_open(head: bytes, found: WireFormat) -> None:
    assert detect(head, at_eof=True) is found


@given(st.binary(max_size=60))
def test_more_bytes_never_change_a_decision(data: bytes) -> None:
    for head in (data, b"{" + data, b'{ "' + data):
        decided = None
        for length in range(len(head) + 1):
            found = detect(head[:length])
            assert decided is None or found is decided
            decided = decided or found


@given(
    st.lists(st.binary(max_size=121), max_size=4),
    st.integers(0, 2**31 - 1),
    st.integers(0, 2**31 - 1),
)
def test_a_real_protobuf_frame_of_123_bytes_is_not_taken_for_json(
    arguments: list[bytes], request_id: int, verbosity: int
) -> None:
    request = WorkRequest.of(arguments=arguments, request_id=request_id, verbosity=verbosity)
    short = 123 - len(request.pb.SerializeToString())
    if short >= 2:
        request.pb.sandbox_dir = b"s" * (short - 2)
    frame = encode_request(PROTO, request)
    if len(frame) == 124:
        assert frame.startswith(b"{")
        assert detect(frame) is PROTO


@given(st.integers(0, 121))
def test_a_first_argument_of_any_length_is_not_taken_for_json(length: int) -> None:
    request = WorkRequest.of(arguments=[b"-" * length, b"x" * 118])
    del request.pb.arguments[1:]
    rest = 123 - len(request.pb.SerializeToString())
    if rest >= 2:
        request.pb.arguments.append(b"y" * (rest - 2))
    frame = encode_request(PROTO, request)
    if frame.startswith(b"{"):
        assert detect(frame) is PROTO
