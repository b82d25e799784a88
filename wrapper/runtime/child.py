"""One process that we started ourselves: its death, its exit status, its signals.

Death is seen through a pidfd; nothing polls, and nobody else in the process has to handle SIGCHLD.
A pid is used for a signal only while the process is not reaped. Knows nothing of workers.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Callable

from wrapper.runtime import linux
from wrapper.runtime.base import ExitStatus


class Child:
    """Owns the Popen object; `exited` is done once the process is dead and reaped.

    `before_reap` is called when the process is dead but its pid cannot be anybody else's yet.
    While it lives, its pid is in `registry`.
    """

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        loop: asyncio.AbstractEventLoop,
        registry: set[int],
        before_reap: Callable[[], None],
    ) -> None:
        self.pid = process.pid
        self._process = process
        self._loop = loop
        self._registry = registry
        self._before_reap = before_reap
        self.exited: asyncio.Future[ExitStatus] = loop.create_future()
        try:
            self._pidfd = os.pidfd_open(process.pid)
        except BaseException:
            process.kill()
            process.wait()
            raise
        registry.add(process.pid)
        loop.add_reader(self._pidfd, self._dead)

    @property
    def status(self) -> ExitStatus | None:
        """None while it lives."""
        code = self._process.returncode
        return None if code is None else ExitStatus(code)

    def _dead(self) -> None:
        if self._pidfd < 0:
            return
        try:
            self._before_reap()
        finally:
            self._reap()

    def _reap(self) -> None:
        code = self._process.poll()
        if code is None:
            return  # not dead after all
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1
        self._registry.discard(self.pid)
        if not self.exited.done():  # somebody who awaited it without a shield may have cancelled it
            self.exited.set_result(ExitStatus(code))

    def kill(self) -> None:
        """SIGKILL; does nothing if it is dead."""
        if self._pidfd >= 0:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def signal_group(self, signum: int) -> None:
        """Signal its whole process group; does nothing once the process itself is reaped."""
        if self._pidfd >= 0:
            os.killpg(self.pid, signum)

    async def wait(self, timeout_s: float) -> bool:
        """Whether it is dead, at the latest after `timeout_s`. Cancelling this cancels nothing else."""
        await asyncio.wait((self.exited,), timeout=timeout_s)
        return self.status is not None

    def kill_and_reap_now(self, timeout_s: float) -> bool:
        """Kill and reap without an await, blocking; False if it will not die."""
        if self._pidfd >= 0:
            self.kill()
            linux.block_until_dead((self.pid,), timeout_s)
            self._dead()
        return self.status is not None
