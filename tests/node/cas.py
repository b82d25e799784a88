"""A content-addressed store as NativeLink keeps one: files that inputs are hard links to."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


class Cas:
    """Blobs by digest; 0444, executables 0555, all of one owner. Evicted when a test says so."""

    def __init__(self, folder: Path, owner: int) -> None:
        self.folder = folder
        self.owner = owner
        folder.mkdir(mode=0o755, exist_ok=True)
        os.chown(folder, owner, owner)

    def put(self, data: bytes, *, executable: bool = False) -> Path:
        digest = hashlib.sha256(data).hexdigest()
        blob = self.folder / (f"{digest}-x" if executable else digest)
        if not blob.exists():
            fresh = self.folder / f"{blob.name}.{os.urandom(4).hex()}"
            fresh.write_bytes(data)
            fresh.chmod(0o555 if executable else 0o444)
            os.chown(fresh, self.owner, self.owner)
            fresh.rename(blob)
        return blob

    def take(self, path: Path) -> str:
        """An output becomes a blob: by rename and chmod, as NativeLink takes it. Returns its digest.

        A file of somebody else's keeps its owner if we are root, and is an error if we are not.
        """
        info = path.lstat()
        if self.owner != 0 and info.st_uid != self.owner:
            raise PermissionError(f"EPERM: {path} belongs to uid {info.st_uid}")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        executable = bool(info.st_mode & 0o111)
        blob = self.folder / (f"{digest}-x" if executable else digest)
        path.rename(blob)
        blob.chmod(0o555 if executable else 0o444)
        return digest

    def read(self, digest: str) -> bytes:
        plain = self.folder / digest
        return (plain if plain.exists() else self.folder / f"{digest}-x").read_bytes()

    def evict(self, count: int) -> None:
        """Unlink some: who has a hard link keeps the content."""
        for blob in sorted(self.folder.iterdir())[:count]:
            blob.unlink()

    def damage(self) -> list[str]:
        """Blobs that are not what their name says, or that somebody could write to."""
        found = []
        for blob in self.folder.iterdir():
            digest, _, executable = blob.name.partition("-")
            info = blob.stat()
            if hashlib.sha256(blob.read_bytes()).hexdigest() != digest:
                found.append(f"{blob.name}: other content")
            if info.st_mode & 0o7777 != (0o555 if executable else 0o444):
                found.append(f"{blob.name}: mode {info.st_mode & 0o7777:o}")
            if info.st_uid != self.owner:
                found.append(f"{blob.name}: uid {info.st_uid}")
        return found
