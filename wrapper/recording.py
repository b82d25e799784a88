"""Record files: WorkRequests of real traffic with the files that they read, to prime new workers with.

Owns the format, its bounds, and both directions. Knows nothing of workers. A record file is a plain tar:

    requests/0001/request.bin   the WorkRequest, as protobuf, without request_id and sandbox_dir
    requests/0001/tree.json     its files: {"files": [[path, sha256, executable], ...], "directories": [...]}
    blobs/<sha256>              each content once
    manifest.json               {"format": 1, "tool", "trust_domain", "requests", "blobs"}

The manifest comes last: a file without one was cut short. It is written under another name and renamed
when it is whole. A reader believes nothing: every size, path and digest is checked when the file is
opened, so that whatever is wrong with it is said at start and not at the hundredth worker.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self

from wrapper.errors import ConfigError, RuntimeUnavailable
from wrapper.worker_protocol.messages import WorkRequest
from wrapper.worker_protocol.worker_protocol_pb2 import WorkRequest as PbWorkRequest

if TYPE_CHECKING:
    import tarfile

FORMAT = 1
MAX_FILE_BYTES = 4 << 30
MAX_REQUESTS = 10_000
MAX_REQUEST_BYTES = 64 << 20
MAX_TREE_BYTES = 64 << 20
MAX_TREE_ENTRIES = 200_000
MAX_MEMBERS = 500_000
_MAX_MANIFEST_BYTES = 1 << 20
_COPY_BYTES = 1 << 20
_MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class Tree:
    """The files that a request reads, by path below its working directory."""

    files: Mapping[bytes, tuple[str, bool]]
    """Path → SHA-256 of the content, and whether it is executable."""
    directories: frozenset[bytes] = frozenset()
    """Those that have to exist beside the parents of the files: where outputs go."""

    def united_with(self, other: Tree) -> Tree | None:
        """Both at once; None if they disagree about a path."""
        for path, content in self.files.items():
            if other.files.get(path, content) != content:
                return None
        both = Tree({**self.files, **other.files}, self.directories | other.directories)
        folders = both.all_directories()
        return None if any(path in folders for path in both.files) else both

    def all_directories(self) -> set[bytes]:
        """Every directory of the tree, the parents of all entries included."""
        found: set[bytes] = set()
        for path in (*self.files, *(directory + b"/." for directory in self.directories)):
            parent = os.path.dirname(path)
            while parent and parent not in found:
                found.add(parent)
                parent = os.path.dirname(parent)
        return found


@dataclass(frozen=True, slots=True)
class RecordedRequest:
    """One request and what it reads."""

    number: int
    pb: PbWorkRequest
    tree: Tree

    def request(self) -> WorkRequest:
        """A copy to send."""
        copy = PbWorkRequest()
        copy.CopyFrom(self.pb)
        return WorkRequest(copy)


def is_plain_path(path: bytes) -> bool:
    """Whether this is a relative path that goes down only."""
    parts = path.split(b"/")
    return b"\0" not in path and all(part not in (b"", b".", b"..") for part in parts)


class RecordedRequests:
    """A record file that was found to be in order. Holds it open: what is renamed over it does not matter."""

    def __init__(
        self,
        path: str,
        file: IO[bytes],
        manifest: Mapping[str, Any],
        requests: tuple[RecordedRequest, ...],
        blobs: Mapping[str, tuple[int, int]],
    ) -> None:
        self.path = path
        self.tool = str(manifest["tool"])
        self.trust_domain = str(manifest["trust_domain"])
        self.requests = requests
        self._file = file
        self._blobs = blobs

    @classmethod
    def load(cls, path: str) -> RecordedRequests:
        """Check a whole file. Raises ConfigError, which names it and says what is wrong."""
        try:
            file = open(path, "rb")  # noqa: SIM115 - kept open, closed by `close`
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise ConfigError(f"record file {path}: cannot be read: {reason}") from None
        try:
            manifest, requests, blobs = _Reader(path, file).read()
            return cls(path, file, manifest, requests, blobs)
        except BaseException:
            file.close()
            raise

    def __repr__(self) -> str:
        return f"<RecordedRequests {self.path} requests={len(self.requests)}>"

    def close(self) -> None:
        """Let go of the file. Idempotent."""
        self._file.close()

    def write_tree(self, tree: Tree, directory: str) -> None:
        """Make these files below an empty directory that nobody else writes to.

        Raises RuntimeUnavailable if it cannot be written, or the record file has been tampered with.
        """
        base = os.fsencode(directory)
        try:
            for folder in sorted(tree.all_directories()):
                os.mkdir(os.path.join(base, folder), 0o755)
            for path, (digest, executable) in tree.files.items():
                self._write_blob(digest, os.path.join(base, path), 0o755 if executable else 0o644)
        except OSError as error:
            raise RuntimeUnavailable(f"the files of {self.path} cannot be laid out: {error}") from error

    def _write_blob(self, digest: str, path: bytes, mode: int) -> None:
        offset, size = self._blobs[digest]
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            while size:
                data = os.pread(self._file.fileno(), min(size, _COPY_BYTES), offset)
                if not data:
                    raise RuntimeUnavailable(f"record file {self.path} was cut short while it was in use")
                while data:
                    written = os.write(fd, data)
                    offset, size, data = offset + written, size - written, data[written:]
        finally:
            os.close(fd)


class _Reader:
    """Checks a record file from its first byte to its last."""

    def __init__(self, path: str, file: IO[bytes]) -> None:
        self._path = path
        self._file = file
        self._members: dict[str, tuple[int, int]] = {}

    def _wrong(self, what: str) -> ConfigError:
        return ConfigError(
            f"record file {self._path}: {what}; make a new one with `nativelink_worker_wrapper record`"
        )

    def read(self) -> tuple[Mapping[str, Any], tuple[RecordedRequest, ...], Mapping[str, tuple[int, int]]]:
        if os.fstat(self._file.fileno()).st_size > MAX_FILE_BYTES:
            raise self._wrong(f"is larger than {MAX_FILE_BYTES} bytes")
        for member in self._scan():
            if not member.isreg():
                raise self._wrong(f"{member.name!r} is not a regular file")
            if member.name in self._members:
                raise self._wrong(f"{member.name!r} is in it twice")
            self._members[member.name] = (member.offset_data, member.size)
            if len(self._members) > MAX_MEMBERS:
                raise self._wrong(f"holds more than {MAX_MEMBERS} files")
        if not self._members:
            raise self._wrong("is empty")
        if _MANIFEST not in self._members:
            raise self._wrong("has no manifest.json: it is no record file, or was cut short")
        manifest = self._manifest()
        blobs = {name[6:]: place for name, place in self._members.items() if name.startswith("blobs/")}
        for digest, place in blobs.items():
            if self._digest(place) != digest:
                raise self._wrong(f"blobs/{digest} has another content than its name says")
        requests = tuple(self._request(number, blobs) for number in range(1, manifest["requests"] + 1))
        known = len(blobs) + 2 * len(requests) + 1
        if known != len(self._members):
            raise self._wrong("holds files that are no part of it")
        return manifest, requests, blobs

    def _scan(self) -> Iterator[tarfile.TarInfo]:
        import tarfile  # 10 ms, and few wrappers prime anything

        try:
            with tarfile.open(fileobj=self._file, mode="r:") as archive:
                yield from archive
        except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
            raise self._wrong(f"is no tar file, or was cut short ({error})") from None

    def _manifest(self) -> Mapping[str, Any]:
        manifest = self._json(_MANIFEST, _MAX_MANIFEST_BYTES)
        version = manifest.get("format")
        if version != FORMAT:
            raise self._wrong(f"has format {version!r}; this version reads {FORMAT}")
        count = manifest.get("requests")
        if type(count) is not int or not 0 < count <= MAX_REQUESTS:
            raise self._wrong(f"says that it has {count!r} requests; allowed: 1 to {MAX_REQUESTS}")
        for name in ("tool", "trust_domain"):
            if not isinstance(manifest.get(name), str):
                raise self._wrong(f"manifest.json: {name} is not a string")
        return manifest

    def _request(self, number: int, blobs: Mapping[str, tuple[int, int]]) -> RecordedRequest:
        folder = f"requests/{number:04}"
        pb = PbWorkRequest()
        try:
            pb.ParseFromString(self._bytes(f"{folder}/request.bin", MAX_REQUEST_BYTES))
        except ConfigError:
            raise
        except Exception as error:  # noqa: BLE001 - protobuf's DecodeError, which is not importable by name
            raise self._wrong(f"{folder}/request.bin is no WorkRequest ({error})") from None
        pb.request_id, pb.cancel, pb.sandbox_dir = 0, False, b""
        return RecordedRequest(number, pb, self._tree(f"{folder}/tree.json", blobs))

    def _tree(self, name: str, blobs: Mapping[str, tuple[int, int]]) -> Tree:
        document = self._json(name, MAX_TREE_BYTES)
        try:
            files = {
                os.fsencode(path): (str(digest), bool(executable))
                for path, digest, executable in document["files"]
            }
            directories = frozenset(os.fsencode(path) for path in document["directories"])
            entries = len(document["files"]) + len(document["directories"])
        except (KeyError, TypeError, ValueError):
            raise self._wrong(f"{name} is not a tree of files and directories") from None
        if entries > MAX_TREE_ENTRIES:
            raise self._wrong(f"{name} has {entries} entries; allowed: at most {MAX_TREE_ENTRIES}")
        for path in (*files, *directories):
            if not is_plain_path(path):
                raise self._wrong(f"{name}: {os.fsdecode(path)!r} is not a path below a working directory")
        for path, (digest, _) in files.items():
            if digest not in blobs:
                raise self._wrong(f"{name}: the content of {os.fsdecode(path)!r} is not in the file")
        tree = Tree(files, directories)
        folders = tree.all_directories()
        doubled = next((path for path in files if path in folders), None)
        if doubled is not None:
            raise self._wrong(f"{name}: {os.fsdecode(doubled)!r} is a file and a directory")
        return tree

    def _json(self, name: str, max_bytes: int) -> dict[str, Any]:
        try:
            document = json.loads(self._bytes(name, max_bytes))
        except (ValueError, RecursionError):
            raise self._wrong(f"{name} is not JSON") from None
        if not isinstance(document, dict):
            raise self._wrong(f"{name} is not an object")
        return document

    def _bytes(self, name: str, max_bytes: int) -> bytes:
        place = self._members.get(name)
        if place is None:
            raise self._wrong(f"{name} is missing")
        if place[1] > max_bytes:
            raise self._wrong(f"{name} is larger than {max_bytes} bytes")
        return b"".join(self._pieces(place))

    def _digest(self, place: tuple[int, int]) -> str:
        digest = hashlib.sha256()
        for piece in self._pieces(place):
            digest.update(piece)
        return digest.hexdigest()

    def _pieces(self, place: tuple[int, int]) -> Iterator[bytes]:
        offset, size = place
        while size:
            data = os.pread(self._file.fileno(), min(size, _COPY_BYTES), offset)
            if not data:
                raise self._wrong("was cut short")
            yield data
            offset, size = offset + len(data), size - len(data)


class RecordWriter:
    """Writes a record file. `finish` makes it appear under its name; without that nothing is left of it."""

    def __init__(self, path: str, *, tool: str, trust_domain: str, max_requests: int, max_bytes: int) -> None:
        import tarfile

        self.path = path
        self.requests = 0
        self.bytes = 0
        """Of the contents written so far."""
        self._tool = tool
        self._trust_domain = trust_domain
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        self._blobs: set[str] = set()
        self._part = f"{path}.{os.getpid()}.part"
        try:
            # For its owner alone: it holds whatever the requests have read.
            fd = os.open(self._part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None
        self._file: IO[bytes] | None = os.fdopen(fd, "wb")
        self._archive = tarfile.open(  # noqa: SIM115 - closed by `finish`
            fileobj=self._file, mode="w:", format=tarfile.PAX_FORMAT
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()

    def add(
        self,
        request: PbWorkRequest,
        files: Iterable[tuple[bytes, IO[bytes]]],
        directories: Iterable[bytes] = (),
    ) -> bool:
        """Add a request with its files, which are read to their end. False: there is no room for it.

        Raises OSError if a file cannot be read; then the request is not in the record.
        """
        entries: list[tuple[str, str, bool]] = []
        new: dict[str, bytes] = {}
        size = 0
        if self.requests >= self._max_requests:
            return False
        for path, file in files:
            content = file.read(self._max_bytes + 1)
            digest = hashlib.sha256(content).hexdigest()
            if digest not in self._blobs and digest not in new:
                size += len(content)
                if self.bytes + size > self._max_bytes:
                    return False
                new[digest] = content
            executable = bool(os.fstat(file.fileno()).st_mode & 0o111)
            entries.append((os.fsdecode(path), digest, executable))
        copy = PbWorkRequest()
        copy.CopyFrom(request)
        copy.request_id, copy.cancel, copy.sandbox_dir = 0, False, b""
        tree = {"files": entries, "directories": [os.fsdecode(path) for path in directories]}
        for digest, content in new.items():
            self._put(f"blobs/{digest}", content)
        self._blobs |= new.keys()
        self.bytes += size
        self.requests += 1
        folder = f"requests/{self.requests:04}"
        self._put(f"{folder}/request.bin", copy.SerializeToString())
        self._put(f"{folder}/tree.json", json.dumps(tree).encode())
        return True

    def finish(self) -> None:
        """Make the file whole, and put it in its place. Raises OSError."""
        if self._file is None:
            return
        manifest = {
            "format": FORMAT,
            "tool": self._tool,
            "trust_domain": self._trust_domain,
            "requests": self.requests,
            "blobs": len(self._blobs),
        }
        self._put(_MANIFEST, json.dumps(manifest).encode())
        self._archive.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        os.replace(self._part, self.path)

    def discard(self) -> None:
        """Leave nothing, unless it was finished. Idempotent."""
        if self._file is not None:
            self._file.close()
            self._file = None
            os.unlink(self._part)

    def _put(self, name: str, content: bytes) -> None:
        import tarfile

        member = tarfile.TarInfo(name)
        member.size = len(content)
        member.mode = 0o644
        self._archive.addfile(member, io.BytesIO(content))
