"""The demo's pool in containers: the pools document for it, and what of this machine its containers may read.

The workers work in place: the demo's folder is mounted at the same path, the machine's JDK too, so that both
sides compile with the same one. Knows nothing of actions or timing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from demo_input import DemoError, Jdk

SOCKETS = ("/var/run/crio/crio.sock", "/run/containerd/containerd.sock")
"""Where CRI-O and containerd listen, as a rule."""
HINT = (
    f"--runtime cri needs --cri-socket PATH (CRI-O: {SOCKETS[0]}, containerd: {SOCKETS[1]}) and "
    "--container-image REF: any image with a C library that this machine's JDK runs with, such as that of "
    "its own distribution. The JDK itself is mounted"
)
UID = 65532
"""The workers' user: nobody in particular. It may write the outputs, and nothing else."""
MEMORY_BYTES = 2 << 30


def document(
    socket: str, image: str, tool: Sequence[str], jdk: Jdk, jar: Path, mounts: Sequence[str]
) -> dict[str, object]:
    """The pools document: one pool of containers that run `tool`. Raises DemoError.

    `mounts`: further paths of this machine that they may read, as `PATH` or `PATH:PATH_IN_THE_CONTAINER`.
    """
    if os.geteuid() != 0:
        raise DemoError("--runtime cri needs root: each container gets a bounded /tmp and a group of its own")
    asked = [_mount(text) for text in mounts]
    seen = [place for _, place in asked]
    asked += [
        (path, path)
        for path in (*jdk_folders(jdk), str(jar))
        if not any(path == place or path.startswith(f"{place}/") for place in seen)
    ]
    pool = {
        "name": "demo",
        "language": "jvm",
        "runtime": "cri",
        "cri_socket": socket,
        "container_image": image,
        "worker_command": list(tool),
        "min_warm_workers": 0,
        "execroot": {"strategy": "inplace"},
        "isolation": {
            "run_as_user": UID,
            "memory_limit_in_bytes": MEMORY_BYTES,
            "mounts": [{"host_path": path, "path": place} for path, place in asked],
        },
    }
    return {"pools": [pool]}


def write(folder: Path, pools: dict[str, object]) -> Path:
    """The document as a file in `folder`."""
    path = folder / "pools.json5"
    path.write_text(json.dumps(pools, indent=2))
    return path


def jdk_folders(jdk: Jdk) -> list[str]:
    """The JDK's folder, and the folders that links in it lead to: Debian keeps its settings below /etc."""
    home = Path(jdk.java).resolve().parent.parent
    folders = {home}
    for folder, subfolders, files in os.walk(home):
        for name in (*subfolders, *files):
            path = Path(folder, name)
            if path.is_symlink() and path.exists():
                target = path.resolve()
                folders.add(target if target.is_dir() else target.parent)
    return [str(one) for one in sorted(folders) if not any(other in one.parents for other in folders)]


def _mount(text: str) -> tuple[str, str]:
    path, _, place = text.partition(":")
    if not os.path.exists(path):
        raise DemoError(f"--mount {text}: there is no {path}")
    return os.path.abspath(path), place or os.path.abspath(path)
