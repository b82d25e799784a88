"""Which requests may share a worker (WorkerKey), and whether its tool is still the same (ToolFingerprint).

The key is identity: two different keys never share a worker. The fingerprint is freshness, checked on
lease and outside identity, as Bazel does it: a changed tool retires its workers instead of leaving them
behind under a key that nobody asks for again.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class WorkerKey:
    """Identity of a kind of worker. `env` holds what does not differ from action to action."""

    pool: str
    argv: tuple[str, ...]
    """Program and startup arguments."""
    cwd: str
    env: tuple[tuple[str, str], ...] = ()
    trust_domain: str = ""
    persistent_worker_key: str = ""
    """The platform property, which a client may choose: a part of the identity, never all of it."""
    protocol: str = "proto"
    multiplex: bool = False
    own_execroot: bool = False
    """The worker runs in a directory of its own, into which each request's files are moved."""
    for_actions: bool = False
    """With `own_execroot`: the files are an action's, and the directory is empty in between. Without:
    they are in a sandbox below the host's execroot, whose content the worker sees in between."""
    working_directory: str = ""
    """Below the execroot; with `for_actions`."""
    tool: str = ""
    """What tells the tool's files apart that come with the actions (`execroot.tool_files`); empty: none do.

    Identity, not freshness: actions of two versions of a tool may come alternately, and each has its workers.
    """
    _hash: int = field(init=False, repr=False, compare=False, default=0)

    def __post_init__(self) -> None:
        # The key is looked up for every request; its environment alone can be dozens of strings.
        parts = (self.pool, self.argv, self.cwd, self.env, self.trust_domain, self.persistent_worker_key)
        kind = (self.protocol, self.multiplex, self.own_execroot, self.for_actions)
        object.__setattr__(self, "_hash", hash((parts, kind, self.working_directory, self.tool)))

    def __hash__(self) -> int:
        return self._hash

    @property
    def label(self) -> str:
        """A short name for logs: the key that the user chose, else the program's name."""
        return self.persistent_worker_key or os.path.basename(self.argv[0] if self.argv else "") or self.pool


@dataclass(frozen=True, slots=True)
class ToolFingerprint:
    """What a worker's program and the files among its startup arguments looked like.

    (device, inode, size, mtime): the same hard link is the same content. Never ctime: making a hard
    link changes it. A file that is missing is part of the picture too.
    """

    files: tuple[tuple[str, tuple[int, int, int, int] | None], ...]

    @classmethod
    def of(cls, argv: tuple[str, ...], cwd: str) -> ToolFingerprint:
        """Fingerprint of `argv[0]` and of every startup argument that names a regular file.

        An argument names a file if it is one, relative to `cwd` (`tool.jar`, after `-jar` for instance;
        `@flags.txt`), or holds one after an equals sign or a colon (`--lib=tool.jar`, `-javaagent:a.jar`),
        or is a class path (`a.jar:b.jar`). What lies in a directory is not looked at.
        """
        paths: dict[str, None] = {}
        for index, argument in enumerate(argv):
            if index == 0:
                paths[os.path.join(cwd, argument)] = None
                continue
            if argument.startswith("-"):
                parts = argument.replace("=", ":").split(":")[1:]
            else:
                parts = [argument.removeprefix("@"), *argument.split(":")]
            for part in parts:
                path = os.path.join(cwd, part)
                if part and os.path.isfile(path):
                    paths[path] = None
        return cls(tuple((path, _look(path)) for path in paths))

    def changed(self) -> str | None:
        """The first file that differs now, or None if all are as they were."""
        for path, then in self.files:
            if _look(path) != then:
                return path
        return None


def _look(path: str) -> tuple[int, int, int, int] | None:
    try:
        st = os.stat(path)
    except OSError:
        return None
    return (st.st_dev, st.st_ino, st.st_size, st.st_mtime_ns)
