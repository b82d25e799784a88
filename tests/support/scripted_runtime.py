"""The container runtime on an engine that a test scripts: settings, one exchange with a worker, leftovers."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.scripted_engine import BASIC_CALLS, IMAGE, ScriptedEngine
from tests.support.cri import ISOLATION, leftovers_on_node
from tests.support.loop import eventually
from wrapper.runtime.base import Mount, WorkerProcess, WorkerSpec
from wrapper.runtime.cri_container import CriRuntime, CriSettings
from wrapper.runtime.cri_engine import Deadlines

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="namespaces, mounts and control groups need root")

CAT = WorkerSpec("cat", ("/usr/bin/cat",), {}, "/")
SHORT = Deadlines(call_s=0.7, start_s=0.7, pull_s=0.7, shim_s=0.7, abandon_s=0.3, removal_s=3.0)
"""Of an engine that does not answer: what is in time takes some tens of milliseconds."""


def settings(engine: ScriptedEngine, folder: Path, **changes: Any) -> CriSettings:
    """A pool on this engine; the fake has no system call filter, all else is as usual."""
    usual = CriSettings(
        pool="pool",
        socket=engine.socket,
        image=IMAGE,
        isolation=replace(ISOLATION, seccomp=False),
        mounts=(Mount("/usr", "/usr"),),
        state_dir=str(folder / "state"),
    )
    return replace(usual, **changes)


@asynccontextmanager
async def runtime_on(engine: ScriptedEngine, folder: Path, **changes: Any) -> AsyncIterator[CriRuntime]:
    """A runtime; afterwards nothing of it is left on the node, and it asked for basic calls only."""
    runtime = CriRuntime(settings(engine, folder, **changes))
    try:
        yield runtime
    finally:
        await runtime.close()
    assert leftovers_on_node(folder) == []
    assert set(engine.names()) <= BASIC_CALLS


async def ask(worker: WorkerProcess, data: bytes = b"hello") -> bytes:
    """One exchange with a worker that repeats its input."""
    os.write(worker.stdin_fd, data)
    answer = b""

    def answered() -> bool:
        nonlocal answer
        try:
            answer += os.read(worker.stdout_fd, 65536)
        except BlockingIOError:
            pass
        assert not worker.exited.done(), f"it ended: {worker.stderr_tail()!r}"
        return len(answer) >= len(data)

    await eventually(answered)
    return answer


async def failure_of(start: Any) -> BaseException:
    """What a start ends with, which must not succeed."""
    result = (await asyncio.gather(start, return_exceptions=True))[0]
    assert isinstance(result, BaseException), f"it succeeded: {result}"
    return result
