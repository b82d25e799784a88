"""The unix socket that the per-action clients connect to: accept, one request each, its outcome.

Owns the connections: their bounds, the descriptor that comes with a request, heartbeats, and that the end of
a connection is a cancel. Knows nothing of what an action is: it hands each request to `serve`, and passes on
what that tells.

Whoever can open the socket may be an action. It can have no more than so many connections, must send its
one request within a time, and gains nothing by it: see `action_service.py`.
"""

from __future__ import annotations

import array
import asyncio
import fcntl
import grp
import logging
import os
import socket
import stat
import struct
from collections import Counter
from collections.abc import Awaitable, Callable

from wrapper import client_protocol
from wrapper.action_outcome import Client
from wrapper.client_protocol import ActionRequest, FailureKind, RequestDecoder
from wrapper.errors import ConfigError, ProtocolError

REQUEST_TIMEOUT_S = 10.0
"""A client sends its request at once; whoever is slower is none."""
HEARTBEAT_S = 10.0
DRAIN_S = 30.0
"""How long a client may take to read its action's output."""
_BACKLOG = 1024
_READ_BYTES = 64 * 1024
"""Above 128 KiB each read would map and unmap its buffer."""
_UCRED = struct.Struct("3i")
_ACCEPT_AGAIN_S = 0.1

Serve = Callable[[ActionRequest, int, Client], Awaitable[None]]

_log = logging.getLogger(__name__)


class ClientListener:
    """Listens from `open` to `close`. `max_per_peer`: connections of one uid at a time."""

    def __init__(self, path: str, serve: Serve, *, group: str | None, max_per_peer: int) -> None:
        self.path = path
        self.max_per_peer = max_per_peer
        self._serve = serve
        self._group = group
        self._loop = asyncio.get_running_loop()
        self._socket: socket.socket | None = None
        self._lock_fd = -1
        self._connections: set[_Connection] = set()
        self._per_peer: Counter[int] = Counter()
        self._heartbeat: asyncio.TimerHandle | None = None
        self._no_more = ""
        """Why new requests are turned away; empty: they are not."""

    @property
    def in_flight(self) -> int:
        """Connections that are open now."""
        return len(self._connections)

    def open(self) -> None:
        """Begin to listen. Raises ConfigError if another process does, or the path cannot be used."""
        self._lock_fd = lock_socket(self.path)
        try:
            self._socket = bind_socket(self.path, 0o660, self._group)
        except BaseException:
            os.close(self._lock_fd)
            self._lock_fd = -1
            raise
        self._loop.add_reader(self._socket.fileno(), self._acceptable)
        self._heartbeat = self._loop.call_later(HEARTBEAT_S, self._beat)

    def refuse_new(self, reason: str) -> None:
        """From now on whoever connects is told to do without us. Requests that are being served go on."""
        self._no_more = reason

    async def close(self) -> None:
        """Take the socket away, cancel what is being served, and wait for its end. Idempotent."""
        listening, self._socket = self._socket, None
        if listening is not None:
            self._loop.remove_reader(listening.fileno())
            os.unlink(self.path)
            listening.close()
        if self._heartbeat is not None:
            self._heartbeat.cancel()
        for connection in list(self._connections):
            connection.cancel("the daemon is stopping")
        while self._connections:
            await asyncio.wait([connection.closed for connection in self._connections])
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    async def wait_until_quiet(self) -> None:
        """Until nothing is being served."""
        while self._connections:
            await asyncio.wait([connection.closed for connection in self._connections])

    def _acceptable(self) -> None:
        if self._socket is None:
            return
        try:
            connected, _ = self._socket.accept()  # one a turn: to ask for more costs more than the turn
        except (BlockingIOError, ConnectionAbortedError, InterruptedError):
            return
        except OSError as error:  # out of descriptors: those that are open will end
            _log.error("cannot accept a connection: %s", error)
            self._loop.remove_reader(self._socket.fileno())
            self._loop.call_later(_ACCEPT_AGAIN_S, self._accept_again)
            return
        self._accepted(connected)

    def _accept_again(self) -> None:
        if self._socket is not None:
            self._loop.add_reader(self._socket.fileno(), self._acceptable)

    def _accepted(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        _, uid, _ = _UCRED.unpack(connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        connection = _Connection(connected, self._loop, self._serve)
        self._connections.add(connection)
        self._per_peer[uid] += 1
        connection.closed.add_done_callback(lambda _done: self._closed(connection, uid))
        if self._no_more:
            connection.busy(self._no_more)
        elif self._per_peer[uid] > self.max_per_peer:
            connection.busy(f"uid {uid} has {self.max_per_peer} connections already (max_connections)")
        else:
            connection.begin()

    def _closed(self, connection: _Connection, uid: int) -> None:
        self._connections.discard(connection)
        self._per_peer[uid] -= 1
        if not self._per_peer[uid]:
            del self._per_peer[uid]

    def _beat(self) -> None:
        for connection in list(self._connections):
            connection.beat()
        self._heartbeat = self._loop.call_later(HEARTBEAT_S, self._beat)


class _Connection:
    """One client, from its request to its outcome. A `Client`."""

    def __init__(self, connected: socket.socket, loop: asyncio.AbstractEventLoop, serve: Serve) -> None:
        self.closed: asyncio.Future[None] = loop.create_future()
        self._socket = connected
        self._loop = loop
        self._serve = serve
        self._decoder = RequestDecoder()
        self._cwd_fd = -1
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._unsent = b""
        self._is_writing = False
        self._is_listening = False
        self._is_gone = False
        """It has closed its end, or what it says makes no sense."""
        self._is_told = False
        """The last frame was sent, or put into `_unsent`."""

    # ---- its request -----------------------------------------------------------------------------------

    def begin(self) -> None:
        self._readable()  # most often it is all there
        if self.closed.done():
            return
        if self._task is None:
            self._timer = self._loop.call_later(REQUEST_TIMEOUT_S, self._too_slow)
            self._listen()
        else:
            self._loop.call_soon(self._loop.call_soon, self._listen)  # when the action is on its way

    def _listen(self) -> None:
        """From now on its end is seen."""
        if not self.closed.done() and not self._is_gone:
            self._loop.add_reader(self._socket.fileno(), self._readable)
            self._is_listening = True

    def _readable(self) -> None:
        try:
            data, ancillary, flags, _ = self._socket.recvmsg(
                _READ_BYTES, socket.CMSG_SPACE(4 * array.array("i").itemsize), socket.MSG_CMSG_CLOEXEC
            )
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data, ancillary, flags = b"", [], 0
        fds = _descriptors(ancillary)
        if self._task is not None or self._is_told:
            for fd in fds:
                os.close(fd)
            self._gone() if not data else self._senseless("bytes after the request")
            return
        if fds and self._cwd_fd < 0 and len(fds) == 1 and not flags & socket.MSG_CTRUNC:
            self._cwd_fd = fds[0]
        elif fds or flags & socket.MSG_CTRUNC:
            for fd in fds:
                os.close(fd)
            self._senseless("more than one descriptor")
            return
        if not data:
            self._close()
            return
        try:
            request = self._decoder.feed(data)
        except ProtocolError as error:
            self._senseless(error.message)
            return
        if request is not None:
            self._requested(request)

    def _requested(self, request: ActionRequest) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._cwd_fd < 0:
            self._senseless("no descriptor of a working directory")
            return
        self._task = self._loop.create_task(self._run(request), name="action")
        self._task.add_done_callback(self._served)

    async def _run(self, request: ActionRequest) -> None:
        await self._serve(request, self._cwd_fd, self)

    def _too_slow(self) -> None:
        self._senseless(f"no request within {REQUEST_TIMEOUT_S:g} s")

    def _senseless(self, what: str) -> None:
        _log.warning("a client of the pool's socket sent %s; it is disconnected", what)
        if self._task is None:
            self._close()
        else:
            self._gone()

    # ---- its end ---------------------------------------------------------------------------------------

    def _gone(self) -> None:
        """It wants the action to be cancelled, and may still be there to hear that it was."""
        self._loop.remove_reader(self._socket.fileno())
        self._is_listening = False
        self.cancel("the client has cancelled it")

    def cancel(self, _why: str) -> None:
        """End what is being served. The client is told when nothing is at work any more."""
        if self._is_gone:
            return
        self._is_gone = True
        if self._task is not None and not self._task.done():
            self._task.cancel()
        elif self._task is None:
            self._close()

    def _served(self, task: asyncio.Task[None]) -> None:
        if not self._is_told:
            if not task.cancelled() and task.exception() is not None:
                _log.error("serving an action failed", exc_info=task.exception())
                self.failed(FailureKind.LOST, f"an error of the wrapper's own: {task.exception()!r}")
            else:
                self.failed(FailureKind.CANCELLED, "the action was cancelled; nothing of it is left")
        if not self._unsent:
            self._close()
        elif self._timer is None:
            self._timer = self._loop.call_later(DRAIN_S, self._close)

    def _close(self) -> None:
        if self.closed.done():
            return
        if self._timer is not None:
            self._timer.cancel()
        if self._is_listening:
            self._loop.remove_reader(self._socket.fileno())
        if self._is_writing:
            self._loop.remove_writer(self._socket.fileno())
        self._socket.close()
        if self._cwd_fd >= 0:
            os.close(self._cwd_fd)
            self._cwd_fd = -1
        self.closed.set_result(None)

    # ---- what it is told -------------------------------------------------------------------------------

    def beat(self) -> None:
        if self._task is not None and not self._is_told:
            self._send(client_protocol.waiting())

    def taken(self) -> bool:
        if self._is_gone:
            return False
        return self._send(client_protocol.taken())

    def one_shot(self, reason: str) -> None:
        self._tell(client_protocol.one_shot(reason))

    def busy(self, reason: str) -> None:
        self._tell(client_protocol.busy(reason))

    def ended(self, exit_code: int, output: bytes) -> None:
        self._tell(client_protocol.output(output) + client_protocol.end(exit_code))

    def failed(self, kind: FailureKind, message: str, exit_code: int = 0) -> None:
        self._tell(client_protocol.failure(kind, message, exit_code))

    def _tell(self, frames: bytes) -> None:
        if self._is_told:
            return
        self._is_told = True
        self._send(frames)
        if self._task is None:  # it was turned away
            self._close()

    def _send(self, data: bytes) -> bool:
        """Whether it is there to read this."""
        if self.closed.done():
            return False
        if self._unsent:
            self._unsent += data
            return True
        try:
            sent = self._socket.send(data)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError:
            return False
        if sent < len(data):
            self._unsent = data[sent:]
            if not self._is_writing:
                self._is_writing = True
                self._loop.add_writer(self._socket.fileno(), self._writable)
        return True

    def _writable(self) -> None:
        try:
            sent = self._socket.send(self._unsent[: 1 << 20])
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            sent = len(self._unsent)
        self._unsent = self._unsent[sent:]
        if not self._unsent:
            self._is_writing = False
            self._loop.remove_writer(self._socket.fileno())
            if self._task is not None and self._task.done():
                self._close()


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    fds: list[int] = []
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            received = array.array("i")
            received.frombytes(data[: len(data) - len(data) % received.itemsize])
            fds += received
    return fds


def lock_socket(path: str) -> int:
    """Hold the lock of a socket's path, for as long as the descriptor is open. Raises ConfigError."""
    lock = f"{path}.lock"
    try:
        os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
        fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"the socket {path} cannot be made: {error}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise ConfigError(f"another daemon serves {path}; one is enough for a node") from None
    except BaseException:
        os.close(fd)
        raise
    return fd


def bind_socket(path: str, mode: int, group: str | None) -> socket.socket:
    """A listening socket at a path that is ours alone. Raises ConfigError."""
    gid = -1
    if group is not None:
        try:
            gid = grp.getgrnam(group).gr_gid
        except KeyError:
            raise ConfigError(f"there is no group {group!r} (socket_group)") from None
    try:
        if stat.S_ISSOCK(os.lstat(path).st_mode):
            os.unlink(path)  # of a daemon that is dead: its lock is ours
    except FileNotFoundError:
        pass
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        # Nobody gets in before mode and group are right.
        try:
            os.unlink(f"{path}.new")
        except FileNotFoundError:
            pass
        listening.bind(f"{path}.new")
        try:
            os.chown(f"{path}.new", -1, gid)
            os.chmod(f"{path}.new", mode)
            listening.listen(_BACKLOG)
            os.rename(f"{path}.new", path)
        except BaseException:
            os.unlink(f"{path}.new")
            raise
    except OSError as error:
        listening.close()
        hint = "; a path of a socket has at most 107 bytes" if "too long" in str(error) else ""
        raise ConfigError(f"the socket {path} cannot be made: {error}{hint}") from error
    return listening
