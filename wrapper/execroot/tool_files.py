"""Which files of an action's tree are its tool, and whether they are the same as another action's.

Inputs are hard links, so an inode is a content: while a worker's seed holds links to them, no inode of its
tool can become another file's. The same inodes under the same paths are the same tool, and nothing is read
or hashed.

The tool is the program, its runfiles, the folder around a program in `bin` (a toolchain: a JDK finds its
libraries from there), and every file and directory that a startup argument names.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Sequence

from wrapper.errors import RequestRefused
from wrapper.files import DIRECTORY

MAX_FILES = 100_000
"""More than that is no tool: a JDK has some 400 files, a Node.js toolchain some 5,000."""


def tool_identity(directory_fd: int, argv: Sequence[str]) -> str:
    """What tells this action's tool from another; empty if no file of the tree belongs to it.

    `argv`: the program and its startup arguments, `directory_fd`: where they are seen from. Raises
    RequestRefused if it has more than MAX_FILES files.
    """
    parts: list[str] = []
    for path in dict.fromkeys(_places(argv)):
        try:
            info = os.stat(path, dir_fd=directory_fd)
        except (OSError, ValueError):
            continue
        if stat.S_ISDIR(info.st_mode):
            for found in _below(directory_fd, path):
                parts.append(found)
                if len(parts) > MAX_FILES:
                    raise RequestRefused(f"the tool {argv[0]!r} has more than {MAX_FILES} files")
        else:
            parts.append(f"{path}\0{info.st_dev}\0{info.st_ino}")
    if not parts:
        return ""
    return hashlib.sha256("\n".join(sorted(parts)).encode("utf-8", "surrogateescape")).hexdigest()


def _places(argv: Sequence[str]) -> Iterator[str]:
    """Relative paths at which there may be files of the tool."""
    program = argv[0]
    if "/" in program and not program.startswith("/"):
        yield program
        yield f"{program}.runfiles"
        yield f"{program}.runfiles_manifest"
        folder = os.path.dirname(program)
        above = os.path.dirname(folder)
        if os.path.basename(folder) == "bin" and above:
            yield above
    for argument in argv[1:]:
        # `tool.jar`, `--lib=tool.jar`, `-javaagent:a.jar`, `a.jar:b.jar`, `@options`.
        if argument.startswith("-"):
            parts = argument.replace("=", ":").split(":")[1:]
        else:
            parts = [argument.removeprefix("@"), *argument.split(":")]
        for part in parts:
            normal = os.path.normpath(part) if part else "."
            if normal != "." and not normal.startswith(("/", "../")) and normal != "..":
                yield part


def _below(directory_fd: int, path: str) -> Iterator[str]:
    """Each file below a directory of the tree, as path and inode."""
    try:
        fd = os.open(path, DIRECTORY, dir_fd=directory_fd)
    except OSError:  # a link, which no toolchain's folder is; its files are seen from elsewhere
        return
    todo = [(fd, path)]
    try:
        while todo:
            fd, path = todo.pop()
            try:
                device = os.fstat(fd).st_dev
                with os.scandir(fd) as listing:
                    for entry in listing:
                        below = f"{path}/{entry.name}"
                        if not entry.is_dir(follow_symlinks=False):
                            yield f"{below}\0{device}\0{entry.inode()}"
                            continue
                        todo.append((os.open(entry.name, DIRECTORY, dir_fd=fd), below))
            finally:
                os.close(fd)
    finally:
        for fd, _ in todo:
            os.close(fd)
