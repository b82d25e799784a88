"""Ids, cancels and strays: every answer reaches the request it belongs to, or nobody."""

from __future__ import annotations

import pytest

from wrapper.errors import RequestRefused
from wrapper.worker_protocol.exchange import Answered, Broken, Stray, UpstreamLedger, WorkerExchange
from wrapper.worker_protocol.messages import WorkRequest, WorkResponse
from wrapper.worker_protocol.wire_format import WireFormat, encode_response, request_decoder


def answer(request_id: int, output: bytes = b"", *, cancelled: bool = False) -> bytes:
    response = WorkResponse.of(output=output, request_id=request_id, was_cancelled=cancelled)
    return encode_response(WireFormat.PROTO, response)


def sent_id(frame: bytes) -> int:
    decoder = request_decoder(WireFormat.PROTO)
    decoder.feed(frame)
    request = decoder.next_message()
    assert request is not None
    return request.pb.request_id


def request(upstream_id: int = 0) -> WorkRequest:
    return WorkRequest.of(arguments=[b"x"], request_id=upstream_id)


def test_a_tool_that_echoes_ids_gets_a_new_one_for_each_request() -> None:
    exchange = WorkerExchange(WireFormat.PROTO)
    ids = []
    for _ in range(3):
        sent, frame = exchange.send(request(7))
        ids.append(sent_id(frame))
        (received,) = exchange.receive(answer(sent_id(frame)))
        assert isinstance(received, Answered)
        assert received.sent is sent
    assert ids == [11, 22, 33]  # never neighbours: off by one is nobody's
    assert exchange.echoes_ids is True


def test_a_tool_that_answers_zero_is_sent_zero_from_then_on() -> None:
    exchange = WorkerExchange(WireFormat.PROTO)
    _, first = exchange.send(request())
    assert sent_id(first) != 0
    assert isinstance(exchange.receive(answer(0))[0], Answered)
    _, second = exchange.send(request())
    assert sent_id(second) == 0
    assert isinstance(exchange.receive(answer(0))[0], Answered)


def test_the_second_of_two_equal_answers_is_a_stray_even_when_the_next_request_is_in_flight() -> None:
    exchange = WorkerExchange(WireFormat.PROTO)
    _, first = exchange.send(request())
    exchange.receive(answer(sent_id(first)))
    second, frame = exchange.send(request())
    late, right = exchange.receive(answer(sent_id(first)) + answer(sent_id(frame), b"right"))
    assert isinstance(late, Stray)
    assert isinstance(right, Answered)
    assert right.sent is second


@pytest.mark.parametrize("request_id", [0, 5, 99])
def test_an_answer_without_a_request_is_a_stray(request_id: int) -> None:
    (received,) = WorkerExchange(WireFormat.PROTO).receive(answer(request_id))
    assert isinstance(received, Stray)


def test_a_tool_without_ids_that_answers_a_strange_id_is_not_believed() -> None:
    exchange = WorkerExchange(WireFormat.PROTO)
    exchange.send(request())
    exchange.receive(answer(0))
    exchange.send(request())
    assert isinstance(exchange.receive(answer(4))[0], Stray)


def test_multiplex_answers_come_in_any_order_and_must_echo() -> None:
    exchange = WorkerExchange(WireFormat.PROTO, multiplex=True)
    sent = [exchange.send(request())[0] for _ in range(4)]
    received = exchange.receive(b"".join(answer(s.wire_id) for s in reversed(sent)))
    assert [r.sent for r in received if isinstance(r, Answered)] == sent[::-1]
    exchange.send(request())
    assert isinstance(exchange.receive(answer(0))[0], Stray)


def test_was_cancelled_without_a_cancel_is_not_an_answer() -> None:
    exchange = WorkerExchange(WireFormat.PROTO)
    sent, frame = exchange.send(request())
    assert isinstance(exchange.receive(answer(sent.wire_id, cancelled=True))[0], Broken)
    sent, frame = exchange.send(request())
    cancel = exchange.cancel(sent)
    assert sent_id(cancel) == sent_id(frame)
    assert isinstance(exchange.receive(answer(sent.wire_id, cancelled=True))[0], Answered)


def test_answers_before_garbage_are_answers() -> None:
    exchange = WorkerExchange(WireFormat.PROTO, multiplex=True)
    first, _ = exchange.send(request())
    exchange.send(request())
    good, broken = exchange.receive(answer(first.wire_id) + b"\xff" * 8)
    assert isinstance(good, Answered)
    assert isinstance(broken, Broken)
    assert f"at byte {len(answer(first.wire_id))}:" in broken.description


def test_a_request_that_json_cannot_carry_is_refused_and_leaves_the_worker_free() -> None:
    exchange = WorkerExchange(WireFormat.JSON)
    with pytest.raises(RequestRefused):
        exchange.send(WorkRequest.of(arguments=[b"\xff\xfe"]))
    assert exchange.in_flight == 0
    exchange.send(request())


def test_a_singleplex_worker_is_never_given_two_requests() -> None:
    exchange = WorkerExchange(WireFormat.PROTO)
    exchange.send(request())
    with pytest.raises(AssertionError):
        exchange.send(request())


def test_the_ledger_echoes_ids_that_repeat_even_in_flight() -> None:
    ledger = UpstreamLedger()
    first, second = ledger.accept(request(1)), ledger.accept(request(1))
    assert ledger.answer(second, WorkResponse.of(request_id=55)).pb.request_id == 1
    assert ledger.answer(first, WorkResponse.of(request_id=54)).pb.request_id == 1
    assert len(ledger) == 0


def test_a_cancel_means_the_newest_request_of_its_id_and_is_ignored_for_a_finished_one() -> None:
    ledger = UpstreamLedger()
    old, new = ledger.accept(request(3)), ledger.accept(request(3))
    assert ledger.cancel(3) is new
    assert ledger.cancel(3) is old
    assert ledger.cancel(3) is None
    ledger.answer(old, WorkResponse.of())
    ledger.answer(new, WorkResponse.of(was_cancelled=True))
    assert ledger.cancel(3) is None
    assert ledger.cancel(77) is None


def test_a_second_answer_and_an_unasked_was_cancelled_are_errors_of_ours() -> None:
    ledger = UpstreamLedger()
    ticket = ledger.accept(request(3))
    with pytest.raises(AssertionError):
        ledger.answer(ticket, WorkResponse.of(was_cancelled=True))
    ledger.answer(ticket, WorkResponse.of())
    with pytest.raises(AssertionError):
        ledger.answer(ticket, WorkResponse.of())
