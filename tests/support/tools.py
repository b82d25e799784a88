"""Tools for fake workers: functions from bytes on stdin to bytes on stdout."""

from __future__ import annotations

from collections.abc import Callable

from wrapper.worker_protocol.messages import WorkRequest, WorkResponse
from wrapper.worker_protocol.wire_format import WireFormat, encode_response, request_decoder

Answer = Callable[[WorkRequest], bytes]


def response(request: WorkRequest, output: bytes | None = None, **fields: int) -> bytes:
    """The frame of a right answer: it repeats the request's arguments."""
    if output is None:
        output = b" ".join(request.pb.arguments)
    answer = WorkResponse.of(output=output, request_id=request.pb.request_id, **fields)  # type: ignore[arg-type]
    return encode_response(WireFormat.PROTO, answer)


def proto_tool(answer: Answer = response) -> Callable[[bytes], bytes]:
    """A tool that understands frames however they are cut, and answers each with `answer(request)`."""
    decoder = request_decoder(WireFormat.PROTO)

    def tool(data: bytes) -> bytes:
        decoder.feed(data)
        out = b""
        while (request := decoder.next_message()) is not None:
            out += answer(request)
        return out

    return tool


def request(*arguments: bytes, request_id: int = 0) -> WorkRequest:
    return WorkRequest.of(arguments=arguments, request_id=request_id)
