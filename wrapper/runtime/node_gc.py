"""Garbage collection inside a Node.js worker: our end of `node_gc_agent.js`.

`node -e "global.gc()"` would only collect in a new process. So the agent is preloaded into every
Node.js process of the worker (through NODE_OPTIONS, which its children inherit), each of which
announces itself on a named pipe; those that still live in the worker's tree are signalled.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Collection, Mapping

from wrapper.errors import RuntimeUnavailable
from wrapper.runtime import process_tree

AGENT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "node_gc_agent.js")
FIFO_VARIABLE = "NLWW_NODE_GC_FIFO"
GC_TIMEOUT_S = 30.0

_MAX_PROCESSES = 64
_MAX_PENDING_BYTES = 64 * 1024


def agent_environment(env: Mapping[str, str], fifo: str, agent: str = AGENT) -> dict[str, str]:
    """What to add to a worker's environment, keeping a NODE_OPTIONS; paths as the worker sees them."""
    escaped = agent.replace("\\", "\\\\").replace('"', '\\"')
    options = " ".join(part for part in (env.get("NODE_OPTIONS", ""), f'--require "{escaped}"') if part)
    return {"NODE_OPTIONS": options, FIFO_VARIABLE: fifo}


class NodeGc:
    """Listens to the agents of one worker. Owns the named pipe until `close`.

    `pid_of`: from the pid that a process has in its own namespace to the one that we see; None: no such one.
    """

    def __init__(
        self,
        fifo: str,
        loop: asyncio.AbstractEventLoop,
        pid_of: Callable[[int], int | None] = lambda pid: pid,
    ) -> None:
        self._loop = loop
        self._pid_of = pid_of
        os.mkfifo(fifo, 0o600)
        # Read-write: with a writer of our own the pipe never reports an end of file between messages.
        self._fd = os.open(fifo, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self._pending = b""
        self._announced: dict[int, int] = {}
        self._awaited: set[int] = set()
        self._answered: asyncio.Future[None] | None = None
        loop.add_reader(self._fd, self._readable)

    def close(self) -> None:
        """Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            self._loop.remove_reader(fd)
            os.close(fd)

    def _readable(self) -> None:
        try:
            self._pending += os.read(self._fd, 65536)
        except BlockingIOError:
            return
        *lines, self._pending = self._pending[-_MAX_PENDING_BYTES:].split(b"\n")
        for line in lines:
            match line.split():
                case [b"ready", pid] if pid.isdigit():
                    self._announce(self._pid_of(int(pid)))
                case [b"gc", pid, before, after] if pid.isdigit() and before.isdigit() and after.isdigit():
                    self._awaited.discard(self._pid_of(int(pid)) or 0)
                    if not self._awaited and self._answered is not None and not self._answered.done():
                        self._answered.set_result(None)
                case _:
                    pass  # the tool can write here too; whatever it says, it only harms itself

    def _announce(self, pid: int | None) -> None:
        stat = process_tree.read_stat(pid) if pid is not None else None
        if pid is None or stat is None:
            return
        self._announced[pid] = stat.start_ticks
        if len(self._announced) > _MAX_PROCESSES:
            for known, start_ticks in list(self._announced.items()):
                stat = process_tree.read_stat(known)
                if stat is None or stat.start_ticks != start_ticks:
                    del self._announced[known]
            while len(self._announced) > _MAX_PROCESSES:  # the oldest is the tool itself: drop the youngest
                self._announced.popitem()

    async def collect(self, tree: Collection[int]) -> bool:
        """Collect garbage in every announced process among `tree`; False if there is none.

        Raises RuntimeUnavailable if one does not answer. One call at a time.
        """
        self._readable()  # an announcement may have come since the loop's last turn
        targets = {
            pid: start_ticks
            for pid, start_ticks in self._announced.items()
            # Without its handler (a tool may remove all listeners) the signal would kill it.
            if pid in tree and process_tree.catches_signal(pid, signal.SIGUSR2)
        }
        if not targets:
            return False
        self._awaited = set(targets)
        self._answered = self._loop.create_future()
        try:
            for pid, start_ticks in targets.items():
                if not process_tree.send_signal(pid, start_ticks, signal.SIGUSR2):
                    self._awaited.discard(pid)
            if self._awaited:
                async with asyncio.timeout(GC_TIMEOUT_S):
                    await self._answered
        except TimeoutError:
            raise RuntimeUnavailable(
                f"the Node.js processes {sorted(self._awaited)} did not collect garbage in {GC_TIMEOUT_S:g} s"
            ) from None
        finally:
            self._answered = None
            self._awaited = set()
        return True
