"""The per-action client in Python, for nodes where `native/client.c` could not be compiled.

Does what that does, step by step: see there, and `docs/nativelink.md`. One file, standard library only, run
as `python3 -I -S client.py`. It imports what an interpreter has loaded anyway, but for `_socket` and
`select`: the start of the interpreter is most of what it costs.
"""

import _signal
import _socket
import errno
import posix
import select
import sys
import time

EXIT_MISUSE, EXIT_LOST, EXIT_BUSY, EXIT_POLICY, EXIT_TIMEOUT, EXIT_NOT_RUN = 64, 70, 75, 78, 124, 126
MAX_REQUEST, MAX_FRAME, MAX_POLICY, MAX_ROOTS, MAX_PATH, MAX_STRINGS = 8 << 20, 65536, 65536, 16, 4096, 65536
SEND_TIMEOUT_S, CANCEL_TIMEOUT_S, MAX_TIMEOUT_MS, MAX_SILENCE_S = 5, 10.0, 7 * 24 * 3600 * 1000, 86400
OURS = (
    b"NL_WORKER_KEY",
    b"NL_WORKER_TOOL",
    b"NL_WORKER_PROTOCOL",
    b"NL_TIMEOUT_MS",
    b"NL_SIDE_CHANNEL",
    b"NL_ACTION_DIR",
)
MORE, FALL_BACK, GONE = range(3)
_PR_SET_PDEATHSIG = 1
_exit = posix._exit  # noqa: SLF001 - `os` would cost more to import than all else here


def put(data):
    view = memoryview(data)
    while view:
        try:
            view = view[posix.write(2, view) :]
        except BlockingIOError:
            waiting = select.poll()
            waiting.register(2, select.POLLOUT)
            waiting.poll()
        except OSError:
            return  # nobody reads it


def say(first, second=b""):
    put(b"nativelink_worker_entrypoint: " + first + second + b"\n")


def leave(code, first, second=b""):
    say(first, second)
    _exit(code)


def wrong_policy(what, detail=b""):
    say(b"nativelink_worker_entrypoint.conf beside this program: ", what)
    leave(EXIT_POLICY, detail)


class Client:
    """One action."""

    def __init__(self, program, argv, environment):
        self.program = program
        self.argv = argv
        self.socket_path = b"/run/nativelink_worker_wrapper/pool.sock"
        self.work_roots = []
        self.fail_when_busy = self.fail_when_lost = self.host_times = False
        self.silence_s = 60
        self.ours = dict.fromkeys(OURS, b"")
        self.environment = {}
        for name, value in environment.items():
            if name in self.ours:
                self.ours[name] = value
            else:
                self.environment[name] = value
        digits = self.ours[b"NL_TIMEOUT_MS"]
        timeout_ms = int(digits) if digits.isdigit() and len(digits) < 12 else 0
        self.timeout_ms = timeout_ms if timeout_ms <= MAX_TIMEOUT_MS else 0
        self.action_dir = -1
        self.socket = None
        self.taken = self.is_over = False
        self.data = b""
        self.signals = []
        self.wakeup = -1
        self.reason = b""

    # ---- the policy ------------------------------------------------------------------------------------

    def read_policy(self):
        """NAME = VALUE, comments from '#', in a file beside the program."""
        path = self.program[: self.program.rfind(b"/") + 1] + b"nativelink_worker_entrypoint.conf"
        flags = posix.O_RDONLY | posix.O_NOFOLLOW | posix.O_NONBLOCK | posix.O_CLOEXEC
        try:
            owner = posix.stat(self.program).st_uid
            fd = posix.open(path, flags)
        except FileNotFoundError:
            return
        except OSError as error:
            wrong_policy(b"it cannot be read", str(error).encode())
        info = posix.fstat(fd)
        if info.st_mode & 0o170022 != 0o100000 or info.st_uid not in (0, owner):
            wrong_policy(
                b"it must be a regular file of root's or of the program's owner, and writable for nobody else"
            )
        text = posix.read(fd, MAX_POLICY + 1)
        posix.close(fd)
        if len(text) > MAX_POLICY or len(text) != info.st_size or b"\0" in text:
            wrong_policy(b"it is too large, or no text")
        for raw_line in text.split(b"\n"):
            line = raw_line.strip(b" \t\r")
            if not line or line.startswith(b"#"):
                continue
            name, equals, value = line.partition(b"=")
            if not equals:
                wrong_policy(b"a line without '=': ", line)
            self.set_policy(name.strip(b" \t\r"), value.strip(b" \t\r"))

    def set_policy(self, name, value):
        choices = {b"fallback": (b"one-shot", b"fail"), b"lost": (b"rerun", b"fail")}
        choices[b"timeouts"] = (b"wrapper", b"host")
        if name in choices and value in choices[name]:
            attribute = {b"fallback": "fail_when_busy", b"lost": "fail_when_lost"}.get(name, "host_times")
            setattr(self, attribute, value == choices[name][1])
        elif name == b"socket" and value.startswith(b"/") and len(value) < 108:
            self.socket_path = value
        elif name == b"work_root" and value.startswith(b"/") and len(self.work_roots) < MAX_ROOTS:
            self.work_roots.append(value.rstrip(b"/") or b"/")
        elif (
            name == b"silence_s"
            and value.isdigit()
            and 0 < int(value[:6]) <= MAX_SILENCE_S
            and len(value) < 6
        ):
            self.silence_s = int(value)
        else:
            wrong_policy(b"an unknown name, a wrong value, or too many lines: ", name)

    # ---- the action ------------------------------------------------------------------------------------

    def find_action_dir(self):
        """Open the directory directly beneath a work root that our working directory lies in."""
        try:
            cwd = posix.getcwdb()
            for root in self.work_roots:
                if not cwd.startswith(root + b"/"):
                    continue
                below = cwd[len(root) + 1 :].split(b"/")
                if len(below) < 2:
                    continue
                fd = posix.open(b"../" * (len(below) - 1), 0o10000000 | posix.O_DIRECTORY | posix.O_CLOEXEC)
                here, named = posix.fstat(fd), posix.lstat(root + b"/" + below[0])
                return fd if (here.st_dev, here.st_ino) == (named.st_dev, named.st_ino) else -1
        except OSError:
            pass
        return -1

    def tell_host(self, text):
        """Write the side-channel file, whole or not at all, under the last component of its name only."""
        name = self.ours[b"NL_SIDE_CHANNEL"].rpartition(b"/")[2]
        if len(name) != 32 or name.strip(b"0123456789abcdef") or self.action_dir < 0:
            say(b"NL_SIDE_CHANNEL names no side-channel file of this action, so the host is told nothing")
            return
        temporary = b".nlww-" + name
        try:
            try:
                posix.unlink(temporary, dir_fd=self.action_dir)
            except FileNotFoundError:
                pass
            flags = posix.O_WRONLY | posix.O_CREAT | posix.O_EXCL | posix.O_NOFOLLOW | posix.O_CLOEXEC
            fd = posix.open(temporary, flags, 0o644, dir_fd=self.action_dir)
            posix.write(fd, text)
            posix.rename(temporary, name, src_dir_fd=self.action_dir, dst_dir_fd=self.action_dir)
        except OSError as error:
            say(b"the side-channel file cannot be written: ", str(error).encode())

    def timed_out(self):
        if not self.host_times:
            self.tell_host(b'{"failure": "timeout"}')
        _exit(EXIT_TIMEOUT)

    def hold_signals(self, how, handler):
        for signum in (_signal.SIGTERM, _signal.SIGINT):
            _signal.signal(signum, handler)
        _signal.signal(_signal.SIGCHLD, _signal.SIG_DFL)
        _signal.pthread_sigmask(how, (_signal.SIGTERM, _signal.SIGINT, _signal.SIGCHLD))

    def supervise(self):
        """Returns in a child with a process group of its own, which dies with us; we end it in time."""
        self.hold_signals(_signal.SIG_BLOCK, _signal.SIG_DFL)
        parent, child = posix.getpid(), posix.fork()
        if not child:
            posix.setpgid(0, 0)
            _die_with_parent()
            if posix.getppid() != parent:
                _exit(EXIT_NOT_RUN)
            return
        try:
            posix.setpgid(child, child)
        except OSError:
            pass  # it has done that itself, and runs
        deadline = time.monotonic() + self.timeout_ms / 1000
        while (left := deadline - time.monotonic()) > 0:
            pid, status = posix.waitpid(child, posix.WNOHANG)
            if pid:
                signum = status & 0x7F
                _exit(128 + signum if signum else status >> 8)
            got = _signal.sigtimedwait((_signal.SIGTERM, _signal.SIGINT, _signal.SIGCHLD), left)
            if got is not None and got.si_signo != _signal.SIGCHLD:
                _kill_group(child, got.si_signo)
        _kill_group(child, _signal.SIGKILL)
        posix.waitpid(child, 0)
        self.timed_out()

    def run_directly(self):
        """The action as it stands; as a child of ours where nobody else ends it in time."""
        _signal.set_wakeup_fd(-1)
        if not self.host_times and self.timeout_ms:
            self.supervise()
        self.hold_signals(_signal.SIG_UNBLOCK, _signal.SIG_DFL)
        _signal.signal(_signal.SIGPIPE, _signal.SIG_DFL)
        name = self.argv[0]
        path = self.environment.get(b"PATH", b"/bin:/usr/bin").split(b":")
        worst = FileNotFoundError(errno.ENOENT, "No such file or directory")
        for folder in [b""] if b"/" in name else path:
            whole = (folder + b"/" if folder else b"") + name
            try:
                posix.execve(whole, self.argv, self.environment)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                if error.errno == errno.ENOEXEC:
                    posix.execve(b"/bin/sh", [b"/bin/sh", whole, *self.argv[1:]], self.environment)
                worst = error
                if error.errno != errno.EACCES:
                    break
        say(b"the action cannot be run: ", name)
        leave(EXIT_NOT_RUN + isinstance(worst, FileNotFoundError), worst.strerror.encode())

    def do_without(self, why):
        if not self.fail_when_busy:
            self.run_directly()
        leave(EXIT_BUSY, b"no warm worker can take the action (fallback = fail): ", why)

    def lost(self, why):
        say(b"the action is lost: ", why)
        if self.fail_when_lost:
            _exit(EXIT_LOST)
        self.tell_host(b"lost: run it again")
        _exit(EXIT_BUSY)

    # ---- the daemon ------------------------------------------------------------------------------------

    def request(self):
        """The whole request; None if it is too large."""
        env = [name + b"=" + value for name, value in self.environment.items()]
        fields = [self.ours[name] for name in OURS[:3]]
        if max(map(len, fields)) > MAX_PATH or max(len(self.argv), len(env)) > MAX_STRINGS:
            return None
        numbers = self.timeout_ms.to_bytes(8, "little") + len(self.argv).to_bytes(4, "little")
        body = numbers + len(env).to_bytes(4, "little") + b"\0".join([*fields, *self.argv, *env, b""])
        if len(body) > MAX_REQUEST:
            return None
        return b"NLA1" + len(body).to_bytes(4, "little") + body

    def ask(self, request, cwd):
        self.socket = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        try:
            self.socket.setsockopt(
                _socket.SOL_SOCKET, _socket.SO_SNDTIMEO, SEND_TIMEOUT_S.to_bytes(8, "little") + bytes(8)
            )
            self.socket.connect(self.socket_path)
        except OSError:
            self.do_without(b"the pool daemon cannot be reached")
        rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, cwd.to_bytes(4, "little"))]
        view = memoryview(request)
        try:
            while view:
                view = view[self.socket.sendmsg([view], rights, _socket.MSG_NOSIGNAL) :]
                rights = []
        except OSError:
            self.give_up(b"the pool daemon does not take the request")
        posix.close(cwd)

    def take_frame(self, kind, payload):
        if kind == b"W" and not payload:
            return MORE
        if kind == b"T" and not payload and not self.taken:
            self.taken = True
            return MORE
        if kind == b"D" and payload and self.taken:
            put(payload)
            return MORE
        if kind == b"E" and len(payload) == 4 and self.taken and not self.is_over:
            code = int.from_bytes(payload, "little")
            _exit(1 if code and not code & 0xFF else code & 0xFF)
        if kind == b"O":
            self.run_directly()
        if kind == b"B" and not self.taken:
            return FALL_BACK
        if kind == b"F":
            self.failed(payload)
        return GONE

    def failed(self, payload):
        kind = payload[:1] if len(payload) >= 2 else b"l"
        if len(payload) > 2:
            say(payload[2:])
        if kind == b"t":
            self.timed_out()
        if kind == b"c":
            _exit(128 + self.signals[0] if self.signals else EXIT_BUSY)
        if kind == b"r":
            _exit(payload[1] or EXIT_MISUSE)
        self.lost(b"the pool daemon could not finish it")

    def read_some(self):
        """Read what there is; what came of it, and whether anything was read."""
        try:
            got = self.socket.recv(MAX_FRAME, _socket.MSG_DONTWAIT)
        except (BlockingIOError, InterruptedError):
            return MORE, False
        except OSError:
            return GONE, False
        if not got:
            return GONE, False
        self.data += got
        while len(self.data) >= 5:
            length = int.from_bytes(self.data[1:5], "little")
            if length > MAX_FRAME:
                return GONE, True
            if len(self.data) < 5 + length:
                break
            kind, payload, self.data = self.data[:1], self.data[5 : 5 + length], self.data[5 + length :]
            step = self.take_frame(kind, payload)
            if step != MORE:
                self.reason = payload
                return step, True
        return MORE, True

    def give_up(self, why):
        """After SHUT_RD the daemon can send nothing more: what it has sent tells whose the action is."""
        try:
            self.socket.shutdown(_socket.SHUT_RD)
        except OSError:
            pass
        self.is_over = True
        while not self.taken and self.read_some() == (MORE, True):
            pass
        if self.taken:
            self.lost(why)
        if self.signals:
            _exit(128 + self.signals[0])
        self.socket.close()
        self.do_without(why)

    def wait_for_outcome(self):
        silent_since, give_up_at = time.monotonic(), None
        readable = select.poll()
        readable.register(self.socket.fileno(), select.POLLIN)
        readable.register(self.wakeup, select.POLLIN)
        while True:
            if len(self.signals) > 1:
                _exit(128 + self.signals[1])
            if self.signals and give_up_at is None:
                self.socket.shutdown(_socket.SHUT_WR)
                give_up_at = time.monotonic() + CANCEL_TIMEOUT_S
            now, until = time.monotonic(), silent_since + self.silence_s
            if give_up_at is not None:
                until = min(until, give_up_at)
            if now >= until and self.signals:
                _exit(128 + self.signals[0])
            if now >= until:
                self.give_up(b"the pool daemon says nothing any more")
            ready = [fd for fd, _ in readable.poll(int((until - now) * 1000) + 1)]
            if self.wakeup in ready:
                posix.read(self.wakeup, 64)
            if self.socket.fileno() not in ready:
                continue
            step, some = self.read_some()
            if step == GONE:
                self.give_up(b"the pool daemon is gone, or talks nonsense")
            if step == FALL_BACK:
                if self.signals:
                    _exit(128 + self.signals[0])
                self.socket.close()
                self.do_without(self.reason)
            if some:
                silent_since = time.monotonic()

    def main(self):
        if not self.argv:
            leave(EXIT_MISUSE, b"no action: a host of actions starts this with the action's command line")
        if self.argv[-1] == b"--persistent_worker" and not self.ours[b"NL_ACTION_DIR"]:
            leave(
                EXIT_MISUSE,
                b"--persistent_worker was given without an action: with supports-workers=1 the host starts "
                b"its entrypoint as a persistent worker of its own. Give the actions a persistentWorkerKey "
                b"instead",
            )
        self.read_policy()
        self.action_dir = self.find_action_dir()
        if not (self.ours[b"NL_WORKER_KEY"] or self.ours[b"NL_WORKER_TOOL"]) or self.action_dir < 0:
            self.run_directly()
        request = self.request()
        if request is None:
            self.run_directly()
        try:
            cwd = posix.open(b".", posix.O_RDONLY | posix.O_DIRECTORY | posix.O_CLOEXEC)
        except OSError:
            self.run_directly()
        self.wakeup, wake = posix.pipe2(posix.O_CLOEXEC | posix.O_NONBLOCK)
        _signal.set_wakeup_fd(wake)
        for signum in (_signal.SIGTERM, _signal.SIGINT):
            _signal.signal(signum, lambda signum, _frame: self.signals.append(signum))
        self.ask(request, cwd)
        self.wait_for_outcome()


def _kill_group(leader, signum):
    try:
        posix.killpg(leader, signum)
    except ProcessLookupError:
        pass


def _die_with_parent():
    try:
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, _signal.SIGKILL)
    except (ImportError, OSError, AttributeError):
        pass  # then a killed client leaves its action running, as any host's kill does


def main():
    # Its real path, behind any links, decides where the policy lies: never anything in the environment.
    encoding = sys.getfilesystemencoding()
    fd = posix.open(__file__, posix.O_RDONLY | posix.O_CLOEXEC)
    program = posix.readlink(f"/proc/self/fd/{fd}").encode(encoding, "surrogateescape")
    posix.close(fd)
    argv = [word.encode(encoding, "surrogateescape") for word in sys.argv[1:]]
    Client(program, argv, dict(posix.environ)).main()


if __name__ == "__main__":
    main()
