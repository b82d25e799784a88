"""Every recorded stream of real Bazel and real workers, replayed through the codec."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from wrapper.worker_protocol.messages import WorkRequest, WorkResponse
from wrapper.worker_protocol.wire_format import (
    WireFormat,
    detect,
    encode_request,
    encode_response,
    request_decoder,
    response_decoder,
)

Drain = Callable[[Any, Iterable[bytes]], list[Any]]

FOLDERS = [
    "bazel-4.2.3",
    "cancel-multiplex-sandboxed-proto",
    "cancel-singleplex-proto",
    "fail",
    "javac-multiplex",
    "json-multiplex",
    "json-singleplex",
    "max-instances-1",
    "proto-multiplex",
    "proto-multiplex-sandboxed",
    "proto-noverbose",
    "proto-singleplex",
    "proto-singleplex-sandboxed",
    "quit",
]


class Recording(NamedTuple):
    """Both directions of one worker's life, and the format it spoke."""

    name: str
    wire_format: WireFormat
    requests: bytes
    responses: bytes


def recordings(folder: Path) -> Iterator[Recording]:
    for stdin in sorted(folder.glob("*.stdin.bin")):
        requests = stdin.read_bytes()
        spoken = WireFormat.JSON if requests.startswith(b'{"') else WireFormat.PROTO
        stdout = stdin.with_name(stdin.name.replace("stdin", "stdout"))
        yield Recording(f"{folder.name}/{stdin.name}", spoken, requests, stdout.read_bytes())


def chunkings(data: bytes, seed: str) -> Iterator[list[bytes]]:
    """The data whole, byte by byte, and cut at random."""
    yield [data]
    yield [data[at : at + 1] for at in range(len(data))]
    rng = random.Random(seed)
    for longest in (3, 50, 700, 5000):
        chunks, at = [], 0
        while at < len(data):
            size = rng.randint(1, longest)
            chunks.append(data[at : at + size])
            at += size
        yield chunks


def test_no_recording_is_left_out(captures: Path) -> None:
    assert sorted(entry.name for entry in captures.iterdir() if entry.is_dir()) == FOLDERS
    both = [recording for folder in FOLDERS for recording in recordings(captures / folder)]
    assert len(both) >= 20
    assert {recording.wire_format for recording in both} == set(WireFormat)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_recorded_stream_replays_whole_byte_by_byte_and_in_random_chunks(
    captures: Path, drain: Drain, folder: str
) -> None:
    for recording in recordings(captures / folder):
        for data, new_decoder in (
            (recording.requests, request_decoder),
            (recording.responses, response_decoder),
        ):
            whole: list[Any] | None = None
            for chunks in chunkings(data, recording.name):
                decoder = new_decoder(recording.wire_format)
                messages = drain(decoder, chunks)
                decoder.end_of_stream()
                assert not decoder.mid_frame
                whole = messages if whole is None else whole
                assert messages == whole, recording.name
        assert drain(request_decoder(recording.wire_format), [recording.requests]), recording.name


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_recorded_stream_survives_decoding_encoding_and_conversion(
    captures: Path, drain: Drain, folder: str
) -> None:
    for recording in recordings(captures / folder):
        spoken = recording.wire_format
        other = WireFormat.JSON if spoken is WireFormat.PROTO else WireFormat.PROTO
        requests: list[WorkRequest] = drain(request_decoder(spoken), [recording.requests])
        responses: list[WorkResponse] = drain(response_decoder(spoken), [recording.responses])
        again = b"".join(encode_request(spoken, request) for request in requests)
        answers = b"".join(encode_response(spoken, response) for response in responses)
        if spoken is WireFormat.PROTO:
            assert again == recording.requests
            assert answers == recording.responses
        assert drain(request_decoder(spoken), [again]) == requests
        assert drain(response_decoder(spoken), [answers]) == responses
        converted = b"".join(encode_request(other, request) for request in requests)
        assert drain(request_decoder(other), [converted]) == requests
        converted = b"".join(encode_response(other, response) for response in responses)
        assert drain(response_decoder(other), [converted]) == responses


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_format_of_a_recorded_stream_is_detected_from_every_prefix_or_stays_open(
    captures: Path, folder: str
) -> None:
    for recording in recordings(captures / folder):
        decided_at = None
        for length in range(min(len(recording.requests), 2000)):
            found = detect(recording.requests[:length])
            assert found in (None, recording.wire_format), (recording.name, length)
            if found is not None and decided_at is None:
                decided_at = length
            assert (found is None) == (decided_at is None), "once decided it stays decided"
        assert decided_at is not None
        assert decided_at <= len('{"arguments":'), recording.name


def test_a_cancel_is_three_bytes_as_bazel_sends_it(captures: Path, drain: Drain) -> None:
    recording = next(recordings(captures / "cancel-singleplex-proto"))
    work, cancel = drain(request_decoder(WireFormat.PROTO), [recording.requests])
    assert not work.pb.cancel
    assert cancel == WorkRequest.of(cancel=True)
    assert recording.requests.endswith(bytes.fromhex("022001"))
    assert encode_request(WireFormat.PROTO, cancel) == bytes.fromhex("022001")


def test_arguments_that_are_not_ascii_are_the_bytes_that_bazel_sent(captures: Path, drain: Drain) -> None:
    recording = next(recordings(captures / "proto-noverbose"))
    [request] = drain(request_decoder(WireFormat.PROTO), [recording.requests])
    assert "é".encode() in request.pb.arguments
