"""The host's side of one shim: its socket, its pipe for standard error, and the shim itself as a process."""

from __future__ import annotations

import os
import shutil
import socket
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

PATIENCE_S = 20.0


class ShimHost:
    """Starts one shim after another in a folder that any user can reach. Use as a context manager."""

    status: socket.socket
    data: socket.socket
    process: subprocess.Popen[bytes]

    def __init__(self, shim: str) -> None:
        self.shim = shim
        self.folder = Path(tempfile.mkdtemp(prefix="shim-"))
        self.folder.chmod(0o755)
        self.socket_path, self.fifo_path = self.folder / "socket", self.folder / "stderr"
        self.prefix: Sequence[str] = ()
        """What starts the shim, before its own argv."""
        self.pass_fds: Iterable[int] = ()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.socket_path))
        self._listener.listen()
        self._listener.settimeout(PATIENCE_S)
        self.socket_path.chmod(0o666)
        os.mkfifo(self.fifo_path)
        self.fifo_path.chmod(0o666)
        self._stderr_fd = os.open(self.fifo_path, os.O_RDONLY | os.O_NONBLOCK)
        os.set_blocking(self._stderr_fd, True)
        self._own_stderr = open(self.folder / "shim-stderr", "w+b")  # noqa: SIM115 - closed in `__exit__`
        self._sockets: list[socket.socket] = []
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        self.close_connections()
        self._listener.close()
        self._own_stderr.close()
        self.close_stderr()
        shutil.rmtree(self.folder)

    def start(self, worker: Sequence[str], env: Mapping[str, str], *, in_namespace: bool = False) -> None:
        """Start a shim, as process 1 of a pid namespace if so asked, and take its status connection.

        The namespace's first process dies with the `unshare` that made it, and takes the rest along.
        """
        namespace = (
            ["/usr/bin/unshare", "--pid", "--fork", "--kill-child", "--mount-proc"] if in_namespace else []
        )
        argv = [*namespace, *self.prefix, self.shim, str(self.socket_path), str(self.fifo_path), *worker]
        self.process = subprocess.Popen(
            argv, env=env, pass_fds=tuple(self.pass_fds), stdin=subprocess.DEVNULL, stderr=self._own_stderr
        )
        self._processes.append(self.process)
        self.connected()

    def connected(self) -> None:
        """Take the status connection, of a shim that somebody else may have started."""
        self.status = self._accept()

    def started(self) -> None:
        """Take the data connection; fails unless the shim says that its worker runs."""
        self.data = self._accept()
        told = self.read_status(1)
        assert told == b"S", (told, self.own_stderr())

    def _accept(self) -> socket.socket:
        connection, _ = self._listener.accept()
        connection.settimeout(PATIENCE_S)
        self._sockets.append(connection)
        return connection

    def read_status(self, size: int) -> bytes:
        return self._read_exactly(self.status, size)

    def failure(self) -> tuple[int, int]:
        """The errno that the shim tells, and its exit code."""
        told = self.read_status(5)
        assert told[:1] == b"E", told
        return struct.unpack("=i", told[1:])[0], self.process.wait(PATIENCE_S)

    def end(self) -> tuple[int, int]:
        """How the worker ended by what the shim tells (negative: a signal), and the shim's own exit code."""
        return self.worker_end(), self.process.wait(PATIENCE_S)

    def worker_end(self) -> int:
        """How the worker ended by what the shim tells; negative: a signal."""
        told = self.read_status(5)
        assert told[:1] == b"X", told
        return os.waitstatus_to_exitcode(struct.unpack("=i", told[1:])[0])

    def exchange(self, frame: bytes) -> bytes:
        """Send a frame and read as much back, both at the same time: neither side has to hold it all."""
        self.data.setblocking(False)
        sent, answer = 0, b""
        while len(answer) < len(frame):
            try:
                sent += self.data.send(frame[sent:]) if sent < len(frame) else 0
            except BlockingIOError:
                pass
            try:
                chunk = self.data.recv(1 << 20)
                assert chunk, "the worker has closed its output"
                answer += chunk
            except BlockingIOError:
                pass
        self.data.settimeout(PATIENCE_S)
        return answer

    def read_data(self, size: int) -> bytes:
        return self._read_exactly(self.data, size)

    def read_data_until_end(self) -> bytes:
        chunks = []
        while chunk := self.data.recv(1 << 16):
            chunks.append(chunk)
        return b"".join(chunks)

    def read_stderr(self, size: int) -> bytes:
        read = b""
        while len(read) < size and (chunk := os.read(self._stderr_fd, size - len(read))):
            read += chunk
        return read

    def own_stderr(self) -> str:
        """What the shims so far have said themselves."""
        return (self.folder / "shim-stderr").read_text()

    def close_connections(self) -> None:
        while self._sockets:
            self._sockets.pop().close()

    def close_stderr(self) -> None:
        """Idempotent."""
        fd, self._stderr_fd = self._stderr_fd, -1
        if fd >= 0:
            os.close(fd)

    @staticmethod
    def _read_exactly(connection: socket.socket, size: int) -> bytes:
        read = b""
        while len(read) < size and (chunk := connection.recv(size - len(read))):
            read += chunk
        return read

    @staticmethod
    def peer_pid(connection: socket.socket) -> int:
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("=iII"))
        return int(struct.unpack("=iII", credentials)[0])
