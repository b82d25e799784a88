"""The table of a worker's states, every pair of it: allowed, or an error that changes nothing."""

from __future__ import annotations

import copy

import pytest

from tests.support.core_world import World, tool
from wrapper.pool.core_records import Registry, Worker
from wrapper.pool.worker_states import (
    LIVE_STATES,
    SERVING_STATES,
    TRANSITIONS,
    IllegalStep,
    Step,
    WorkerState,
    next_state,
)


@pytest.mark.parametrize("step", Step, ids=lambda step: step.name)
@pytest.mark.parametrize("state", WorkerState, ids=lambda state: state.name)
def test_a_step_is_in_the_table_or_raises_and_changes_nothing(state: WorkerState, step: Step) -> None:
    world = World()
    key = world.core.registry.key_state(tool())
    registry = world.core.registry
    worker = Worker(99, key, WorkerState.STARTING, 0.0, None, leases={1: 0.0})
    registry.add_worker(worker)
    for earlier in way_to(state):
        registry.step(worker, earlier, 0.0)
    before = books(registry, worker)
    if step in TRANSITIONS[state]:
        registry.step(worker, step, 1.0)
        assert worker.state is TRANSITIONS[state][step]
    else:
        with pytest.raises(IllegalStep, match=f"'{step.value}' in state '{state.value}'"):
            registry.step(worker, step, 1.0)
        assert books(registry, worker) == before


def way_to(state: WorkerState) -> list[Step]:
    """The shortest way from the beginning of a worker's life."""
    ways: dict[WorkerState, list[Step]] = {WorkerState.STARTING: []}
    queue = [WorkerState.STARTING]
    for here in queue:
        for step, there in TRANSITIONS[here].items():
            if there not in ways:
                ways[there] = [*ways[here], step]
                queue.append(there)
    return ways[state]


def books(registry: Registry, worker: Worker) -> object:
    key = worker.key
    return copy.deepcopy(
        (
            worker.state,
            registry.slots,
            registry.stopping,
            sorted(registry.workers),
            (sorted(key.workers), list(key.open), key.starting, key.serving),
            (key.pool.slots, key.pool.stopping, list(key.pool.idle)),
            {state.name: count for state, count in key.pool.states.items()},
        )
    )


def test_every_state_can_be_reached_and_every_life_can_end() -> None:
    for state in WorkerState:
        way_to(state)
        if state not in (WorkerState.STOPPING, WorkerState.STOPPED):
            assert next_state(state, Step.STOP) is WorkerState.STOPPING
    assert TRANSITIONS[WorkerState.STOPPED] == {}


def test_a_serving_worker_is_alive_and_can_come_to_a_lease_without_a_start() -> None:
    assert SERVING_STATES < LIVE_STATES
    for state in SERVING_STATES:
        reached = {state}
        for _ in WorkerState:
            reached |= {after for here in reached for after in TRANSITIONS[here].values()}
        assert WorkerState.LEASED in reached
