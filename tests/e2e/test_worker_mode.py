"""Worker mode on real processes: formats, ids, and what passes through unchanged."""

from __future__ import annotations

import base64
import itertools
import json
import sys
from pathlib import Path

import pytest

from tests.support.raw_host import WORKERS, RawHost, ask, echo_tool, outputs, until
from tests.workers.echo_worker import expected_output
from wrapper.worker_protocol import worker_protocol_pb2
from wrapper.worker_protocol.messages import WorkRequest
from wrapper.worker_protocol.wire_format import WireFormat, encode_request, request_decoder

CAPTURES = Path(__file__).resolve().parents[1] / "captures"
FORMATS = (WireFormat.PROTO, WireFormat.JSON)


@pytest.mark.parametrize("forced", [False, True], ids=["auto", "forced"])
@pytest.mark.parametrize("multiplex_tool", [False, True], ids=["singleplex-tool", "multiplex-tool"])
@pytest.mark.parametrize("tool", FORMATS, ids=["proto-tool", "json-tool"])
@pytest.mark.parametrize("upstream", FORMATS, ids=["proto-host", "json-host"])
def test_every_format_on_both_sides_and_one_or_many_at_a_time(
    tmp_path: Path, upstream: WireFormat, tool: WireFormat, multiplex_tool: bool, forced: bool
) -> None:
    options = ["--tool-protocol", tool.value, "--max-instances", "2"]
    options += ["--tool-multiplex"] if multiplex_tool else []
    options += ["--worker-protocol", upstream.value] if forced else []
    flags = [f"--{tool.value}", *(["--multiplex"] if multiplex_tool else [])]
    with RawHost(echo_tool(*flags), *options, cwd=tmp_path, upstream=upstream) as host:
        for number in range(3):  # singleplex: id 0, one after the other
            assert host.one("alone", str(number)).pb.output == expected_output([b"alone", b"%d" % number])
        ids = [7, 1, 2**31 - 1, 3, 100, 5]
        answers = host.exchange(*[ask("many", str(number), request_id=number) for number in ids])
        assert outputs(answers) == {number: expected_output([b"many", b"%d" % number]) for number in ids}
        assert host.finish() == []


@pytest.mark.parametrize("multiplex_tool", [False, True], ids=["singleplex-tool", "multiplex-tool"])
def test_ids_that_repeat_while_in_flight_are_each_answered_as_often(
    tmp_path: Path, multiplex_tool: bool
) -> None:
    options = ["--tool-multiplex"] if multiplex_tool else []
    flags = ["--multiplex"] if multiplex_tool else []
    with RawHost(echo_tool(*flags, "--delay-ms", "5"), *options, cwd=tmp_path) as host:
        texts = [f"{text}{number}" for number in (0, 1, 1, 0, 1) for text in "ab"]
        answers = host.exchange(*[ask(text, request_id=int(text[1])) for text in texts])
        got = sorted((answer.pb.request_id, answer.pb.output) for answer in answers)
        assert got == sorted((int(text[1]), expected_output([text.encode()])) for text in texts)


def test_json_objects_need_no_line_end_between_them_nor_one_chunk_each(tmp_path: Path) -> None:
    stream = b"".join(b'{"requestId":%d,"arguments":["x%d"]}' % (n, n) for n in range(1, 6))
    with RawHost(
        echo_tool("--json", "--no-newline"),
        *("--tool-protocol", "json"),
        cwd=tmp_path,
        upstream=WireFormat.JSON,
    ) as host:
        for byte in stream[:40]:
            host.send_bytes(bytes([byte]))
        host.send_bytes(stream[40:])
        assert outputs(host.receive(5)) == {n: expected_output([b"x%d" % n]) for n in range(1, 6)}


def mirror(wire_format: WireFormat) -> list[str]:
    tool = [sys.executable, "-I", "-S", str(WORKERS / "mirror_worker.py")]
    return [*tool, wire_format.value, "--persistent_worker"]


def test_protobuf_passes_with_its_unknown_fields_digests_and_verbosity(tmp_path: Path) -> None:
    known = WorkRequest.of(
        arguments=[b"\xff not utf-8", b""], inputs=[(b"in/\xfe", b"\x00digest")], verbosity=10, request_id=5
    ).pb.SerializeToString()
    unknown = b"\xa0\x06\x96\x01" + b"\xb2\x06\x03abc"  # fields 100 and 102
    with RawHost(mirror(WireFormat.PROTO), cwd=tmp_path) as host:
        host.send_bytes(bytes([len(known + unknown)]) + known + unknown)
        (answer,) = host.receive(1)
        seen = worker_protocol_pb2.WorkRequest.FromString(answer.pb.output)
        assert seen.verbosity == 10
        assert list(seen.arguments) == [b"\xff not utf-8", b""]
        assert [(i.path, i.digest) for i in seen.inputs] == [(b"in/\xfe", b"\x00digest")]
        assert unknown in answer.pb.output
        assert answer.pb.request_id == 5
        assert b"\xa0\x06\x07" in host.raw  # the tool's own unknown field


def test_json_passes_with_its_unknown_fields_digests_and_verbosity(tmp_path: Path) -> None:
    digest = base64.b64encode(b"0123abcd").decode()
    sent = {
        "arguments": ["a", "é\u2028\x01"],
        "inputs": [{"path": "in", "digest": digest, "nlwwNew": [1, None]}],
        "requestId": 4,
        "verbosity": 10,
        "nlwwFuture": {"deep": [True, "x"], "number": 1.5},
    }
    options = ("--tool-protocol", "json")
    with RawHost(mirror(WireFormat.JSON), *options, cwd=tmp_path, upstream=WireFormat.JSON) as host:
        # As Bazel writes it: "=" may come escaped.
        host.send_bytes(json.dumps(sent).replace("=", "\\u003d").encode())
        (answer,) = host.receive(1)
        seen = json.loads(answer.pb.output)
        seen.pop("requestId")  # the wrapper's own, or absent
        assert seen == {name: value for name, value in sent.items() if name != "requestId"}
        assert json.loads(host.raw)["fromTheFuture"] == {"a": [7]}
        assert json.loads(host.raw)["requestId"] == 4


@pytest.mark.parametrize(("upstream", "tool"), list(itertools.permutations(FORMATS)))
def test_digests_and_verbosity_survive_the_change_of_format(
    tmp_path: Path, upstream: WireFormat, tool: WireFormat
) -> None:
    sent = WorkRequest.of(arguments=[b"a"], inputs=[(b"in", b"0123abcd")], verbosity=10)
    options = ("--tool-protocol", tool.value)
    with RawHost(mirror(tool), *options, cwd=tmp_path, upstream=upstream) as host:
        (answer,) = host.exchange(sent)
        decoder = request_decoder(tool)
        body = answer.pb.output
        decoder.feed(body if tool is WireFormat.JSON else bytes([len(body)]) + body)
        seen = decoder.next_message()
        assert seen is not None
        assert (seen.pb.verbosity, seen.pb.inputs[0].digest) == (10, b"0123abcd")


def test_an_argument_that_json_cannot_carry_is_refused_and_the_next_request_served(tmp_path: Path) -> None:
    with RawHost(echo_tool("--json"), "--tool-protocol", "json", cwd=tmp_path) as host:
        refused = host.one(b"\xff", request_id=3)
        assert refused.pb.exit_code == 64
        assert b"UTF-8" in refused.pb.output
        assert host.one("fine").pb.exit_code == 0


def recordings() -> list[Path]:
    return sorted(CAPTURES.glob("*/*.stdin.bin"))


def test_there_are_recordings() -> None:
    assert len(recordings()) >= 20, f"expected in {CAPTURES}: what real Bazel sent to workers"


@pytest.mark.parametrize("multiplex_tool", [False, True], ids=["singleplex-tool", "multiplex-tool"])
@pytest.mark.parametrize("recording", recordings(), ids=lambda path: f"{path.parent.name}-{path.name[:6]}")
def test_what_real_bazel_sent_is_answered_once_each_with_its_id(
    tmp_path: Path, recording: Path, multiplex_tool: bool
) -> None:
    stream = recording.read_bytes()
    upstream = WireFormat.JSON if stream.startswith(b'{"') else WireFormat.PROTO
    decoder = request_decoder(upstream)
    decoder.feed(stream)
    requests = []
    while (request := decoder.next_message()) is not None:
        requests.append(request)
    expected = sorted(
        (request.pb.request_id, expected_output(list(request.pb.arguments)))
        for request in requests
        if not request.pb.cancel
    )
    options = ["--tool-multiplex"] if multiplex_tool else ["--max-instances", "2"]
    flags = ["--multiplex"] if multiplex_tool else []
    tool = echo_tool(*flags, "--delay-ms", "1")
    # Like the recorded ones, the tool takes sandbox_dir; its cancels come while it may be at work.
    with RawHost(tool, *options, "--tool-sandbox", cwd=tmp_path, upstream=upstream) as host:
        host.send_bytes(stream)
        answers = host.finish()
    assert len(answers) == len(expected)
    assert sorted(answer.pb.request_id for answer in answers) == [number for number, _ in expected]
    for answer in answers:
        if not answer.pb.was_cancelled:
            assert (answer.pb.request_id, answer.pb.output) in expected
    if not any(request.pb.cancel for request in requests):
        assert sorted((answer.pb.request_id, answer.pb.output) for answer in answers) == expected


def test_a_burst_of_more_requests_than_may_wait_is_served_in_turn(tmp_path: Path) -> None:
    count = 12_000  # one pipe of 64 KiB takes them all at once; the pool's queue holds 10,000
    stream = b"".join(encode_request(WireFormat.PROTO, ask(request_id=n)) for n in range(1, count + 1))
    assert len(stream) < 60_000
    with RawHost(echo_tool(), "--max-instances", "2", cwd=tmp_path) as host:
        host.send_bytes(stream)
        assert outputs(host.receive(count)) == dict.fromkeys(range(1, count + 1), b"echo:")


def test_instances_grow_with_the_load_up_to_the_limit_and_no_further(tmp_path: Path) -> None:
    tool = echo_tool("--delay-ms", "250")
    with RawHost(tool, "--max-instances", "3", cwd=tmp_path) as host:
        host.send(*[ask(request_id=number) for number in range(40)])
        most = 0

        def all_answered() -> bool:
            nonlocal most
            most = max(most, len(host.workers()))
            return most == 3

        until(all_answered, "three instances")
        host.receive(40)
        assert len(host.workers()) <= 3
