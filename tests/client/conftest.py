"""The two per-action clients, installed as an operator does, and a host that starts them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from wrapper.install_entrypoint import install_entrypoint, policy_text

NAME = "a" * 32
"""Of a side-channel file."""


class Host:
    """A work root with one action in it. `run` starts the client as a host of actions does."""

    def __init__(self, folder: Path, *, python: bool) -> None:
        self.folder = folder
        self.socket = folder / "pool.sock"
        self.work_root = folder / "work"
        self.action_dir = self.work_root / "operation"
        self.cwd = self.action_dir / "work"
        self.cwd.mkdir(parents=True)
        self.is_python = python
        self.program = Path(
            install_entrypoint(
                str(folder / "bin"), policy_text(str(self.socket), [str(self.work_root)]), python=python
            )
        )
        with self.program.open("rb") as file:
            assert file.read(4) == (
                b"#!/" + os.path.realpath(sys.executable).encode()[1:2] if python else b"\x7fELF"
            )
        self.policy = folder / "bin" / "nativelink_worker_entrypoint.conf"
        self.side_channel = self.action_dir / NAME

    def set_policy(self, *lines: str) -> None:
        usual = [f"socket = {self.socket}", f"work_root = {self.work_root}"]
        self.policy.write_text("\n".join([*usual, *lines, ""]))

    def environment(self, **changes: str | None) -> dict[str, str]:
        usual: dict[str, str | None] = {
            "PATH": "/usr/bin:/bin",
            "NL_WORKER_KEY": "key",
            "NL_SIDE_CHANNEL": str(self.side_channel),
            "NL_ACTION_DIR": str(self.action_dir),
        }
        return {name: value for name, value in {**usual, **changes}.items() if value is not None}

    def start(
        self,
        *argv: str | bytes,
        env: dict[str, str | None] | None = None,
        cwd: Path | None = None,
        stderr: int | IO[bytes] = subprocess.PIPE,
        stdin: int = subprocess.DEVNULL,
        pass_fds: tuple[int, ...] = (),
    ) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [self.program, *argv],
            cwd=cwd or self.cwd,
            env=self.environment(**(env or {})),
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=stderr,
            process_group=0,
            pass_fds=pass_fds,
        )

    def run(
        self,
        *argv: str | bytes,
        env: dict[str, str | None] | None = None,
        cwd: Path | None = None,
        timeout_s: float = 30,
    ) -> subprocess.CompletedProcess[bytes]:
        process = self.start(*argv, env=env, cwd=cwd)
        try:
            output, errors = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            output, errors = process.communicate()
            raise AssertionError(f"the client does not end; it said {output!r} {errors!r}") from None
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


@pytest.fixture(params=["native", "python"])
def host(request: pytest.FixtureRequest) -> Iterator[Host]:
    folder = Path(tempfile.mkdtemp(prefix="nlww-client-"))
    folder.chmod(0o711)
    yield Host(folder, python=request.param == "python")
    shutil.rmtree(folder)


@pytest.fixture
def nobody() -> int:
    assert os.geteuid() == 0, "these tests make files of another owner: they need root"
    return 65534
