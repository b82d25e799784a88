"""Record files made for a test."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from wrapper.recording import RecordWriter
from wrapper.worker_protocol.worker_protocol_pb2 import WorkRequest as PbWorkRequest


def record(
    path: Path, *requests: tuple[bytes, Mapping[bytes, bytes]], trust_domain: str = "", tool: str = "tool"
) -> str:
    """A record file of requests, each with one argument and its files; returns its path."""
    with RecordWriter(
        str(path), tool=tool, trust_domain=trust_domain, max_requests=1000, max_bytes=1 << 24
    ) as writer:
        for argument, files in requests:
            opened = [(name, _file_of(path.parent, content)) for name, content in files.items()]
            assert writer.add(PbWorkRequest(arguments=[argument]), opened)
            for _, file in opened:
                file.close()
        writer.finish()
    return str(path)


def _file_of(folder: Path, content: bytes) -> IO[bytes]:
    file = io.FileIO(os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600), "rb+")
    file.write(content)
    file.seek(0)
    return io.BufferedReader(file)
