"""One per-action client between a host and a daemon that both are the test.

The host's side: an action's directory, its environment, the program with its policy file beside it, and
the side-channel file. The daemon's: a socket, and what is said on it, word for word.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from wrapper.client_protocol import ActionRequest, RequestDecoder

PATIENCE_S = 30.0
SIDE_CHANNEL = "0123456789abcdef" * 2
PROGRAM = "nativelink_worker_entrypoint"


class Ended(NamedTuple):
    code: int
    """Negative: the signal that ended it."""
    stdout: bytes
    stderr: bytes


class Connection:
    """A client's, as the daemon has it."""

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected
        self.socket.settimeout(PATIENCE_S)
        self.cwd = -1

    def request(self) -> ActionRequest:
        """The whole request, and its one descriptor in `cwd`."""
        decoder = RequestDecoder()
        while True:
            data, fds, _, _ = socket.recv_fds(self.socket, 1 << 18, 4)
            for fd in fds:
                assert self.cwd == -1, "a second descriptor"
                self.cwd = fd
            assert data, "the client has gone before its request was whole"
            assert self.cwd >= 0, "the descriptor comes with the first byte"
            if (request := decoder.feed(data)) is not None:
                return request

    def send(self, *frames: bytes) -> None:
        for frame in frames:
            self.socket.sendall(frame)

    def ends(self) -> bool:
        """Wait until the client sends nothing more; whether it had sent nothing since its request."""
        try:
            return self.socket.recv(1) == b""
        except ConnectionResetError:  # it has closed without reading what we sent
            return True

    def close(self) -> None:
        self.socket.close()
        fd, self.cwd = self.cwd, -1
        if fd >= 0:
            os.close(fd)


class ClientWorld:
    """Use as a context manager. `install` puts a client into a folder."""

    def __init__(self, install: Callable[[Path], None]) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="client-"))
        self.folder.chmod(0o755)
        self.bin = self.folder / "bin"
        self.bin.mkdir()
        install(self.bin)
        self.program = self.bin / PROGRAM
        self.is_python = self.program.read_bytes().startswith(b"#!")
        self.policy_file = self.bin / f"{PROGRAM}.conf"
        self.socket_path = self.folder / "pool.sock"
        self.work_root = self.folder / "roots" / "work1"
        self.action_directory = self.work_root / "operation-1"
        self.cwd = self.action_directory / "work"
        self.cwd.mkdir(parents=True)
        self.policy()
        self.processes: list[subprocess.Popen[bytes]] = []
        self.connections: list[Connection] = []
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(self.socket_path))
        self.listener.listen(8)
        self.listener.settimeout(PATIENCE_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        for process in self.processes:
            process.kill()
            with process:  # closes its pipes
                process.wait()
        for connection in self.connections:
            connection.close()
        self.listener.close()
        shutil.rmtree(self.folder)

    # ---- the policy file ----

    def policy(self, **values: str) -> None:
        """The usual one, and what the test wants to have in it."""
        self.policy_text(
            "".join(
                f"{name} = {value}\n"
                for name, value in {
                    "socket": str(self.socket_path),
                    "work_root": str(self.work_root),
                    **values,
                }.items()
            )
        )

    def policy_text(self, text: str | bytes) -> None:
        self.policy_file.write_bytes(text.encode() if isinstance(text, str) else text)
        self.policy_file.chmod(0o644)

    # ---- the host ----

    def environment(self, **values: str) -> dict[str, str]:
        """What NativeLink gives an action with a key."""
        return {
            "PATH": "/usr/bin:/bin",
            "NL_WORKER_KEY": "java",
            "NL_SIDE_CHANNEL": str(self.action_directory / SIDE_CHANNEL),
            "NL_ACTION_DIR": str(self.action_directory),
            **values,
        }

    def start(
        self,
        argv: Sequence[str | bytes],
        env: Mapping[str, str] | Mapping[bytes, bytes] | None = None,
        *,
        cwd: Path | None = None,
        prefix: Sequence[str] = (),
        stdin: int = subprocess.DEVNULL,
        stderr: int = subprocess.PIPE,
        pass_fds: Iterable[int] = (),
    ) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [*prefix, self.program, *argv],
            env=self.environment() if env is None else env,
            cwd=cwd or self.cwd,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=stderr,
            pass_fds=tuple(pass_fds),
            process_group=0,
        )
        self.processes.append(process)
        return process

    def end(self, process: subprocess.Popen[bytes] | None = None) -> Ended:
        """Of the last client that was started."""
        process = process or self.processes[-1]
        stdout, stderr = process.communicate(timeout=PATIENCE_S)
        return Ended(process.returncode, stdout, stderr or b"")

    def run(
        self,
        argv: Sequence[str | bytes],
        env: Mapping[str, str] | Mapping[bytes, bytes] | None = None,
        *,
        cwd: Path | None = None,
        prefix: Sequence[str] = (),
    ) -> Ended:
        return self.end(self.start(argv, env, cwd=cwd, prefix=prefix))

    def side_channel(self) -> str | None:
        """What NativeLink finds there. Nothing else may lie in the action directory."""
        names = set(os.listdir(self.action_directory)) - {self.cwd.name}
        assert names <= {SIDE_CHANNEL}, names
        path = self.action_directory / SIDE_CHANNEL
        assert not path.is_symlink()
        return path.read_text() if names else None

    # ---- the daemon ----

    def accept(self) -> Connection:
        connection = Connection(self.listener.accept()[0])
        self.connections.append(connection)
        return connection

    def nobody_connects(self) -> bool:
        """To be asked after the client's end."""
        return not select.select([self.listener], [], [], 0)[0]

    def converse(
        self,
        frames: bytes,
        argv: Sequence[str | bytes] = ("/bin/echo", "direct"),
        env: Mapping[str, str] | None = None,
    ) -> Ended:
        """One client whose request is answered with these bytes, after which the daemon goes."""
        process = self.start(argv, env)
        connection = self.accept()
        connection.request()
        connection.send(frames)
        connection.close()
        return self.end(process)


def wait_until_gone(pid: int) -> None:
    """Fails if the process, or what is left of it, does not go."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([fd], [], [], PATIENCE_S)[0], f"process {pid} lives on"
    finally:
        os.close(fd)


def signal_of(ended: Ended) -> signal.Signals | None:
    """The one that it ended by, or that its exit code tells of."""
    if ended.code < 0:
        return signal.Signals(-ended.code)
    return signal.Signals(ended.code - 128) if ended.code > 128 else None
