"""What every test gets: the repository on sys.path, and a check that it leaks nothing."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # for `tests.support` and `tests.fakes`
    sys.path.insert(0, str(ROOT))

# A deadline on each example would be an assertion on wall time, on a machine that others use too.
settings.register_profile("ordinary", deadline=None, print_blob=True)
settings.register_profile(
    "nightly",
    deadline=None,
    print_blob=True,
    max_examples=20_000,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("ordinary")

pytest_plugins = ["tests.support.engine_fixture"]

_PATIENCE_S = 2.0


def _descriptors() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue  # the descriptor of this listing itself
        # Random sources and caches that the interpreter or a library opens once and keeps.
        if not target.startswith(("/dev/urandom", "/dev/random")) and "/.hypothesis/" not in target:
            found[int(name)] = target
    return found


def _children() -> set[int]:
    found = set()
    for thread in os.listdir("/proc/self/task"):
        try:
            found |= {int(c) for c in Path(f"/proc/self/task/{thread}/children").read_text().split()}
        except OSError:
            continue
    return {pid for pid in found if not _belongs_to_an_engine(pid)}


def _belongs_to_an_engine(pid: int) -> bool:
    """Whether this is the engine that the tests share, which a test may start anew: its fixture ends it."""
    try:
        return b"/nlww-engine-" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _threads() -> set[str]:
    # Threads of an executor end with their loop; whoever makes a daemon thread says that it may stay.
    return {t.name for t in threading.enumerate() if not t.daemon}


@pytest.fixture(autouse=True)
def _nothing_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test that leaves a descriptor, a child process or a thread. Tasks: see `tests.support.loop`."""
    if request.node.get_closest_marker("engine"):
        request.getfixturevalue("engine")  # now: what all tests share is none's leak
    descriptors, children, threads = _descriptors(), _children(), _threads()
    yield
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        leaked = {
            "descriptors": {f: t for f, t in _descriptors().items() if descriptors.get(f) != t},
            "children": _children() - children,
            "threads": _threads() - threads,
        }
        if not any(leaked.values()):
            return
        if time.monotonic() > deadline:
            pytest.fail(f"the test leaks: { {what: found for what, found in leaked.items() if found} }")
        gc.collect()  # a cycle may hold a socket that its owner has dropped
        time.sleep(0.01)
