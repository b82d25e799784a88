"""A containerd of the tests' own: started from a folder, and gone without a trace when it is stopped.

Owns the engine's whole life and what it leaves behind; what runs in it is the tests' business. It ends only
processes whose command line names its own socket, and their descendants.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import grpc

from tests.support.oci_image import PAUSE_IMAGE
from tests.support.raw_cri import RawCri
from wrapper.runtime import process_tree

ROOT = Path(__file__).resolve().parents[2]
FOLDER_PREFIX = "nlww-engine-"
"""How folders of engines begin; the check for leaks leaves processes alone that name one."""
NAMESPACE = "k8s.io"
"""containerd's own name for what the CRI sees."""
PATIENCE_S = 30.0

_CONFIG = """\
version = 2
root = {root}
state = {state}
oom_score = 0
disabled_plugins = ["io.containerd.internal.v1.restart", "io.containerd.tracing.processor.v1.otlp"]

[grpc]
  address = {socket}

[plugins."io.containerd.internal.v1.opt"]
  path = {opt}

[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = {pause}
  restrict_oom_score_adj = true
  disable_tcp_service = true
  enable_unprivileged_ports = false
  netns_mounts_under_state_dir = true

  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = {cni}
    conf_dir = {cni}

  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"

    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"

      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = false
        Root = {runc}
"""


def _stock_loopback() -> str | None:
    """The CNI plugin with which containerd itself brings a pod's `lo` up."""
    return next(filter(os.path.exists, ("/usr/lib/cni/loopback", "/opt/cni/bin/loopback")), None)


def why_no_engine() -> str | None:
    """Why this machine cannot run a private containerd; None: it can."""
    if os.geteuid() != 0:
        return "a private containerd needs root"
    missing = [name for name in ("containerd", "ctr", "runc", "cc") if shutil.which(name) is None]
    if _stock_loopback() is None:
        missing.append("the CNI plugin loopback")
    if missing:
        packages = "containerd runc containernetworking-plugins gcc libc6-dev"
        return f"not installed: {', '.join(missing)} (Debian: apt-get install {packages})"
    return None


class PrivateContainerd:
    """One containerd. `start` and `stop` come in pairs; between them it may be killed and started again."""

    def __init__(self) -> None:
        # Not in a folder of the test's: a socket's path may have 107 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX))
        self.folder.chmod(0o711)
        self._socket = self.folder / "containerd.sock"
        self._log = self.folder / "containerd.log"
        self._state = self.folder / "state"
        self._process: subprocess.Popen[bytes] | None = None
        self._images: list[str] = []
        cni = self.folder / "cni"
        cni.mkdir()
        for path in (ROOT / "deploy" / "cni").glob("*nlww-loopback*"):
            shutil.copy(path, cni)
        (cni / "loopback").symlink_to(_stock_loopback() or "missing")
        names = ("root", "state", "opt", "runc")
        paths = {name: json.dumps(str(self.folder / name)) for name in names}
        (self.folder / "config.toml").write_text(
            _CONFIG.format(
                **paths,
                socket=json.dumps(str(self._socket)),
                cni=json.dumps(str(cni)),
                pause=json.dumps(PAUSE_IMAGE),
            )
        )

    def __repr__(self) -> str:
        return f"<PrivateContainerd {self._socket} pid={self._process.pid if self._process else None}>"

    # ---- what tests use ----

    @property
    def socket(self) -> str:
        """The path of its CRI socket."""
        return str(self._socket)

    @property
    def pid(self) -> int:
        """Of the daemon itself; raises if it does not run."""
        assert self._process is not None, "the engine does not run"
        return self._process.pid

    def log(self, most_bytes: int = 16 * 1024) -> str:
        """The end of what all daemons of this engine have logged."""
        return self._log.read_bytes()[-most_bytes:].decode(errors="replace") if self._log.exists() else ""

    def start(self) -> None:
        """Start the daemon and return when it answers. Raises RuntimeError, with its log, if it does not."""
        assert self._process is None, "the engine runs already"
        argv = ["containerd", "--config", str(self.folder / "config.toml"), "--address", self.socket]
        with open(self._log, "ab") as log:
            # A session of its own: a Ctrl-C for the tests is not one for the containers.
            self._process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        try:
            self._wait(self._answers, "containerd does not answer")
        except BaseException:
            self.kill()
            raise

    def kill(self) -> None:
        """SIGKILL the daemon; containers go on. Idempotent."""
        self._end(signal.SIGKILL)

    def terminate(self) -> None:
        """SIGTERM the daemon and wait for its end; containers go on. Idempotent."""
        self._end(signal.SIGTERM)

    def restart(self) -> None:
        """A new daemon in the place of this one; containers go on."""
        self.terminate()
        self.start()

    def import_image(self, archive: Path, name: str) -> None:
        """Import an OCI archive and return when the CRI knows its image."""
        self.ctr("images", "import", str(archive))
        with RawCri(self.socket) as cri:  # it learns by an event
            self._wait(lambda: cri.has_image(name), f"the engine does not know the image {name}")

    def ctr(self, *arguments: str) -> str:
        """Run `ctr` on this engine, in the CRI's namespace; returns its output. Fails with what it said."""
        argv = ["ctr", "--address", self.socket, "--namespace", NAMESPACE, *arguments]
        done = subprocess.run(argv, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(argv)}: {done.stdout}{done.stderr}\n{self.log()}")
        return done.stdout

    def stop(self) -> None:
        """End the daemon and every container, and remove all that they were. Idempotent."""
        self.terminate()
        ids, sockets = self._ids(), self._shim_sockets()
        self._kill_shims()
        for path in sockets:
            path.unlink(missing_ok=True)
        self._unmount_all()
        self._remove_cgroups(ids)
        for path in Path("/var/lib/cni/results").glob("*-loopback-*"):  # of pods that nobody has removed
            if any(pod in path.name for pod in ids):
                path.unlink(missing_ok=True)
        if self.folder.exists():
            shutil.rmtree(self.folder)

    def leftovers(self) -> list[str]:
        """What is still there of this engine: processes, mounts, its folder."""
        found = [f"process {pid}" for pid in self._shims()]
        found += [f"mount {path}" for path in self._mounts()]
        return found + ([str(self.folder)] if self.folder.exists() else [])

    # ---- how ----

    def _answers(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            code, self._process = self._process.returncode, None
            raise RuntimeError(f"containerd has ended with {code}\n{self.log()}")
        try:
            with RawCri(self.socket) as cri:
                cri.version()
        except grpc.RpcError:
            return False
        return True

    def _wait(self, condition: Callable[[], object], problem: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            if time.monotonic() > deadline:
                raise RuntimeError(f"{problem} after {PATIENCE_S:g} s\n{self.log()}")
            time.sleep(0.01)

    def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(number)
        try:
            process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _shims(self) -> list[int]:
        """The processes of ours by their command line: it names our socket."""
        found = []
        for name in os.listdir("/proc"):
            if name.isdigit():
                try:
                    words = Path("/proc", name, "cmdline").read_bytes().split(b"\0")
                except OSError:
                    continue
                if os.fsencode(self._socket) in words and b"containerd" in words[0]:
                    found.append(int(name))
        return found

    def _kill_shims(self) -> None:
        """First what runs in the containers, which would otherwise outlive its shim."""
        deadline = time.monotonic() + PATIENCE_S
        while shims := self._shims():
            tree = [pid for shim in shims for pid in process_tree.children(shim)]
            for pid in tree or shims:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            if time.monotonic() > deadline:
                raise RuntimeError(f"shims of {self!r} do not end: {shims}")
            time.sleep(0.01)

    def _tasks(self) -> Iterable[Path]:
        return self._state.glob(f"io.containerd.runtime.v2.task/{NAMESPACE}/*")

    def _ids(self) -> set[str]:
        """Of all pods and containers, those without a process included."""
        cri = self.folder / "root" / "io.containerd.grpc.v1.cri"
        return {path.name for path in (*self._tasks(), *cri.glob("sandboxes/*"), *cri.glob("containers/*"))}

    def _shim_sockets(self) -> list[Path]:
        """They lie in /run/containerd whatever the configuration says."""
        addresses = [path / "address" for path in self._tasks()]
        return [Path(a.read_text().removeprefix("unix://")) for a in addresses if a.exists()]

    def _mounts(self) -> list[str]:
        points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        return [point for point in points if point.startswith(f"{self.folder}/")]

    def _unmount_all(self) -> None:
        for point in reversed(self._mounts()):
            subprocess.run(["umount", "--lazy", point], check=True)

    def _remove_cgroups(self, ids: set[str]) -> None:
        """Those of containers; and the parent that the CRI gives to pods without one, if nobody is in it."""
        for folder, folders, _ in os.walk("/sys/fs/cgroup", topdown=False):
            if ids & set(folders) or NAMESPACE in folders:
                for name in (ids | {NAMESPACE}) & set(folders):
                    self._remove_cgroup(Path(folder, name), must=name in ids)

    def _remove_cgroup(self, path: Path, *, must: bool) -> None:
        def removed() -> bool:
            try:
                path.rmdir()
            except FileNotFoundError:
                return True
            except OSError:
                return not must
            return True

        self._wait(removed, f"the cgroup {path} is still in use")
