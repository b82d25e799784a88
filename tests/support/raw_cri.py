"""Calls of the CRI with messages put together by hand: what tests ask an engine without the product's client.

Each message is a list of (field number, value); the numbers are those of the CRI's runtime.v1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import grpc

Field = tuple[int, "int | str | bytes | Message"]
Message = list[Field]

CALL_TIMEOUT_S = 30.0


def encode(message: Iterable[Field]) -> bytes:
    encoded = b""
    for number, value in message:
        if isinstance(value, int):
            encoded += _varint(number << 3) + _varint(value)
            continue
        content = value.encode() if isinstance(value, str) else value
        content = content if isinstance(content, bytes) else encode(content)
        encoded += _varint(number << 3 | 2) + _varint(len(content)) + content
    return encoded


def decode(data: bytes) -> dict[int, list[Any]]:
    """Integers, and bytes for all else, by field number."""
    fields: dict[int, list[Any]] = {}
    at = 0
    while at < len(data):
        tag, at = _read_varint(data, at)
        number, at = _read_varint(data, at)
        if tag & 7 == 2:
            begin, at = at, at + number
            fields.setdefault(tag >> 3, []).append(data[begin:at])
        else:
            fields.setdefault(tag >> 3, []).append(number)
    return fields


def _read_only(path: str, place: str) -> Field:
    """A mount of a container's configuration."""
    return (7, [(1, place), (2, path), (3, 1)])


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while data[at] & 0x80:
        value |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
    return value | data[at] << shift, at + 1


class RawCri:
    """One connection to an engine. Use as a context manager."""

    def __init__(self, socket_path: str) -> None:
        self._channel = grpc.insecure_channel(f"unix:{socket_path}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def call(self, method: str, request: Message, *, patient: bool = False) -> dict[int, list[Any]]:
        """`method` such as "RuntimeService/Version". Raises grpc.RpcError; if patient, not for a restart."""
        answer: bytes = self._channel.unary_unary(f"/runtime.v1.{method}")(
            encode(request), timeout=CALL_TIMEOUT_S, wait_for_ready=patient
        )
        return decode(answer)

    def version(self) -> tuple[str, str]:
        """The engine's name and version."""
        answer = self.call("RuntimeService/Version", [])
        return answer[2][0].decode(), answer[3][0].decode()

    def has_image(self, name: str) -> bool:
        return 1 in self.call("ImageService/ImageStatus", [(1, [(1, name)])])

    def run_pod(self, name: str, *, cgroup_parent: str = "") -> tuple[str, Message]:
        """Run a pod; returns its id and the configuration, which `create` wants again."""
        config: Message = [(1, [(1, name), (2, name), (3, "tests")]), (8, [(1, cgroup_parent)])]
        return self.call("RuntimeService/RunPodSandbox", [(1, config)])[1][0].decode(), config

    def start(
        self,
        pod: tuple[str, Message],
        image: str,
        command: Sequence[str],
        *,
        mounts: Sequence[str] = (),
        mounts_at: Mapping[str, str] | None = None,
        memory_bytes: int = 0,
        hardened: bool = False,
    ) -> str:
        """Create and start a container as user 1000; returns its id.

        Mounts are read-only: paths of the host at the same place, and places to paths of the host. Hardened
        is: a pid namespace of its own, a read-only root, no capability, no new privileges.
        """
        resources: Message = [(4, memory_bytes)]
        security: Message = [(5, [(1, 1000)])]
        if hardened:
            security += [(1, [(2, "ALL")]), (3, [(2, 1)]), (7, 1), (11, 1)]
        places = {path: path for path in mounts} | dict(mounts_at or {})
        config: Message = [
            (1, [(1, "worker")]),
            (2, [(1, image)]),
            *[(3, word) for word in command],
            *[_read_only(path, place) for place, path in places.items()],
            (15, [(1, resources), (2, security)]),
        ]
        request: Message = [(1, pod[0]), (2, config), (3, pod[1])]
        container_id: str = self.call("RuntimeService/CreateContainer", request)[1][0].decode()
        self.call("RuntimeService/StartContainer", [(1, container_id)])
        return container_id

    def execute(self, container_id: str, command: Sequence[str]) -> tuple[int, str]:
        """Exit code, and standard output followed by standard error."""
        request: Message = [(1, container_id), *[(2, word) for word in command], (3, int(CALL_TIMEOUT_S))]
        answer = self.call("RuntimeService/ExecSync", request)
        output = b"".join([*answer.get(1, []), *answer.get(2, [])])
        return answer.get(3, [0])[0], output.decode()

    def status(self, container_id: str) -> dict[int, list[Any]]:
        """The fields of the container's ContainerStatus."""
        return decode(self.call("RuntimeService/ContainerStatus", [(1, container_id)])[1][0])

    def pods(self) -> list[str]:
        answer = self.call("RuntimeService/ListPodSandbox", [])
        return [decode(pod)[1][0].decode() for pod in answer.get(1, [])]

    def containers(self) -> list[str]:
        answer = self.call("RuntimeService/ListContainers", [])
        return [decode(container)[1][0].decode() for container in answer.get(1, [])]

    def remove_pod(self, pod_id: str) -> None:
        """With all its containers."""
        self.call("RuntimeService/StopPodSandbox", [(1, pod_id)], patient=True)
        self.call("RuntimeService/RemovePodSandbox", [(1, pod_id)], patient=True)
