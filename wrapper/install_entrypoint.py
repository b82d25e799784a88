"""Puts the per-action client where NativeLink's `entrypoint` names it, and its policy file beside it.

Owns what the files look like. The program is the native client if it was built, else, or if so asked, the
client in Python: a few lines that load `wrapper/client.py` compiled, from a third file. To compile it at each
start would cost half as much again as all the rest, and to carry it in the program's text a tenth.
"""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from wrapper.errors import ConfigError, RuntimeUnavailable

PROGRAM = "nativelink_worker_entrypoint"
DEFAULT_SOCKET = "/run/nativelink_worker_wrapper/pool.sock"

_STUB = """\
#!{interpreter} -IS
# The per-action client of nativelink_worker_wrapper in Python. Written by "nativelink_worker_wrapper
# install-entrypoint", as was the file that it loads: wrapper/client.py, compiled.
import marshal
import posix
from _frozen_importlib_external import MAGIC_NUMBER
try:
    fd = posix.open({path!r}, posix.O_RDONLY | posix.O_CLOEXEC)
    client = posix.read(fd, 1 << 20)
    posix.close(fd)
except OSError:
    client = b""
if client[:4] != MAGIC_NUMBER:
    posix.write(2, {message!r})
    posix._exit(78)
exec(marshal.loads(client[16:]))
"""

_COMPILE = """\
import _frozen_importlib_external, marshal, sys
code = compile(sys.stdin.buffer.read(), "client.py", "exec", optimize=2)
sys.stdout.buffer.write(_frozen_importlib_external.MAGIC_NUMBER + bytes(12) + marshal.dumps(code))
"""

_POLICY = """\
# What {program} beside this file does. It is read for every action.
# It must belong to root or to the owner of the program, and nobody else may write it: else every action fails
# with exit code 78. A line is "name = value" or a comment; what is left out has the value that is shown.

# The socket of the pool daemon ("nativelink_worker_wrapper serve").
{socket}

# NativeLink's work directory, as its configuration names it. May be given up to 16 times. Only an action that
# runs beneath one of them goes to the daemon; without a work root every action runs as if we were not there.
{work_roots}

# What to do with an action that the daemon does not take, because it is not there, or has no room:
# run it without a worker (one-shot), or fail with exit code 75 (fail).
#fallback = one-shot

# What to do with an action whose worker or daemon was lost while it ran: let NativeLink run it again, which
# it does up to 4 times (rerun), or fail with exit code 70 (fail).
#lost = rerun

# Who ends an action whose time is over: we do, for a NativeLink with "timeout_handled_externally" (wrapper),
# or NativeLink itself (host).
#timeouts = wrapper

# Seconds without a sign of life from the daemon, which gives one every 10, after which it counts as lost.
#silence_s = 60
"""


def install(
    directory: str, *, in_python: bool, socket: str | None, work_roots: Sequence[str], out: TextIO
) -> int:
    """Write both files; a policy file that is there stays. Raises ConfigError."""
    folder = Path(directory)
    policy = _policy(socket, work_roots)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if stat.S_IMODE(folder.stat().st_mode) & 0o022:
            raise ConfigError(
                f"{folder} is writable by others, who could put another program into the place of {PROGRAM}"
            )
        program = folder / PROGRAM
        kind = _write_program(program, in_python=in_python, out=out)
        out.write(f"{program}: the client in {kind}\n")
        policy_file = folder / f"{PROGRAM}.conf"
        if policy_file.exists():
            same = policy_file.read_text(encoding="utf-8", errors="replace") == policy
            if not same and (socket is not None or work_roots):
                raise ConfigError(f"{policy_file} is there already: change it by hand, or remove it first")
            out.write(f"{policy_file}: kept as it is\n")
        else:
            _write(policy_file, policy.encode(), mode=0o644)
            out.write(f"{policy_file}: new\n")
    except OSError as error:
        raise ConfigError(f"{error.filename or folder}: {error.strerror}") from None
    return 0


def _write_program(program: Path, *, in_python: bool, out: TextIO) -> str:
    compiled = program.with_name(f"{PROGRAM}.pyc")
    if not in_python:
        from wrapper.runtime.native import client_path

        try:
            _write(program, Path(client_path()).read_bytes(), mode=0o755)
        except RuntimeUnavailable as error:
            out.write(f"note: {error}\n")
        else:
            compiled.unlink(missing_ok=True)
            return "C"
    interpreter = os.path.realpath(sys.executable)
    # In a process of its own, to leave out what only shows columns in a traceback.
    argv = [interpreter, "-IS", "-X", "no_debug_ranges", "-c", _COMPILE]
    source = Path(__file__).with_name("client.py").read_bytes()
    _write(compiled, subprocess.run(argv, input=source, capture_output=True, check=True).stdout, mode=0o644)
    path = str(compiled.absolute())
    message = f"{PROGRAM}: {path} is not there, or not for this Python: run install-entrypoint again\n"
    stub = _STUB.format(interpreter=interpreter, path=path, message=os.fsencode(message))
    _write(program, os.fsencode(stub), mode=0o755)
    return "Python"


def _policy(socket: str | None, work_roots: Sequence[str]) -> str:
    for what, value in [("socket", socket), *(("work root", root) for root in work_roots)]:
        if value is not None and not (value.startswith("/") and value.isprintable()):
            raise ConfigError(f"the {what} must be an absolute path, not {value!r}")
    return _POLICY.format(
        program=PROGRAM,
        socket=f"#socket = {DEFAULT_SOCKET}" if socket is None else f"socket = {socket}",
        work_roots="\n".join(f"work_root = {root}" for root in work_roots) or "#work_root = /var/lib/nl/work",
    )


def _write(path: Path, data: bytes, *, mode: int) -> None:
    """All or nothing: a program that runs cannot be written to, only replaced."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with open(fd, "wb") as file:
            file.write(data)
            os.fchmod(file.fileno(), mode)
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
