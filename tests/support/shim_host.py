"""The host's side of one shim: its socket, its worker's pipes, and the shim itself as a process."""

from __future__ import annotations

import os
import select
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
_CREDENTIALS = struct.Struct("=iII")


class ShimHost:
    """Starts one shim after another in a folder that any user can reach. Use as a context manager."""

    status: socket.socket
    process: subprocess.Popen[bytes]
    shim_pid: int
    worker_pid: int
    """As the message came from the worker's own process; known once `started` or `failure` has returned."""
    stdin_fd: int
    stdout_fd: int
    stderr_fd: int

    def __init__(self, shim: str) -> None:
        self.shim = shim
        self.folder = Path(tempfile.mkdtemp(prefix="shim-"))
        self.folder.chmod(0o755)
        self.socket_path = self.folder / "socket"
        self.prefix: Sequence[str] = ()
        """What starts the shim, before its own argv."""
        self.pass_fds: Iterable[int] = ()
        self.worker_uid: int | None = None
        """Whom the pipes belong to, as an engine's do; None: us."""
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._listener.bind(str(self.socket_path))
        self._listener.listen()
        self._listener.settimeout(PATIENCE_S)
        self.socket_path.chmod(0o666)
        self._own_stderr = open(self.folder / "shim-stderr", "w+b")  # noqa: SIM115 - closed in `__exit__`
        self._sockets: list[socket.socket] = []
        self._fds: set[int] = set()
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
        for fd in [*self._fds]:
            self.close(fd)
        self._listener.close()
        self._own_stderr.close()
        shutil.rmtree(self.folder)

    # ---- the start ----

    def start(
        self,
        worker: Sequence[str],
        env: Mapping[str, str],
        *,
        in_namespace: bool = False,
        descriptors: int = 3,
    ) -> None:
        """Start a shim, as process 1 of a pid namespace if so asked, and give it its worker's pipes.

        The namespace's first process dies with the `unshare` that made it, and takes the rest along.
        """
        namespace = (
            ["/usr/bin/unshare", "--pid", "--fork", "--kill-child", "--mount-proc"] if in_namespace else []
        )
        argv = [*namespace, *self.prefix, self.shim, str(self.socket_path), *worker]
        self.process = subprocess.Popen(
            argv, env=env, pass_fds=tuple(self.pass_fds), stdin=subprocess.DEVNULL, stderr=self._own_stderr
        )
        self._processes.append(self.process)
        self.connected(descriptors)

    def connected(self, descriptors: int = 3) -> None:
        """Take the connection of a shim, that somebody else may have started, and give it the pipes.

        Another number of descriptors than 3: one byte with so many.
        """
        self.status, _ = self._listener.accept()
        self._sockets.append(self.status)
        self.status.settimeout(PATIENCE_S)
        self.shim_pid = _CREDENTIALS.unpack(
            self.status.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        )[0]
        theirs = []
        for name, worker_reads in (("stdin_fd", True), ("stdout_fd", False), ("stderr_fd", False)):
            read, write = os.pipe()
            their, our = (read, write) if worker_reads else (write, read)
            theirs.append(their)
            self._fds.add(our)
            setattr(self, name, our)
            if self.worker_uid is not None:
                os.fchown(their, self.worker_uid, -1)
        try:
            socket.send_fds(self.status, [b"G"], [theirs[min(i, 2)] for i in range(descriptors)])
        finally:
            for fd in theirs:
                os.close(fd)

    def started(self) -> None:
        """Fails unless the worker tells who it is, and the shim that it runs."""
        self._worker_tells()
        told = self.read_status(1)
        assert told == b"S", (told, self.own_stderr())

    def failure(self) -> tuple[int, int]:
        """The errno that the shim tells after its worker's process has tried, and its exit code."""
        self._worker_tells()
        told = self.read_status(5)
        assert told[:1] == b"E", told
        return struct.unpack("=i", told[1:])[0], self.process.wait(PATIENCE_S)

    def _worker_tells(self) -> None:
        told, control, _, _ = self.status.recvmsg(1, socket.CMSG_SPACE(_CREDENTIALS.size))
        assert told == b"W", (told, self.own_stderr())
        [(level, kind, content)] = control
        assert (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS)
        self.worker_pid = _CREDENTIALS.unpack(content)[0]

    # ---- what the shim tells ----

    def read_status(self, size: int) -> bytes:
        """So many bytes, or fewer if the shim has closed."""
        read = b""
        while len(read) < size and (chunk := self.status.recv(size - len(read))):
            read += chunk
        return read

    def end(self) -> tuple[int, int]:
        """How the worker ended by what the shim tells (negative: a signal), and the shim's own exit code."""
        return self.worker_end(), self.process.wait(PATIENCE_S)

    def worker_end(self) -> int:
        """How the worker ended by what the shim tells; negative: a signal."""
        told = self.read_status(5)
        assert told[:1] == b"X", told
        return os.waitstatus_to_exitcode(struct.unpack("=i", told[1:])[0])

    def own_stderr(self) -> str:
        """What the shims so far have said themselves."""
        return (self.folder / "shim-stderr").read_text()

    def close_connections(self) -> None:
        """Those to the shims; the workers' pipes stay."""
        while self._sockets:
            self._sockets.pop().close()

    # ---- the worker's streams ----

    def write(self, data: bytes) -> None:
        """To the worker's standard input: few enough bytes to be taken at once."""
        assert os.write(self.stdin_fd, data) == len(data)

    def exchange(self, frame: bytes) -> bytes:
        """Send a frame and read as much back, both at the same time: neither side has to hold it all."""
        os.set_blocking(self.stdin_fd, False)
        rest, answer = memoryview(frame), b""
        while len(answer) < len(frame):
            readable, writable, _ = select.select(
                [self.stdout_fd], [self.stdin_fd] if rest else [], [], PATIENCE_S
            )
            assert readable or writable, f"nothing moves after {len(answer)} bytes"
            if writable:
                rest = rest[os.write(self.stdin_fd, rest) :]
            if readable:
                chunk = os.read(self.stdout_fd, 1 << 20)
                assert chunk, "the worker has closed its output"
                answer += chunk
        return answer

    def read(self, size: int, *, of: int | None = None) -> bytes:
        """So many bytes of the worker's standard output, or of another stream, or fewer if it ends."""
        fd = self.stdout_fd if of is None else of
        read = b""
        while len(read) < size:
            assert select.select([fd], [], [], PATIENCE_S)[0], f"no more than {read!r} comes"
            if not (chunk := os.read(fd, size - len(read))):
                break
            read += chunk
        return read

    def read_until_end(self) -> bytes:
        """All that is left of the worker's standard output."""
        return self.read(1 << 30)

    def read_stderr(self, size: int) -> bytes:
        """So many bytes, or fewer if it ends."""
        return self.read(size, of=self.stderr_fd)

    def close(self, fd: int) -> None:
        """Close our end of one of the worker's streams."""
        self._fds.remove(fd)
        os.close(fd)
