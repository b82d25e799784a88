"""WorkRequest and WorkResponse in memory: the protobuf message and what only JSON could say.

Owns the two classes and nothing else: how they travel is the framings' business, what they mean
`exchange.py`'s. The fields are read and set on `pb`, whose parser is in C: a request of 100 KB that
only passes through is never taken apart in Python.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from wrapper.worker_protocol import worker_protocol_pb2

NOTHING_UNKNOWN: Mapping[str, object] = MappingProxyType({})
"""Shared by all messages without unknown JSON fields."""

_SHOWN_OUTPUT_BYTES = 40


class WorkRequest:
    """One request, or the cancel of one.

    `pb` holds the known fields, and unknown ones if the request came as protobuf. `unknown_json`
    holds the unknown fields of a request that came as JSON, by name; those inside its inputs stand
    under the (known) name "inputs", as a mapping from the input's index to its unknown fields.
    Unknown fields survive within one format only: no conversion of a thing unknown is possible.
    """

    __slots__ = ("pb", "unknown_json")

    pb: worker_protocol_pb2.WorkRequest
    unknown_json: Mapping[str, object]

    def __init__(
        self, pb: worker_protocol_pb2.WorkRequest, unknown_json: Mapping[str, object] = NOTHING_UNKNOWN
    ) -> None:
        self.pb = pb
        self.unknown_json = unknown_json

    @classmethod
    def of(
        cls,
        *,
        arguments: Iterable[bytes] = (),
        inputs: Iterable[tuple[bytes, bytes]] = (),
        request_id: int = 0,
        cancel: bool = False,
        verbosity: int = 0,
        sandbox_dir: bytes = b"",
    ) -> WorkRequest:
        """A request from plain values; `inputs` are pairs of path and digest."""
        return cls(
            worker_protocol_pb2.WorkRequest(
                arguments=arguments,
                inputs=[worker_protocol_pb2.Input(path=path, digest=digest) for path, digest in inputs],
                request_id=request_id,
                cancel=cancel,
                verbosity=verbosity,
                sandbox_dir=sandbox_dir,
            )
        )

    __hash__ = None  # type: ignore[assignment]  # mutable, like the message inside

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, WorkRequest):
            return NotImplemented
        return self.pb == other.pb and self.unknown_json == other.unknown_json

    def __repr__(self) -> str:
        pb = self.pb
        parts = [f"id={pb.request_id}", f"arguments={len(pb.arguments)}", f"inputs={len(pb.inputs)}"]
        if pb.cancel:
            parts.append("cancel")
        if pb.verbosity:
            parts.append(f"verbosity={pb.verbosity}")
        if pb.sandbox_dir:
            parts.append(f"sandbox_dir={_shown(pb.sandbox_dir)}")
        return f"<WorkRequest {' '.join(parts)}>"


class WorkResponse:
    """The answer to one request. `pb` and `unknown_json` are as in WorkRequest."""

    __slots__ = ("pb", "unknown_json")

    pb: worker_protocol_pb2.WorkResponse
    unknown_json: Mapping[str, object]

    def __init__(
        self, pb: worker_protocol_pb2.WorkResponse, unknown_json: Mapping[str, object] = NOTHING_UNKNOWN
    ) -> None:
        self.pb = pb
        self.unknown_json = unknown_json

    @classmethod
    def of(
        cls, *, exit_code: int = 0, output: bytes = b"", request_id: int = 0, was_cancelled: bool = False
    ) -> WorkResponse:
        """A response from plain values."""
        return cls(
            worker_protocol_pb2.WorkResponse(
                exit_code=exit_code, output=output, request_id=request_id, was_cancelled=was_cancelled
            )
        )

    __hash__ = None  # type: ignore[assignment]  # mutable, like the message inside

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, WorkResponse):
            return NotImplemented
        return self.pb == other.pb and self.unknown_json == other.unknown_json

    def __repr__(self) -> str:
        pb = self.pb
        parts = [f"id={pb.request_id}", f"exit={pb.exit_code}"]
        if pb.was_cancelled:
            parts.append("was_cancelled")
        if pb.output:
            parts.append(f"output={_shown(pb.output)} ({len(pb.output)} bytes)")
        return f"<WorkResponse {' '.join(parts)}>"


def _shown(text: bytes) -> str:
    if len(text) <= _SHOWN_OUTPUT_BYTES:
        return repr(text)
    return f"{text[:_SHOWN_OUTPUT_BYTES]!r}..."
