"""`record`: keeps the requests that worker mode serves, with their inputs, in a record file.

Owns which files of a request are kept, and that recording neither slows nor changes an answer: files are
read and written by a thread. Requests that come quicker than that are left out, and counted. The format is
`recording.py`'s.

A request's files are those that its `inputs` name, else those that its arguments and flagfiles name. Only
names that lead down from the working directory are looked at; links are followed, for it is with links
that a worker host lays out inputs.
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import stat
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import IO

from wrapper.recording import MAX_REQUESTS, MAX_TREE_ENTRIES, RecordWriter, is_plain_path
from wrapper.worker_protocol.messages import WorkRequest
from wrapper.worker_protocol.worker_protocol_pb2 import WorkRequest as PbWorkRequest

MAX_WAITING = 100
"""Requests that wait to be recorded; one more is left out."""
MAX_OPEN_FILES = 500
"""A sandboxed request has its files opened before it is served: they are moved away for it."""
_MAX_FLAGFILE_BYTES = 1 << 20
_SEPARATORS = re.compile(rb"[=:,;\s]")


class _NotRecordedError(Exception):
    """Why a request is left out."""


class Recorder:
    """See the module. Made before the first request; `ended` writes the file. Raises ConfigError."""

    def __init__(
        self, path: str, *, tool: str, trust_domain: str, max_requests: int, max_bytes: int, cwd: str
    ) -> None:
        self._cwd = os.fsencode(cwd)
        self._writer = RecordWriter(
            path,
            tool=tool,
            trust_domain=trust_domain,
            max_requests=min(max_requests, MAX_REQUESTS),
            max_bytes=max_bytes,
        )
        self._left_out: dict[str, int] = {}
        self._full = False
        self._queue: queue.Queue[tuple[PbWorkRequest, _Files] | None] = queue.Queue(MAX_WAITING)
        self._thread = threading.Thread(target=self._work, name="recorder")
        self._thread.start()

    def accepted(self, request: WorkRequest) -> None:
        """See RequestListener. Opens the files of a sandboxed request, reads none."""
        if self._full:
            self._leave_out("no room left in the record")
            return
        copy = PbWorkRequest()
        copy.CopyFrom(request.pb)
        files = _Files(self._cwd, copy)
        try:
            if copy.sandbox_dir and not is_plain_path(os.path.normpath(copy.sandbox_dir)):
                raise _NotRecordedError("their sandbox_dir is not below the working directory")
            if copy.sandbox_dir:
                files.open_now()
            self._queue.put_nowait((copy, files))
        except (_NotRecordedError, OSError, queue.Full) as error:
            files.close()
            self._leave_out("they came too quickly" if isinstance(error, queue.Full) else _reason(error))

    def ended(self) -> None:
        """See RequestListener. Says on stderr what was recorded."""
        self._queue.put(None)
        self._thread.join()
        writer = self._writer
        try:
            if writer.requests:
                writer.finish()
                text = f"recorded {writer.requests} requests, {writer.bytes} bytes of inputs: {writer.path}"
            else:
                text = f"no request was recorded, {writer.path} was not written"
        except OSError as error:
            text = f"{writer.path} cannot be written: {error}"
        finally:
            writer.discard()
        left_out = "; ".join(f"{count} left out: {why}" for why, count in self._left_out.items())
        print(f"nativelink_worker_wrapper: {text}{'; ' if left_out else ''}{left_out}", file=sys.stderr)

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            request, files = item
            try:
                if not self._writer.add(request, files.opened(), files.directories()):
                    self._full = True
                    self._leave_out("no room left in the record")
            except (_NotRecordedError, OSError) as error:
                self._leave_out(_reason(error))
            finally:
                files.close()

    def _leave_out(self, why: str) -> None:
        # Both threads come here; the reasons are few, since none of them names a file.
        self._left_out[why] = self._left_out.get(why, 0) + 1


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"an input cannot be read ({error.strerror or 'unknown reason'})"
    return str(error)


class _Files:
    """The files of one request: named by its inputs, else by its arguments."""

    def __init__(self, cwd: bytes, request: PbWorkRequest) -> None:
        self._cwd = cwd
        self._base = os.path.join(cwd, request.sandbox_dir) if request.sandbox_dir else cwd
        self._request = request
        self._open: list[tuple[bytes, IO[bytes]]] | None = None
        self._directories: set[bytes] = set()

    def open_now(self) -> None:
        """Open all of them: they will not be where they are when they are read."""
        opened: list[tuple[bytes, IO[bytes]]] = []
        self._open = opened
        for path in self._names():
            if len(opened) >= MAX_OPEN_FILES:
                raise _NotRecordedError(f"sandboxed, with more than {MAX_OPEN_FILES} files")
            opened.append((path, self._opened(path)))

    def opened(self) -> Iterator[tuple[bytes, IO[bytes]]]:
        """Each with its name, to be read before the next is asked for."""
        if self._open is not None:
            yield from self._open
            return
        for path in self._names():
            with self._opened(path) as file:
                yield path, file

    def directories(self) -> set[bytes]:
        """Those where outputs may go; to be asked for last."""
        return self._directories

    def close(self) -> None:
        for _, file in self._open or ():
            file.close()

    def _opened(self, path: bytes) -> IO[bytes]:
        # Not blocking: what is named may be a FIFO that nobody writes to.
        fd = os.open(os.path.join(self._base, path), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        file = os.fdopen(fd, "rb")
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            file.close()
            raise _NotRecordedError("an input is no regular file")
        return file

    def _names(self) -> Iterator[bytes]:
        words = list(self._words())
        found: set[bytes] = set()
        for path in self._inputs() if self._request.inputs else self._named_by(words):
            if path in found:
                continue
            found.add(path)
            if len(found) > MAX_TREE_ENTRIES:
                raise _NotRecordedError(f"more than {MAX_TREE_ENTRIES} files")
            yield path
        for word in words:
            self._note_directories(word)

    def _words(self) -> Iterator[bytes]:
        """The arguments, and the lines of the flagfiles that they name."""
        for argument in self._request.arguments:
            self._refuse_absolute(argument)
            yield argument
            flagfile = re.fullmatch(rb"(?:@|--flagfile=)(.+)", argument, re.DOTALL)
            if flagfile is None or not is_plain_path(os.path.normpath(flagfile[1])):
                continue
            try:
                with self._opened(flagfile[1]) as file:
                    content = file.read(_MAX_FLAGFILE_BYTES)
            except (OSError, _NotRecordedError):
                continue  # no flagfile after all
            self._refuse_absolute(content)
            yield from content.splitlines()

    def _inputs(self) -> Iterator[bytes]:
        for each in self._request.inputs:
            path = os.path.normpath(each.path)
            if not is_plain_path(path):
                raise _NotRecordedError("an input lies outside of the working directory")
            if os.path.isdir(os.path.join(self._base, path)):
                yield from self._below(path)
            else:
                yield path

    def _named_by(self, words: Iterable[bytes]) -> Iterator[bytes]:
        """Files that words name, also after `=`, `:` and the like."""
        for word in words:
            for path in self._paths_in(word):
                if os.path.isdir(os.path.join(self._base, path)):
                    yield from self._below(path)
                elif os.path.isfile(os.path.join(self._base, path)):
                    yield path

    def _paths_in(self, argument: bytes) -> Iterator[bytes]:
        for word in {argument, *_SEPARATORS.split(argument)}:
            path = os.path.normpath(word.lstrip(b"@")) if word.lstrip(b"@") else b""
            if path and path != b"." and is_plain_path(path):
                yield path

    def _below(self, directory: bytes) -> Iterator[bytes]:
        self._directories.add(directory)
        top = os.path.join(self._base, directory)
        for folder, _, names in os.walk(top):
            for name in names:
                path = os.path.join(folder, name)
                if os.path.isfile(path):
                    yield os.path.relpath(path, self._base)

    def _note_directories(self, argument: bytes) -> None:
        """Where an argument's file would be written, if that is a directory already."""
        for path in self._paths_in(argument):
            parent = os.path.dirname(path)
            with contextlib.suppress(OSError, ValueError):
                if parent and os.path.isdir(os.path.join(self._base, parent)):
                    self._directories.add(parent)

    def _refuse_absolute(self, text: bytes) -> None:
        """Run again elsewhere, such a request would still write to where it did the first time."""
        if self._cwd != b"/" and self._cwd in text:
            raise _NotRecordedError("they name the working directory by its absolute path")
