"""A pool daemon as its operator starts it, and actions as a host makes them, for tests that play clients."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from tests.support.client import FRAMES, PlainClient, request_of

HOST_ID = 2000
"""The user that the host of actions runs as, and owns the CAS."""
WORKER_ID = 1000
PYTHON = shutil.which("python3", path="/usr/bin:/usr/local/bin") or sys.executable
WORKERS = Path(__file__).resolve().parents[1] / "workers"


class Node:
    """Folders of a node, that other users may go through; `with` removes them."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="nlww-node-"))
        self.folder.chmod(0o711)
        self.work, self.cas = self.folder / "work", self.folder / "cas"
        for path in (self.work, self.cas):
            path.mkdir(mode=0o755)
            os.chown(path, HOST_ID, HOST_ID)
        self.tools = self.folder / "tools"
        shutil.copytree(WORKERS, self.tools, ignore=shutil.ignore_patterns("__pycache__"))
        self._actions = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def action(self, files: Mapping[str, str], *, below: str = "", executable: tuple[str, ...] = ()) -> Path:
        """An action's working directory: inputs are hard links, `out` is there already."""
        self._actions += 1
        top = self.work / f"{self._actions:032x}" / "work"
        cwd = top / below
        (cwd / "out").mkdir(parents=True)
        for name, text in files.items():
            mode = 0o555 if name in executable else 0o444
            blob = self.cas / f"{abs(hash((text, mode)))}"
            if not blob.exists():
                blob.write_text(text)
                blob.chmod(mode)
                os.chown(blob, HOST_ID, HOST_ID)
            (cwd / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(blob, cwd / name)
        for path in [top.parent, *top.parent.rglob("*")]:
            os.chown(path, HOST_ID, HOST_ID, follow_symlinks=False)
        return cwd

    def document(self, *pools: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
        """A configuration with these pools of plain processes, and what differs from the usual one."""
        usual = {
            "language": "custom(test)",
            "keys": ["key"],
            "worker_command": [],
            "isolation": {"run_as_user": WORKER_ID},
        }
        made = [{"name": f"pool{number}", **usual, **pool} for number, pool in enumerate(pools)]
        actions = {
            "work_roots": [{"path": str(self.work), "trust_domain": "main"}],
            **changes.pop("actions", {}),
        }
        return {
            "actions": actions,
            "pools": made,
            "state_dir": str(self.folder / "state"),
            "drain_timeout_s": 10,
            **changes,
        }

    def leftovers(self) -> list[str]:
        """What lies where only the daemon makes anything."""
        return [str(path) for path in self.folder.glob(".nativelink_worker_wrapper/*")]


class Daemon:
    """`serve`, from its start to its end. `with` ends it, and it must end well."""

    def __init__(self, node: Node, document: Mapping[str, Any]) -> None:
        self.node = node
        self.config = node.folder / "pools.json5"
        self.configure(document)
        self.socket = str(node.folder / "pool.sock")
        self.log = node.folder / "daemon.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.tmp = node.folder / "tmp"
        """Where everything temporary of the daemon goes."""
        self.tmp.mkdir(mode=0o711, exist_ok=True)

    def configure(self, document: Mapping[str, Any]) -> None:
        self.config.write_text(json.dumps(document))

    def start(self) -> Self:
        command = ["serve", "--config", str(self.config), "--socket", self.socket, "--verbose"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "wrapper", *command],
                env={**os.environ, "TMPDIR": str(self.tmp)},
                stdin=subprocess.DEVNULL,
                stderr=log,
                stdout=log,
            )
        return self

    def command(self, *args: str) -> subprocess.CompletedProcess[str]:
        """One of the commands that speak to a daemon."""
        return subprocess.run(
            [sys.executable, "-m", "wrapper", *args, "--socket", self.socket],
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def wait_ready(self) -> Self:
        done = self.command("wait-ready", "--timeout", "30")
        assert done.returncode == 0, done.stderr + self.log.read_text()
        return self

    def stop(self, signum: int = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(signum)
        return self.process.wait(30)

    def __enter__(self) -> Self:
        return self.start().wait_ready()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        assert self.process is not None
        if self.process.poll() is None:
            code = self.stop()
            if kind is None:
                assert code == 0, self.log.read_text()
                assert self.node.leftovers() == []
                assert list(self.tmp.iterdir()) == []
        if kind is not None:
            print(self.log.read_text()[-20_000:])

    # ---- what a client would do ------------------------------------------------------------------------

    async def ask(self, cwd: Path, *argv: str, **fields: Any) -> list[tuple[bytes, bytes]]:
        """All frames that one action's client gets."""
        client = await PlainClient.ask(self.socket, request_of(*argv, **fields), str(cwd))
        return [frame for frame in await client.frames() if frame[0] != FRAMES.WAITING]

    async def run(self, cwd: Path, *argv: str, **fields: Any) -> tuple[int, bytes]:
        """Exit code and output of an action that a worker must have served."""
        frames = await self.ask(cwd, *argv, **fields)
        kinds = [kind for kind, _ in frames]
        assert kinds[:1] == [FRAMES.TAKEN], frames
        assert kinds[-1] == FRAMES.END, frames
        output = b"".join(data for kind, data in frames if kind == FRAMES.OUTPUT)
        return int.from_bytes(frames[-1][1], "little", signed=True), output


async def eventually_true(condition: Any, timeout_s: float = 30.0) -> None:
    """Wait for something that another process does."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)
