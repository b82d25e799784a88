"""When a key starts a worker again after failures, and what it expects of its workers."""

from __future__ import annotations

import pytest

from wrapper.errors import WorkerDied, WorkerStartFailed
from wrapper.pool.backoff import EARLY_DEATHS_TOLERATED, FIRST_DELAY_S, MAX_DELAY_S, StartBackoff
from wrapper.pool.estimates import Estimates

BROKEN = WorkerStartFailed("no such program")
DEAD = WorkerDied("it died")


def test_before_any_failure_nothing_is_refused_or_delayed() -> None:
    backoff = StartBackoff()
    assert backoff.refusal(0.0) is None
    assert not backoff.delays(0.0)


def test_a_program_that_cannot_start_is_refused_until_the_delay_is_over() -> None:
    backoff = StartBackoff()
    backoff.start_failed(100.0, BROKEN)
    assert backoff.refusal(100.0) is BROKEN
    assert backoff.refusal(100.0 + FIRST_DELAY_S - 0.001) is BROKEN
    assert backoff.refusal(100.0 + FIRST_DELAY_S) is None  # whoever comes now causes the next try


def test_the_delay_doubles_with_each_failure_up_to_a_bound() -> None:
    backoff = StartBackoff()
    delays = []
    for _ in range(20):
        backoff.start_failed(0.0, BROKEN)
        delays.append(backoff.retry_at)
    assert delays[:4] == [FIRST_DELAY_S * factor for factor in (1, 2, 4, 8)]
    assert delays == sorted(delays)
    assert delays[-1] == MAX_DELAY_S


def test_one_success_ends_it() -> None:
    backoff = StartBackoff()
    for _ in range(5):
        backoff.start_failed(0.0, BROKEN)
    backoff.succeeded()
    assert backoff.refusal(0.0) is None
    assert not backoff.delays(0.0)
    assert backoff.error is None
    backoff.start_failed(0.0, BROKEN)
    assert backoff.retry_at == FIRST_DELAY_S


def test_early_deaths_delay_at_once_but_refuse_only_after_several() -> None:
    backoff = StartBackoff()
    for _ in range(EARLY_DEATHS_TOLERATED):
        backoff.died_before_first_answer(0.0, DEAD)
        assert backoff.delays(0.0)
        assert backoff.refusal(0.0) is None  # a single request can kill its worker: the next is innocent
    backoff.died_before_first_answer(0.0, DEAD)
    assert backoff.refusal(0.0) is DEAD


def test_the_newest_error_is_the_one_that_is_told() -> None:
    backoff = StartBackoff()
    backoff.start_failed(0.0, BROKEN)
    backoff.died_before_first_answer(0.0, DEAD)
    assert backoff.refusal(0.0) is DEAD


# ---- estimates -------------------------------------------------------------------------------------


def test_what_was_never_measured_is_not_guessed() -> None:
    estimates = Estimates()
    assert estimates.wait_s(1, 1) is None
    assert estimates.cold_s() is None
    estimates.started(0.5)
    assert estimates.cold_s() is None
    estimates.served(0.7, first=True)
    assert estimates.wait_s(1, 1) is None  # one first request says nothing about the later ones


def test_a_cold_worker_costs_its_start_and_what_its_first_request_takes_longer() -> None:
    estimates = Estimates()
    estimates.started(0.3)
    estimates.served(0.36, first=True)
    estimates.served(0.06, first=False)
    assert estimates.cold_s() == pytest.approx(0.6)


def test_a_first_request_that_happens_to_be_quick_makes_nothing_cheaper_than_the_start() -> None:
    estimates = Estimates()
    estimates.started(0.3)
    estimates.served(0.1, first=True)
    estimates.served(5.0, first=False)
    assert estimates.cold_s() == pytest.approx(0.3)


def test_the_wait_grows_with_the_queue_and_shrinks_with_the_workers_and_cleaning_counts() -> None:
    estimates = Estimates()
    estimates.served(0.06, first=False)
    assert estimates.wait_s(7, 1) == pytest.approx(0.42)
    assert estimates.wait_s(7, 2) == pytest.approx(0.21)
    estimates.cooled(0.04)
    assert estimates.wait_s(7, 1) == pytest.approx(0.7)
    assert estimates.wait_s(7, 0) == pytest.approx(0.7)  # none serving: as long as for one


def test_the_last_handful_of_requests_decides() -> None:
    estimates = Estimates()
    for _ in range(100):
        estimates.served(10.0, first=False)
    for _ in range(10):
        estimates.served(0.1, first=False)
    assert estimates.serving_s == pytest.approx(0.1, abs=0.3)
