"""The two message classes: equality, and a repr that stays short."""

from __future__ import annotations

import subprocess
import sys

import pytest

from wrapper.worker_protocol.messages import NOTHING_UNKNOWN, WorkRequest, WorkResponse


def test_messages_are_equal_by_what_they_say() -> None:
    assert WorkRequest.of(request_id=1) == WorkRequest.of(request_id=1)
    assert WorkRequest.of(request_id=1) != WorkRequest.of(request_id=2)
    assert WorkResponse.of(output=b"a") == WorkResponse.of(output=b"a")
    assert WorkResponse.of(output=b"a") != WorkResponse.of(output=b"b")
    assert WorkRequest.of() != WorkResponse.of()
    assert WorkResponse(WorkResponse.of().pb, {"x": 1}) != WorkResponse.of()
    assert WorkRequest(WorkRequest.of().pb, {"x": 1}) != WorkRequest.of()


def test_unknown_protobuf_fields_are_part_of_what_a_message_says() -> None:
    known = WorkRequest.of(request_id=1)
    more = WorkRequest.of()
    more.pb.MergeFromString(known.pb.SerializeToString() + b"\x7a\x01a")
    assert more != known


def test_messages_cannot_be_keys_because_they_can_change() -> None:
    for message in (WorkRequest.of(), WorkResponse.of()):
        with pytest.raises(TypeError):
            hash(message)


def test_what_has_no_unknown_fields_shares_one_empty_mapping() -> None:
    assert WorkRequest.of().unknown_json is NOTHING_UNKNOWN
    with pytest.raises(TypeError):
        NOTHING_UNKNOWN["x"] = 1  # type: ignore[index]


def test_a_repr_shows_what_matters_and_stays_short() -> None:
    request = WorkRequest.of(
        arguments=[b"a" * 1000] * 1000,
        inputs=[(b"p", b"d")],
        request_id=7,
        cancel=True,
        verbosity=10,
        sandbox_dir=b"s" * 1000,
    )
    assert repr(WorkRequest.of()) == "<WorkRequest id=0 arguments=0 inputs=0>"
    assert repr(request).startswith("<WorkRequest id=7 arguments=1000 inputs=1 cancel verbosity=10 sandbox_d")
    assert len(repr(request)) < 150
    response = WorkResponse.of(exit_code=1, output=b"\xff" * 100_000, request_id=7, was_cancelled=True)
    assert repr(WorkResponse.of()) == "<WorkResponse id=0 exit=0>"
    assert repr(response).startswith("<WorkResponse id=7 exit=1 was_cancelled output=b'")
    assert repr(response).endswith("... (100000 bytes)>")
    assert len(repr(response)) < 250


def test_the_path_to_the_first_answer_imports_nothing_heavy() -> None:
    """JSON only for streams that speak it; no JSON mapping and no reflection of protobuf's own."""
    code = "import sys, wrapper.worker_protocol.wire_format; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & {
        "asyncio",
        "google.protobuf.json_format",
        "json",
        "json5",
        "pydantic",
        "wrapper.worker_protocol.json_framing",
    }
