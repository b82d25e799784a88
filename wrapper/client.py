"""The per-action client in Python: does what `native/client.c` does, for where no C compiler was.

Started once for every action, as `python3 -IS client.py ARGV...` in the action's directory. Hands the action
to the pool daemon and waits, or, where no warm worker serves it, becomes the action. Each import and each
line costs every action time: it is one file, and takes only what is built into the interpreter, or nearly.

The action is not trusted: it may forge every variable. What it cannot forge is the policy file beside this
program, which alone names the socket and the work roots, and our working directory.
"""

import _signal  # type: ignore[import-not-found] # `signal`, without its enumerations
import posix
import sys
from posix import _exit as leave

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket
    from typing import NoReturn

NAME = b"nativelink_worker_entrypoint"
KEY, TOOL, PROTOCOL, TIMEOUT, SIDE_CHANNEL, ACTION_DIR = _VARIABLES = (
    b"NL_WORKER_KEY",
    b"NL_WORKER_TOOL",
    b"NL_WORKER_PROTOCOL",
    b"NL_TIMEOUT_MS",
    b"NL_SIDE_CHANNEL",
    b"NL_ACTION_DIR",
)
EXIT_USAGE, EXIT_LOST, EXIT_TRY_AGAIN, EXIT_POLICY, EXIT_TIMEOUT, EXIT_NOT_RUN = 64, 70, 75, 78, 124, 126
MAX_BODY, MAX_STRINGS, MAX_NAME, MAX_PAYLOAD, MAX_POLICY, MAX_ROOTS = 8 << 20, 65536, 4096, 65536, 65536, 16
MAX_TIMEOUT_MS, CONFIRM_CANCEL_S, SEND_S = 7 * 24 * 3600 * 1000, 10, 5
FRAMES = {  # what may come when, < and > being before and after TAKEN, and its least and largest size
    b"W": (b"*", 0, 0),
    b"T": (b"<", 0, 0),
    b"O": (b"*", 0, 4096),
    b"B": (b"<", 0, 4096),
    b"D": (b">", 1, MAX_PAYLOAD),
    b"E": (b">", 4, 4),
    b"F": (b"*", 2, 2 + 16384),
}
READ = posix.O_RDONLY | posix.O_CLOEXEC | posix.O_NONBLOCK | posix.O_NOCTTY

policy = {
    b"socket": b"/run/nativelink_worker_wrapper/pool.sock",
    b"fallback": b"one-shot",
    b"lost": b"rerun",
    b"timeouts": b"wrapper",
    b"silence_s": b"60",
}
silence_ms = 60000
work_roots: list[bytes] = []
ours = dict.fromkeys(_VARIABLES, b"")
environment: list[bytes] = []
argv: list[bytes] = []
timeout_ms = 0
action_directory = -1
cancelled_by = 0
daemon: "socket"


# ---- words ----


def write_to_stderr(data: bytes) -> None:
    while data:
        try:
            data = data[posix.write(2, data) :]
        except BlockingIOError:
            import select

            poll = select.poll()
            poll.register(2, select.POLLOUT)
            poll.poll()
        except OSError:
            return  # nobody listens: that is nothing to fail of


def say(*parts: bytes) -> None:
    """One line, in one write. In bytes, as all is here."""
    _signal.signal(_signal.SIGPIPE, _signal.SIG_IGN)
    write_to_stderr(NAME + b": " + b"".join(parts) + b"\n")


def words(error: OSError) -> bytes:
    return posix.strerror(error.errno or 0).encode()


def number_in(text: bytes, most: int) -> int:
    """Decimal digits and nothing else, or -1."""
    text = text.lstrip(b"0") or text[-1:]
    if not text.isdigit() or len(text) > 20 or int(text) > most:
        return -1
    return int(text)


def read_all(fd: int, most: int) -> bytes:
    data = b""
    while len(data) < most and (chunk := posix.read(fd, min(most - len(data), 1 << 17))):
        data += chunk
    posix.close(fd)
    return data


def read_system(path: str) -> bytes:
    return read_all(posix.open(path, READ), 1 << 40)


def fill_streams() -> None:
    """Should we have been started without standard streams, what we open must not come in their places."""
    try:
        while (fd := posix.open("/dev/null", posix.O_RDWR | posix.O_CLOEXEC)) <= 2:
            pass
        posix.close(fd)
    except OSError:
        pass


# ---- the policy file ----


def refuse_policy(*why: bytes) -> "NoReturn":
    say(*why)
    leave(EXIT_POLICY)


def read_policy() -> None:
    try:
        fd = posix.open(sys.argv[0], READ)
        owner = posix.fstat(fd).st_uid
        path = posix.readlink(b"/proc/self/fd/%d" % fd)
        posix.close(fd)
    except OSError as error:
        refuse_policy(b"cannot find where this program lies: ", words(error))
    path = path[: path.rindex(b"/") + 1] + NAME + b".conf"
    try:
        fd = posix.open(path, READ)
        status = posix.fstat(fd)
    except FileNotFoundError:
        return
    except OSError as error:
        refuse_policy(path, b": cannot be opened: ", words(error))
    if status.st_mode & 0o170000 != 0o100000:
        refuse_policy(path, b": is not a regular file")
    if status.st_uid not in (0, owner) or status.st_mode & 0o022:
        refuse_policy(
            path, b": must belong to root or to the program's owner, and be writable by nobody else"
        )
    try:
        text = read_all(fd, MAX_POLICY + 1)
    except OSError as error:
        refuse_policy(path, b": cannot be read: ", words(error))
    if len(text) > MAX_POLICY:
        refuse_policy(path, b": cannot be read: more than 64 KiB")
    for whole in text.split(b"\n"):
        if b"\0" in whole:
            refuse_policy(path, b": has a NUL in the line ", whole[: whole.index(b"\0")])
        line = whole.strip(b" \t\r")
        if not line or line.startswith(b"#"):
            continue
        name, equals, value = line.partition(b"=")
        if not equals:
            refuse_policy(path, b': is not "name = value": ', line)
        name = name.strip(b" \t\r")
        if name != b"work_root" and name not in policy:
            refuse_policy(path, b": there is no such name: ", name)
        if not set_policy(name, value.strip(b" \t\r")):
            refuse_policy(path, b": has a wrong value for ", name)


def set_policy(name: bytes, value: bytes) -> bool:
    """Whether the value is one for this name."""
    global silence_ms
    if name == b"socket":
        is_good = value.startswith(b"/") and len(value) < 108
    elif name == b"work_root":
        value = value.rstrip(b"/")
        work_roots.append(value)
        return value.startswith(b"/") and len(value) < 4096 and len(work_roots) <= MAX_ROOTS
    elif name == b"silence_s":
        whole, point, decimals = value.partition(b".")
        is_good = len(decimals) <= 3 and bool(decimals) == bool(point)
        seconds, rest = number_in(whole, 86400), number_in(decimals.ljust(3, b"0"), 999)
        silence_ms = seconds * 1000 + rest
        is_good = is_good and min(seconds, rest) >= 0 and 0 < silence_ms <= 86400000
    else:
        is_good = (
            value
            in {
                b"fallback": (b"one-shot", b"fail"),
                b"lost": (b"rerun", b"fail"),
                b"timeouts": (b"wrapper", b"host"),
            }[name]
        )
    policy[name] = value
    return is_good


# ---- the action ----


def read_action() -> None:
    """What we were started with, from the system: the interpreter decodes arguments, and adds LC_CTYPE."""
    global timeout_ms
    found: dict[bytes, bytes] = {}
    arguments = read_system("/proc/self/cmdline")[:-1].split(b"\0")
    argv.extend(arguments[len(arguments) - len(sys.argv) + 1 :])
    for entry in read_system("/proc/self/environ").split(b"\0"):
        name, equals, value = entry.partition(b"=")
        if name in ours and equals:
            found.setdefault(name, value)
        elif entry:
            environment.append(entry)
    ours.update(found)
    timeout_ms = max(number_in(ours[TIMEOUT], MAX_TIMEOUT_MS), 0)


def length_beneath(root: bytes, cwd: bytes) -> int:
    return len(root) if cwd.startswith(root + b"/") and len(cwd) > len(root) + 1 else 0


def real_path(path: bytes) -> bytes:
    try:
        fd = posix.open(path, posix.O_PATH | posix.O_DIRECTORY | posix.O_CLOEXEC)
        path = posix.readlink(b"/proc/self/fd/%d" % fd)
        posix.close(fd)
    except OSError:
        pass
    return path


def find_action_directory() -> None:
    """Open the directory directly beneath a work root that the working directory lies in, if there is one.

    It is opened from the working directory upwards, and then is what the path says, or something was moved.
    """
    global action_directory
    try:
        cwd = posix.getcwdb()
    except OSError:
        return
    length = 0
    for look in (bytes, real_path):
        for root in work_roots:
            length = length or length_beneath(look(root), cwd)
    if not length:
        return
    end = cwd.find(b"/", length + 1) % (len(cwd) + 1)
    upwards = b"../" * cwd.count(b"/", end) or b"."
    try:
        fd = posix.open(upwards, posix.O_PATH | posix.O_DIRECTORY | posix.O_CLOEXEC)
        opened, named = posix.fstat(fd), posix.lstat(cwd[:end])
    except OSError:
        return
    if (opened.st_dev, opened.st_ino) == (named.st_dev, named.st_ino):
        action_directory = fd
    else:
        posix.close(fd)


def tell_host(text: bytes) -> None:
    """Write the side-channel file. It lies in the action directory, whatever the variable says."""
    name = ours[SIDE_CHANNEL].rpartition(b"/")[2]
    if action_directory < 0 or len(name) != 32 or name.strip(b"0123456789abcdef"):
        say(b"NativeLink cannot be told: NL_SIDE_CHANNEL names no such file, or this is no action directory")
        return
    fresh = b"." + name + b".new"
    flags = posix.O_WRONLY | posix.O_CREAT | posix.O_EXCL | posix.O_NOFOLLOW | posix.O_CLOEXEC
    try:
        unlink(fresh)
        fd = posix.open(fresh, flags, 0o644, dir_fd=action_directory)
        posix.write(fd, text)
        posix.close(fd)
        posix.rename(fresh, name, src_dir_fd=action_directory, dst_dir_fd=action_directory)
    except OSError as error:
        unlink(fresh)
        say(b"NativeLink cannot be told by its side-channel file: ", words(error))


def unlink(name: bytes) -> None:
    try:
        posix.unlink(name, dir_fd=action_directory)
    except OSError:
        pass


# ---- to run it ourselves ----


def become_action() -> "NoReturn":
    """Become the action; the program is looked for as execvp does it."""
    variables: dict[bytes, bytes] = {}
    for entry in environment:
        name, equals, value = entry.partition(b"=")
        if name and equals:
            variables.setdefault(name, value)
    candidates = [argv[0]] if argv[0] else []
    is_searched = argv[0] and b"/" not in argv[0] and len(argv[0]) <= 255
    if is_searched:
        path = variables.get(b"PATH", b"/usr/bin:/bin")
        candidates = [directory + b"/" * bool(directory) + argv[0] for directory in path.split(b":")]
    failure: OSError | None = None
    for candidate in candidates:
        try:
            posix.execve(candidate, argv, variables)
        except PermissionError as error:
            failure = error
        except OSError as error:
            if not is_searched or error.errno not in (2, 20, 36):  # ENOENT, ENOTDIR, ENAMETOOLONG
                failure = error
                break
    failure = failure or FileNotFoundError(2, "")
    say(b"cannot run ", argv[0], b": ", words(failure))
    leave(EXIT_NOT_RUN + (failure.errno == 2))


def supervise() -> "NoReturn":
    """Run the action as a process group of its own until it ends or its time does."""
    try:
        from ctypes import CDLL

        prctl = CDLL(None).prctl
    except (ImportError, OSError, AttributeError):
        prctl = None  # then a client that is killed leaves its action behind
    awaited = {_signal.SIGCHLD, _signal.SIGALRM, _signal.SIGTERM, _signal.SIGINT}
    _signal.pthread_sigmask(_signal.SIG_BLOCK, awaited)
    us = posix.getpid()
    try:
        action = posix.fork()
    except OSError as error:
        say(b"cannot start a process: ", words(error))
        leave(EXIT_NOT_RUN)
    if action == 0:
        posix.setpgid(0, 0)
        if prctl is not None:
            prctl(1, _signal.SIGKILL)  # PR_SET_PDEATHSIG
        if posix.getppid() != us:
            leave(EXIT_NOT_RUN)
        _signal.pthread_sigmask(_signal.SIG_SETMASK, ())
        become_action()
    try:
        posix.setpgid(action, action)  # both of us do it, so that it is done before either goes on
    except OSError:
        pass
    _signal.setitimer(_signal.ITIMER_REAL, timeout_ms / 1000)
    number = 0
    while number != _signal.SIGALRM:
        if number in (_signal.SIGTERM, _signal.SIGINT):
            kill(-action, number)
        while (ended := posix.waitpid(-1, posix.WNOHANG))[0] > 0:  # any: we may be process 1 of a namespace
            if ended[0] == action:
                code = posix.waitstatus_to_exitcode(ended[1])
                leave(code if code >= 0 else 128 - code)
        number = _signal.sigwaitinfo(awaited).si_signo
    kill(-action, _signal.SIGKILL)
    kill(action, _signal.SIGKILL)
    posix.waitpid(action, 0)
    tell_host(b'{"failure": "timeout"}')
    say(b"the action did not end within ", ours[TIMEOUT], b" ms")
    leave(EXIT_TIMEOUT)


def kill(pid: int, number: int) -> None:
    try:
        posix.kill(pid, number)
    except OSError:
        pass


def run_directly() -> "NoReturn":
    for number in range(1, _signal.NSIG):
        try:
            _signal.signal(number, _signal.SIG_DFL)
        except (OSError, ValueError):
            pass
    _signal.pthread_sigmask(_signal.SIG_SETMASK, ())
    if cancelled_by:
        leave(128 + cancelled_by)  # from here on a signal ends us
    if timeout_ms and policy[b"timeouts"] == b"wrapper":
        supervise()
    become_action()


# ---- to let the daemon run it ----


def written_request() -> bytes | None:
    """None if it is too large."""
    # Variables without a name cannot be set by anybody's `NAME=value`: they stay here.
    named = [entry for entry in environment if entry.find(b"=") > 0]
    names = [ours[KEY], ours[TOOL], ours[PROTOCOL]]
    integers = (
        timeout_ms.to_bytes(8, "little"),
        len(argv).to_bytes(4, "little"),
        len(named).to_bytes(4, "little"),
    )
    body = b"".join(integers) + b"\0".join([*names, *argv, *named, b""])
    if max(map(len, names)) > MAX_NAME or max(len(argv), len(named)) > MAX_STRINGS or len(body) > MAX_BODY:
        return None
    return b"NLA1" + len(body).to_bytes(4, "little") + body


def on_signal(number: int, _frame: object) -> None:
    """The first asks the daemon to cancel, and gives it a while to confirm; the second does not wait."""
    global cancelled_by
    if cancelled_by:
        leave(128 + (cancelled_by if number == _signal.SIGALRM else number))
    cancelled_by = number
    _signal.signal(_signal.SIGALRM, on_signal)
    _signal.alarm(CONFIRM_CANCEL_S)
    give_up(1)


def give_up(how: int) -> None:
    try:
        daemon.shutdown(how)
    except OSError:
        pass


def time_value(milliseconds: int) -> bytes:
    """A struct timeval."""
    size = 8 if sys.maxsize >> 32 else 4
    seconds = (milliseconds // 1000).to_bytes(size, sys.byteorder)
    return seconds + (milliseconds % 1000 * 1000).to_bytes(size, sys.byteorder)


def connect_to_daemon() -> None:
    import _socket

    global daemon
    daemon = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    for number in (_signal.SIGTERM, _signal.SIGINT):
        _signal.signal(number, on_signal)
    _signal.pthread_sigmask(_signal.SIG_SETMASK, ())
    daemon.setsockopt(_socket.SOL_SOCKET, _socket.SO_SNDTIMEO, time_value(SEND_S * 1000))  # of connect, too
    daemon.setsockopt(_socket.SOL_SOCKET, _socket.SO_RCVTIMEO, time_value(silence_ms))
    daemon.connect(policy[b"socket"])


def send_request(request: bytes, cwd: int) -> bool:
    """Send the request, and the working directory with its first byte; whether all was taken."""
    rights = [(1, 1, cwd.to_bytes(4, sys.byteorder))]  # SOL_SOCKET, SCM_RIGHTS
    rest = memoryview(request)
    try:
        while rest:
            rest = rest[daemon.sendmsg([rest], rights) :]
            rights = []
    except OSError:
        return False
    return True


def fail(kind: bytes, code: int, message: bytes) -> "NoReturn":
    """End without an end of the action: for t(imeout), l(ost), c(ancelled), r(efused with this code)."""
    is_rerun = policy[b"lost"] == b"rerun"
    if kind == b"l" and cancelled_by:
        kind = b"c"
    if kind == b"l" and is_rerun:
        tell_host(NAME + b": the infrastructure failed, run this action again\n")  # no JSON
    if kind == b"t" and policy[b"timeouts"] == b"wrapper":
        tell_host(b'{"failure": "timeout"}')
    say(message)
    if kind == b"c":
        code = 128 + cancelled_by if cancelled_by else EXIT_TRY_AGAIN
    if kind == b"l":
        code = EXIT_TRY_AGAIN if is_rerun else EXIT_LOST
    leave(EXIT_TIMEOUT if kind == b"t" else code or 1)


def frame_size(data: bytes, is_taken: bool) -> int:
    """The size of the frame that comes next; 0 if it is not whole, -1 if it is none."""
    if not data:
        return 0
    when, least, most = FRAMES.get(data[:1], (b"", 0, 0))
    if when not in (b"*", b">" if is_taken else b"<"):
        return -1
    if len(data) < 5:
        return 0
    length = int.from_bytes(data[1:5], "little")
    if not least <= length <= most or (data[:1] == b"F" and data[5:6] not in b"tlcr"):
        return -1
    return 0 if len(data) < 5 + length else 5 + length


def obey_daemon() -> bytes | None:
    """Returns if we are to run the action ourselves, with the reason if only as a fallback."""
    data = b""
    is_taken = False
    while True:
        while (size := frame_size(data, is_taken)) > 0:
            letter, payload, data = data[:1], data[5:size], data[size:]
            if letter == b"T":
                is_taken = True
            elif letter == b"D":
                write_to_stderr(payload)
            elif letter == b"E":
                leave(payload[0] or any(payload))
            elif letter == b"F":
                fail(payload[:1], payload[1], payload[2:].partition(b"\0")[0])
            elif letter == b"B":
                return payload.partition(b"\0")[0]
            elif letter == b"O":
                return None
        if size < 0:
            break
        try:
            chunk = daemon.recv(5 + MAX_PAYLOAD - len(data))
            if not chunk:
                break
            data += chunk
        except BlockingIOError:
            give_up(0)  # TAKEN is here by now, or cannot be sent
        except OSError:
            break
    give_up(0)
    if is_taken:
        fail(b"l", 0, b"the pool daemon was lost while it had the action")
    return b"it went away, or said nothing that can be understood"


def main() -> int:
    fill_streams()
    read_action()
    if not argv:
        say(b"usage: ", NAME, b" PROGRAM [ARGS...]; NativeLink starts it so")
        return EXIT_USAGE
    if argv[-1] == b"--persistent_worker" and not ours[ACTION_DIR]:
        say(
            b"started by NativeLink as a persistent worker of its own, because the action has the property"
            b" supports-workers=1: take that away, and give it persistentWorkerKey instead"
        )
        return EXIT_USAGE
    read_policy()
    is_for_worker = ours[KEY] or ours[TOOL]
    if is_for_worker or timeout_ms:
        find_action_directory()
    request = written_request() if is_for_worker and action_directory >= 0 else None
    if request is None:
        run_directly()
    try:
        cwd = posix.open(".", posix.O_RDONLY | posix.O_DIRECTORY | posix.O_CLOEXEC)
    except OSError:
        run_directly()
    why: bytes | None
    try:
        connect_to_daemon()
    except OSError as error:
        why = words(error)
    else:
        if not send_request(request, cwd):
            give_up(0)  # no TAKEN any more; what has come is read
        why = obey_daemon()
        daemon.close()
    if cancelled_by:
        leave(128 + cancelled_by)
    if why is None or policy[b"fallback"] == b"one-shot":
        run_directly()
    say(b"the pool daemon at ", policy[b"socket"], b" did not take the action: ", why)
    return EXIT_TRY_AGAIN


if __name__ == "__main__":
    leave(main())
