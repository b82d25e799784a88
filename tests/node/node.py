"""What NativeLink 1.6.6 does with an action, for tests: no more and no less than was seen of the real one.

Directories, hard links, environment, entrypoint, side-channel file, upload and deletion; each of them has a
test in `test_node.py`. Runs as root and acts as the owner that it is told to be.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.node.cas import Cas

MAX_ATTEMPTS = 4
ENVIRONMENT: Mapping[str, Any] = {
    "PATH": {"value": "/usr/local/bin:/usr/bin:/bin"},
    "NL_WORKER_KEY": {"property": "persistentWorkerKey"},
    "NL_WORKER_TOOL": {"property": "persistentWorkerTool"},
    "NL_WORKER_PROTOCOL": {"property": "persistentWorkerProtocol"},
    "NL_TIMEOUT_MS": "timeout_millis",
    "NL_SIDE_CHANNEL": "side_channel_file",
    "NL_ACTION_DIR": "action_directory",
}
"""`additional_environment` of nativelink-config.json."""


@dataclass(frozen=True, slots=True)
class Link:
    """A symbolic link among the inputs."""

    target: str


@dataclass(slots=True)
class NodeAction:
    argv: Sequence[str]
    inputs: Mapping[str, bytes | Link] = field(default_factory=dict)
    executables: Sequence[str] = ()
    outputs: Sequence[str] = ()
    """Declared, relative to the working directory: files, directories or links."""
    env: Mapping[str, str] = field(default_factory=dict)
    properties: Mapping[str, str] = field(default_factory=dict)
    timeout_s: float | None = None
    working_directory: str = ""


@dataclass(slots=True)
class NodeResult:
    exit_code: int | None
    """None: it was killed by a cancel, or it timed out, or every attempt failed."""
    stdout: bytes = b""
    stderr: bytes = b""
    outputs: dict[str, bytes | str] = field(default_factory=dict)
    """Contents of files; "-> TARGET" of links; "directory" of empty directories."""
    timed_out: bool = False
    cancelled: bool = False
    attempts: int = 1
    error: str = ""
    """What NativeLink would complain of."""


class Node:
    """One NativeLink worker. `run` may be called from several threads at once."""

    def __init__(
        self,
        work_directory: Path,
        cas: Cas,
        entrypoint: str | None,
        *,
        additional_environment: Mapping[str, Any] = ENVIRONMENT,
        timeout_handled_externally: bool = True,
        use_namespaces: bool = False,
        use_mount_namespace: bool = False,
    ) -> None:
        self.work_directory = work_directory
        self.cas = cas
        self.entrypoint = entrypoint
        self.additional_environment = additional_environment
        self.timeout_handled_externally = timeout_handled_externally
        self.use_namespaces = use_namespaces
        self.use_mount_namespace = use_mount_namespace
        self.stuck: list[str] = []
        """Directories that could not be deleted."""
        if work_directory.exists():
            shutil.rmtree(work_directory)  # as NativeLink does at its start
        work_directory.mkdir(mode=0o755)
        os.chown(work_directory, cas.owner, cas.owner)

    # ---- an action -------------------------------------------------------------------------------------

    def run(self, action: NodeAction, *, cancel_after_s: float | None = None) -> NodeResult:
        """All of it, from the inputs to the deletion; again if the side-channel file is malformed."""
        for attempt in range(1, MAX_ATTEMPTS + 1):
            directory = self.prepare(action)
            try:
                result, again = self._attempt(action, directory, cancel_after_s)
            finally:
                self.delete(directory)
            result.attempts = attempt
            if not again:
                return result
        result.exit_code, result.error = None, "every attempt ended with a malformed side-channel file"
        return result

    def prepare(self, action: NodeAction) -> Path:
        """The directory of an action, with its inputs and the parents of its declared outputs."""
        directory = self.work_directory / os.urandom(16).hex()
        root = directory / "work"
        root.mkdir(parents=True)
        made = {str(root), str(directory)}
        for name, content in action.inputs.items():
            path = root / name
            self._parents(path, made)
            if isinstance(content, Link):
                path.symlink_to(content.target)
            else:
                os.link(self.cas.put(content, executable=name in action.executables), path)
        cwd = root / action.working_directory
        self._parents(cwd / "x", made)
        for name in action.outputs:
            self._parents(cwd / name, made)
        if self.cas.owner != 0:
            for one in made:
                os.chown(one, self.cas.owner, self.cas.owner)
        return directory

    @staticmethod
    def _parents(path: Path, made: set[str]) -> None:
        parent = str(path.parent)
        if parent in made:
            return
        os.makedirs(parent, exist_ok=True)
        while parent not in made:
            made.add(parent)
            parent = os.path.dirname(parent)

    def environment(self, action: NodeAction, directory: Path, side_channel: str) -> dict[str, str]:
        """Cleared, then `additional_environment`, then the action's own, which wins."""
        env: dict[str, str] = {}
        for name, source in self.additional_environment.items():
            if source == "from_environment":
                env[name] = os.environ.get(name, "")
            elif source == "timeout_millis":
                env[name] = str(round(action.timeout_s * 1000)) if action.timeout_s else ""
            elif source == "side_channel_file":
                env[name] = side_channel
            elif source == "action_directory":
                env[name] = str(directory)
            elif "value" in source:
                env[name] = source["value"]
            else:
                env[name] = action.properties.get(source["property"], "")
        env.update(action.env)
        return env

    def _attempt(
        self, action: NodeAction, directory: Path, cancel_after_s: float | None
    ) -> tuple[NodeResult, bool]:
        side_channel = directory / os.urandom(16).hex()
        process = self.spawn(action, directory, str(side_channel))
        timer: threading.Timer | None = None
        cancelled: list[bool] = []

        def kill() -> None:
            cancelled.append(True)
            process.send_signal(signal.SIGKILL)

        limit_s = cancel_after_s
        if limit_s is None and not self.timeout_handled_externally:
            limit_s = action.timeout_s
        if limit_s is not None:
            timer = threading.Timer(limit_s, kill)
            timer.start()
        try:
            stdout, stderr = process.communicate()
        finally:
            if timer is not None:
                timer.cancel()
        result = NodeResult(process.returncode, stdout, stderr)
        if cancelled and process.returncode == -signal.SIGKILL:
            result.exit_code, result.cancelled = None, cancel_after_s is not None
            result.timed_out = not result.cancelled
            return result, False
        told = self._side_channel(side_channel)
        if told == "malformed":
            return result, True
        if told == "timeout":
            result.exit_code, result.timed_out = None, True
            return result, False
        try:
            self._upload(action, directory, result)
        except OSError as error:
            result.error = str(error)
        return result, False

    @staticmethod
    def _side_channel(path: Path) -> str:
        try:
            text = path.read_text()
        except FileNotFoundError:
            return ""
        try:
            return "timeout" if json.loads(text)["failure"] == "timeout" else "malformed"
        except (ValueError, KeyError, TypeError):
            return "malformed"

    def spawn(self, action: NodeAction, directory: Path, side_channel: str) -> subprocess.Popen[bytes]:
        cwd = str(directory / "work" / action.working_directory)
        argv = [*([self.entrypoint] if self.entrypoint else []), *action.argv]
        env = self.environment(action, directory, side_channel)
        if self.use_namespaces or self.use_mount_namespace:
            argv = [*self._namespaces(), str(self.work_directory), cwd, *argv]
        owner = None if self.cas.owner == 0 else self.cas.owner
        return subprocess.Popen(
            argv,
            executable=None if "/" in argv[0] else shutil.which(argv[0], path=env.get("PATH")),
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            process_group=0,
            user=owner,
            group=owner,
            extra_groups=None if owner is None else [],
        )

    def _namespaces(self) -> list[str]:
        kinds = ["--pid", "--fork", "--kill-child=SIGKILL"] if self.use_namespaces else []
        script = 'root=$1 cwd=$2; shift 2; cd "$cwd" && exec "$@"'
        if self.use_mount_namespace:
            kinds += ["--mount", "--propagation", "private"]
            script = 'root=$1 cwd=$2; shift 2; mount --bind "$root" "$root" && cd "$cwd" && exec "$@"'
        return ["unshare", *kinds, "/bin/sh", "-c", script, "sh"]

    def start_as_worker(self, *startup: str) -> subprocess.CompletedProcess[bytes]:
        """What an action with `supports-workers=1` makes of the entrypoint: a persistent worker."""
        assert self.entrypoint is not None
        return subprocess.run(
            [self.entrypoint, *startup, "--persistent_worker"],
            cwd=self.work_directory,
            stdin=subprocess.DEVNULL,
            capture_output=True,
        )

    # ---- afterwards ------------------------------------------------------------------------------------

    def _upload(self, action: NodeAction, directory: Path, result: NodeResult) -> None:
        cwd = directory / "work" / action.working_directory
        for name in action.outputs:
            self._take(cwd / name, name, result)

    def _take(self, path: Path, name: str, result: NodeResult) -> None:
        try:
            mode = path.lstat().st_mode
        except FileNotFoundError:
            return
        if stat.S_ISLNK(mode):
            target = os.readlink(path)
            if not target.startswith("/"):  # an absolute one is lost without a word
                result.outputs[name] = f"-> {target}"
        elif stat.S_ISDIR(mode):
            below = sorted(path.iterdir())
            if not below:
                result.outputs[name] = "directory"
            for one in below:
                self._take(one, f"{name}/{one.name}", result)
        else:
            digest = self.cas.take(path)
            result.outputs[name] = self.cas.read(digest)

    def delete(self, directory: Path) -> None:
        """A chmod of everything first, which a foreign directory refuses: then the rest sticks."""
        owner = self.cas.owner
        for folder, _, _ in os.walk(directory):
            try:
                if owner != 0 and os.lstat(folder).st_uid != owner:
                    self.stuck.append(folder)
                    return
                os.chmod(folder, 0o755)
            except FileNotFoundError:
                pass  # whoever renames within it does so while we delete
        for _ in range(5):
            shutil.rmtree(directory, ignore_errors=True)
            if not directory.exists():
                return
            time.sleep(0.01)
        self.stuck.append(str(directory))
