"""A directory beside a worker's execroot, made up for one request that primes the worker.

Its files go into the execroot and come back as those of a real request do. Owns that, and that nothing of
it stays.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Protocol

from wrapper.files import remove_tree


class Staged(Protocol):
    """Files that are in a worker's execroot now."""

    def collect(self) -> object:
        """Take everything out again. Raises RuntimeUnavailable."""

    def undo(self) -> bool:
        """As `collect`, quietly, and what is new is removed: whether all is as it was before."""

    def abandon(self) -> None:
        """Leave it there: the worker goes, and its execroot with it."""


class Scratch:
    """One such directory. `path`: where its files are to be made; `stage` moves them. Raises OSError."""

    def __init__(self, path: str, stage: Callable[[], Staged]) -> None:
        self.path = path
        self.stage = stage
        os.mkdir(path, 0o700)

    def remove(self) -> None:
        """Delete it with all that is in it. Idempotent. Raises RuntimeUnavailable."""
        remove_tree(self.path)
