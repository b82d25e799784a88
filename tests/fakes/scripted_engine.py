"""A container engine whose every answer a test decides: real gRPC on a unix socket, in the test's own loop.

Plays containerd or CRI-O where they differ. Its containers are real processes in namespaces of their own,
with the mounts and the user that were asked for, so that a start can succeed. It keeps books of what it was
asked and of what it has made. Knows nothing of the product but the messages' numbers.
"""

from __future__ import annotations

import asyncio
import glob
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import grpc
import grpc.aio

from tests.support.loop import eventually
from wrapper.runtime import cri_runtime_pb2 as cri
from wrapper.runtime import linux, process_tree

CRI_O, CONTAINERD = "cri-o", "containerd"
IMAGE = "localhost/scripted:1"
IMAGE_ID = "sha256:" + "5" * 64

BASIC_CALLS = frozenset(
    [
        "Version",
        "Status",
        "RuntimeConfig",
        "ImageStatus",
        "PullImage",
        "RunPodSandbox",
        "StopPodSandbox",
        "RemovePodSandbox",
        "ListPodSandbox",
        "CreateContainer",
        "StartContainer",
        "StopContainer",
        "RemoveContainer",
        "ListContainers",
        "ContainerStatus",
        "ExecSync",
    ]
)
"""Calls of runtime.v1 that every engine has, and RuntimeConfig, which may be missing."""

_GROUPS = "/sys/fs/cgroup"
PATIENCE_S = 10.0


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to one call. `does`: whether the engine does what it was asked."""

    does: bool = False
    code: grpc.StatusCode | None = None
    """What it answers; None: the truth."""
    details: str = "scripted"
    hangs: bool = False
    """No answer, until the caller gives up or the engine ends."""
    waits_for: asyncio.Event | None = None
    """Only then anything happens."""
    late: asyncio.Event | None = None
    """No answer, and done only then, whether or not the caller is still there."""


ERROR = Fault(code=grpc.StatusCode.INTERNAL, details="no space left")
LOST_ANSWER = Fault(does=True, code=grpc.StatusCode.UNAVAILABLE, details="connection reset")
HANG = Fault(hangs=True)
HANG_AFTERWARDS = Fault(does=True, hangs=True)


@dataclass(eq=False)
class Pod:
    """One that exists. `stopped`: StopPodSandbox was called."""

    id: str
    config: cri.PodSandboxConfig
    stopped: bool = False


@dataclass(eq=False)
class Container:
    """One that exists."""

    id: str
    pod_id: str
    config: cri.ContainerConfig
    root: Path
    process: subprocess.Popen[bytes] | None = None
    pid: int = 0
    """Of its first process."""
    groups: list[str] = field(default_factory=list)


class _Answer(Exception):
    """An answer other than the usual."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self.code, self.details = code, details


class ScriptedEngine:
    """Use as an async context manager: it serves inside. Its socket is in a folder of its own."""

    def __init__(self, kind: str = CONTAINERD) -> None:
        self.kind = kind
        self.folder = Path(tempfile.mkdtemp(prefix="scripted-"))
        self.folder.chmod(0o711)
        self.socket = str(self.folder / "engine.sock")
        self.pods: dict[str, Pod] = {}
        self.containers: dict[str, Container] = {}
        self.calls: list[tuple[str, Any]] = []
        """Name and request of each call, as they came."""
        self.conditions = {"RuntimeReady": "", "NetworkReady": ""}
        """Why each one does not hold; "": it does."""
        self.images = {IMAGE: IMAGE_ID}
        self.cgroup_driver: int | None = cri.CgroupDriver.CGROUPFS
        """None: RuntimeConfig is not known."""
        self.info: dict[str, str] = {}
        """What Status tells of its configuration."""
        self.tells_pid = True
        self.old_pod: str | None = None
        self.old_container: str | None = None
        """Answered in the place of what was asked for, as if their names were known."""
        self._faults: dict[str, list[Fault]] = {}
        self._server: grpc.aio.Server | None = None
        self._serial = 0
        self._late: set[asyncio.Task[Any]] = set()

    async def __aenter__(self) -> Self:
        await self.come_back()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.go_away()
        for task in list(self._late):
            task.cancel()
            await asyncio.wait([task])
        for container in list(self.containers.values()):
            self._kill(container)
        shutil.rmtree(self.folder)

    # ---- what tests use ----

    def script(self, call: str, *faults: Fault) -> None:
        """What happens to the next calls of this name; after them, all is well again."""
        self._faults.setdefault(call, []).extend(faults)

    async def go_away(self) -> None:
        """No socket, no answers; its containers go on."""
        server, self._server = self._server, None
        if server is not None:
            await server.stop(None)
            await eventually(lambda: not any(map(_is_of_grpc, asyncio.all_tasks())))
        Path(self.socket).unlink(missing_ok=True)

    async def come_back(self) -> None:
        """As it was."""
        server = grpc.aio.server()
        server.add_generic_rpc_handlers([_Handlers(self)])
        server.add_insecure_port(f"unix:{self.socket}")
        await server.start()
        self._server = server

    @property
    def is_empty(self) -> bool:
        return not self.pods and not self.containers

    def names(self) -> list[str]:
        """Of the calls, in their order."""
        return [name for name, _ in self.calls]

    def requests(self, call: str) -> list[Any]:
        return [request for name, request in self.calls if name == call]

    def add_foreign(self, name: str = "foreign") -> tuple[Pod, Container]:
        """A pod and a container, not running, that somebody else has made."""
        pod = self._new_pod(cri.PodSandboxConfig(metadata=cri.PodSandboxMetadata(name=name)))
        return pod, self._new_container(pod.id, cri.ContainerConfig())

    # ---- calls ----

    async def answer(self, name: str, data: bytes, context: Any) -> bytes:
        request = getattr(cri, f"{name}Request").FromString(data)
        self.calls.append((name, request))
        faults = self._faults.get(name)
        fault = faults.pop(0) if faults else None
        if fault is not None and fault.waits_for is not None:
            await fault.waits_for.wait()
        response: Any = None
        try:
            if fault is not None and fault.late is not None:
                doing = asyncio.create_task(self._do_late(name, request, fault.late), name=f"late {name}")
                self._late.add(doing)
                doing.add_done_callback(self._late.discard)
                await asyncio.Event().wait()
            if fault is None or fault.does or (fault.code is None and not fault.hangs):
                response = await self._method(name)(request)
            if fault is not None and fault.hangs:
                await asyncio.Event().wait()
            if fault is not None and fault.code is not None:
                raise _Answer(fault.code, fault.details)
        except _Answer as other:
            context.set_code(other.code)
            context.set_details(other.details)
            return b""
        return bytes(response.SerializeToString())

    def _method(self, name: str) -> Any:
        return getattr(self, "_call" + re.sub("[A-Z]", lambda letter: f"_{letter[0].lower()}", name))

    async def _do_late(self, name: str, request: Any, when: asyncio.Event) -> None:
        await when.wait()
        await self._method(name)(request)

    async def _call_version(self, _: Any) -> Any:
        return cri.VersionResponse(
            version="0.1.0", runtime_name=self.kind, runtime_version="1.2.3", runtime_api_version="v1"
        )

    async def _call_status(self, request: Any) -> Any:
        conditions = [
            cri.RuntimeCondition(type=name, status=not why, reason="Scripted" if why else "", message=why)
            for name, why in self.conditions.items()
        ]
        info = self.info if request.verbose else {}
        return cri.StatusResponse(status=cri.RuntimeStatus(conditions=conditions), info=info)

    async def _call_runtime_config(self, _: Any) -> Any:
        if self.cgroup_driver is None:
            raise _Answer(grpc.StatusCode.UNIMPLEMENTED, "unknown method RuntimeConfig")
        return cri.RuntimeConfigResponse(
            linux=cri.LinuxRuntimeConfiguration(cgroup_driver=self.cgroup_driver)  # type: ignore[arg-type]
        )

    async def _call_image_status(self, request: Any) -> Any:
        image_id = self.images.get(request.image.image)
        image = None if image_id is None else cri.Image(id=image_id, size=3 << 20)
        return cri.ImageStatusResponse(image=image)

    async def _call_pull_image(self, request: Any) -> Any:
        self.images[request.image.image] = IMAGE_ID
        return cri.PullImageResponse(image_ref=IMAGE_ID)

    async def _call_run_pod_sandbox(self, request: Any) -> Any:
        name = request.config.metadata.name
        old = next((pod for pod in self.pods.values() if pod.config.metadata.name == name), None)
        if old is not None and self.kind == CONTAINERD:
            raise _Answer(grpc.StatusCode.UNKNOWN, f'name "{name}" is reserved for "{old.id}"')
        if self.old_pod is not None:
            return cri.RunPodSandboxResponse(pod_sandbox_id=self.old_pod)
        pod = old or self._new_pod(request.config)
        return cri.RunPodSandboxResponse(pod_sandbox_id=pod.id)

    async def _call_create_container(self, request: Any) -> Any:
        self._existing(self.pods, request.pod_sandbox_id)
        name = request.config.metadata.name
        for container in self.containers.values():
            if container.pod_id == request.pod_sandbox_id and container.config.metadata.name == name:
                if self.kind == CONTAINERD:
                    raise _Answer(grpc.StatusCode.UNKNOWN, f'name "{name}" is reserved for "{container.id}"')
                return cri.CreateContainerResponse(container_id=container.id)
        if self.old_container is not None:
            return cri.CreateContainerResponse(container_id=self.old_container)
        container = self._new_container(request.pod_sandbox_id, request.config)
        return cri.CreateContainerResponse(container_id=container.id)

    async def _call_start_container(self, request: Any) -> Any:
        container = self._existing(self.containers, request.container_id)
        if container.process is not None:
            raise _Answer(grpc.StatusCode.UNKNOWN, "the container runs already")
        if container.config.command:
            await self._run(container)
        return cri.StartContainerResponse()

    async def _call_container_status(self, request: Any) -> Any:
        container = self._existing(self.containers, request.container_id)
        status = cri.ContainerStatus(id=container.id, labels=container.config.labels)
        status.state = cri.ContainerState.CONTAINER_CREATED
        if container.process is not None:
            status.state = cri.ContainerState.CONTAINER_RUNNING
            if container.process.poll() is not None:
                status.state = cri.ContainerState.CONTAINER_EXITED
                status.exit_code, status.reason = container.process.returncode & 0xFF, "Error"
        info = {"info": json.dumps({"pid": container.pid})} if request.verbose and self.tells_pid else {}
        return cri.ContainerStatusResponse(status=status, info=info)

    async def _call_exec_sync(self, request: Any) -> Any:
        self._existing(self.containers, request.container_id)
        return cri.ExecSyncResponse(stdout=" ".join(request.cmd).encode(), exit_code=0)

    async def _call_stop_container(self, request: Any) -> Any:
        if self._known(self.containers, request.container_id):
            self._kill(self.containers[request.container_id])
        return cri.StopContainerResponse()

    async def _call_remove_container(self, request: Any) -> Any:
        if self._known(self.containers, request.container_id):
            container = self.containers.pop(request.container_id)
            self._kill(container)
            shutil.rmtree(container.root)
        return cri.RemoveContainerResponse()

    async def _call_stop_pod_sandbox(self, request: Any) -> Any:
        if self._known(self.pods, request.pod_sandbox_id):
            self.pods[request.pod_sandbox_id].stopped = True
        return cri.StopPodSandboxResponse()

    async def _call_remove_pod_sandbox(self, request: Any) -> Any:
        if self._known(self.pods, request.pod_sandbox_id):
            for container in [c for c in self.containers.values() if c.pod_id == request.pod_sandbox_id]:
                await self._call_remove_container(cri.RemoveContainerRequest(container_id=container.id))
            del self.pods[request.pod_sandbox_id]
        return cri.RemovePodSandboxResponse()

    async def _call_list_pod_sandbox(self, request: Any) -> Any:
        wanted = request.filter.label_selector.items()
        items = [
            cri.PodSandbox(id=pod.id, metadata=pod.config.metadata, labels=pod.config.labels)
            for pod in self.pods.values()
            if wanted <= pod.config.labels.items()
        ]
        return cri.ListPodSandboxResponse(items=items)

    async def _call_list_containers(self, request: Any) -> Any:
        wanted = request.filter.label_selector.items()
        containers = [
            cri.Container(id=one.id, pod_sandbox_id=one.pod_id, labels=one.config.labels)
            for one in self.containers.values()
            if wanted <= one.config.labels.items()
        ]
        return cri.ListContainersResponse(containers=containers)

    # ---- how ----

    def _new_id(self, what: str) -> str:
        self._serial += 1
        return f"{what}{self._serial:060d}"

    def _new_pod(self, config: cri.PodSandboxConfig) -> Pod:
        pod = Pod(self._new_id("pod-"), config)
        self.pods[pod.id] = pod
        return pod

    def _new_container(self, pod_id: str, config: cri.ContainerConfig) -> Container:
        container = Container(self._new_id("ctr-"), pod_id, config, Path(tempfile.mkdtemp(dir=self.folder)))
        self.containers[container.id] = container
        return container

    def _existing(self, books: dict[str, Any], name: str) -> Any:
        if name not in books:
            raise _Answer(grpc.StatusCode.NOT_FOUND, f"{name} is not known")
        return books[name]

    def _known(self, books: dict[str, Any], name: str) -> bool:
        """Stopping or removing what is unknown: CRI-O says OK, containerd NOT_FOUND."""
        if name not in books and self.kind == CONTAINERD:
            raise _Answer(grpc.StatusCode.NOT_FOUND, f"{name} is not known")
        return name in books

    async def _run(self, container: Container) -> None:
        """Its first process, in namespaces of its own, whose end is that of `unshare` too."""
        container.groups = self._make_groups(container)
        namespaces = ["--pid", "--fork", "--mount", "--net", "--ipc"]
        script = _setting_up(container)
        argv = ["unshare", *namespaces, "/bin/sh", "-c", script]
        with open(self.folder / "log", "ab") as log:
            process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        container.process = process
        await eventually(lambda: process_tree.children(process.pid) or process.poll() is not None)
        container.pid = next(iter(process_tree.children(process.pid)), 0)

    def _make_groups(self, container: Container) -> list[str]:
        """`/PARENT/ID`, or CRI-O's `/PARENT/crio-ID`, in each hierarchy."""
        parent = self.pods[container.pod_id].config.linux.cgroup_parent
        if parent.endswith(".slice"):
            parent = f"/{parent}"
        if not parent:
            return []
        name = f"crio-{container.id}" if self.kind == CRI_O else container.id
        roots = [_GROUPS] if os.path.exists(f"{_GROUPS}/cgroup.procs") else []
        roots += [os.path.dirname(path) for path in glob.glob(f"{_GROUPS}/*/cgroup.procs") if not roots]
        groups = list(dict.fromkeys(f"{os.path.realpath(root)}{parent}/{name}" for root in roots))
        limit = container.config.linux.resources.memory_limit_in_bytes
        for group in groups:
            if "/cpuset" in group:
                continue
            os.makedirs(group)
            for file in ("memory.limit_in_bytes", "memory.max"):
                if limit and os.path.exists(f"{group}/{file}"):
                    Path(group, file).write_text(str(limit))
        return [group for group in groups if "/cpuset" not in group]

    def _kill(self, container: Container) -> None:
        if container.process is not None:
            if container.pid and process_tree.children(container.process.pid) == [container.pid]:
                os.kill(container.pid, signal.SIGKILL)
                linux.block_until_dead([container.pid], PATIENCE_S)
            container.process.kill()
            container.process.wait()
        for group in container.groups:
            with suppress(FileNotFoundError):
                os.rmdir(group)
            if group.count("/nlww-") == 1 and os.path.dirname(group).endswith(".slice"):
                os.rmdir(os.path.dirname(group))  # as systemd would
        container.groups = []


def _is_of_grpc(task: asyncio.Task[Any]) -> bool:
    """A call's task, which the server leaves to end by itself."""
    return task.get_name().startswith(("HandleExceptions[", "rpc_task"))


class _Handlers(grpc.GenericRpcHandler):  # type: ignore[misc]
    def __init__(self, engine: ScriptedEngine) -> None:
        self._engine = engine

    def service(self, call: Any) -> Any:
        name = call.method.rpartition("/")[2]
        if name not in BASIC_CALLS:
            self._engine.calls.append((name, None))
            return None

        async def answer(data: bytes, context: Any) -> bytes:
            return await self._engine.answer(name, data, context)

        return grpc.unary_unary_rpc_method_handler(answer)


def _setting_up(container: Container) -> str:
    """A shell script that becomes the container's first process: root, mounts, groups, user, program."""
    config, root = container.config, container.root
    security = config.linux.security_context
    lines = ["set -e", *(f"echo 0 > {shlex.quote(group)}/cgroup.procs" for group in container.groups)]
    lines += [f"mount -t tmpfs none {root}", f"mkdir -p {root}/proc {root}/usr", f"cd {root}"]
    lines += [f"ln -s usr/{name} {name}" for name in ("bin", "lib", "lib64", "sbin")]
    for mount in config.mounts:
        host, place = shlex.quote(mount.host_path), shlex.quote(f"{root}{mount.container_path}")
        is_folder = os.path.isdir(mount.host_path)
        make = [f"mkdir -p {place}"] if is_folder else [f"mkdir -p $(dirname {place})", f": > {place}"]
        lines += [*make, f"mount --bind {host} {place}"]
        if mount.readonly:
            lines.append(f"mount -o remount,bind,ro {place}")
    lines += [f"mkdir -p {root}/dev", f"mount --rbind /dev {root}/dev"]
    lines += [f"mount -t proc proc {root}/proc", "pivot_root . .", "umount -l ."]
    if security.readonly_rootfs:
        lines.append("mount -o remount,bind,ro /")
    user, group = security.run_as_user.value, security.run_as_group.value
    drop = ["setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups"]
    drop += ["--no-new-privs"] if security.no_new_privs else []
    drop += ["--bounding-set=-all", "--inh-caps=-all"] if security.capabilities.drop_capabilities else []
    env = [f"{one.key}={one.value}" for one in config.envs]
    lines.append(f"cd {shlex.quote(config.working_dir or '/')}")
    lines.append(f"exec env -i {shlex.join([*env, *drop, '--', *config.command])}")
    return "\n".join(lines)
