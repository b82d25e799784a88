"""Cold and warm requests, counted and averaged without growing."""

from __future__ import annotations

import pytest

from wrapper.pool.start_statistics import MAX_SAMPLES, StartRecorder


def test_of_nothing_there_is_no_mean() -> None:
    summary = StartRecorder.summary([StartRecorder()])
    assert (summary.cold_requests, summary.warm_requests, summary.starts) == (0, 0, 0)
    assert summary.cold_share is summary.cold_latency_s is summary.warm_latency_s is None
    assert summary.start_p95_s is summary.first_request_s is None


def test_cold_and_warm_requests_are_kept_apart() -> None:
    recorder = StartRecorder()
    recorder.served(True, 2.0)
    for seconds in (0.1, 0.2, 0.3):
        recorder.served(False, seconds)
    recorder.first_served(1.5)
    summary = StartRecorder.summary([recorder])
    assert (summary.cold_requests, summary.warm_requests, summary.cold_share) == (1, 3, 0.25)
    assert summary.cold_latency_s == 2.0
    assert summary.warm_latency_s == pytest.approx(0.2)
    assert (summary.first_requests, summary.first_request_s) == (1, 1.5)


@pytest.mark.parametrize(("samples", "expected"), [(1, 1), (19, 19), (20, 19), (100, 95)])
def test_the_percentile_is_a_sample_that_95_of_100_do_not_exceed(samples: int, expected: int) -> None:
    recorder = StartRecorder()
    for seconds in range(samples, 0, -1):
        recorder.started(seconds)
    assert StartRecorder.summary([recorder]).start_p95_s == expected


def test_the_percentile_looks_back_so_far_and_no_further() -> None:
    recorder = StartRecorder()
    for _ in range(500):
        recorder.started(100.0)
    for _ in range(MAX_SAMPLES):
        recorder.started(1.0)
    summary = StartRecorder.summary([recorder])
    assert (summary.starts, summary.start_p95_s) == (500 + MAX_SAMPLES, 1.0)
    assert len(recorder.starts_s) == MAX_SAMPLES


def test_several_pools_are_one_sum() -> None:
    one, other = StartRecorder(), StartRecorder()
    one.served(True, 1.0)
    other.served(True, 3.0)
    other.started(7.0)
    summary = StartRecorder.summary([one, other])
    assert (summary.cold_requests, summary.cold_latency_s, summary.start_p95_s) == (2, 2.0, 7.0)
