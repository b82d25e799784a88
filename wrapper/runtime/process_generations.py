"""What plain workers of a daemon that was killed have left: processes, and their temporary directories.

All temporary directories of one daemon lie in its generation (`wrapper/generation.py`), and each worker has
the path of its own in TMPDIR. So whoever runs with the name of a dead generation in its environment is one
of its workers, or was started by one; it is killed before the directories are deleted.

For daemons. Worker mode needs none of this: its host kills what it started.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal

from wrapper.errors import RuntimeUnavailable
from wrapper.generation import Generation, take_over
from wrapper.runtime import linux, process_tree

KILL_TIMEOUT_S = 10.0
_MOST_ENVIRONMENT = 1 << 20

_log = logging.getLogger(__name__)


class ProcessGenerations:
    """The generations below one folder, which is made if need be."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._own: Generation | None = None
        self._is_clean = False

    def path(self) -> str:
        """Of this process's generation, through which other users may go. Raises ConfigError."""
        if self._own is None:
            self._own = Generation.begin(self._folder, passable=True)
        return self._own.path

    async def remove_dead(self) -> None:
        """Once: end the processes of dead generations, and delete their files. Raises RuntimeUnavailable."""
        if self._is_clean:
            return
        for dead in take_over(self._folder):
            try:
                await _end_processes_of(dead)
                await asyncio.to_thread(dead.wipe)
            except BaseException:
                dead.leave()
                raise
        self._is_clean = True

    def close(self) -> None:
        """Delete this process's generation. Idempotent. Raises RuntimeUnavailable if it stays."""
        if self._own is not None:
            self._own.wipe()
            self._own = None


async def _end_processes_of(dead: Generation) -> None:
    mark = os.fsencode(dead.path) + b"/"
    for _ in range(5):  # one of them may start another while we look
        found = await asyncio.to_thread(_processes_with, mark)
        if not found:
            return
        _log.warning("ending %d processes that a dead daemon has left", len(found))
        for pid, start_ticks in found.items():
            process_tree.send_signal(pid, start_ticks, signal.SIGKILL)
        await linux.wait_until_dead(list(found), KILL_TIMEOUT_S)
    raise RuntimeUnavailable(f"processes of a dead daemon do not end: {sorted(found)}")


def _processes_with(mark: bytes) -> dict[int, int]:
    """Pid and start time of each process with these bytes in its environment."""
    found: dict[int, int] = {}
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            with open(f"/proc/{name}/environ", "rb") as file:
                environment = file.read(_MOST_ENVIRONMENT)
        except OSError:
            continue  # gone, or somebody else's
        stat = process_tree.read_stat(int(name)) if mark in environment else None
        if stat is not None and not stat.is_dead:
            found[int(name)] = stat.start_ticks
    return found
