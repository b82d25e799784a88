"""The queue of starts: never more than there are places, the most urgent first, no place lost."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from wrapper.pool.warmup_queue import Urgency, WarmupQueue


def test_whoever_comes_while_there_is_a_place_has_it_at_once() -> None:
    queue = WarmupQueue(2)
    assert queue.enter(1, "p", lambda: Urgency.SPARE)
    assert queue.enter(2, "q", lambda: Urgency.SPARE)
    assert not queue.enter(3, "p", lambda: Urgency.WAITED_FOR)
    assert (queue.active(), queue.active("p"), queue.pending(), queue.pending("q")) == (2, 1, 1, 0)


def test_a_waited_for_key_goes_before_a_minimum_and_that_before_a_spare() -> None:
    queue = WarmupQueue(1)
    queue.enter(1, "p", lambda: Urgency.SPARE)
    queue.enter(2, "p", lambda: Urgency.SPARE)
    queue.enter(3, "p", lambda: Urgency.MINIMUM)
    queue.enter(4, "p", lambda: Urgency.WAITED_FOR)
    assert [queue.leave(1), queue.leave(4), queue.leave(3), queue.leave(2)] == [4, 3, 2, 0]


def test_the_urgency_is_looked_at_when_a_place_becomes_free() -> None:
    queue = WarmupQueue(1)
    urgencies = {2: Urgency.WAITED_FOR, 3: Urgency.SPARE}
    queue.enter(1, "p", lambda: Urgency.MINIMUM)
    for worker in (2, 3):
        queue.enter(worker, "p", lambda worker=worker: urgencies[worker])  # type: ignore[misc]
    urgencies[2], urgencies[3] = Urgency.SPARE, Urgency.WAITED_FOR
    assert queue.leave(1) == 3


def test_among_equals_the_first_come_is_the_first_served() -> None:
    queue = WarmupQueue(1)
    for worker in range(1, 6):
        queue.enter(worker, "p", lambda: Urgency.MINIMUM)
    assert [queue.leave(worker) for worker in range(1, 6)] == [2, 3, 4, 5, 0]


def test_who_leaves_the_queue_is_not_called_and_leaving_twice_frees_one_place() -> None:
    queue = WarmupQueue(1)
    for worker in (1, 2, 3, 4):
        queue.enter(worker, "p", lambda: Urgency.MINIMUM)
    assert queue.leave(2) == 0
    assert queue.leave(1) == 3
    assert queue.leave(1) == 0
    assert (queue.active(), queue.pending()) == (1, 1)
    assert "active=1/1 pending=1" in repr(queue)


@given(places=st.integers(1, 4), data=st.data())
def test_whatever_happens_no_place_is_lost_and_nobody_of_a_class_is_overtaken_in_it(
    places: int, data: st.DataObject
) -> None:
    queue = WarmupQueue(places)
    urgencies: dict[int, Urgency] = {}
    active: set[int] = set()
    pending: list[int] = []
    for worker in range(1, data.draw(st.integers(1, 40), label="steps")):
        step = data.draw(st.sampled_from(["enter", "enter", "leave", "give up", "change"]), label="step")
        if step == "enter":
            urgencies[worker] = data.draw(st.sampled_from(Urgency))
            has_place = queue.enter(worker, "p", lambda worker=worker: urgencies[worker])  # type: ignore[misc]
            assert has_place == (len(active) < places)
            if has_place:
                active.add(worker)
            else:
                pending.append(worker)
        elif step == "change" and pending:
            urgencies[data.draw(st.sampled_from(pending))] = data.draw(st.sampled_from(Urgency))
        elif step == "give up" and pending:
            gone = data.draw(st.sampled_from(pending))
            pending.remove(gone)
            assert queue.leave(gone) == 0
        elif step == "leave" and active:
            leaving = data.draw(st.sampled_from(sorted(active)))
            active.remove(leaving)
            expected = min(pending, key=lambda one: urgencies[one], default=0)  # the first of the most urgent
            assert queue.leave(leaving) == expected
            if expected:
                pending.remove(expected)
                active.add(expected)
        assert (queue.active(), queue.pending()) == (len(active), len(pending))
        assert len(active) <= places
        assert not pending or len(active) == places, "somebody waits beside a free place"
    while active:
        following = queue.leave(active.pop())
        if following:
            pending.remove(following)
            active.add(following)
    assert not pending
    assert (queue.active(), queue.pending()) == (0, 0)
