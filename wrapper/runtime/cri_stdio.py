"""The streams of a worker in a container: pipes, handed to the shim over a unix socket in a mounted folder.

The shim (`native/shim.c`), first process of the container, connects once. It is given three pipes, which
become the worker's stdin, stdout and stderr: it finds what a plain process would find, at the same cost.
The shim tells the worker's pid, whether the program could be run, and how it ended, all without the engine.
Nobody can connect a second time: the socket is gone before the worker's first instruction.

Knows nothing of engines, nor of the worker protocol.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from dataclasses import dataclass

from wrapper.errors import RuntimeUnavailable, WorkerStartFailed
from wrapper.runtime import linux
from wrapper.runtime.base import ExitStatus

SOCKET_NAME = "shim.sock"

_ONE_PAGE = 4096
_INT = struct.Struct("=i")
_CREDENTIALS = struct.Struct("=iII")
_CONTROL_BYTES = socket.CMSG_SPACE(_CREDENTIALS.size)
KILLED = ExitStatus(-9)


@dataclass(frozen=True, slots=True)
class StartedPids:
    """As seen from here, whatever the container's own namespace counts."""

    shim: int
    worker: int


class ShimLink:
    """The host's side of one shim. Owns the pipes' ends, the socket and its file until `close`.

    `stdin_fd`, `stdout_fd` and `stderr_fd` are non-blocking. `started` ends with the pids or with
    WorkerStartFailed; `exited` with how the worker ended: nothing of its container runs then, or will in a
    moment.
    """

    def __init__(self, folder: str, uid: int, gid: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._uid = uid
        self._path = os.path.join(folder, SOCKET_NAME)
        self._listener: socket.socket | None = None
        self._shim: socket.socket | None = None
        self._told = b""
        self._worker_pid = 0
        self.shim_pid = 0
        """Known as soon as the shim has connected, before the worker's first instruction."""
        self.started: asyncio.Future[StartedPids] = self._loop.create_future()
        self.exited: asyncio.Future[ExitStatus] = self._loop.create_future()
        self.started.add_done_callback(_retrieved)
        self.stdin_fd = self.stdout_fd = self.stderr_fd = -1
        self._theirs: list[int] = []
        try:
            self._make_pipes(gid)
            self._listen(folder, gid)
        except OSError as error:
            self.close()
            raise RuntimeUnavailable(f"cannot make the streams of a worker in {folder}: {error}") from error
        except BaseException:
            self.close()
            raise

    def _make_pipes(self, gid: int) -> None:
        theirs, self.stdin_fd = os.pipe()
        self._theirs.append(theirs)
        self.stdout_fd, theirs = os.pipe()
        self._theirs.append(theirs)
        self.stderr_fd, theirs = os.pipe()
        self._theirs.append(theirs)
        # One page, so that it is writable again when the worker begins to read its first request.
        linux.set_pipe_size(self.stdin_fd, _ONE_PAGE)
        linux.set_pipe_size(self.stdout_fd, linux.PIPE_BYTES)
        for fd in (self.stdin_fd, self.stdout_fd, self.stderr_fd):
            os.set_blocking(fd, False)
        for fd in self._theirs:
            if os.geteuid() != self._uid:
                os.fchown(
                    fd, self._uid, gid
                )  # or it could not open /dev/stderr, which is the same pipe again

    def _listen(self, folder: str, gid: int) -> None:
        listener = self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.setblocking(False)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        # Through a descriptor: a socket's path may have 107 bytes, and the folder's may be longer.
        folder_fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            listener.bind(f"/proc/self/fd/{folder_fd}/{SOCKET_NAME}")
        finally:
            os.close(folder_fd)
        os.chmod(self._path, 0o600)
        if os.geteuid() != self._uid:
            os.chown(self._path, self._uid, gid)
        listener.listen(1)
        self._loop.add_reader(listener.fileno(), self._accept)

    def _accept(self) -> None:
        assert self._listener is not None  # noqa: S101 - it is its reader
        try:
            shim, _ = self._listener.accept()
        except BlockingIOError:
            return
        self._stop_listening()
        self._shim = shim
        shim.setblocking(False)
        pid, uid, _ = _CREDENTIALS.unpack(
            shim.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        )
        self.shim_pid = pid
        if uid != self._uid:
            self._never(f"a process of user {uid} connected in the place of user {self._uid}'s")
            return
        try:
            socket.send_fds(shim, [b"G"], self._theirs)
        except OSError as error:
            self._never(f"it ended before it took its streams: {error}")
            return
        self._close_theirs()
        self._loop.add_reader(shim.fileno(), self._readable)

    def _readable(self) -> None:
        assert self._shim is not None  # noqa: S101 - it is its reader
        try:
            data, control, _, _ = self._shim.recvmsg(64, _CONTROL_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data, control = b"", []
        if not data:
            self._ended(None)
            return
        if data[:1] == b"W" and not self._worker_pid:
            for level, kind, content in control:
                if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
                    self._worker_pid = _CREDENTIALS.unpack(content)[0]
            data = data[1:]
        self._told += data
        self._understand()

    def _understand(self) -> None:
        while self._told:
            what = self._told[:1]
            if what == b"S":
                self._told = self._told[1:]
                if not self.started.done():
                    self.started.set_result(StartedPids(self.shim_pid, self._worker_pid))
                continue
            if len(self._told) < 1 + _INT.size:
                return
            value = _INT.unpack(self._told[1 : 1 + _INT.size])[0]
            self._told = self._told[1 + _INT.size :]
            if what == b"E":
                self._never(os.strerror(value))
            elif what == b"X":
                self._ended(ExitStatus(os.waitstatus_to_exitcode(value)))

    def _never(self, why: str) -> None:
        if not self.started.done():
            self.started.set_exception(WorkerStartFailed(why))
        self._ended(None)

    def shim_is_dead(self) -> None:
        """Somebody has seen it: take what it told last, and know that the worker has ended."""
        while self._shim is not None and not self.exited.done():
            try:
                data = self._shim.recv(64, socket.MSG_PEEK)
            except OSError:
                data = b""
            if not data:
                break
            self._readable()
        self._ended(None)

    def take_stderr(self) -> int:
        """Our end of the worker's stderr, from now on the caller's to close."""
        fd, self.stderr_fd = self.stderr_fd, -1
        return fd

    def _ended(self, status: ExitStatus | None) -> None:
        if self._shim is not None:
            self._loop.remove_reader(self._shim.fileno())
            self._shim.close()
            self._shim = None
        if not self.started.done():
            self.started.set_exception(WorkerStartFailed("its container ended before the program ran"))
        if not self.exited.done():
            self.exited.set_result(status or KILLED)

    def give_up_waiting(self, why: str) -> None:
        """The container will never come: whoever waits for `started` is told so."""
        self._never(why)

    def close_stdin(self) -> None:
        """The worker reads the end of its input. Idempotent."""
        fd, self.stdin_fd = self.stdin_fd, -1
        self._close_fd(fd)

    def close(self) -> None:
        """Close all that is left. `exited` is not done by this unless it never began. Idempotent."""
        self._stop_listening()
        if self._shim is not None:
            self._loop.remove_reader(self._shim.fileno())
            self._shim.close()
            self._shim = None
        self._close_theirs()
        self.close_stdin()
        fd, self.stdout_fd = self.stdout_fd, -1
        self._close_fd(fd)
        fd, self.stderr_fd = self.stderr_fd, -1
        self._close_fd(fd)

    def _close_fd(self, fd: int) -> None:
        if fd >= 0:
            self._loop.remove_reader(fd)  # a registration that outlives its descriptor breaks the loop
            self._loop.remove_writer(fd)
            os.close(fd)

    def _close_theirs(self) -> None:
        theirs, self._theirs = self._theirs, []
        linux.close_all(theirs)

    def _stop_listening(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            self._loop.remove_reader(listener.fileno())
            listener.close()
            try:
                os.unlink(self._path)
            except OSError:
                pass


def _retrieved(future: asyncio.Future[StartedPids]) -> None:
    """A start that nobody waits for any more may fail in silence."""
    if not future.cancelled():
        future.exception()
