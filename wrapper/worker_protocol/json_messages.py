"""One JSON object of the worker protocol to a message and back.

Owns what is accepted in an object and how one is written; where an object ends in a stream is
`json_framing.py`'s business.

Accepted, because a producer that follows protobuf's JSON mapping or Bazel's own reader may rely on
it: names in lowerCamelCase or as in the .proto file; null for a default; integers as numbers without
a fraction (`3`, `3.0`) or as strings of digits; base64 of either alphabet, padded or not; unescaped
control characters in strings. A known name given twice is an error; unknown names are kept. Bytes of
a response that are not UTF-8 become U+FFFD, as they do in Bazel; in a request they are an error.

Written: lowerCamelCase, defaults left out, everything outside ASCII escaped (so that the reader's
locale does not matter), a newline at the end.
"""

from __future__ import annotations

import binascii
import json
import re
from collections.abc import Callable, Mapping
from typing import NoReturn

from wrapper.errors import SHOWN_BYTES, RequestRefused
from wrapper.worker_protocol import worker_protocol_pb2
from wrapper.worker_protocol.messages import NOTHING_UNKNOWN, WorkRequest, WorkResponse

MAX_DEPTH = 100
"""How deep an unknown field may be nested; the same number as protobuf's own limit."""


class Unacceptable(Exception):
    """An object that is not a message; `expected` is what a ProtocolError should say."""

    def __init__(self, expected: str) -> None:
        self.expected = expected


class _Doubled(dict[str, object]):
    """A JSON object in which some names stand more than once."""

    __slots__ = ("names",)
    names: frozenset[str]


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    document = dict(pairs)
    if len(document) == len(pairs):
        return document
    doubled = _Doubled(document)
    seen: set[str] = set()
    doubled.names = frozenset(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
    return doubled


def _float(digits: str) -> float:
    number = float(digits)
    if number - number != 0:  # infinite: it could not be written again
        raise ValueError(f"the number {digits[:40]} is too large")
    return number


def _not_a_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")


_LOADS = json.JSONDecoder(
    object_pairs_hook=_object, parse_float=_float, parse_constant=_not_a_number, strict=False
).decode
_DUMPS = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


def _load(frame: bytes, *, utf8_errors: str) -> dict[str, object]:
    try:
        document = _LOADS(frame.decode("utf-8", utf8_errors))
    except RecursionError:
        raise Unacceptable("a JSON object that is not nested so deep") from None
    except ValueError as error:
        raise Unacceptable(f"a JSON object ({error})") from None
    if not isinstance(document, dict):  # pragma: no cover  # it begins with a brace
        raise Unacceptable("a JSON object")
    return document


# Readers of one value. `name` is the field as it was written, with its place: inputs[3].digest.


def _wrong(name: str, what: str, value: object) -> NoReturn:
    kinds: dict[type, str] = {bool: "a boolean", str: "a string", type(None): "null", list: "an array"}
    kinds |= {int: "a number", float: "a number", dict: "an object", _Doubled: "an object"}
    raise Unacceptable(f"{what} in {name} (it holds {kinds.get(type(value), 'something else')})")


def _read_text(value: object, name: str) -> bytes:
    if not isinstance(value, str):
        _wrong(name, "a string", value)
    try:
        return value.encode()
    except UnicodeEncodeError:
        raise Unacceptable(f"text without lone surrogates in {name}") from None


def _read_output(value: object, name: str) -> bytes:
    # Meant for a human: what cannot be said exactly is better said nearly than not at all.
    if not isinstance(value, str):
        _wrong(name, "a string", value)
    return value.encode("utf-8", "replace")


def _read_texts(value: object, name: str) -> list[bytes]:
    if not isinstance(value, list):
        _wrong(name, "an array of strings", value)
    try:
        return [text.encode() for text in value]
    except (AttributeError, UnicodeEncodeError):
        return [_read_text(text, f"{name}[{index}]") for index, text in enumerate(value)]


_DIGITS = re.compile(r"-?[0-9]{1,10}", re.ASCII)


def _read_int32(value: object, name: str) -> int:
    digits = isinstance(value, str) and _DIGITS.fullmatch(value)
    if digits or (isinstance(value, float) and value.is_integer()):
        value = int(value)  # type: ignore[call-overload]
    if not isinstance(value, int) or isinstance(value, bool):
        _wrong(name, "an integer", value)
    if not -(1 << 31) <= value < 1 << 31:
        raise Unacceptable(f"an integer of 32 bits in {name}")
    return value


def _read_bool(value: object, name: str) -> bool:
    if not isinstance(value, bool):
        _wrong(name, "true or false", value)
    return value


def _read_digest(value: object, name: str) -> bytes:
    if not isinstance(value, str):
        _wrong(name, "a string of base64", value)
    try:
        return binascii.a2b_base64(value, strict_mode=True)
    except ValueError:
        pass
    plain = value.rstrip("=").replace("-", "+").replace("_", "/")
    try:
        return binascii.a2b_base64(plain + "=" * (-len(plain) % 4), strict_mode=True)
    except ValueError:
        raise Unacceptable(f"base64 in {name}") from None


_Fields = Mapping[str, tuple[str, Callable[[object, str], object]]]


def _fields(**readers: Callable[[object, str], object]) -> _Fields:
    """For each name a field may have in JSON: its name in the .proto file, and its reader."""
    table: dict[str, tuple[str, Callable[[object, str], object]]] = {}
    for name, reader in readers.items():
        table[name] = table[_camel(name)] = (name, reader)
    return table


def _camel(name: str) -> str:
    head, *tail = name.split("_")
    return head + "".join(word.capitalize() for word in tail)


_USUAL_INPUT = {"path", "digest"}
_INPUT_FIELDS = _fields(path=_read_text, digest=_read_digest)
_REQUEST_FIELDS = _fields(
    arguments=_read_texts,
    inputs=lambda value, _name: value,  # read with the request: their unknown fields need a place
    request_id=_read_int32,
    cancel=_read_bool,
    verbosity=_read_int32,
    sandbox_dir=_read_text,
)
_RESPONSE_FIELDS = _fields(
    exit_code=_read_int32, output=_read_output, request_id=_read_int32, was_cancelled=_read_bool
)


def _split(
    document: dict[str, object], fields: _Fields, place: str
) -> tuple[dict[str, object], dict[str, object]]:
    """The known fields of an object, by their names in the .proto file and read; and the others."""
    known: dict[str, object] = {}
    unknown: dict[str, object] = {}
    for written, value in document.items():
        field = fields.get(written)
        if field is None:
            if isinstance(value, dict | list):
                _check_depth(value, place + written)
            unknown[written] = value
            continue
        name, read = field
        if name in known or (isinstance(document, _Doubled) and written in document.names):
            raise Unacceptable(f"{place}{written} only once in an object")
        known[name] = None if value is None else read(value, place + written)
    return {name: value for name, value in known.items() if value is not None}, unknown


def _check_depth(value: object, name: str) -> None:
    level: list[object] = [value]
    for _ in range(MAX_DEPTH):
        below: list[object] = []
        for item in level:
            if isinstance(item, dict):
                below += item.values()
            elif isinstance(item, list):
                below += item
        if not below:
            return
        level = below
    raise Unacceptable(f"no more than {MAX_DEPTH} levels of nesting in {name[:SHOWN_BYTES]}")


def parse_request(frame: bytes) -> WorkRequest:
    """One object of a build tool's. Raises Unacceptable."""
    known, unknown = _split(_load(frame, utf8_errors="strict"), _REQUEST_FIELDS, "")
    inputs = known.pop("inputs", ())
    if not isinstance(inputs, list | tuple):
        _wrong("inputs", "an array of objects", inputs)
    read_inputs: list[dict[str, object]] = []
    unknown_of_inputs: dict[int, dict[str, object]] = {}
    for index, value in enumerate(inputs):
        if type(value) is dict and value.keys() == _USUAL_INPUT:
            try:
                path = value["path"].encode()
                digest = binascii.a2b_base64(value["digest"], strict_mode=True)
            except (AttributeError, TypeError, ValueError):
                pass  # unusual after all
            else:
                read_inputs.append({"path": path, "digest": digest})
                continue
        if not isinstance(value, dict):
            _wrong(f"inputs[{index}]", "an object", value)
        fields, others = _split(value, _INPUT_FIELDS, f"inputs[{index}].")
        read_inputs.append(fields)
        if others:
            unknown_of_inputs[index] = others
    pb = worker_protocol_pb2.WorkRequest(inputs=read_inputs, **known)  # type: ignore[arg-type]  # each reader gives its type
    if unknown_of_inputs:
        unknown["inputs"] = unknown_of_inputs
    return WorkRequest(pb, unknown or NOTHING_UNKNOWN)


def parse_response(frame: bytes) -> WorkResponse:
    """One object of a worker's. Raises Unacceptable."""
    known, unknown = _split(_load(frame, utf8_errors="replace"), _RESPONSE_FIELDS, "")
    return WorkResponse(
        worker_protocol_pb2.WorkResponse(**known),  # type: ignore[arg-type]  # as above
        unknown or NOTHING_UNKNOWN,
    )


def _write_text(text: bytes, name: str) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise RequestRefused(
            f"{name} of the request is not UTF-8 (byte {error.start}: {text[error.start :][:8]!r}), "
            "so JSON cannot carry it: this tool needs the proto format for it"
        ) from None


def encode_request(request: WorkRequest) -> bytes:
    """One line. Unknown protobuf fields are left out.

    Raises RequestRefused, which names the field, if a text is not UTF-8: JSON has no way to say it,
    and a tool that got something else in its place would read or write the wrong file.
    """
    pb = request.pb
    unknown = request.unknown_json
    document: dict[str, object] = {}
    if pb.arguments:
        try:
            document["arguments"] = [argument.decode() for argument in pb.arguments]
        except UnicodeDecodeError:
            for index, argument in enumerate(pb.arguments):
                _write_text(argument, f"arguments[{index}]")
            raise
    if pb.inputs:
        try:
            inputs = [_input_document(item) for item in pb.inputs]
        except UnicodeDecodeError:
            for index, item in enumerate(pb.inputs):
                _write_text(item.path, f"inputs[{index}].path")
            raise
        others = unknown.get("inputs")
        if isinstance(others, Mapping):
            for index, fields in others.items():
                if index < len(inputs):
                    inputs[index] |= fields
        document["inputs"] = inputs
    if pb.request_id:
        document["requestId"] = pb.request_id
    if pb.cancel:
        document["cancel"] = True
    if pb.verbosity:
        document["verbosity"] = pb.verbosity
    if pb.sandbox_dir:
        document["sandboxDir"] = _write_text(pb.sandbox_dir, "sandbox_dir")
    if unknown:
        document |= {name: value for name, value in unknown.items() if name != "inputs"}
    return _DUMPS(document).encode("ascii") + b"\n"


def _input_document(item: worker_protocol_pb2.Input) -> dict[str, object]:
    document: dict[str, object] = {}
    if path := item.path:
        document["path"] = path.decode()
    if digest := item.digest:
        document["digest"] = binascii.b2a_base64(digest, newline=False).decode("ascii")
    return document


def encode_response(response: WorkResponse) -> bytes:
    """One line. Unknown protobuf fields are left out; output that is not UTF-8 is replaced by U+FFFD."""
    pb = response.pb
    document: dict[str, object] = {}
    if pb.exit_code:
        document["exitCode"] = pb.exit_code
    if pb.output:
        document["output"] = pb.output.decode("utf-8", "replace")
    if pb.request_id:
        document["requestId"] = pb.request_id
    if pb.was_cancelled:
        document["wasCancelled"] = True
    if response.unknown_json:
        document |= response.unknown_json
    return _DUMPS(document).encode("ascii") + b"\n"
