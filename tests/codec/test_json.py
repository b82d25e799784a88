"""The JSON form: what is accepted, what is refused and by which name, and what is written."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from wrapper.errors import ProtocolError, RequestRefused
from wrapper.worker_protocol.json_framing import (
    encode_request,
    encode_response,
    request_decoder,
    response_decoder,
)
from wrapper.worker_protocol.json_messages import MAX_DEPTH
from wrapper.worker_protocol.messages import WorkRequest, WorkResponse
from wrapper.worker_protocol.wire_format import WireFormat
from wrapper.worker_protocol.wire_format import encode_request as encode_request_in

Drain = Callable[[Any, Iterable[bytes]], list[Any]]


def request_of(text: str | bytes) -> WorkRequest:
    decoder = request_decoder()
    decoder.feed(text.encode() if isinstance(text, str) else text)
    message = decoder.next_message()
    assert message is not None
    return message


def response_of(text: str | bytes) -> WorkResponse:
    decoder = response_decoder()
    decoder.feed(text.encode() if isinstance(text, str) else text)
    message = decoder.next_message()
    assert message is not None
    return message


def test_a_request_is_read_with_bazels_names() -> None:
    digest = base64.b64encode(b"abc123").decode()
    text = (
        '{"arguments":["--x\\u003d1"],"inputs":[{"path":"a b","digest":"%s"}],'
        '"requestId":7,"cancel":true,"verbosity":10,"sandboxDir":"__sandbox/7/_main"}'
    )
    assert request_of(text % digest) == WorkRequest.of(
        arguments=[b"--x=1"],
        inputs=[(b"a b", b"abc123")],
        request_id=7,
        cancel=True,
        verbosity=10,
        sandbox_dir=b"__sandbox/7/_main",
    )


def test_the_names_of_the_proto_file_are_accepted_too() -> None:
    assert request_of('{"request_id": 7, "sandbox_dir": "s"}') == WorkRequest.of(
        request_id=7, sandbox_dir=b"s"
    )
    assert response_of('{"exit_code": 1, "request_id": 7, "was_cancelled": true}') == WorkResponse.of(
        exit_code=1, request_id=7, was_cancelled=True
    )


def test_null_is_the_default_in_every_field() -> None:
    names = ["arguments", "inputs", "requestId", "cancel", "verbosity", "sandboxDir"]
    assert request_of(json.dumps(dict.fromkeys(names))) == WorkRequest.of()
    names = ["exitCode", "output", "requestId", "wasCancelled"]
    assert response_of(json.dumps(dict.fromkeys(names))) == WorkResponse.of()
    assert request_of('{"inputs":[{"path":null,"digest":null}]}') == WorkRequest.of(inputs=[(b"", b"")])


@pytest.mark.parametrize("written", ["3", "3.0", '"3"', "3e0", '"03"'])
def test_an_integer_may_be_written_in_several_ways(written: str) -> None:
    assert response_of(f'{{"exitCode":{written}}}').pb.exit_code == 3


@pytest.mark.parametrize("written", ["-2147483648", "2147483647"])
def test_the_whole_range_of_an_integer_is_accepted(written: str) -> None:
    response = response_of(f'{{"exitCode":{written}}}')
    assert encode_response(response) == b'{"exitCode":%s}\n' % written.encode()


@pytest.mark.parametrize("written", ["-_-_", "-_-_-g", "-_-_-g==", "+/+/+g", ""])
def test_a_digest_may_be_in_either_alphabet_and_without_padding(written: str) -> None:
    [read] = request_of(f'{{"inputs":[{{"path":"p","digest":"{written}"}}]}}').pb.inputs
    assert read.digest == bytes.fromhex("fbffbffa" if len(written) > 4 else "fbffbf")[: len(written)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"arguments":"a"}', "an array of strings in arguments (it holds a string)"),
        ('{"arguments":["a",1]}', "a string in arguments[1] (it holds a number)"),
        ('{"arguments":["a",null]}', "a string in arguments[1] (it holds null)"),
        ('{"arguments":["\\ud800"]}', "text without lone surrogates in arguments[0]"),
        ('{"inputs":{}}', "an array of objects in inputs (it holds an object)"),
        ('{"inputs":["a"]}', "an object in inputs[0] (it holds a string)"),
        ('{"inputs":[{},{"path":1}]}', "a string in inputs[1].path (it holds a number)"),
        ('{"inputs":[{"path":"p","digest":1}]}', "a string of base64 in inputs[0].digest"),
        ('{"inputs":[{"path":1,"digest":"YQ=="}]}', "a string in inputs[0].path (it holds a number)"),
        ('{"inputs":[{"digest":"%%%%"}]}', "base64 in inputs[0].digest"),
        ('{"inputs":[{"digest":"\\u00e9"}]}', "base64 in inputs[0].digest"),
        ('{"inputs":[{"digest":"aaaaa"}]}', "base64 in inputs[0].digest"),
        ('{"inputs":[{"path":"\\udfff"}]}', "text without lone surrogates in inputs[0].path"),
        ('{"requestId":true}', "an integer in requestId (it holds a boolean)"),
        ('{"requestId":1.5}', "an integer in requestId (it holds a number)"),
        ('{"requestId":"1 "}', "an integer in requestId (it holds a string)"),
        ('{"requestId":"\\u0661"}', "an integer in requestId"),
        ('{"requestId":2147483648}', "an integer of 32 bits in requestId"),
        ('{"requestId":"9999999999"}', "an integer of 32 bits in requestId"),
        ('{"requestId":[]}', "an integer in requestId (it holds an array)"),
        ('{"request_id":{}}', "an integer in request_id (it holds an object)"),
        ('{"cancel":1}', "true or false in cancel (it holds a number)"),
        ('{"cancel":"true"}', "true or false in cancel (it holds a string)"),
        ('{"verbosity":false}', "an integer in verbosity (it holds a boolean)"),
        ('{"sandboxDir":1}', "a string in sandboxDir (it holds a number)"),
        ('{"requestId":1,"requestId":1}', "requestId only once in an object"),
        ('{"requestId":null,"request_id":1}', "request_id only once in an object"),
        ('{"inputs":[{"path":"a","path":"b"}]}', "inputs[0].path only once in an object"),
        ('{"x":NaN}', "a JSON object (NaN is not JSON)"),
        ('{"x":-Infinity}', "a JSON object (-Infinity is not JSON)"),
        ('{"x":1e999}', "a JSON object (the number 1e999 is too large)"),
        ('{"x":%s}' % ("9" * 5000), "a JSON object (Exceeds the limit"),
        ('{"x"}', "a JSON object (Expecting ':' delimiter"),
        ('{"x":[}', "a JSON object (Expecting value"),
        ("{,}", "a JSON object (Expecting property name"),
        ("[]", "a JSON object"),
        ("null", "a JSON object"),
        ('"text"', "a JSON object"),
        ("hello world\n", "a JSON object"),
        ("\N{ZERO WIDTH NO-BREAK SPACE}{}", "a JSON object"),
    ],
)
def test_what_is_not_a_request_is_refused_by_name(text: str, words: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        request_of("  \n" + text)
    assert caught.value.offset == 3
    assert caught.value.expected.startswith(words)
    assert caught.value.seen == text.encode()[:64]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"exitCode":"one"}', "an integer in exitCode (it holds a string)"),
        ('{"exitCode":null,"exit_code":3}', "exit_code only once in an object"),
        ('{"output":["a"]}', "a string in output (it holds an array)"),
        ('{"wasCancelled":0}', "true or false in wasCancelled (it holds a number)"),
    ],
)
def test_what_is_not_a_response_is_refused_by_name(text: str, words: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        response_of(text)
    assert caught.value.expected.startswith(words)


def test_bytes_that_are_not_utf8_are_refused_in_a_request_and_replaced_in_a_response() -> None:
    with pytest.raises(ProtocolError, match="can't decode byte 0xff"):
        request_of(b'{"arguments":["\xff"]}')
    assert response_of(b'{"output":"caf\xe9 (latin-1)"}').pb.output.decode() == "caf\ufffd (latin-1)"


def test_a_lone_surrogate_in_output_does_not_fail_the_build() -> None:
    assert response_of('{"output":"a\\ud800b"}').pb.output == b"a?b"


def test_control_characters_in_a_string_are_accepted_as_bazel_does() -> None:
    assert response_of('{"output":"a\tb\nc"}').pb.output == b"a\tb\nc"


@pytest.mark.parametrize("between", ["", "\n", "\r\n", "  \t \n\n"])
def test_objects_may_follow_each_other_with_or_without_white_space(drain: Drain, between: str) -> None:
    stream = between.join(['{"requestId":1}', "{}", '{"requestId":3}']) + between
    for chunks in ([stream.encode()], [bytes((byte,)) for byte in stream.encode()]):
        decoder = request_decoder()
        assert [request.pb.request_id for request in drain(decoder, chunks)] == [1, 0, 3]
        assert not decoder.mid_frame
        decoder.end_of_stream()


@pytest.mark.parametrize(
    "argument",
    [
        "}",
        "{",
        '"',
        "\\",
        '\\"',
        '"}',
        "}{",
        "\\\\",
        '{"a":"}"}',
        "\\" * 150 + '"',
        '"' * 250,
        "é}",
        "\n" * 120,
    ],
)
def test_braces_quotes_and_backslashes_inside_strings_end_nothing(drain: Drain, argument: str) -> None:
    request = WorkRequest.of(arguments=[argument.encode()] * 3, inputs=[(argument.encode(), b"d")] * 2)
    frame = encode_request(request)
    assert drain(request_decoder(), [frame, frame]) == [request] * 2
    assert drain(request_decoder(), [frame[at : at + 1] for at in range(len(frame))]) == [request]
    for at in range(len(frame)):
        assert drain(request_decoder(), [frame[:at], frame[at:] + frame]) == [request] * 2


def test_more_objects_and_strings_than_one_look_of_the_scanner_takes(drain: Drain) -> None:
    request = WorkRequest.of(
        arguments=[b'"x"'] * 2000, inputs=[(b"\\" * (n % 300), b"%d" % n) for n in range(1500)]
    )
    frame = encode_request(request)
    assert drain(request_decoder(), [frame + b"{}"]) == [request, WorkRequest.of()]
    assert drain(request_decoder(), [frame[at : at + 777] for at in range(0, len(frame), 777)]) == [request]


def test_an_object_above_the_limit_is_an_error_while_it_still_comes() -> None:
    decoder = request_decoder(50)
    decoder.feed(b" " * 100 + b'{"arguments":["' + b"a" * 35)
    assert decoder.next_message() is None
    decoder.feed(b"a")
    with pytest.raises(ProtocolError, match="a JSON object of at most 50 bytes") as caught:
        decoder.next_message()
    assert caught.value.offset == 100


def test_an_object_above_the_limit_is_an_error_when_it_comes_whole() -> None:
    frame = encode_request(WorkRequest.of(arguments=[b"a" * 40])).rstrip()
    decoder = request_decoder(len(frame))
    decoder.feed(frame * 3)
    assert decoder.next_message() is not None
    decoder = request_decoder(len(frame) - 1)
    decoder.feed(frame)
    with pytest.raises(ProtocolError):
        decoder.next_message()


def test_a_truncated_object_is_an_error_at_the_end_of_the_stream() -> None:
    decoder = response_decoder()
    decoder.feed(b'{"exitCode":0}\n{"output":"}')
    assert decoder.next_message() is not None
    assert decoder.next_message() is None
    assert decoder.mid_frame
    assert "of which 12 bytes have come, within 5 s" in str(decoder.frame_overdue(5))
    with pytest.raises(ProtocolError, match="at byte 15: expected a whole JSON object, not the end"):
        decoder.end_of_stream()


@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 2000, 100_000])
def test_a_deeply_nested_unknown_field_is_a_protocol_error(depth: int) -> None:
    for opening, closing in (("[", "]"), ('{"x":', "}")):
        with pytest.raises(ProtocolError, match="nest"):
            response_of(f'{{"x":{opening * depth}0{closing * depth}}}')


def test_unknown_fields_pass_through_also_inside_inputs() -> None:
    text = (
        '{"arguments":["a"],"inputs":[{"path":"p"},{"path":"q","mode":{"x":[1,null,"\\ud800"]}}],'
        '"later":[1.5,{"deep":[]}],"ünknown":"é"}'
    )
    request = request_of(text)
    assert json.loads(encode_request(request)) == json.loads(text)
    assert request_of(encode_request(request)) == request
    assert request != request_of(text.replace('"later"', '"sooner"'))
    response = response_of('{"exitCode":1,"trace":{"ms":5}}')
    assert json.loads(encode_response(response)) == {"exitCode": 1, "trace": {"ms": 5}}


def test_a_doubled_unknown_name_is_no_error() -> None:
    assert response_of('{"x":1,"x":2}').unknown_json == {"x": 2}


def test_unknown_json_fields_are_left_out_of_protobuf() -> None:
    request = request_of('{"requestId":1,"x":1}')
    assert encode_request_in(WireFormat.PROTO, request) == bytes.fromhex("021801")


def test_defaults_are_left_out_and_a_newline_ends_what_is_written() -> None:
    assert encode_request(WorkRequest.of()) == b"{}\n"
    assert encode_response(WorkResponse.of()) == b"{}\n"
    assert encode_request(WorkRequest.of(inputs=[(b"", b"")])) == b'{"inputs":[{}]}\n'


def test_what_is_written_is_ascii_and_in_bazels_names() -> None:
    request = WorkRequest.of(
        arguments=["é\U0001f600\n".encode()],
        inputs=[(b"p", b"06f9")],
        request_id=2,
        cancel=True,
        verbosity=10,
        sandbox_dir=b"s",
    )
    assert encode_request(request) == (
        b'{"arguments":["\\u00e9\\ud83d\\ude00\\n"],"inputs":[{"path":"p","digest":"MDZmOQ=="}],'
        b'"requestId":2,"cancel":true,"verbosity":10,"sandboxDir":"s"}\n'
    )
    response = WorkResponse.of(exit_code=1, output=b"o", request_id=2, was_cancelled=True)
    assert encode_response(response) == (b'{"exitCode":1,"output":"o","requestId":2,"wasCancelled":true}\n')


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (
            WorkRequest.of(arguments=[b"a", b"x\xffy"]),
            r"arguments\[1\] of the request is not UTF-8 \(byte 1: b'\\xffy'",
        ),
        (WorkRequest.of(inputs=[(b"a", b""), (b"\xe9", b"")]), r"inputs\[1\].path of the request"),
        (WorkRequest.of(sandbox_dir=b"\xe9"), "sandbox_dir of the request"),
    ],
)
def test_a_request_that_json_cannot_carry_is_refused_by_name(request_: WorkRequest, words: str) -> None:
    with pytest.raises(RequestRefused, match=words):
        encode_request(request_)


def test_output_that_is_not_utf8_is_written_nearly() -> None:
    assert response_of(encode_response(WorkResponse.of(output=b"a\xffb"))).pb.output == "a\ufffdb".encode()
