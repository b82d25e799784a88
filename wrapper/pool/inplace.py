"""What of the node a container sees whose worker runs in its host's own execroot.

Bazel's execroot is a folder of links: to the top-level entries of the user's workspace, which change from
build to build, and in `external` to repositories. So the folder that such an entry lies in is mounted, not
the entry; at the path that the link names, since that is where the worker looks. Of it a worker may read all,
and write nothing.

Looked at once for each execroot, before any worker has run there: workers write there, and a link that one
of them has made must not open anything of the node to the next.
"""

from __future__ import annotations

import contextlib
import os

from wrapper.runtime.base import Mount

EXTERNAL = "external"
WORKERS_FOLDER = "bazel-workers"
"""`OUTPUT_BASE/bazel-workers/NAME/WORKSPACE` is where Bazel runs sandboxed workers."""

_TOO_MUCH = 2
"""A path of so few components (/, /home) is never mounted because something lies directly in it."""
_MAX_HOPS = 40


class InplaceMounts:
    """Remembers what was decided for each execroot."""

    def __init__(self) -> None:
        self._decided: dict[str, tuple[Mount, ...]] = {}

    def of(self, cwd: str) -> tuple[Mount, ...]:
        """What a worker in this execroot gets to see. Raises OSError."""
        if cwd not in self._decided:
            self._decided[cwd] = inplace_mounts(cwd)
        return tuple(mount for mount in self._decided[cwd] if os.path.exists(mount.host_path))


def inplace_mounts(cwd: str) -> tuple[Mount, ...]:
    """The execroot, and where the links in it lead to, at the same paths. Raises OSError."""
    places: dict[str, None] = {}
    for root in _roots(cwd):
        if root != cwd:
            places[root] = None
        for link in _links_in(root):
            first, *further = _hops(link)
            if os.path.exists(link):
                places[_folder_of(first)] = None
                places |= dict.fromkeys(further)
    read_only = [place for place in sorted(places) if place != cwd and not _is_in(place, cwd)]
    return (
        Mount(cwd, cwd, read_only=False),
        *(Mount(place, place) for place in read_only if not any(_is_in(place, p) for p in read_only)),
    )


def _roots(cwd: str) -> list[str]:
    """The execroot; for one of a sandboxed worker, to whose files links lead, the real one too."""
    parts = cwd.rsplit("/", 3)
    if len(parts) == 4 and parts[1] == WORKERS_FOLDER:
        real = os.path.join(parts[0], "execroot", parts[3])
        if os.path.isdir(real):
            return [cwd, real]
    return [cwd]


def _links_in(root: str) -> list[str]:
    links: list[str] = []
    for folder in (root, os.path.join(root, EXTERNAL)):
        if folder != root and os.path.islink(folder):
            continue
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
            links += [entry.path for entry in entries if entry.is_symlink()]
    return links


def _hops(link: str) -> list[str]:
    """The paths over which a link leads to something that is none."""
    hops: list[str] = []
    while os.path.islink(link) and len(hops) < _MAX_HOPS:
        link = os.path.normpath(os.path.join(os.path.dirname(link), os.readlink(link)))
        hops.append(link)
    return hops


def _folder_of(path: str) -> str:
    folder = os.path.dirname(path)
    return path if len([part for part in folder.split("/") if part]) < _TOO_MUCH else folder


def _is_in(path: str, other: str) -> bool:
    """Whether `other` shows this path already; not for the same path twice."""
    return path.startswith(f"{other}/")
