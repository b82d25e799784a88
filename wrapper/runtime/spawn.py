"""Starts one program on pipes of its own, and explains it when that is not possible.

Knows nothing of what the program is for.

Why `subprocess.Popen` without `preexec_fn`: it then uses vfork (0.5 ms; with a preexec_fn, or for another
user, a fork that copies our page tables, 6 ms during which the event loop serves nobody), and runs no
Python code in a forked copy of a process that has threads.
"""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from wrapper.errors import RuntimeUnavailable, WorkerStartFailed
from wrapper.runtime import linux
from wrapper.runtime.base import User

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

_ONE_PAGE = 4096
_SYSTEM_IS_FULL = {errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE}


@dataclass(frozen=True, slots=True)
class Spawned:
    """A started process and our ends of its pipes, which the caller owns. All are non-blocking."""

    process: subprocess.Popen[bytes]
    stdin_fd: int
    stdout_fd: int
    stderr_fd: int


def resolve_program(program: str, env: Mapping[str, str], cwd: str) -> str:
    """The path of a program as WorkerSpec describes the search. Raises WorkerStartFailed."""
    if not program:
        raise WorkerStartFailed("the worker's command is empty: its first word must name a program")
    if "/" in program:
        return os.path.join(cwd, program)
    if "PATH" in env:
        path, whose = env["PATH"], "PATH of the worker's environment"
    elif "PATH" in os.environ:
        path, whose = os.environ["PATH"], "the wrapper's own PATH, since the worker's environment has none"
    else:
        path, whose = DEFAULT_PATH, "the default path, since neither the worker nor the wrapper has a PATH"
    not_executable = None
    for directory in path.split(":"):
        candidate = os.path.join(cwd, directory, program)
        if os.path.isfile(candidate):
            if os.access(candidate, os.X_OK):
                return candidate
            not_executable = not_executable or candidate
    if not_executable:
        raise WorkerStartFailed(
            f"{not_executable!r} exists but is not executable: chmod +x it ({whose}: {path!r})"
        )
    raise WorkerStartFailed(
        f"there is no program {program!r} on {whose} ({path!r}): "
        "install it, give its full path, or set PATH in env"
    )


def spawn(
    argv: tuple[str, ...], env: Mapping[str, str], cwd: str, tag: int, user: User | None = None
) -> Spawned:
    """Start a worker's program in a session of its own. `user`: None for ours.

    Its stdin holds one page only, until somebody enlarges it. `tag`: see `linux.inherited_tag`.
    Raises WorkerStartFailed, or RuntimeUnavailable if the system cannot start anything now; then
    nothing is left behind.
    """
    fds: list[int] = []
    try:
        for _ in range(3):
            fds += os.pipe()
        stdin_read, stdin_write, stdout_read, stdout_write, stderr_read, stderr_write = fds
        linux.set_pipe_size(stdin_write, _ONE_PAGE)
        linux.set_pipe_size(stdout_read, linux.PIPE_BYTES)
        process = _start(argv, env, cwd, tag, user, stdin_read, stdout_write, stderr_write)
    except BaseException as error:
        linux.close_all(fds)
        if isinstance(error, OSError):  # out of descriptors for the pipes
            raise explain(error, argv[0] if argv else "", argv, env, cwd) from error
        raise
    linux.close_all((stdin_read, stdout_write, stderr_write))
    for fd in (stdin_write, stdout_read, stderr_read):
        os.set_blocking(fd, False)
    return Spawned(process, stdin_write, stdout_read, stderr_read)


def spawn_command(
    argv: tuple[str, ...], env: Mapping[str, str], cwd: str, tag: int, user: User | None = None
) -> tuple[subprocess.Popen[bytes], int]:
    """Start a command without input; returns it and a non-blocking descriptor with all its output.

    Raises as `spawn` does.
    """
    try:
        read_end, write_end = os.pipe()
    except OSError as error:
        raise explain(error, argv[0] if argv else "", argv, env, cwd) from error
    try:
        process = _start(argv, env, cwd, tag, user, subprocess.DEVNULL, write_end, write_end)
    except BaseException:
        os.close(read_end)
        raise
    finally:
        os.close(write_end)
    os.set_blocking(read_end, False)
    return process, read_end


def _start(
    argv: tuple[str, ...],
    env: Mapping[str, str],
    cwd: str,
    tag: int,
    user: User | None,
    stdin: int,
    stdout: int,
    stderr: int,
) -> subprocess.Popen[bytes]:
    if not argv:
        raise WorkerStartFailed("the worker's command is empty")
    if not os.path.isabs(cwd) or not os.path.isdir(cwd):
        raise WorkerStartFailed(
            f"the worker's working directory {cwd!r} is not an existing directory with an absolute path"
        )
    program = resolve_program(argv[0], env, cwd)
    try:
        with linux.inherited_tag(tag):
            return subprocess.Popen(
                argv,
                executable=program,
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                cwd=cwd,
                env=dict(env),
                start_new_session=True,
                close_fds=True,
                user=None if user is None else user.uid,
                group=None if user is None else user.gid,
                extra_groups=None if user is None else [],
            )
    except (OSError, ValueError) as error:
        raise explain(error, program, argv, env, cwd) from error


def explain(
    error: OSError | ValueError, program: str, argv: tuple[str, ...], env: Mapping[str, str], cwd: str
) -> WorkerStartFailed | RuntimeUnavailable:
    """What an error of Popen means and what to do about it."""
    if isinstance(error, ValueError):  # a NUL byte, or a "=" in a variable's name
        return WorkerStartFailed(f"the command or environment of {program!r} cannot be passed on: {error}")
    if error.errno in _SYSTEM_IS_FULL:
        return RuntimeUnavailable(
            f"cannot start {program!r}: {error.strerror}; "
            "the system is short of memory, processes or descriptors "
            "(see ulimit -u, ulimit -n, pids.max of the cgroup)"
        )
    if error.errno == errno.E2BIG:
        size = sum(len(os.fsencode(a)) + 9 for a in argv)
        size += sum(len(os.fsencode(f"{k}={v}")) + 9 for k, v in env.items())
        return WorkerStartFailed(
            f"cannot start {program!r}: its arguments and environment take {size} bytes, "
            "more than the kernel allows (128 KiB for one string, a quarter of the stack limit for all): "
            "use a parameter file"
        )
    if error.errno == errno.ENOENT and os.path.exists(program):
        return WorkerStartFailed(f"cannot start {program!r}: {_missing_interpreter(program)}")
    if error.errno == errno.ENOENT:
        return WorkerStartFailed(f"there is no program {program!r} (working directory {cwd!r})")
    if error.errno == errno.EPERM:
        return WorkerStartFailed(
            f"cannot start {program!r} as another user: {error.strerror}; be root, or have SETUID"
        )
    if error.errno == errno.EACCES:
        what = "it is not executable (chmod +x), or its file system is mounted noexec"
        if os.path.isdir(program):
            what = "it is a directory"
        return WorkerStartFailed(f"cannot start {program!r}: permission denied; {what}")
    if error.errno == errno.ENOEXEC:
        return WorkerStartFailed(
            f"cannot start {program!r}: not a program of this machine ({os.uname().machine}), "
            "and no script with a #! line"
        )
    return WorkerStartFailed(f"cannot start {program!r} in {cwd!r}: {error.strerror or error}")


def _missing_interpreter(program: str) -> str:
    try:
        with open(program, "rb") as file:
            first_line = file.read(256).split(b"\n", 1)[0]
    except OSError:
        first_line = b""
    if first_line.startswith(b"#!"):
        words = first_line[2:].decode("utf-8", "replace").split(None, 1)
        name = words[0] if words else ""
        hint = "; its line ends with a carriage return" if first_line.endswith(b"\r") else ""
        return f"the interpreter {name!r} in its #! line does not exist{hint}"
    return "its dynamic loader does not exist (a binary for another libc or machine)"
