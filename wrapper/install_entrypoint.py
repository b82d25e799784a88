"""Installs the per-action client, the native program where there is one, else the Python one, and its policy.

Owns what lies where. What the policy means is `native/client.c`'s and `wrapper/client.py`'s business.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence

from wrapper.errors import ConfigError, RuntimeUnavailable
from wrapper.runtime.native import client_path

NAME = "nativelink_worker_entrypoint"
_PYTHON = os.path.join(os.path.dirname(os.path.abspath(__file__)), "client.py")
_LONGEST_FIRST_LINE = 255  # the kernel reads no more of it

_POLICY = """\
# The policy of {name} in this directory: docs/nativelink.md.
# Only root, or whoever owns the program, may be able to write it.

# Where the pool daemon (nativelink_worker_wrapper serve) listens.
socket = {socket}

# NativeLink's work_directory, one line each. An action that runs elsewhere gets no worker.
{roots}

# When the daemon is away, full, or gone before it took the action: one-shot (run it as it stands) or fail.
fallback = {fallback}

# When the daemon or its worker is lost with the action: rerun (by NativeLink, at most 4 times) or fail.
lost = {lost}

# Who ends an action that takes too long: wrapper (NativeLink has timeout_handled_externally) or host.
timeouts = wrapper
"""


def policy_text(
    socket: str, work_roots: Sequence[str], *, fallback: str = "one-shot", lost: str = "rerun"
) -> str:
    """The content of a policy file, with a comment for each line."""
    roots = (
        "\n".join(f"work_root = {root}" for root in work_roots) or "# work_root = /var/lib/nativelink/work"
    )
    return _POLICY.format(name=NAME, socket=socket, roots=roots, fallback=fallback, lost=lost)


def install_entrypoint(
    directory: str, policy: str, *, python: bool = False, keep_policy: bool = False
) -> str:
    """Write the client and its policy into a directory, which is made if need be; the client's path.

    `python`: the one in Python also where there is a native one. `keep_policy`: leave a policy that is there.
    Raises ConfigError if it cannot be written.
    """
    path = os.path.join(os.path.abspath(directory), NAME)
    try:
        os.makedirs(directory, mode=0o755, exist_ok=True)
        fresh = f"{path}.new"
        native = None if python else _native()
        if native is not None:
            shutil.copyfile(native, fresh)
        else:
            _write(fresh, _python_program())
        os.chmod(fresh, 0o755)  # noqa: S103 - every action starts it
        os.rename(fresh, path)  # a program that runs cannot be written to, only replaced
        if not (keep_policy and os.path.exists(f"{path}.conf")):
            _write(f"{path}.conf.new", policy)
            os.chmod(f"{path}.conf.new", 0o644)
            os.rename(f"{path}.conf.new", f"{path}.conf")
    except OSError as error:
        raise ConfigError(f"the entrypoint cannot be installed in {directory}: {error}") from error
    return path


def _native() -> str | None:
    try:
        return client_path()
    except RuntimeUnavailable:
        return None


def _python_program() -> str:
    interpreter = os.path.realpath(sys.executable)
    first_line = f"#!{interpreter} -IS\n"
    if len(first_line) > _LONGEST_FIRST_LINE or " " in interpreter:
        raise ConfigError(f"a script cannot name this interpreter in its first line: {interpreter}")
    with open(_PYTHON, encoding="utf-8") as file:
        return first_line + file.read()


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
