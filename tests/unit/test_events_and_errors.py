"""The events bus, and how errors show themselves."""

from __future__ import annotations

import inspect
import logging

import pytest

from wrapper import errors
from wrapper.errors import SHOWN_BYTES, SHOWN_STDERR_BYTES, ProtocolError, WorkerDied, WrapperError
from wrapper.events import Event, EventBus, EventKind, log_events

STARTED = Event(EventKind.WORKER_STARTED, "java", 7, "javac", "pid 12")


def test_every_subscriber_gets_every_event_in_the_order_of_subscription() -> None:
    bus = EventBus()
    seen: list[tuple[str, Event]] = []
    bus.subscribe(lambda event: seen.append(("first", event)))
    bus.subscribe(lambda event: seen.append(("second", event)))
    bus.publish(STARTED)
    assert seen == [("first", STARTED), ("second", STARTED)]


def test_a_subscription_ends_also_from_inside_an_event_and_without_harm_to_the_others() -> None:
    bus = EventBus()
    seen: list[str] = []

    def once(_: Event) -> None:
        seen.append("once")
        end()

    end = bus.subscribe(once)
    bus.subscribe(lambda _: seen.append("always"))
    bus.publish(STARTED)
    bus.publish(STARTED)
    assert seen == ["once", "always", "always"]


def test_a_subscriber_that_fails_is_logged_and_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    bus = EventBus()
    seen: list[Event] = []

    def broken(_: Event) -> None:
        raise ZeroDivisionError

    bus.subscribe(broken)
    bus.subscribe(seen.append)
    bus.publish(STARTED)
    assert seen == [STARTED]
    assert "a subscriber failed on worker started" in caplog.text
    assert "ZeroDivisionError" in caplog.text


def test_nobody_need_listen() -> None:
    EventBus().publish(STARTED)


def test_bytes_are_shown_in_mebibytes_from_one_on() -> None:
    numbers = {"load_s": 0.03125, "memory_bytes": 126_353_408.0, "left_bytes": 2000.0}
    event = Event(EventKind.WARMUP_DONE, "java", 1, numbers=numbers)
    assert str(event) == "warm-up done: pool=java worker=1 load_s=0.03125 memory=120.5MiB left_bytes=2000"


def test_an_event_reads_as_one_line() -> None:
    assert str(STARTED) == "worker started: pool=java worker=7 key=javac (pid 12)"
    gc = Event(EventKind.GARBAGE_COLLECTED, "java", numbers={"reclaimed_bytes": 2048, "duration_s": 0.0512})
    assert str(gc) == "garbage collected: pool=java reclaimed_bytes=2048 duration_s=0.0512"


@pytest.mark.parametrize("kind", EventKind)
def test_every_event_can_be_logged_and_trouble_is_a_warning(
    kind: EventKind, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        log_events(Event(kind, "java"))
    (record,) = caplog.records
    trouble = "failed" in kind.value or kind in (
        EventKind.STRAY_OUTPUT,
        EventKind.LEFTOVERS_REMOVED,
        EventKind.WARMUP_SKIPPED,
        EventKind.POOL_UNHEALTHY,
        EventKind.POOL_HEALTHY,  # whoever was woken by the one wants to see the other
    )
    assert (record.levelno >= logging.WARNING) == trouble


# ---- errors ----------------------------------------------------------------------------------------

ERRORS = [
    found for _, found in inspect.getmembers(errors, inspect.isclass) if issubclass(found, WrapperError)
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_every_error_says_what_it_means_and_has_an_exit_code_of_its_own_kind(
    error: type[WrapperError],
) -> None:
    assert error.__doc__
    assert 64 <= error.exit_code <= 78  # sysexits.h
    assert isinstance(error.retry_helps, bool)


def test_what_helps_to_retry_is_what_passes() -> None:
    helped = {error.__name__ for error in ERRORS if error.retry_helps}
    assert helped == {"RuntimeUnavailable", "ActionLost", "PoolTimeout", "PoolExhausted", "PoolDraining"}


def test_a_report_is_the_message_alone_if_the_worker_said_nothing() -> None:
    assert WorkerDied("it died").report() == str(WorkerDied("it died")) == "it died"


def test_a_report_shows_the_workers_last_words_under_the_message() -> None:
    report = WorkerDied("it died", stderr_tail=b"first\nOutOfMemoryError\n\n").report()
    assert report.splitlines() == [
        "it died",
        "--- last lines of the worker's stderr ---",
        "first",
        "OutOfMemoryError",
        "---",
    ]


def test_a_report_is_bounded_and_keeps_the_end() -> None:
    report = WorkerDied("it died", stderr_tail=b"x" * 10**6 + b" the end").report()
    assert report.endswith(" the end\n---")
    assert len(report) < SHOWN_STDERR_BYTES + 100


def test_last_words_that_are_no_text_do_not_break_the_report() -> None:
    assert "\ufffd" in WorkerDied("it died", stderr_tail=b"\xff\xfe").report()


def test_a_protocol_error_says_where_what_was_expected_and_what_was_seen() -> None:
    error = ProtocolError(offset=17, expected="a WorkResponse", seen=b"Hello" + b"x" * 1000)
    assert error.message.startswith("at byte 17: expected a WorkResponse, saw b'Hello")
    assert len(error.seen) == SHOWN_BYTES
    assert len(error.message) < 200
