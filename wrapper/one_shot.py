"""Execution without a worker: the tool as it stands, once.

What a build tool does without `--persistent_worker` on the command line.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from wrapper.errors import WorkerStartFailed
from wrapper.runtime.spawn import resolve_program


def run_once(argv: Sequence[str]) -> NoReturn:
    """Become the tool. Raises WorkerStartFailed if it cannot be run."""
    program = resolve_program(argv[0], os.environ, os.getcwd())
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execv(program, list(argv))  # noqa: S606 - no shell is wanted
    except OSError as error:
        raise WorkerStartFailed(f"cannot run {program}: {error.strerror}") from error
