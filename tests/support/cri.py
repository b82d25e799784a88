"""The container runtime on the tests' own engine, with the machine's programs mounted."""

from __future__ import annotations

import glob
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.support.engine import ROOT, PrivateContainerd
from tests.support.oci_image import HOST_IMAGE, WORKER_UID, host_mounts
from tests.support.raw_cri import RawCri
from wrapper.config_containers import EXECROOTS
from wrapper.runtime.base import Mount
from wrapper.runtime.cri_container import CriSettings
from wrapper.runtime.cri_owned import GROUP_PREFIX, owner_of
from wrapper.runtime.isolation import Isolation

ISOLATION = Isolation(run_as_user=WORKER_UID, run_as_group=WORKER_UID)


def cri_settings(engine: PrivateContainerd, folder: Path, **isolation: object) -> CriSettings:
    """A pool on this engine, whose processes keep their things in `folder`."""
    return CriSettings(
        pool="pool",
        socket=engine.socket,
        image=HOST_IMAGE,
        isolation=replace(ISOLATION, **isolation),  # type: ignore[arg-type]
        mounts=tuple(Mount(path, path) for path in host_mounts()),
        state_dir=str(folder / "state"),
    )


WORKERS = "/opt/workers"
"""Where containers of `container_pool` see tests/workers."""


def container_pool(engine: PrivateContainerd, folder: Path, **changes: Any) -> dict[str, Any]:
    """A pools document with one pool of containers, and what differs from the usual one."""
    mounts = [{"host_path": path} for path in host_mounts()]
    mounts.append({"host_path": str(ROOT / "tests" / "workers"), "path": WORKERS})
    isolation = {"run_as_user": WORKER_UID, "mounts": mounts, **changes.pop("isolation", {})}
    work_root = folder / "work"
    work_root.mkdir(exist_ok=True)
    pool = {
        "name": "pool",
        "language": "custom(echo)",
        "runtime": "cri",
        "cri_socket": engine.socket,
        "container_image": HOST_IMAGE,
        "min_warm_workers": 0,
        "execroot": {"work_root": str(work_root)},
        "isolation": isolation,
        **changes,
    }
    return {"pools": [pool], "state_dir": str(folder / "state"), "drain_timeout_s": 10}


def engine_is_empty(engine: PrivateContainerd) -> bool:
    """Whether the engine has no pod at all."""
    with RawCri(engine.socket) as cri:
        return not cri.pods()


def leftovers_on_node(folder: Path) -> list[str]:
    """Mounts, control groups and folders that a runtime with its things in `folder` has left."""
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    found = [f"mount {point}" for point in mounts if point.startswith(f"{folder}/")]
    found += [str(path) for path in (folder / "state").glob("*/*")]
    found += [str(path) for path in (folder / "work" / EXECROOTS).glob("*")]
    owner = owner_of(str(folder / "state"))
    found += [f"group {path}" for path in glob.glob(f"/sys/fs/cgroup/*/{GROUP_PREFIX}-{owner}-*")]
    return found


def stop_containers(engine: PrivateContainerd) -> None:
    """As an operator might: every container, at once, behind the back of whoever started it."""
    with RawCri(engine.socket) as cri:
        for container in cri.containers():
            cri.call("RuntimeService/StopContainer", [(1, container), (2, 0)])
