"""Container images made with the standard library alone: uncompressed OCI archives, which an engine imports.

Owns the format and the few images that the tests use; knows no engine.
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

HOST_IMAGE = "localhost/nlww/host:1"
"""The image of `host_image`, as the engine's fixture imports it."""
PAUSE_IMAGE = "localhost/nlww/pause:1"
"""The image of `pause_image`, as the engine's fixture imports it."""
WORKER_UID = 1000
"""The user "worker" of `host_image`, and its group."""

_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
_FOLDERS = ["dev", "etc", "execroot", "nlww", "proc", "run", "sys", "tmp", "usr", "var/tmp"]
_LINKS = {"bin": "usr/bin", "lib": "usr/lib", "lib64": "usr/lib64", "sbin": "usr/sbin"}
_FILES = {
    "etc/passwd": f"root:x:0:0::/:/bin/false\nworker:x:{WORKER_UID}:{WORKER_UID}::/tmp:/bin/false\n",
    "etc/group": f"root:x:0:\nworker:x:{WORKER_UID}:\n",
    "etc/hosts": "127.0.0.1 localhost\n",
}
_HOST_PATTERNS = ("alternatives", "java-*-openjdk", "ssl/certs/java", "ld.so.cache", "localtime")
_PAUSE_SOURCE = """
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>
static void end(int number) { (void)number; _exit(0); }
static void reap(int number) { (void)number; while (waitpid(-1, 0, WNOHANG) > 0) {} }
int main(void) {
    signal(SIGTERM, end);
    signal(SIGINT, end);
    signal(SIGCHLD, reap);
    for (;;) pause();
}
"""


def host_mounts() -> list[str]:
    """The host's paths that, mounted read-only at the same place over `host_image`, make its programs run.

    That is /usr, and of /etc what Debian's Java and the links in /usr/bin point to.
    """
    etc = [str(path) for pattern in _HOST_PATTERNS for path in sorted(Path("/etc").glob(pattern))]
    return ["/usr", *etc]


def host_image(archive: Path, name: str = HOST_IMAGE) -> None:
    """A root of a few kilobytes, for `host_mounts` to be mounted over."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        for folder in _FOLDERS:
            for parent in [*reversed(Path(folder).parents)][1:]:
                _add(tar, str(parent), tarfile.DIRTYPE, mode=0o755)
            _add(tar, folder, tarfile.DIRTYPE, mode=0o1777 if folder.endswith("tmp") else 0o755)
        for link, target in _LINKS.items():
            _add(tar, link, tarfile.SYMTYPE, mode=0o777, target=target)
        for path, text in _FILES.items():
            _add(tar, path, tarfile.REGTYPE, mode=0o644, content=text.encode())
    write_archive(archive, name, layer.getvalue(), environment={"PATH": "/usr/local/bin:/usr/bin:/bin"})


def tree_image(
    archive: Path,
    name: str,
    tree: Path,
    *,
    entrypoint: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    user: str = "",
) -> None:
    """An image whose root is a copy of a folder, owned by root, modes as they are."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        tar.add(tree, ".", filter=_of_root)
    write_archive(
        archive, name, layer.getvalue(), entrypoint=entrypoint, environment=environment or {}, user=user
    )


def pause_image(archive: Path, name: str = PAUSE_IMAGE) -> None:
    """The image for pods themselves: one static program, which waits and reaps. Needs `cc`."""
    with tempfile.TemporaryDirectory() as tree:
        program = Path(tree, "pause")
        argv = ["cc", "-static", "-Os", "-s", "-x", "c", "-", "-o", str(program)]
        subprocess.run(argv, input=_PAUSE_SOURCE, text=True, check=True)
        tree_image(archive, name, Path(tree), entrypoint=["/pause"], user="65535:65535")


def write_archive(
    archive: Path,
    name: str,
    layer: bytes,
    *,
    entrypoint: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    user: str = "",
) -> None:
    """An OCI archive of one image with one layer, a tar."""
    config = {
        "architecture": _ARCHITECTURES.get(platform.machine(), platform.machine()),
        "os": "linux",
        "config": {
            "Entrypoint": list(entrypoint),
            "Env": [f"{key}={value}" for key, value in (environment or {}).items()],
            "User": user,
            "WorkingDir": "/",
        },
        "rootfs": {"type": "layers", "diff_ids": [_digest(layer)]},
    }
    blobs: dict[str, bytes] = {}

    def descriptor(kind: str, blob: bytes) -> dict[str, object]:
        blobs[_digest(blob)] = blob
        return {
            "mediaType": f"application/vnd.oci.image.{kind}",
            "digest": _digest(blob),
            "size": len(blob),
        }

    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": descriptor("config.v1+json", _json(config)),
        "layers": [descriptor("layer.v1.tar", layer)],
    }
    # The first names it for containerd, the second for all others.
    names = {"io.containerd.image.name": name, "org.opencontainers.image.ref.name": name}
    top = {**descriptor("manifest.v1+json", _json(manifest)), "annotations": names}
    with tarfile.open(archive, "w") as tar:
        _add(tar, "oci-layout", tarfile.REGTYPE, content=_json({"imageLayoutVersion": "1.0.0"}))
        _add(tar, "index.json", tarfile.REGTYPE, content=_json({"schemaVersion": 2, "manifests": [top]}))
        for digest, blob in blobs.items():
            _add(tar, f"blobs/{digest.replace(':', '/')}", tarfile.REGTYPE, content=blob)


def _add(
    tar: tarfile.TarFile, path: str, kind: bytes, *, mode: int = 0o644, target: str = "", content: bytes = b""
) -> None:
    entry = tarfile.TarInfo(path)
    entry.type, entry.mode, entry.linkname, entry.size = kind, mode, target, len(content)
    tar.addfile(entry, io.BytesIO(content))


def _of_root(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


def _digest(blob: bytes) -> str:
    return f"sha256:{hashlib.sha256(blob).hexdigest()}"


def _json(value: object) -> bytes:
    return json.dumps(value).encode()
