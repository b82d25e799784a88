"""Flagfiles: the lines of `@FILE` in place of it, as Bazel sends them to a worker.

Owns the reading of files that an action names, as whoever may be root: beneath the action's own directory,
through no link, regular files only, all of it bounded. Knows nothing of how a command line was split.

As in Bazel, every line is an argument as it stands: an empty one too, nothing is trimmed, quoted or escaped;
lines end with a line feed, a carriage return or both, the last one with or without. A line may be a
flagfile again. `@@text`, labels (`@repository//package:target`) and `--flagfile=FILE` pass as they stand.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass

from wrapper.errors import RequestRefused, WrapperError
from wrapper.files import REGULAR_FILE, open_beneath

MAX_BYTES = 64 * 1024 * 1024
"""Of all flagfiles of an action together; one that is read twice counts twice."""
MAX_FILES = 1_000
MAX_ARGUMENTS = 1_000_000
MAX_DEPTH = 10

_LINE_END = re.compile("\r\n|\n|\r")
_MAX_SHOWN = 200


class NotExpressible(WrapperError):
    """What the action asks for cannot be said in the worker protocol. It can run without a worker."""

    exit_code = 64


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument of a request. `expand`: it is a flagfile, whose lines take its place."""

    text: str
    expand: bool = False

    @classmethod
    def of(cls, text: str) -> Argument:
        """An argument or a line of a flagfile, as Bazel sees it."""
        return cls(text, is_flagfile(text))


def is_flagfile(text: str) -> bool:
    """Whether this is to be replaced by the lines of a file."""
    return text.startswith("@") and len(text) > 1 and text[1] != "@" and "//" not in text


def expand(arguments: Iterable[Argument], directory_fd: int, working_directory: str = "") -> list[str]:
    """The arguments of a request, with the lines of each flagfile in its place.

    `directory_fd` is the action's directory, which no path may lead out of; paths count from
    `working_directory` in it. Raises RequestRefused, which names the file and says what to do, and
    NotExpressible. Reads as much as MAX_BYTES: for a caller that must not wait it is to be done elsewhere.
    """
    return _Expansion(directory_fd, working_directory).run(arguments)


class _Expansion:
    def __init__(self, directory_fd: int, working_directory: str) -> None:
        self._directory_fd = directory_fd
        self._prefix = f"{working_directory}/" if working_directory else ""
        self._bytes = 0
        self._files = 0
        self._result: list[str] = []
        self._open: list[tuple[tuple[int, int], str]] = []
        """The files that we are inside of: identity and name."""

    def run(self, arguments: Iterable[Argument]) -> list[str]:
        for argument in arguments:
            if argument.expand:
                self._expand(argument.text[1:])
            else:
                self._add(argument.text)
        return self._result

    def _add(self, text: str) -> None:
        if len(self._result) >= MAX_ARGUMENTS:
            raise RequestRefused(f"the flagfiles hold more than {MAX_ARGUMENTS} arguments")
        self._result.append(text)

    def _expand(self, path: str) -> None:
        if len(self._open) >= MAX_DEPTH:
            raise RequestRefused(
                f"flagfiles are nested more than {MAX_DEPTH} deep: {self._way(path)}; write them into one"
            )
        if self._files >= MAX_FILES:
            raise RequestRefused(f"the action has more than {MAX_FILES} flagfiles; write them into one")
        self._files += 1
        identity, lines = self._read(path)
        self._open.append((identity, path))
        for line in lines:
            if is_flagfile(line):
                self._expand(line[1:])
            else:
                self._add(line)
        self._open.pop()

    def _read(self, path: str) -> tuple[tuple[int, int], list[str]]:
        fd = self._open_file(path)
        try:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode):
                raise self._refused(path, "is no regular file")
            identity = (info.st_dev, info.st_ino)
            if any(identity == other for other, _ in self._open):
                raise RequestRefused(f"flagfiles hold each other: {self._way(path)}")
            data = self._contents(fd, path)
        except OSError as error:
            raise self._refused(path, f"cannot be read: {error.strerror}") from error
        finally:
            os.close(fd)
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            raise NotExpressible(
                f"flagfile {_shown(path)}, line {line}: not UTF-8, which the worker protocol cannot express"
            ) from None
        lines = _LINE_END.split(text)
        if not lines[-1]:
            lines.pop()
        return identity, lines

    def _contents(self, fd: int, path: str) -> bytes:
        """All of the file, never more than what is left of MAX_BYTES, however it grows."""
        pieces: list[bytes] = []
        while piece := os.read(fd, 1 << 20):
            self._bytes += len(piece)
            if self._bytes > MAX_BYTES:
                raise self._refused(path, f"is too large: all flagfiles together may have {MAX_BYTES} bytes")
            pieces.append(piece)
        return b"".join(pieces)

    def _open_file(self, path: str) -> int:
        if path.startswith("/"):
            raise self._refused(path, "is an absolute path; it has to be relative to the working directory")
        try:
            return open_beneath(self._directory_fd, self._prefix + path, REGULAR_FILE)
        except OSError as error:
            problem = _PROBLEMS.get(error.errno or 0)
            raise self._refused(path, problem or f"cannot be opened: {error.strerror}") from error

    def _refused(self, path: str, problem: str) -> RequestRefused:
        inside = f", named in {_shown(self._open[-1][1])}," if self._open else ""
        return RequestRefused(f"flagfile {_shown(path)}{inside} {problem}")

    def _way(self, path: str) -> str:
        return " → ".join(_shown(name) for name in (*(name for _, name in self._open), path))


_PROBLEMS = {
    errno.ENOENT: "does not exist; it has to be an input of the action",
    errno.ENOTDIR: "does not exist: a part of its path is no directory",
    errno.EXDEV: "leads out of the action's directory",
    errno.ELOOP: "is a symbolic link, or lies behind one; it has to be a file of the action's own",
    errno.EISDIR: "is a directory",
    errno.ENXIO: "is no regular file",
    errno.EINVAL: "is no path",
}


def _shown(path: str) -> str:
    return ascii(path) if len(path) <= _MAX_SHOWN else ascii(path[:_MAX_SHOWN]) + "..."
