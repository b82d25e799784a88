"""The daemon's control socket: one JSON object a line in, one a line out.

Owns the wire only: what a command does is given by whoever makes the server. The socket is its owner's alone
(mode 0600), beside the one for clients: no action may reach it.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from wrapper.errors import RuntimeUnavailable, WrapperError

MAX_LINE_BYTES = 64 * 1024

Command = Callable[[Mapping[str, Any]], Awaitable[dict[str, Any]]]


def control_path(socket_path: str) -> str:
    """Where the control socket of the daemon that serves clients at `socket_path` is."""
    return f"{socket_path}.control"


class ControlServer:
    """Answers `{"command": NAME, ...}` with `{"ok": true, ...}` or `{"ok": false, "error": TEXT}`."""

    def __init__(self, listening: socket.socket, path: str, commands: Mapping[str, Command]) -> None:
        self._listening = listening
        self._path = path
        self._commands = commands
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        self._server = await asyncio.start_unix_server(
            self._connected, sock=self._listening, limit=MAX_LINE_BYTES
        )

    async def close(self) -> None:
        """Idempotent."""
        server, self._server = self._server, None
        if server is not None:
            server.close()
            os.unlink(self._path)
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - it runs
        self._tasks.add(task)
        try:
            while line := await reader.readline():
                writer.write(json.dumps(await self._answer(line)).encode() + b"\n")
                await writer.drain()
        except (ConnectionError, ValueError, asyncio.CancelledError):
            pass  # gone, a line without end, or we are closing
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            asked = json.loads(line)
            command = self._commands[asked["command"]]
        except (ValueError, KeyError, TypeError):
            return {"ok": False, "error": f"not a command; there are {', '.join(sorted(self._commands))}"}
        try:
            return {"ok": True, **await command(asked)}
        except WrapperError as error:
            return {"ok": False, "error": error.report()}


def ask(socket_path: str, command: str, *, timeout_s: float | None = 30.0, **values: Any) -> dict[str, Any]:
    """Ask the daemon that serves clients at `socket_path`.

    Raises RuntimeUnavailable if it is not there or does not answer, WrapperError with what it complains of.
    """
    path = control_path(socket_path)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout_s)
            connection.connect(path)
            connection.sendall(json.dumps({"command": command, **values}).encode() + b"\n")
            with connection.makefile("rb") as answers:
                line = answers.readline()
    except OSError as error:
        raise RuntimeUnavailable(f"no daemon answers at {path}: {error}") from error
    if not line:
        raise RuntimeUnavailable(f"the daemon at {path} has closed the connection")
    answer: dict[str, Any] = json.loads(line)
    if not answer.pop("ok"):
        raise WrapperError(answer["error"])
    return answer
