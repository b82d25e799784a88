"""The calls to a container engine (CRI-O, containerd) over its CRI socket, `runtime.v1`.

Owns the connection, the deadlines and the wording of errors: each names the engine, the call and what it was
about. Knows nothing of workers. Asks for nothing that only one engine has.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message

from wrapper.clock import monotonic_s
from wrapper.errors import RuntimeUnavailable
from wrapper.runtime import cri_runtime_pb2 as cri

_Answer = TypeVar("_Answer", bound=Message)

PULL_PROGRESS_S = 10.0

MAX_MESSAGE_BYTES = 32 * 1024 * 1024
"""ExecSync returns all that a command printed in one message; engines cut it at 16 MiB."""

_IMAGE_SERVICE = "ImageService"
_RUNTIME_SERVICE = "RuntimeService"

_log = logging.getLogger(__name__)


class EngineError(RuntimeUnavailable):
    """A call failed. `is_gone`: the engine does not know what the call was about. `may_have_happened`: the
    answer was lost or late, so that nobody knows whether it did what it was asked."""

    def __init__(self, message: str, code: grpc.StatusCode, details: str) -> None:
        super().__init__(message)
        self.details = details
        self.is_gone = code is grpc.StatusCode.NOT_FOUND
        self.is_unknown_call = code is grpc.StatusCode.UNIMPLEMENTED
        self.timed_out = code is grpc.StatusCode.DEADLINE_EXCEEDED
        self.is_away = code is grpc.StatusCode.UNAVAILABLE
        self.may_have_happened = code in (
            grpc.StatusCode.DEADLINE_EXCEEDED,
            grpc.StatusCode.UNAVAILABLE,
            grpc.StatusCode.CANCELLED,
            grpc.StatusCode.UNKNOWN,
            grpc.StatusCode.INTERNAL,
        )


@dataclass(frozen=True, slots=True)
class Deadlines:
    """How long an engine may take, and how long we wait for what it does."""

    call_s: float = 30.0
    start_s: float = 120.0
    """RunPodSandbox, CreateContainer, StartContainer, StopPodSandbox: CRI-O may take 59 s for the last."""
    pull_s: float = 3600.0
    shim_s: float = 30.0
    """From StartContainer's answer until the program runs: a moment."""
    abandon_s: float = 10.0
    """How long a cancelled start waits for the engine's answer; then it is undone behind its back."""
    removal_s: float = 20.0
    """How long a stopping worker waits for its removal, and a closing runtime for what is still under way."""


@dataclass(frozen=True, slots=True)
class EngineVersion:
    """What an engine says of itself."""

    name: str
    version: str
    api_version: str

    def __str__(self) -> str:
        return f"{self.name} {self.version} (CRI {self.api_version})"


@dataclass(frozen=True, slots=True)
class ContainerState:
    """A container as the engine sees it. `pid`: of its first process; None: the engine does not say."""

    labels: Mapping[str, str]
    pid: int | None
    ended: str | None
    """How it ended; None: it has not."""


@dataclass(frozen=True, slots=True)
class ExecResult:
    """How a command in a container ended; `exit_code` None: its time was over."""

    exit_code: int | None
    output: bytes


class CriEngine:
    """One engine. Connects when it is first called, and again whenever the engine was away."""

    def __init__(self, socket_path: str, deadlines: Deadlines | None = None) -> None:
        self.deadlines = deadlines or Deadlines()
        self.socket_path = socket_path.removeprefix("unix://")
        self.name = f"the container engine at {self.socket_path}"
        self._channel: grpc.aio.Channel | None = None
        self._methods: dict[str, Any] = {}
        self._pulls: dict[str, asyncio.Task[str]] = {}

    def __repr__(self) -> str:
        return f"<CriEngine {self.socket_path}>"

    async def close(self) -> None:
        """Idempotent."""
        for pull in self._pulls.values():
            pull.cancel()
        if self._pulls:
            await asyncio.wait(self._pulls.values())
        channel, self._channel = self._channel, None
        self._methods.clear()
        if channel is not None:
            await channel.close()

    # ---- the engine itself -------------------------------------------------------------------------

    async def version(self) -> EngineVersion:
        """Raises EngineError if the engine does not answer."""
        answer = await self._call("Version", cri.VersionRequest(), cri.VersionResponse)
        version = EngineVersion(answer.runtime_name, answer.runtime_version, answer.runtime_api_version)
        self.name = f"{version.name} {version.version} at {self.socket_path}"
        return version

    async def status(self) -> tuple[dict[str, tuple[bool, str]], Mapping[str, str]]:
        """Its conditions (type → whether it holds, and why not), and what it tells of its configuration."""
        answer = await self._call("Status", cri.StatusRequest(verbose=True), cri.StatusResponse)
        conditions = {
            one.type: (one.status, " ".join(part for part in (one.reason, one.message) if part))
            for one in answer.status.conditions
        }
        return conditions, answer.info

    async def puts_groups_under_systemd(self) -> bool:
        """Whether a `cgroup_parent` is to be named as a slice of systemd's, or is a path."""
        try:
            answer = await self._call("RuntimeConfig", cri.RuntimeConfigRequest(), cri.RuntimeConfigResponse)
        except EngineError as error:
            if not error.is_unknown_call:
                raise
        else:
            return answer.linux.cgroup_driver == cri.CgroupDriver.SYSTEMD
        _, info = await self.status()
        told = "".join(info.values()).replace(" ", "").lower()
        return '"systemdcgroup":true' in told or '"cgroup_manager":"systemd"' in told

    # ---- images ------------------------------------------------------------------------------------

    async def image(self, reference: str) -> cri.Image | None:
        """The image if the engine has it."""
        request = cri.ImageStatusRequest(image=cri.ImageSpec(image=reference))
        answer = await self._call(
            "ImageStatus", request, cri.ImageStatusResponse, reference, service=_IMAGE_SERVICE
        )
        return answer.image if answer.HasField("image") else None

    async def ensure_image(self, reference: str) -> str:
        """The id of the image, pulled if it is not there; whoever asks meanwhile waits for the same pull."""
        image = await self.image(reference)
        if image is not None:
            return image.id
        pull = self._pulls.get(reference)
        if pull is None:
            pull = asyncio.create_task(self._pull(reference), name=f"pull {reference}")
            self._pulls[reference] = pull
            pull.add_done_callback(lambda _: self._pulls.pop(reference, None))
        return await asyncio.shield(pull)

    async def _pull(self, reference: str) -> str:
        began_s = monotonic_s()
        _log.warning("%s has no image %s: pulling it", self.name, reference)
        request = cri.PullImageRequest(image=cri.ImageSpec(image=reference))
        pulling = asyncio.ensure_future(
            self._call(
                "PullImage",
                request,
                cri.PullImageResponse,
                reference,
                timeout_s=self.deadlines.pull_s,
                service=_IMAGE_SERVICE,
            )
        )
        try:
            while not (await asyncio.wait([pulling], timeout=PULL_PROGRESS_S))[0]:
                _log.warning("still pulling %s after %.0f s", reference, monotonic_s() - began_s)
            pulled = pulling.result().image_ref
        finally:
            pulling.cancel()
        _log.warning("pulled %s in %.1f s", reference, monotonic_s() - began_s)
        image = await self.image(reference)
        return image.id if image is not None else pulled

    # ---- pods and containers -----------------------------------------------------------------------

    async def run_pod(self, config: cri.PodSandboxConfig) -> str:
        request = cri.RunPodSandboxRequest(config=config)
        answer = await self._call(
            "RunPodSandbox",
            request,
            cri.RunPodSandboxResponse,
            config.metadata.name,
            timeout_s=self.deadlines.start_s,
        )
        return answer.pod_sandbox_id

    async def create_container(
        self, pod_id: str, config: cri.ContainerConfig, pod: cri.PodSandboxConfig
    ) -> str:
        request = cri.CreateContainerRequest(pod_sandbox_id=pod_id, config=config, sandbox_config=pod)
        answer = await self._call(
            "CreateContainer",
            request,
            cri.CreateContainerResponse,
            pod.metadata.name,
            timeout_s=self.deadlines.start_s,
        )
        return answer.container_id

    async def start_container(self, container_id: str) -> None:
        request = cri.StartContainerRequest(container_id=container_id)
        await self._call(
            "StartContainer",
            request,
            cri.StartContainerResponse,
            container_id,
            timeout_s=self.deadlines.start_s,
        )

    async def container(self, container_id: str) -> ContainerState:
        """What it is now. Raises EngineError, also if the engine does not know it."""
        request = cri.ContainerStatusRequest(container_id=container_id, verbose=True)
        answer = await self._call("ContainerStatus", request, cri.ContainerStatusResponse, container_id)
        try:
            pid = json.loads(answer.info["info"])["pid"]
        except (KeyError, ValueError, TypeError):
            pid = None
        status, ended = answer.status, None
        if status.state == cri.ContainerState.CONTAINER_EXITED:
            ended = " ".join(filter(None, (f"exit code {status.exit_code}", status.reason, status.message)))
        return ContainerState(status.labels, pid if isinstance(pid, int) and pid > 0 else None, ended)

    async def execute(self, container_id: str, argv: tuple[str, ...], timeout_s: float) -> ExecResult:
        """Run a command in a container, to its end or the end of its time.

        The CRI counts whole seconds, so the engine's own limit is rounded up; ours is exact.
        """
        request = cri.ExecSyncRequest(container_id=container_id, cmd=argv, timeout=int(-(-timeout_s // 1)))
        try:
            answer = await self._call(
                "ExecSync", request, cri.ExecSyncResponse, container_id, timeout_s=timeout_s
            )
        except EngineError as error:
            if error.timed_out:
                return ExecResult(None, b"")
            raise
        return ExecResult(answer.exit_code, answer.stdout + answer.stderr)

    async def stop_container(self, container_id: str, grace_s: float = 0.0) -> None:
        """Idempotent: one that is stopped, or gone, is fine (containerd says NOT_FOUND, CRI-O OK)."""
        request = cri.StopContainerRequest(container_id=container_id, timeout=int(-(-grace_s // 1)))
        await self._gone_is_fine(
            "StopContainer",
            request,
            cri.StopContainerResponse,
            container_id,
            timeout_s=self.deadlines.call_s + grace_s,
        )

    async def remove_container(self, container_id: str) -> None:
        """Idempotent."""
        request = cri.RemoveContainerRequest(container_id=container_id)
        await self._gone_is_fine(
            "RemoveContainer",
            request,
            cri.RemoveContainerResponse,
            container_id,
            timeout_s=self.deadlines.call_s,
        )

    async def remove_pod(self, pod_id: str) -> None:
        """Stop and remove a pod whose containers are stopped. Idempotent."""
        await self._gone_is_fine(
            "StopPodSandbox",
            cri.StopPodSandboxRequest(pod_sandbox_id=pod_id),
            cri.StopPodSandboxResponse,
            pod_id,
            timeout_s=self.deadlines.start_s,
        )
        await self._gone_is_fine(
            "RemovePodSandbox",
            cri.RemovePodSandboxRequest(pod_sandbox_id=pod_id),
            cri.RemovePodSandboxResponse,
            pod_id,
            timeout_s=self.deadlines.start_s,
        )

    async def pods(self, labels: Mapping[str, str]) -> dict[str, Mapping[str, str]]:
        """Id → labels of every pod that carries these labels."""
        request = cri.ListPodSandboxRequest(filter=cri.PodSandboxFilter(label_selector=dict(labels)))
        answer = await self._call("ListPodSandbox", request, cri.ListPodSandboxResponse)
        return {pod.id: pod.labels for pod in answer.items}

    async def containers(self, labels: Mapping[str, str]) -> dict[str, str]:
        """Id → pod of every container that carries these labels."""
        request = cri.ListContainersRequest(filter=cri.ContainerFilter(label_selector=dict(labels)))
        answer = await self._call("ListContainers", request, cri.ListContainersResponse)
        return {container.id: container.pod_sandbox_id for container in answer.containers}

    # ---- how ---------------------------------------------------------------------------------------

    async def _gone_is_fine(
        self, name: str, request: Message, answer: type[Message], about: str, *, timeout_s: float
    ) -> None:
        try:
            await self._call(name, request, answer, about, timeout_s=timeout_s)
        except EngineError as error:
            if not error.is_gone:
                raise

    async def _call(
        self,
        name: str,
        request: Message,
        answer: type[_Answer],
        about: str = "",
        *,
        timeout_s: float | None = None,
        service: str = _RUNTIME_SERVICE,
    ) -> _Answer:
        if timeout_s is None:
            timeout_s = self.deadlines.call_s
        method = self._methods.get(name)
        if method is None:
            method = self._methods[name] = self._connected().unary_unary(
                f"/runtime.v1.{service}/{name}",
                request_serializer=type(request).SerializeToString,
                response_deserializer=answer.FromString,
            )
        try:
            response: _Answer = await method(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise self._explained(name, about, error, timeout_s) from None
        return response

    def _connected(self) -> grpc.aio.Channel:
        if self._channel is None:
            # The back-off of a connection attempt: an engine that restarts is back in a second or two.
            options = [
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.initial_reconnect_backoff_ms", 100),
                ("grpc.min_reconnect_backoff_ms", 100),
                ("grpc.max_reconnect_backoff_ms", 1000),
                ("grpc.enable_http_proxy", 0),
                ("grpc.default_authority", "localhost"),
            ]
            self._channel = grpc.aio.insecure_channel(f"unix:{self.socket_path}", options=options)
        return self._channel

    def _explained(self, name: str, about: str, error: grpc.aio.AioRpcError, timeout_s: float) -> EngineError:
        code, details = error.code(), error.details() or ""
        of = f" ({about})" if about else ""
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            said = f"did not answer in {timeout_s:g} s"
        elif code is grpc.StatusCode.UNAVAILABLE:
            said = f"cannot be reached: {self._why_away(details)}"
        elif code is grpc.StatusCode.UNIMPLEMENTED:
            said = f"does not know the call; a CRI of version runtime.v1 is needed: {details}"
        else:
            said = f"answered {code.name}: {details[:2000]}"
        return EngineError(f"{self.name}: {name}{of}: {said}", code, details)

    def _why_away(self, details: str) -> str:
        path = self.socket_path
        if not os.path.exists(path):
            return f"there is no socket {path}; is the engine running, and is cri_socket right?"
        if not os.access(path, os.R_OK | os.W_OK):
            return f"no permission on {path}; run as root or in the group that owns the socket"
        return details[:500]
