"""What is remembered of tools: which protocol they speak, whether they are workers, when they rest."""

from __future__ import annotations

from dataclasses import replace

from wrapper.pool.breaker import FAILURES_IN_A_ROW, FIRST_PAUSE_S, MAX_PAUSE_S, CircuitBreaker
from wrapper.pool.worker_key import WorkerKey
from wrapper.tool_records import MAX_RECORDS, ToolRecord, ToolRecords

KEY = WorkerKey(pool="p", argv=("tool",), cwd="/")


def opened() -> CircuitBreaker:
    breaker = CircuitBreaker()
    for _ in range(FAILURES_IN_A_ROW):
        assert breaker.allows(0.0)
        breaker.failed(0.0, "crash")
    return breaker


def test_it_opens_after_failures_in_a_row_and_says_why() -> None:
    breaker = opened()
    assert breaker.is_open
    assert breaker.reason == "crash"
    assert not breaker.allows(FIRST_PAUSE_S - 0.1)


def test_a_success_in_between_starts_the_count_anew() -> None:
    breaker = CircuitBreaker()
    for _ in range(10):
        breaker.failed(0.0, "crash")
        breaker.failed(0.0, "crash")
        breaker.succeeded()
    assert not breaker.is_open


def test_after_the_pause_one_request_passes_and_decides() -> None:
    breaker = opened()
    assert breaker.allows(FIRST_PAUSE_S)
    assert not breaker.allows(FIRST_PAUSE_S)
    breaker.succeeded()
    assert breaker.allows(FIRST_PAUSE_S)
    assert not breaker.is_open


def test_a_trial_that_fails_makes_the_next_pause_twice_as_long_up_to_a_bound() -> None:
    breaker = opened()
    now, pauses = 0.0, []
    for _ in range(12):
        assert breaker.retry_at is not None
        pauses.append(breaker.retry_at - now)
        now = breaker.retry_at
        assert breaker.allows(now)
        breaker.failed(now, "again")
    assert pauses[:3] == [FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S]
    assert pauses[-1] == MAX_PAUSE_S


def test_a_trial_that_was_cancelled_lets_the_next_one_try() -> None:
    breaker = opened()
    assert breaker.allows(FIRST_PAUSE_S)
    breaker.says_nothing()
    assert breaker.allows(FIRST_PAUSE_S)


def test_late_failures_of_requests_that_passed_before_do_not_prolong_the_pause() -> None:
    breaker = opened()
    until = breaker.retry_at
    for _ in range(5):
        breaker.failed(10.0, "late")
    assert breaker.retry_at == until


def test_an_unknown_tool_is_spoken_to_in_bazels_default_first() -> None:
    record = ToolRecord()
    assert record.protocols(None) == ("proto", "json")
    assert record.protocols("json") == ("json",)


def test_what_worked_last_is_used() -> None:
    record = ToolRecord()
    record.is_no_worker("proto", 0.0, "garbage", asked=None)
    assert record.protocols(None) == ("json",)
    record.answered("json")
    assert record.protocols(None) == ("json",)
    assert not record.breaker.is_open


def test_a_tool_that_speaks_nothing_is_left_alone_and_tried_again_afresh() -> None:
    record = ToolRecord()
    for protocol in record.protocols(None):
        record.is_no_worker(protocol, 0.0, f"no {protocol}", asked=None)
    assert not record.breaker.allows(1.0)
    assert record.breaker.allows(FIRST_PAUSE_S)
    assert record.protocols(None) == ("proto", "json")


def test_a_tool_that_does_not_speak_what_the_action_asks_for_is_left_alone_at_once() -> None:
    record = ToolRecord()
    record.is_no_worker("json", 0.0, "garbage", asked="json")
    assert record.breaker.is_open


def test_kinds_of_workers_that_differ_in_the_protocol_only_are_one_tool() -> None:
    records = ToolRecords()
    assert records.of(KEY) is records.of(replace(KEY, protocol="json"))
    assert records.of(KEY) is not records.of(replace(KEY, tool="another version"))


def test_the_least_recently_used_record_is_forgotten() -> None:
    records = ToolRecords()
    first, second = records.of(KEY), records.of(replace(KEY, tool="second"))
    for number in range(MAX_RECORDS - 2):
        records.of(replace(KEY, tool=str(number)))
    assert records.of(KEY) is first
    records.of(replace(KEY, tool="one more"))
    assert records.of(KEY) is first
    assert records.of(replace(KEY, tool="second")) is not second
