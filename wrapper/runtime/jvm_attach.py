"""Asks a running HotSpot JVM to do what `jcmd` asks, without starting jcmd's own JVM (250 ms).

The protocol (HotSpot, src/hotspot/os/posix/attachListener_posix.cpp, and the JDK's
VirtualMachineImpl for Linux): a file /tmp/.attach_pidN tells the JVM that the SIGQUIT which follows
means "open your attach socket" and not "print all threads"; then /tmp/.java_pidN is a unix
socket that takes one command: the protocol version, the command and three arguments, each ended
by a NUL. The answer is a result number, a line feed and text.

A SIGQUIT to a JVM that does not expect it kills it (started with -Xrs, or not yet initialised) or
makes it print to its stdout, where worker protocol runs. Hence all the checks before it.
"""

from __future__ import annotations

import asyncio
import os
import pwd
import re
import signal
import stat
from collections.abc import Iterable

from wrapper.errors import RuntimeUnavailable
from wrapper.runtime import process_tree

SOCKET_TIMEOUT_S = 5.0
COMMAND_TIMEOUT_S = 60.0
MAX_REPLY_BYTES = 4 << 20

_FORBID = ("-Xrs", "-XX:+ReduceSignalUsage", "-XX:+DisableAttachMechanism")
_OPAQUE = ("-XX:Flags=", "-XX:VMOptionsFile=")
_OPTION_VARIABLES = ("JAVA_TOOL_OPTIONS", "JDK_JAVA_OPTIONS", "_JAVA_OPTIONS")


class AttachForbidden(Exception):
    """This JVM was told not to let anybody attach, or may have been: it is never signalled."""


def find_jvm(pids: Iterable[int]) -> int | None:
    """The first of the processes that has a HotSpot JVM loaded."""
    for pid in pids:
        try:
            with open(f"/proc/{pid}/maps", "rb") as maps:
                if b"/libjvm.so" in maps.read():
                    return pid
        except OSError:
            continue
    return None


async def jcmd(pid: int, command: str) -> bytes:
    """Run a diagnostic command, such as `GC.run` or `Thread.print`, in a JVM; returns its text.

    Raises AttachForbidden, or RuntimeUnavailable if the JVM does not answer or refuses.
    """
    try:
        path = await _attach_socket(pid)
        pin = _pin_socket(path, _uid(pid))
        try:
            async with asyncio.timeout(COMMAND_TIMEOUT_S):
                return await _exchange(f"/proc/self/fd/{pin}", command)
        finally:
            os.close(pin)
    except TimeoutError:
        raise RuntimeUnavailable(
            f"the JVM {pid} did not answer {command!r} in {COMMAND_TIMEOUT_S:g} s"
        ) from None
    except OSError as error:
        raise RuntimeUnavailable(f"cannot attach to the JVM {pid}: {error}") from error


def remove_traces(pids: Iterable[int]) -> None:
    """Delete what killed JVMs leave in /tmp whatever TMPDIR says: their sockets and hsperfdata files.

    To be called while the pids cannot belong to others (zombies, or just seen dead).
    """
    wanted = {str(pid) for pid in pids}
    try:
        directories = [name for name in os.listdir("/tmp") if name.startswith("hsperfdata_")]  # noqa: S108
    except OSError:
        return
    paths = [f"/tmp/{d}/{pid}" for d in directories for pid in wanted]  # noqa: S108
    paths += [f"/tmp/{prefix}{pid}" for prefix in (".java_pid", ".attach_pid") for pid in wanted]  # noqa: S108
    for path in paths:
        try:
            if os.geteuid() in (0, os.lstat(path).st_uid):
                os.unlink(path)
        except OSError:
            continue


def _root_of(pid: int) -> str:
    """The root directory that the process sees, as the kernel shows it to us."""
    return f"/proc/{pid}/root"


def _uid(pid: int) -> int:
    value = process_tree.status_field(pid, "Uid")
    if value is None:
        raise RuntimeUnavailable(f"the JVM {pid} is gone")
    return int(value.split()[1])


async def _attach_socket(pid: int) -> str:
    uid, inner_pid = _uid(pid), process_tree.namespace_pid(pid)
    tmp = os.path.join(_root_of(pid), "tmp")
    socket_path = f"{tmp}/.java_pid{inner_pid}"
    if _is_socket_of(socket_path, uid):
        return socket_path
    check_may_attach(pid, inner_pid)
    start = process_tree.read_stat(pid)
    if start is None:
        raise RuntimeUnavailable(f"the JVM {pid} is gone")
    if not process_tree.catches_signal(pid, signal.SIGQUIT):
        raise RuntimeUnavailable(
            f"the JVM {pid} has not set up its signal handlers yet, or was started with -Xrs"
        )
    # In /tmp and not in the JVM's working directory, which is the execroot.
    trigger = f"{tmp}/.attach_pid{inner_pid}"
    fd = _create_trigger(trigger)
    try:
        if os.geteuid() != uid:
            os.fchown(fd, uid, -1)  # the JVM believes only a file of its own user
        process_tree.send_signal(pid, start.start_ticks, signal.SIGQUIT)
        async with asyncio.timeout(SOCKET_TIMEOUT_S):
            pause_s = 0.002
            while not _is_socket_of(socket_path, uid):
                if process_tree.read_stat(pid) is None:
                    raise RuntimeUnavailable(f"the JVM {pid} died")
                await asyncio.sleep(pause_s)  # it answers with a file, which nothing announces
                pause_s = min(pause_s * 2, 0.1)
    except TimeoutError:
        raise RuntimeUnavailable(
            f"the JVM {pid} did not open its attach socket in {SOCKET_TIMEOUT_S:g} s"
        ) from None
    finally:
        os.close(fd)
        try:
            os.unlink(trigger)
        except OSError:
            pass
    return socket_path


def _create_trigger(path: str) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(path, flags, 0o600)
    except FileExistsError:  # of somebody killed in the middle of this, at an earlier use of the pid
        os.unlink(path)
        return os.open(path, flags, 0o600)


def _pin_socket(path: str, uid: int) -> int:
    """A descriptor of the JVM's socket, which a worker cannot replace by a link to another one meanwhile."""
    pin = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    info = os.fstat(pin)
    if not stat.S_ISSOCK(info.st_mode) or info.st_uid != uid:
        os.close(pin)
        raise RuntimeUnavailable(f"{path!r} is not the JVM's own socket")
    return pin


def _is_socket_of(path: str, uid: int) -> bool:
    try:
        info = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISSOCK(info.st_mode) and info.st_uid == uid


def check_may_attach(pid: int, inner_pid: int) -> None:
    """Raise AttachForbidden unless this JVM surely takes a SIGQUIT as the request to open its socket."""
    supported = _capability(pid, inner_pid)
    if supported is False:
        raise AttachForbidden(f"the JVM {pid} was started with -XX:+DisableAttachMechanism")
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            arguments = [a.decode("utf-8", "replace") for a in file.read().split(b"\0")]
        with open(f"/proc/{pid}/environ", "rb") as file:
            entries = [v.decode("utf-8", "replace") for v in file.read().split(b"\0")]
    except OSError as error:
        raise RuntimeUnavailable(f"cannot read the command line of the JVM {pid}: {error}") from error
    for entry in entries:
        name, _, value = entry.partition("=")
        if name in _OPTION_VARIABLES:
            arguments += value.split()
    for argument in arguments:
        if argument in _FORBID:
            raise AttachForbidden(f"the JVM {pid} was started with {argument}")
        opaque = argument.startswith(("@", *_OPAQUE))
        if opaque and supported is None:
            raise AttachForbidden(f"the JVM {pid} takes options from {argument}, which may forbid to attach")


def _capability(pid: int, inner_pid: int) -> bool | None:
    """What the JVM's own performance data say about attaching (sun.rt.jvmCapabilities); None: no data."""
    try:
        user = pwd.getpwuid(_uid(pid)).pw_name
    except KeyError:
        return None
    path = os.path.join(_root_of(pid), "tmp", f"hsperfdata_{user}", str(inner_pid))
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        data = os.read(fd, 1 << 20)
    except OSError:
        return None
    finally:
        os.close(fd)
    found = re.search(rb"sun\.rt\.jvmCapabilities\0+([01])[01]{7,}", data)
    return found.group(1) == b"1" if found else None


def is_socket(name: str) -> bool:
    """Whether this is what a JVM calls its attach socket."""
    return re.fullmatch(r"\.java_pid[0-9]+", name) is not None


async def _exchange(path: str, command: str) -> bytes:
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        writer.write(b"1\0jcmd\0" + command.encode() + b"\0\0\0")
        await writer.drain()
        reply = bytearray()
        while chunk := await reader.read(65536):
            reply += chunk
            if len(reply) > MAX_REPLY_BYTES:
                raise RuntimeUnavailable(f"the JVM's answer to {command!r} exceeds {MAX_REPLY_BYTES} bytes")
    finally:
        writer.close()
    result, _, text = bytes(reply).partition(b"\n")
    if result.strip() != b"0":
        raise RuntimeUnavailable(
            f"the JVM refused {command!r}: result {result[:20]!r}, {text[:500].decode('utf-8', 'replace')!r}"
        )
    return text
