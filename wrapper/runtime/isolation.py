"""What a worker in a container is kept from: asked of the engine, and read back from the kernel.

An engine may ignore what it is asked for without a word; so nothing counts as isolated before the kernel
says so of the running process. Knows nothing of how a container is started.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from wrapper.runtime import cri_runtime_pb2 as cri
from wrapper.runtime.base import NOBODY_IN_PARTICULAR, Mount
from wrapper.runtime.cgroups import ContainerGroup

OWN_PROCESSES = 2
"""Of a worker's pod: its pause process and the shim. They count in its group, and are not the worker's."""

_OF_THE_ENGINE = ("/proc", "/dev", "/sys")
_FILES_OF_THE_ENGINE = (
    "/etc/hosts",
    "/etc/hostname",
    "/etc/resolv.conf",
    "/run/.containerenv",
    "/run/secrets",
)


@dataclass(frozen=True, slots=True)
class Isolation:
    """Each one is on by default and can be switched off by its name (`isolation` in the configuration).

    A limit of None is no limit.
    """

    run_as_user: int = NOBODY_IN_PARTICULAR
    run_as_group: int = NOBODY_IN_PARTICULAR
    read_only_root: bool = True
    drop_capabilities: bool = True
    no_new_privileges: bool = True
    seccomp: bool = True
    loopback_only: bool = True
    memory_limit_bytes: int | None = 2 << 30
    pids_limit: int | None = 1024
    tmp_limit_bytes: int | None = 512 << 20

    def of_pod(self) -> cri.LinuxSandboxSecurityContext:
        """For the pod itself, whose only process is the engine's."""
        context = cri.LinuxSandboxSecurityContext(
            namespace_options=_NAMESPACES, readonly_rootfs=self.read_only_root
        )
        if self.seccomp:
            context.seccomp.profile_type = cri.SecurityProfile.RuntimeDefault
        return context

    def of_container(self) -> cri.LinuxContainerConfig:
        """For the worker's container."""
        context = cri.LinuxContainerSecurityContext(
            namespace_options=_NAMESPACES,
            run_as_user=cri.Int64Value(value=self.run_as_user),
            run_as_group=cri.Int64Value(value=self.run_as_group),
            readonly_rootfs=self.read_only_root,
            no_new_privs=self.no_new_privileges,
        )
        if self.drop_capabilities:
            context.capabilities.drop_capabilities.append("ALL")
        profiles = cri.SecurityProfile
        context.seccomp.profile_type = profiles.RuntimeDefault if self.seccomp else profiles.Unconfined
        resources = cri.LinuxContainerResources()
        if self.memory_limit_bytes is not None:
            resources.memory_limit_in_bytes = self.memory_limit_bytes
            resources.memory_swap_limit_in_bytes = self.memory_limit_bytes
        return cri.LinuxContainerConfig(security_context=context, resources=resources)


_NAMESPACES = cri.NamespaceOption(
    network=cri.NamespaceMode.POD, pid=cri.NamespaceMode.CONTAINER, ipc=cri.NamespaceMode.POD
)


def what_was_ignored(
    isolation: Isolation, pid: int, group: ContainerGroup, mounts: Iterable[Mount]
) -> list[str]:
    """What of the isolation the process `pid` does not have, each with what was seen; empty: all is so.

    `mounts`: what of the node was asked to be in the container.
    """
    status = _status(pid)
    if not status:
        return ["it is not running any more"]
    problems = []

    def expect(name: str, wanted: object, seen: object) -> None:
        if wanted != seen:
            problems.append(f"isolation.{name}: asked for {wanted}, the container has {seen}")

    for name, line, wanted in (
        ("run_as_user", "Uid", isolation.run_as_user),
        ("run_as_group", "Gid", isolation.run_as_group),
    ):
        expect(name, str(wanted), " ".join(sorted(set(status.get(line, "").split()))))
    if isolation.drop_capabilities:
        held = [name for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb") if int(status[name], 16)]
        expect("drop_capabilities", [], held)
    if isolation.no_new_privileges:
        expect("no_new_privileges", "1", status.get("NoNewPrivs"))
    if isolation.seccomp:
        expect("seccomp", "2", status.get("Seccomp"))
    if os.stat(f"/proc/{pid}/ns/pid").st_ino == os.stat("/proc/self/ns/pid").st_ino:
        problems.append("its processes are not in a namespace of their own")
    if isolation.loopback_only:
        if os.stat(f"/proc/{pid}/ns/net").st_ino == os.stat("/proc/self/ns/net").st_ino:
            problems.append("isolation.loopback_only: the container is in the node's own network")
        expect("loopback_only", ["lo"], _interfaces(pid))
    if isolation.memory_limit_bytes is not None:
        page = os.sysconf("SC_PAGE_SIZE")
        wanted_bytes = isolation.memory_limit_bytes // page * page
        expect("memory_limit_in_bytes", wanted_bytes, group.memory_limit_bytes())
    if isolation.pids_limit is not None:
        expect("pids_limit", isolation.pids_limit + OWN_PROCESSES, group.pids_limit())
    problems += _mount_problems(isolation, pid, {mount.path: mount.read_only for mount in mounts})
    return problems


def _status(pid: int) -> dict[str, str]:
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
            return {name: value.strip() for name, _, value in (line.partition(":") for line in file)}
    except OSError:
        return {}


def _interfaces(pid: int) -> list[str]:
    with open(f"/proc/{pid}/net/dev", encoding="ascii") as file:
        return sorted(line.partition(":")[0].strip() for line in file if ":" in line)


def _mount_problems(isolation: Isolation, pid: int, mounted: Mapping[str, bool]) -> list[str]:
    """`mounted`: place in the container → whether it is read-only."""
    problems = []
    points = set()
    with open(f"/proc/{pid}/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            fields = line.split(" ")
            point, options = _unescaped(fields[4]), fields[5].split(",")
            points.add(point)
            if point == "/" and isolation.read_only_root and "ro" not in options:
                problems.append("isolation.read_only_root: the container can write to its root file system")
            if mounted.get(point) and "ro" not in options:
                problems.append(f"the container can write to {point}, which was to be read-only")
            if point == "/tmp" and isolation.tmp_limit_bytes is not None:  # noqa: S108 - the container's
                kind = line.partition(" - ")[2].split(" ")[0]
                if kind != "tmpfs":
                    problems.append(f"isolation.tmp_limit_mb: the container's /tmp is on {kind}")
            known = (
                point == "/"
                or point in mounted
                or point in _FILES_OF_THE_ENGINE
                or any(point == top or point.startswith(f"{top}/") for top in _OF_THE_ENGINE)
                or any(point.startswith(f"{place}/") for place in mounted)  # mounts below a declared one
            )
            if not known:
                problems.append(f"something that nobody asked for is mounted at {point}")
    problems += [f"nothing is mounted at {point}" for point in sorted(mounted.keys() - points)]
    return problems


def _unescaped(path: str) -> str:
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        path = path.replace(code, character)
    return path
