"""What an untrusted action can try from inside its container, and that it does no harm.

Each test runs the attack for real, as code in a warm worker, and looks at what came of it on the node.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import stat
import textwrap
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from tests.support.cri import WORKERS, container_pool, engine_is_empty, leftovers_on_node
from tests.support.engine import PrivateContainerd
from tests.support.loop import run_async
from wrapper import PoolCreateOptions, WarmWorkerPoolManager, WorkRequest, load_config
from wrapper.errors import WrapperError

pytestmark = pytest.mark.engine

HOSTILE = ["/usr/bin/python3", "-I", "-S", f"{WORKERS}/hostile_worker.py", "--persistent_worker"]
SECRET = "the neighbour's secret, in no other file"


class Attacker:
    """One pool of hostile workers, and directories of actions whose inputs are links to blobs."""

    def __init__(self, folder: Path, pools: WarmWorkerPoolManager) -> None:
        self.folder = folder
        self.pools = pools
        self._number = 0

    def action(self) -> Path:
        """A new action's directory, as NativeLink makes it."""
        self._number += 1
        directory = self.folder / "work" / f"action{self._number}"
        (directory / "out").mkdir(parents=True)
        os.link(self.blob, directory / "input.txt")
        return directory

    @property
    def blob(self) -> Path:
        """A blob of the CAS."""
        blob = self.folder / "work" / "cas-blob"
        if not blob.exists():
            blob.write_text("content of the blob")
            blob.chmod(0o444)
        return blob

    def digest(self) -> str:
        return hashlib.sha256(self.blob.read_bytes()).hexdigest()

    async def attack(self, code: str, directory: Path | None = None) -> str:
        """Run the code as an action; what came of it, in the worker's words."""
        argument = f"--run={textwrap.dedent(code)}".encode()
        response = await self.pools.run(
            "pool",
            WorkRequest.of(arguments=[argument]),
            directory=None if directory is None else str(directory),
        )
        return response.pb.output.decode(errors="replace")


Attack = Callable[[Attacker], Awaitable[None]]


@pytest.fixture
def attacked(engine: PrivateContainerd, tmp_path: Path) -> Callable[..., None]:
    """Runs a test's coroutine with an attacker; afterwards the blob is whole and nothing is left."""

    @contextlib.asynccontextmanager
    async def attacker(**changes: object) -> AsyncIterator[Attacker]:
        document = tmp_path / "pools.json5"
        document.write_text(
            json.dumps(container_pool(engine, tmp_path, worker_command=HOSTILE, max_workers=2, **changes))
        )
        async with WarmWorkerPoolManager(PoolCreateOptions(load_config(document))) as pools:
            yield Attacker(tmp_path, pools)

    def run(attack: Attack, **changes: object) -> None:
        async def main() -> None:
            async with attacker(**changes) as one:
                before = one.digest()
                await attack(one)
                assert one.digest() == before, "a blob of the CAS has changed"
                info = one.blob.stat()
                assert (stat.S_IMODE(info.st_mode), info.st_uid) == (0o444, os.geteuid())

        run_async(main())
        assert engine_is_empty(engine)
        assert leftovers_on_node(tmp_path) == []

    return run


def test_an_input_cannot_be_written_through_its_hard_link(attacked: Callable[..., None]) -> None:
    async def attack(attacker: Attacker) -> None:
        for attempt in (
            "open('input.txt', 'a')",
            "os.chmod('input.txt', 0o666)",
            "os.truncate('input.txt', 0)",
            "os.link('input.txt', 'out/mine')",
            "os.utime('input.txt', (0, 0))",
            "os.setxattr('input.txt', 'user.x', b'y')",
        ):
            said = await attacker.attack(attempt, attacker.action())
            assert said.startswith(("failed: PermissionError", "failed: OSError")), (attempt, said)

    attacked(attack)


def test_an_output_that_is_kept_open_cannot_be_written_later(attacked: Callable[..., None]) -> None:
    async def attack(attacker: Attacker) -> None:
        first = attacker.action()
        await attacker.attack(
            """
            import mmap, socket, array
            f = kept['file'] = open('out/kept', 'w+b', buffering=0)
            f.write(b'as it was given')
            m = open('out/mapped', 'w+b'); m.write(b'x' * 4096); m.flush()
            kept['map'] = mmap.mmap(m.fileno(), 4096); m.close()
            q = open('out/queued', 'w+b', buffering=0); q.write(b'as it was given')
            a, b = kept['pair'] = socket.socketpair()
            socket.send_fds(a, [b'x'], [q.fileno()]); q.close()
            """,
            first,
        )
        said = await attacker.attack(
            """
            import socket
            kept['file'].seek(0); kept['file'].write(b'changed afterwards')
            kept['map'][:7] = b'changed'; kept['map'].flush()
            _, fds, _, _ = socket.recv_fds(kept['pair'][1], 1, 1)
            os.pwrite(fds[0], b'changed afterwards', 0)
            result = 'wrote'
            """,
            attacker.action(),
        )
        assert said == "'wrote'", "the attack itself must work, or nothing is tested"
        assert (first / "out" / "kept").read_bytes() == b"as it was given"
        assert (first / "out" / "queued").read_bytes() == b"as it was given"
        assert (first / "out" / "mapped").read_bytes() == b"x" * 4096

    attacked(attack)


def test_an_output_swapped_for_a_link_while_it_is_collected_is_never_followed(
    attacked: Callable[..., None], tmp_path: Path
) -> None:
    target = tmp_path / "target"
    target.write_text("a file of the node's")
    target.chmod(0o600)

    async def attack(attacker: Attacker) -> None:
        await attacker.attack(
            f"""
            import threading
            def swap():
                while True:
                    for name in ('out/a', 'out/d'):
                        try:
                            os.symlink({str(target)!r}, 'out/link')
                            os.rename('out/link', name)
                        except OSError:
                            pass
                        try:
                            os.unlink(name)
                            if name == 'out/d':
                                os.mkdir(name)
                                open('out/d/inner', 'w').write('mine')
                            else:
                                open(name, 'w').write('mine')
                        except OSError:
                            pass
            threading.Thread(target=swap, daemon=True).start()
            """,
            attacker.action(),
        )
        delivered = 0
        for _ in range(60):
            directory = attacker.action()
            try:
                await attacker.attack("open('out/b', 'w').write('b')", directory)
            except WrapperError:
                continue  # refused to deliver: allowed
            delivered += 1
            for path in directory.rglob("*"):
                if not path.is_symlink() and path.is_file():
                    assert "node's" not in path.read_text(), path
                assert path.lstat().st_uid == os.geteuid(), path
        assert delivered, "not one round was delivered: then nothing was tested"
        info = target.stat()
        assert (target.read_text(), stat.S_IMODE(info.st_mode)) == ("a file of the node's", 0o600)

    attacked(attack)


def test_a_link_to_etc_as_an_output_changes_nothing_there(attacked: Callable[..., None]) -> None:
    before = {path: path.lstat() for path in (Path("/etc"), Path("/etc/passwd"))}

    async def attack(attacker: Attacker) -> None:
        directory = attacker.action()
        await attacker.attack(
            """
            os.symlink('/etc', 'out/etc')
            os.symlink('/etc/passwd', 'out/passwd')
            os.symlink('../../../../etc/shadow', 'out/shadow')
            os.symlink(os.getcwd() + '/out/real', 'out/absolute')
            open('out/real', 'w').write('real')
            """,
            directory,
        )
        assert (directory / "out" / "absolute").resolve() == (directory / "out" / "real").resolve()
        assert not os.path.isabs(os.readlink(directory / "out" / "absolute"))
        for path, info in before.items():
            now = path.lstat()
            assert (now.st_mode, now.st_uid, now.st_mtime_ns, now.st_ctime_ns) == (
                info.st_mode,
                info.st_uid,
                info.st_mtime_ns,
                info.st_ctime_ns,
            )

    attacked(attack)


def test_a_neighbours_execroot_cannot_be_read(attacked: Callable[..., None]) -> None:
    async def attack(attacker: Attacker) -> None:
        neighbour = attacker.action()
        (neighbour / "secret.txt").write_text(SECRET)
        async with attacker.pools.lease("pool") as lease:
            assert lease.execroot is not None
            fd = os.open(neighbour, os.O_RDONLY | os.O_DIRECTORY)
            staged = lease.execroot.stage_action(fd)
            os.close(fd)
            own = attacker.action()
            (own / "secret.txt").write_text(SECRET)
            said = await attacker.attack(
                f"""
                found, seen = [], set()
                roots = ['/', '..', '/proc/self/root', {str(attacker.folder)!r}]
                roots += ['/proc/%s/root' % pid for pid in os.listdir('/proc') if pid.isdigit()]
                roots += ['/proc/%s/cwd' % pid for pid in os.listdir('/proc') if pid.isdigit()]
                for root in roots:
                    for folder, folders, files in os.walk(root):
                        folders[:] = [f for f in folders
                                      if os.path.join(folder, f) not in ('/proc', '/sys', '/usr', '/dev')]
                        for name in files:
                            if name == 'secret.txt':
                                info = os.stat(os.path.join(folder, name))
                                seen.add((info.st_dev, info.st_ino))
                own = os.stat('secret.txt')
                result = len(seen - {{(own.st_dev, own.st_ino)}}), len(seen)
                """,
                own,
            )
            staged.undo()
        assert said == "(0, 1)", "it finds its own, so the search works, and no other"

    attacked(attack)


def test_no_network_connection_can_be_opened(attacked: Callable[..., None]) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    abstract = socket.socket(socket.AF_UNIX)
    abstract.bind(f"\0nlww-test-{os.getpid()}")
    abstract.listen()
    port = listener.getsockname()[1]

    async def attack(attacker: Attacker) -> None:
        said = await attacker.attack(
            f"""
            import socket
            result = [sorted(line.split(':')[0].strip() for line in open('/proc/net/dev') if ':' in line)]
            for family, address in (
                (socket.AF_INET, ('127.0.0.1', {port})),
                (socket.AF_INET, ('192.0.2.1', 80)),
                (socket.AF_UNIX, '\\0nlww-test-{os.getpid()}'),
            ):
                s = socket.socket(family); s.settimeout(5)
                try:
                    s.connect(address); result.append('connected')
                except OSError as error:
                    result.append(type(error).__name__ if error.errno is None else 'failed')
            try:
                socket.socket(socket.AF_PACKET, socket.SOCK_RAW); result.append('raw')
            except OSError:
                result.append('failed')
            """
        )
        assert said.count("failed") + said.count("Error") == 4, said
        assert "['lo']" in said
        assert "connected" not in said

    try:
        attacked(attack)
    finally:
        listener.close()
        abstract.close()


def test_a_fork_bomb_stays_in_its_container(attacked: Callable[..., None]) -> None:
    async def attack(attacker: Attacker) -> None:
        said = await attacker.attack(
            """
            import time
            made, problem = 0, ''
            while made < 100000:
                try:
                    pid = os.fork()
                except OSError as error:
                    problem = type(error).__name__
                    break
                if pid == 0:
                    os.setsid()
                    while True:
                        try:
                            if os.fork() == 0:
                                pass
                        except OSError:
                            time.sleep(0.01)
                made += 1
            result = problem, made < 64
            """,
            attacker.action(),
        )
        assert said == "('BlockingIOError', True)"
        said = await attacker.attack("result = 'the next one is served'", attacker.action())
        assert said == "'the next one is served'"

    attacked(attack, isolation={"pids_limit": 64})


def test_a_filled_tmp_fails_for_the_request_and_is_empty_for_the_next(attacked: Callable[..., None]) -> None:
    async def attack(attacker: Attacker) -> None:
        for _ in range(2):
            said = await attacker.attack(
                """
                problems, size = [], 0
                try:
                    with open('/tmp/full', 'wb', buffering=0) as f:
                        while True:
                            size += f.write(b'x' * 65536)
                except OSError as error:
                    problems.append(error.errno)
                try:
                    for number in range(10**6):
                        open('/tmp/%d' % number, 'w').close()
                except OSError as error:
                    problems.append(error.errno)
                result = problems, size <= 8 << 20
                """,
                attacker.action(),
            )
            assert said == "([28, 28], True)"

    attacked(attack, isolation={"tmp_limit_mb": 8})


def test_a_daemon_left_behind_is_dead_before_the_outputs_are_taken(attacked: Callable[..., None]) -> None:
    async def attack(attacker: Attacker) -> None:
        directory = attacker.action()
        await attacker.attack(
            """
            read_end, write_end = os.pipe()
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    os.chdir('out')
                    f = open('daemon', 'w', buffering=1)
                    os.write(write_end, b'x')
                    number = 0
                    while True:
                        number += 1
                        try:
                            f.seek(0); f.write(str(number))
                            open('late-%d' % (number % 50), 'w').close()
                        except OSError:
                            pass
                os._exit(0)
            os.wait(); os.read(read_end, 1)
            """,
            directory,
        )
        delivered = {path.name: path.read_bytes() for path in (directory / "out").iterdir()}
        await attacker.attack("result = 1", attacker.action())
        assert "daemon" in delivered
        assert {path.name: path.read_bytes() for path in (directory / "out").iterdir()} == delivered

    attacked(attack)


def test_the_container_itself_gives_no_way_out(attacked: Callable[..., None]) -> None:
    async def attack(attacker: Attacker) -> None:
        said = await attacker.attack(
            """
            import ctypes, signal, socket
            libc = ctypes.CDLL(None, use_errno=True)
            tried = {}
            def attempt(name, what):
                try:
                    value = what()
                    tried[name] = 'failed' if value in (-1, None, []) else repr(value)
                except OSError:
                    tried[name] = 'failed'
            attempt('write to the root', lambda: open('/anything', 'w'))
            attempt('write to the run folder', lambda: open('/nlww/run/x', 'w'))
            shim = '/nlww/run/shim.sock'
            attempt('connect to the shim', lambda: socket.socket(socket.AF_UNIX).connect(shim))
            attempt('become root', lambda: os.setuid(0))
            attempt('mount', lambda: libc.mount(b'none', b'/tmp', b'tmpfs', 0, None))
            attempt('new user namespace', lambda: libc.unshare(0x10000000))
            attempt('make a device', lambda: os.mknod('/tmp/sda', 0o60666, os.makedev(8, 0)))
            attempt('trace process 1', lambda: libc.ptrace(16, 1, 0, 0))
            attempt('read the environment of process 1', lambda: open('/proc/1/environ').read() or None)
            attempt('change the kernel', lambda: open('/proc/sys/kernel/core_pattern', 'w').write('x'))
            attempt('cgroups', lambda: [p for p, _, f in os.walk('/sys/fs/cgroup') if os.access(p, os.W_OK)])
            os.kill(1, signal.SIGKILL)
            result = {name: seen for name, seen in tried.items() if seen != 'failed'}
            """,
            attacker.action(),
        )
        assert said == "{}"
        assert await attacker.attack("result = 'alive'", attacker.action()) == "'alive'"
        assert attacker.pools.metrics().recycled_workers == 0

    attacked(attack)
