"""What a container is kept from is looked for in the running process: an engine that ignores it is seen."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.cri import ISOLATION, cri_settings, engine_is_empty, leftovers_on_node
from tests.support.engine import PrivateContainerd
from tests.support.loop import run_async
from wrapper.errors import RuntimeUnavailable, WorkerStartFailed
from wrapper.runtime import bounded_tmp, cri_container
from wrapper.runtime import cri_runtime_pb2 as cri
from wrapper.runtime.base import Mount, WorkerSpec
from wrapper.runtime.cri_container import CriRuntime, CriSettings
from wrapper.runtime.isolation import Isolation, what_was_ignored

pytestmark = pytest.mark.engine

CAT = WorkerSpec("cat", ("/usr/bin/cat",), {}, "/")
Engine = PrivateContainerd
Tamper = Callable[[pytest.MonkeyPatch], None]


def of_container(change: Callable[[Any], None]) -> Tamper:
    """The engine is asked for less than Isolation says of a container."""

    def tamper(patch: pytest.MonkeyPatch) -> None:
        asked = Isolation.of_container

        def less(self: Isolation) -> cri.LinuxContainerConfig:
            config = asked(self)
            change(config)
            return config

        patch.setattr(Isolation, "of_container", less)

    return tamper


def of_request(name: str, change: Callable[[Any], None]) -> Tamper:
    """The engine is asked for something else than the runtime means to."""

    def tamper(patch: pytest.MonkeyPatch) -> None:
        asked = getattr(cri_container._Birth, name)

        def other(self: Any, *arguments: Any) -> Any:
            config = asked(self, *arguments)
            change(config)
            return config

        patch.setattr(cri_container._Birth, name, other)

    return tamper


def _as_root(config: Any) -> None:
    config.security_context.run_as_user.value = 0


def _as_somebody_else(config: Any) -> None:
    config.security_context.run_as_user.value += 1


def _in_another_group(config: Any) -> None:
    config.security_context.run_as_group.value += 1


def _with_a_capability(config: Any) -> None:
    del config.security_context.capabilities.drop_capabilities[:]


def _without_no_new_privs(config: Any) -> None:
    config.security_context.no_new_privs = False


def _unconfined(config: Any) -> None:
    config.security_context.seccomp.profile_type = cri.SecurityProfile.Unconfined


def _writable(config: Any) -> None:
    config.security_context.readonly_rootfs = False


def _without_memory_limit(config: Any) -> None:
    config.resources.Clear()


def _with_more_memory(config: Any) -> None:
    config.resources.memory_limit_in_bytes *= 2
    config.resources.memory_swap_limit_in_bytes *= 2


def _in_no_group(config: Any) -> None:
    config.linux.cgroup_parent = ""


def _in_the_network_of_the_node(config: Any) -> None:
    config.linux.security_context.namespace_options.network = cri.NamespaceMode.NODE
    config.hostname = ""


def _container_in_the_network_of_the_node(config: Any) -> None:
    config.security_context.namespace_options.network = cri.NamespaceMode.NODE


def _with_one_more_mount(config: Any) -> None:
    config.mounts.append(cri.Mount(container_path="/srv", host_path="/etc", readonly=True))


def _with_a_mount_less(config: Any) -> None:
    del config.mounts[-1]


def _with_a_writable_mount(config: Any) -> None:
    config.mounts[-1].readonly = False


def _with_no_bounded_tmp(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cri_container, "mount_bounded", lambda path, *_: os.chmod(path, 0o777))


IGNORED: dict[str, tuple[Tamper, str, dict[str, Any]]] = {
    "group": (of_container(_in_another_group), "isolation.run_as_group: asked for 1000", {}),
    "capabilities": (
        of_container(_with_a_capability),
        "isolation.drop_capabilities: asked for [], the container has ['CapBnd']",
        {"drop_capabilities": False},
    ),
    "privileges": (
        of_container(_without_no_new_privs),
        "isolation.no_new_privileges: asked for 1, the container has 0",
        {"no_new_privileges": False},
    ),
    "seccomp": (
        of_container(_unconfined),
        "isolation.seccomp: asked for 2, the container has 0",
        {"seccomp": False},
    ),
    "root": (
        of_container(_writable),
        "isolation.read_only_root: the container can write to its root file system",
        {"read_only_root": False},
    ),
    "memory": (
        of_container(_without_memory_limit),
        "isolation.memory_limit_in_bytes: asked for 2147483648, the container has None",
        {"memory_limit_bytes": None},
    ),
    "more memory": (of_container(_with_more_memory), "isolation.memory_limit_in_bytes: asked for 214", {}),
    "pids": (
        of_request("_pod_config", _in_no_group),
        "isolation.pids_limit: asked for 1026, the container has None",
        {"pids_limit": None},
    ),
    "tmp": (
        _with_no_bounded_tmp,
        "isolation.tmp_limit_mb: the container's /tmp is on ",
        {"tmp_limit_bytes": None},
    ),
    "mount more": (of_request("_container_config", _with_one_more_mount), "is mounted at /srv", {}),
    "mount less": (of_request("_container_config", _with_a_mount_less), "nothing is mounted at ", {}),
    "mount writable": (of_request("_container_config", _with_a_writable_mount), "can write to ", {}),
}


@pytest.mark.parametrize("what", IGNORED)
def test_what_an_engine_ignores_is_named_and_no_worker_runs(
    what: str, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tamper, said, _ = IGNORED[what]
    tamper(monkeypatch)

    async def main() -> None:
        runtime = CriRuntime(cri_settings(engine, tmp_path))
        try:
            with pytest.raises(RuntimeUnavailable) as refused:
                await runtime.start(CAT)
            assert "did not isolate a worker of pool pool as asked" in refused.value.message
            assert said in refused.value.message
        finally:
            await runtime.close()

    run_async(main())
    assert engine_is_empty(engine)
    assert leftovers_on_node(tmp_path) == []


@pytest.mark.parametrize("user", [_as_root, _as_somebody_else])
def test_a_container_of_another_user_gets_no_streams(
    user: Callable[[Any], None], engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_container(user)(monkeypatch)

    async def main() -> None:
        runtime = CriRuntime(cri_settings(engine, tmp_path))
        try:
            with pytest.raises(WorkerStartFailed, match="its first process ended before it reported"):
                await runtime.start(CAT)
        finally:
            await runtime.close()

    run_async(main())
    assert engine_is_empty(engine)


@pytest.mark.parametrize("what", [name for name, (_, _, off) in IGNORED.items() if off])
def test_what_is_switched_off_by_its_name_is_not_looked_for(
    what: str, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tamper, _, off = IGNORED[what]
    tamper(monkeypatch)
    run_async(starts(cri_settings(engine, tmp_path, **off)))


@pytest.mark.parametrize("off", [off for _, _, off in IGNORED.values() if off], ids=str)
def test_what_is_switched_off_need_not_be_asked_for(
    off: dict[str, Any], engine: Engine, tmp_path: Path
) -> None:
    run_async(starts(cri_settings(engine, tmp_path, **off)))


async def starts(settings: CriSettings) -> None:
    runtime = CriRuntime(settings)
    try:
        worker = await runtime.start(CAT)
        try:
            mounts = (Mount("", "/tmp", read_only=False), *settings.mounts)
            full = what_was_ignored(settings.isolation, worker.pid, worker._group, mounts)
            assert [line for line in full if "nobody asked for" not in line] == []
        finally:
            await worker.stop(0)
    finally:
        await runtime.close()


NETWORKS: dict[str, Tamper] = {
    "pod": of_request("_pod_config", _in_the_network_of_the_node),
    "container": of_container(_container_in_the_network_of_the_node),
}


def test_the_network_of_the_node_is_found_out_even_if_it_has_loopback_only(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for tamper in NETWORKS.values():
        tamper(monkeypatch)
    monkeypatch.setattr("wrapper.runtime.isolation._interfaces", lambda _: ["lo"])

    async def main() -> None:
        runtime = CriRuntime(cri_settings(engine, tmp_path))
        try:
            with pytest.raises(RuntimeUnavailable, match=r"isolation\.loopback_only.*the node's own network"):
                await runtime.start(CAT)
        finally:
            await runtime.close()

    run_async(main())


def test_interfaces_beside_loopback_are_named(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wrapper.runtime.isolation._interfaces", lambda _: ["eth0", "lo"])

    async def main() -> None:
        runtime = CriRuntime(cri_settings(engine, tmp_path))
        try:
            with pytest.raises(RuntimeUnavailable, match=r"loopback_only: asked for \['lo'\].*eth0"):
                await runtime.start(CAT)
        finally:
            await runtime.close()

    run_async(main())
    run_async(starts(cri_settings(engine, tmp_path, loopback_only=False)))


def test_root_is_refused_before_the_engine_is_asked(tmp_path: Path) -> None:
    async def main() -> None:
        settings = CriSettings("pool", "/nowhere/engine.sock", "image", replace(ISOLATION, run_as_user=0))
        runtime = CriRuntime(replace(settings, state_dir=str(tmp_path)))
        try:
            with pytest.raises(RuntimeUnavailable, match=r"must not run as root.*run_as_user"):
                await runtime.start(CAT)
        finally:
            await runtime.close()

    run_async(main())


def test_a_tmp_that_cannot_be_mounted_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(
        RuntimeUnavailable, match=r"No such file.*CAP_SYS_ADMIN.*isolation\.tmp_limit_mb: null"
    ):
        bounded_tmp.mount_bounded(str(tmp_path / "missing"), 1 << 20, 0, 0)
