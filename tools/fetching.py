"""What the fetch_*.py tools share: the cache folder, one fetch at a time, errors that say what to do.

Knows nothing of what is fetched. Names no registry: each client asks the one it is set up for.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
CACHE = REPOSITORY / ".cache"


class FetchError(Exception):
    """Something could not be fetched; the text names it, the command, and what that said."""


@contextmanager
def _locked(name: str) -> Iterator[None]:
    CACHE.mkdir(exist_ok=True)
    with (CACHE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def cached(name: str, version: str, make: Callable[[Path], None]) -> Path:
    """The folder `.cache/NAME`, made by `make` unless it is there already in this version.

    `make` gets an empty folder to fill, which takes the final name only when it is complete. It must
    not remember the folder's path: that changes.
    """
    folder, stamp = CACHE / name, CACHE / name / ".complete"
    with _locked(name):
        if stamp.is_file() and stamp.read_text() == version:
            return folder
        half_made = CACHE / f"{name}.new"
        for old in (half_made, folder):
            if old.exists():
                shutil.rmtree(old)
        half_made.mkdir()
        make(half_made)
        (half_made / stamp.name).write_text(version)
        half_made.rename(folder)
    return folder


def need(program: str, package: str) -> str:
    """The path of a program, or a FetchError that says which Debian package has it."""
    path = shutil.which(program)
    if path is None:
        raise FetchError(f"{program} is missing: apt-get install {package}")
    return path


def run(
    what: str,
    argv: Sequence[str],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 300,
) -> str:
    """Run a command and return its stdout; a FetchError with all that it said if it fails."""
    try:
        done = subprocess.run(
            argv,
            check=False,
            cwd=cwd,
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired as error:
        raise FetchError(f"{what}: no end after {timeout_s:.0f} s: {' '.join(argv)}") from error
    if done.returncode != 0:
        said = (done.stdout + done.stderr).strip()[-4000:]
        raise FetchError(f"{what}: exit code {done.returncode} from: {' '.join(argv)}\n{said}")
    return done.stdout
