"""What the codec's tests share: the recorded streams of real build tools, and a way to drain a decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
CAPTURES = ROOT / "tests" / "captures"


@pytest.fixture(scope="session")
def captures() -> Path:
    """The folder of recorded streams. A test that needs it fails without it: it proves the most."""
    if not CAPTURES.is_dir():
        pytest.fail("the recorded worker-protocol streams are missing: they are expected in tests/captures")
    return CAPTURES


@pytest.fixture(scope="session")
def repository() -> Path:
    return ROOT


Drain = Callable[[Any, Iterable[bytes]], list[Any]]


@pytest.fixture(scope="session")
def drain() -> Drain:
    """Feed the chunks to a decoder; returns the messages that came out."""

    def run(decoder: Any, chunks: Iterable[bytes]) -> list[Any]:
        messages = []
        for chunk in chunks:
            decoder.feed(chunk)
            while (message := decoder.next_message()) is not None:
                messages.append(message)
        return messages

    return run
