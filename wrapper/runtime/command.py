"""Runs one of the operator's commands beside a worker: bounded in time and output, nothing left of it.

Knows nothing of the worker but the environment and directory that it is given.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Mapping

from wrapper.errors import WorkerStartFailed
from wrapper.runtime import linux, spawn
from wrapper.runtime.base import CommandResult, CommandSpec, User
from wrapper.runtime.child import Child
from wrapper.runtime.process_tree import KILL_TIMEOUT_S, ProcessTree

MAX_OUTPUT_BYTES = 64 * 1024

COULD_NOT_START = 127
"""The return code, as a shell's, of a command that does not exist; its output says why."""


async def run_command(
    command: CommandSpec, env: Mapping[str, str], cwd: str, registry: set[int], user: User | None = None
) -> CommandResult:
    """Run to the end or to the time-out; kills whatever the command started, in each case.

    Only the first MAX_OUTPUT_BYTES of stdout and stderr (together) are kept. Raises
    RuntimeUnavailable if the system cannot start anything now.
    """
    loop = asyncio.get_running_loop()
    tag = linux.new_tag()
    try:
        process, output_fd = spawn.spawn_command(command.argv, env, cwd, tag, user)
    except WorkerStartFailed as error:
        return CommandResult(COULD_NOT_START, error.message.encode())
    output = bytearray()

    def read() -> bool:
        """False: nothing more to read now."""
        try:
            data = os.read(output_fd, 65536)
        except BlockingIOError:
            return False
        output.extend(data[: MAX_OUTPUT_BYTES - len(output)])
        if not data:
            loop.remove_reader(output_fd)
        return bool(data)

    tree = ProcessTree(process.pid, tag, registry)
    try:
        child = Child(process, loop, registry, lambda: None)
    except BaseException:
        os.close(output_fd)
        raise
    try:
        loop.add_reader(output_fd, read)
        in_time = await child.wait(command.timeout_s)
        if not in_time:
            child.signal_group(signal.SIGKILL)
            tree.signal_descendants(signal.SIGKILL, frozenset())
            await child.wait(KILL_TIMEOUT_S)
        tree.main_is_reaped()
        await tree.kill_descendants()
        for _ in range(64):
            if not read():
                break
        code = child.status.returncode if in_time and child.status is not None else None
        return CommandResult(code, bytes(output))
    except BaseException:
        if child.status is None:
            tree.signal_descendants(signal.SIGKILL, frozenset())
            child.kill_and_reap_now(KILL_TIMEOUT_S)
        tree.main_is_reaped()
        tree.kill_descendants_now()
        raise
    finally:
        loop.remove_reader(output_fd)
        os.close(output_fd)
