"""The container runtime on the tests' own engine, with the machine's programs mounted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tests.support.engine import PrivateContainerd
from tests.support.oci_image import HOST_IMAGE, WORKER_UID, host_mounts
from wrapper.runtime.base import Mount
from wrapper.runtime.cri_container import CriSettings
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
