"""A client of the pool daemon, written from the description of its frames and not from the product's code."""

from __future__ import annotations

import array
import asyncio
import os
import socket
import struct
from typing import Self


class FRAMES:
    TAKEN, WAITING, ONE_SHOT, BUSY, OUTPUT, END, FAILURE = b"T", b"W", b"O", b"B", b"D", b"E", b"F"


def request_of(
    *argv: str,
    key: str = "key",
    tool: str = "",
    protocol: str = "",
    env: dict[str, str] | None = None,
    timeout_ms: int = 0,
) -> bytes:
    """A request's bytes."""
    pairs = [f"{name}={value}" for name, value in (env or {}).items()]
    strings = [key, tool, protocol, *argv, *pairs]
    body = struct.pack("<QII", timeout_ms, len(argv), len(pairs))
    body += b"".join(os.fsencode(text) + b"\0" for text in strings)
    return b"NLA1" + struct.pack("<I", len(body)) + body


class PlainClient:
    """One connection. Use it in the event loop of the daemon that it speaks to, or in any other."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._loop = asyncio.get_running_loop()
        self._data = b""

    @classmethod
    async def connect(cls, path: str) -> Self:
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connected.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connected, path)
        return cls(connected)

    @classmethod
    async def ask(cls, path: str, request: bytes, cwd: str, *, chunk: int | None = None) -> Self:
        """Connect and send a request; in pieces, each read before the next, if `chunk` says so."""
        client = await cls.connect(path)
        client.send(request[:chunk], cwd)
        for at in range(chunk or len(request), len(request), chunk or 1):
            for _ in range(3):
                await asyncio.sleep(0)
            client._socket.send(request[at : at + (chunk or 1)])
        return client

    def send(self, data: bytes, cwd: str, *, descriptors: int = 1) -> None:
        fds = [os.open(cwd, os.O_RDONLY | os.O_DIRECTORY) for _ in range(descriptors)]
        try:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            if data:
                assert self._socket.sendmsg([data], rights) == len(data)
        finally:
            for fd in fds:
                os.close(fd)

    async def frame(self) -> tuple[bytes, bytes] | None:
        """The next one; None at the end."""
        while True:
            if len(self._data) >= 5:
                (length,) = struct.unpack_from("<I", self._data, 1)
                if len(self._data) >= 5 + length:
                    kind, payload = self._data[:1], self._data[5 : 5 + length]
                    self._data = self._data[5 + length :]
                    return kind, payload
            try:
                data = await asyncio.wait_for(self._loop.sock_recv(self._socket, 1 << 20), 30)
            except ConnectionResetError:
                data = b""
            if not data:
                assert not self._data, "the connection ended in the middle of a frame"
                return None
            self._data += data

    async def frames(self) -> list[tuple[bytes, bytes]]:
        """All that come, up to the end of the connection."""
        found = []
        while (frame := await self.frame()) is not None:
            found.append(frame)
        self.close()
        return found

    async def said_nothing(self) -> bool:
        """Whether nothing has come by now."""
        try:
            self._data += self._socket.recv(1 << 20)
        except BlockingIOError:
            pass
        return not self._data

    def shut_down(self) -> None:
        """Nothing more will be sent; frames are still read."""
        self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._socket.close()
