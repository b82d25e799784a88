#!/usr/bin/env python3
"""Installs the npm workers that the tests run (tests/npm/package.json) and prints the folder they are in.

`npm ci` from the checked-in lock file, without install scripts, into `.cache/`; kept until the lock changes.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from pathlib import Path

from fetching import REPOSITORY, FetchError, cached, need, run

SOURCE = REPOSITORY / "tests" / "npm"
NAMES = ("package.json", "package-lock.json")


def _make(folder: Path) -> None:
    print("installing the npm workers …", file=sys.stderr)
    for name in NAMES:
        shutil.copy(SOURCE / name, folder / name)
    run(
        "installing tests/npm/package-lock.json",
        [need("npm", "npm"), "ci", "--ignore-scripts", "--no-audit", "--no-fund"],
        cwd=folder,
    )


def npm_workers() -> Path:
    """The folder with `node_modules`, installed unless `.cache/` has it. Raises FetchError."""
    need("node", "nodejs")
    digest = hashlib.sha256(b"".join((SOURCE / name).read_bytes() for name in NAMES)).hexdigest()
    return cached("npm-workers", digest, _make)


if __name__ == "__main__":
    try:
        print(npm_workers())
    except FetchError as error:
        sys.exit(f"fetch_npm_workers: {error}")
