"""A WarmWorkerPoolManager on the fake runtime, for tests in virtual time."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from tests.fakes.fake_runtime import FakeRuntime, Script
from tests.support.loop import eventually
from tests.support.tools import proto_tool, request
from wrapper.config import parse_config
from wrapper.events import Event, EventKind
from wrapper.manager import PoolCreateOptions, WarmWorkerPoolManager
from wrapper.runtime.base import WorkerSpec


def pool(name: str = "p", **fields: object) -> dict[str, object]:
    """One pool of a pools document; it keeps no worker warm unless told to."""
    defaults = {"language": "custom(test)", "worker_command": ["/bin/tool"], "min_warm_workers": 0}
    return {"name": name, **defaults, **fields}


def answers(_: WorkerSpec) -> Script:
    """Every worker answers with the arguments of the request."""
    return Script(tool=proto_tool())


class World:
    """A manager, and what a test wants to know of its surroundings."""

    def __init__(self, manager: WarmWorkerPoolManager, runtime: FakeRuntime) -> None:
        self.manager = manager
        self.runtime = runtime
        self.events: list[Event] = []
        manager.events.subscribe(self.events.append)

    def stop_reasons(self) -> list[str]:
        return [event.detail for event in self.events if event.kind is EventKind.WORKER_STOPPING]

    async def ask(self, pool_or_key: str = "p", text: bytes = b"hello") -> bytes:
        async with self.manager.lease(pool_or_key) as lease:
            return (await lease.execute(request(text))).pb.output

    async def until_ready(self, count: int) -> None:
        await eventually(lambda: self.manager.metrics().ready_workers == count)


def make(
    script: Callable[[WorkerSpec], Script] = answers,
    *,
    pools: list[dict[str, object]] | None = None,
    cwd: str = "/",
    **fields: Any,
) -> World:
    """Not started yet. `fields` are those of its one pool, unless there are `pools`."""
    runtime = FakeRuntime(script)
    document = json.dumps({"pools": pools or [pool(**fields)]})
    options = PoolCreateOptions(parse_config(document, "test"), cwd=cwd, make_runtime=lambda _: runtime)
    return World(WarmWorkerPoolManager(options), runtime)


@asynccontextmanager
async def world(
    script: Callable[[WorkerSpec], Script] = answers,
    *,
    pools: list[dict[str, object]] | None = None,
    **fields: Any,
) -> AsyncIterator[World]:
    """Started; closed at the end, and then nothing may be left."""
    there = make(script, pools=pools, **fields)
    try:
        async with there.manager:
            yield there
    finally:
        assert not there.runtime.alive
        assert not there.runtime.starting
