"""A host with a store of inputs, actions' trees of hard links to them, and a worker of another uid.

As root the three have different uids, as in production. Not root, all is one user's: then whatever the
uids would forbid is possible, and only the tests that say so need root.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from wrapper.execroot.action_execroot import ActionExecroot, Strategy

IS_ROOT = os.geteuid() == 0
HOST_ID = 2000 if IS_ROOT else os.geteuid()
WORKER_ID = 1000 if IS_ROOT else os.geteuid()
needs_root = pytest.mark.skipif(not IS_ROOT, reason="only root can let a worker have a uid of its own")


@dataclass(frozen=True)
class Seen:
    """What there is at one path."""

    kind: str
    content: bytes
    mode: int
    uid: int


def look(root: Path | str, *, skip: str = "") -> dict[str, Seen]:
    """All below a directory, by relative path, without following links."""
    found: dict[str, Seen] = {}
    todo = [""]
    while todo:
        directory = todo.pop()
        for name in os.listdir(os.path.join(root, directory)):
            path = os.path.join(directory, name)
            if path == skip:
                continue
            whole = os.path.join(root, path)
            info = os.lstat(whole)
            kind, content = f"{info.st_mode >> 12:o}", b""
            if kind == "10":
                kind, content = "file", Path(whole).read_bytes()
            elif kind == "12":
                kind, content = "link", os.fsencode(os.readlink(whole))
            elif kind == "4":
                kind = "dir"
                todo.append(path)
            found[path] = Seen(kind, content, info.st_mode & 0o7777, info.st_uid)
    return found


class ActionWorld:
    """`make_action` makes a tree, `execroot` a worker's directory, `as_worker` does something there."""

    def __init__(self, root: Path) -> None:
        self.base, self.store, self.host = root / "base", root / "store", root / "host"
        for path in (self.base, self.store, self.host):
            path.mkdir()
        self.strategy = Strategy.RENAME

    def execroot(self, strategy: Strategy | None = None, **options: Any) -> ActionExecroot:
        options["strategy"] = strategy or self.strategy
        return ActionExecroot.make(str(self.base), "worker", uid=WORKER_ID, gid=WORKER_ID, **options)

    def make_action(self, tree: Mapping[str, str | None], name: str = "action") -> Path:
        """Files with a content, directories for None; "-> x" is a link. Names ending in "!" can be run."""
        root = self.host / name
        root.mkdir()
        for path, content in tree.items():
            whole = root / path
            whole.parent.mkdir(parents=True, exist_ok=True)
            if content is None:
                whole.mkdir(exist_ok=True)
            elif content.startswith("-> "):
                whole.symlink_to(content[3:])
            else:
                mode = 0o555 if path.endswith("!") else 0o444
                blob = self.store / f"{hashlib.sha256(content.encode()).hexdigest()}-{mode:o}"
                if not blob.exists():
                    blob.write_text(content)
                    blob.chmod(mode)
                    os.chown(blob, HOST_ID, HOST_ID)
                os.link(blob, whole)
        for whole in [root, *root.rglob("*")]:
            os.chown(whole, HOST_ID, HOST_ID, follow_symlinks=False)
            if whole.is_dir() and not whole.is_symlink():
                whole.chmod(0o755)
        return root

    def blobs(self) -> dict[str, Seen]:
        return look(self.store)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def as_worker(directory: str) -> Iterator[None]:
    """In this directory, with the worker's rights and no others."""
    before, mask = os.getcwd(), os.umask(0o022)
    os.chdir(directory)
    if IS_ROOT:
        os.setegid(WORKER_ID)
        os.seteuid(WORKER_ID)
    try:
        yield
    finally:
        if IS_ROOT:
            os.seteuid(0)
            os.setegid(0)
        os.umask(mask)
        os.chdir(before)


_HOSTILE = """
import array, ctypes, errno, fcntl, json, mmap, os, shutil, signal, socket, stat, struct, sys, threading
worker = int(sys.argv[1])
if os.geteuid() == 0:
    os.setgroups([]); os.setgid(worker); os.setuid(worker)
space = dict(globals())
for line in sys.stdin:
    space["result"] = None
    try:
        exec(json.loads(line), space)
        answer = {"result": space["result"]}
    except OSError as error:
        answer = {"errno": errno.errorcode.get(error.errno, "?")}
    except BaseException as error:
        answer = {"error": repr(error)}
    print(json.dumps(answer), flush=True)
"""


class Hostile:
    """A real process of the worker's uid in the worker's execroot, which runs what it is told."""

    def __init__(self, directory: str, *, pass_fds: tuple[int, ...] = ()) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _HOSTILE, str(WORKER_ID)],
            cwd=directory,
            pass_fds=pass_fds,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, code: str) -> Any:
        """Returns what the code left in `result`, or the name of the error that stopped it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(code) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        assert "error" not in answer, answer
        return answer.get("errno", answer.get("result"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()
