"""The programs in C that the package brings along: where they are, and why one is missing.

Owns their place only (`setup.py` compiles them there); knows nothing of what they are for.
"""

from __future__ import annotations

import os

from wrapper.errors import RuntimeUnavailable

_FOLDER = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "native")


def shim_path() -> str:
    """The shim, process 1 of every worker's container. Raises RuntimeUnavailable if it was not built."""
    return _path_of("shim", "the container runtime needs the shim")


def client_path() -> str:
    """The per-action client. Raises RuntimeUnavailable if it was not built: there is one in Python too."""
    return _path_of("client", "actions start several times faster with the client in C")


def _path_of(name: str, purpose: str) -> str:
    path = os.path.join(_FOLDER, name)
    if os.access(path, os.X_OK):
        return path
    try:
        with open(f"{path}.missing", encoding="utf-8", errors="replace") as file:
            reason = file.read(4096).strip()
    except OSError:
        reason = "the package was not installed by pip"
    raise RuntimeUnavailable(
        f"{purpose}, {path}, which was not built: {reason}; install a C"
        " compiler and a static C library (Debian, Ubuntu: apt-get install gcc libc6-dev), then build the"
        " package again: in a checkout tools/bootstrap.sh, else"
        " pip install --force-reinstall --no-deps with what was given to pip before"
    )
