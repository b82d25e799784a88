"""A directory beside a worker's execroot, made up for one request that primes the worker.

Its files go into the execroot and come back as those of a real request do. Owns that, and that nothing of
it stays.
"""

from __future__ import annotations

import os
import shutil
from typing import Protocol

from wrapper.execroot.worker_execroot import WorkerExecroot


class Staged(Protocol):
    """Files that are in a worker's execroot now."""

    def collect(self) -> None:
        """Take everything out again. Raises RuntimeUnavailable."""

    def abandon(self) -> None:
        """Leave it there: the worker goes, and its execroot with it."""


class Scratch:
    """One such directory. `path`: where its files are to be made. Raises OSError."""

    def __init__(self, execroot: WorkerExecroot, number: int) -> None:
        self._execroot = execroot
        # On the same mount as the execroot, where the sandboxes of real requests are too.
        self.path = f"{execroot.path}.prime-{number}"
        os.mkdir(self.path, 0o700)

    def stage(self) -> Staged:
        """Move the files into the execroot. Raises as `WorkerExecroot.stage` does."""
        host = os.path.dirname(os.path.dirname(self._execroot.path))
        return self._execroot.stage(os.fsencode(os.path.relpath(self.path, host)))

    def remove(self) -> None:
        """Delete it with all that is in it. Idempotent."""
        shutil.rmtree(self.path, ignore_errors=True)
