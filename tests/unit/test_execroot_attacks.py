"""A hostile process of the worker's uid, below the execroot: what it tries does no harm."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.action_world import HOST_ID, WORKER_ID, ActionWorld, Hostile, look, needs_root, opened
from wrapper.errors import RuntimeUnavailable
from wrapper.execroot.action_execroot import ActionExecroot, Collected, StagedAction, Strategy

pytestmark = needs_root

INPUTS = {"src/A.java": "class A", "src/B.java": "class B", "out/gen": None, "flags": "-g"}
ROUNDS = 150


@pytest.fixture
def world(tmp_path: Path) -> ActionWorld:
    return ActionWorld(tmp_path)


@pytest.fixture(params=list(Strategy), ids=lambda strategy: str(strategy.value))
def execroot(world: ActionWorld, request: pytest.FixtureRequest) -> Iterator[ActionExecroot]:
    made = world.execroot(request.param)
    yield made
    made.remove()


@pytest.fixture
def hostile(execroot: ActionExecroot) -> Iterator[Hostile]:
    with Hostile(execroot.path) as process:
        yield process


@pytest.fixture
def action(world: ActionWorld) -> Path:
    return world.make_action(INPUTS)


@pytest.fixture
def staged(execroot: ActionExecroot, action: Path) -> StagedAction:
    with opened(action) as fd:
        return execroot.stage(fd)


def all_is_sealed(tree: Path) -> None:
    for path, seen in look(tree).items():
        assert seen.uid == HOST_ID, path
        if seen.kind != "link":
            assert seen.mode & 0o022 == 0, path


def test_inputs_cannot_be_written_through_their_links(
    world: ActionWorld, staged: StagedAction, hostile: Hostile
) -> None:
    blobs = world.blobs()
    assert hostile.run("os.open('src/A.java', os.O_WRONLY)") == "EACCES"
    assert hostile.run("os.truncate('src/A.java', 0)") == "EACCES"
    assert hostile.run("os.chmod('src/A.java', 0o666)") == "EPERM"
    assert hostile.run("os.chown('src/A.java', worker, worker)") == "EPERM"
    assert hostile.run("os.utime('src/A.java', (1, 1))") == "EPERM"
    assert hostile.run(
        "fd = os.open('src/A.java', os.O_RDONLY)\nos.open(f'/proc/self/fd/{fd}', os.O_RDWR)"
    ) == ("EACCES")
    assert hostile.run("m = mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_WRITE)") == "EACCES"
    staged.collect()
    assert world.blobs() == blobs


KEEP = {
    "a descriptor": "kept = os.open('out/x', os.O_RDWR | os.O_CREAT); os.write(kept, b'good')",
    "a descriptor queued in a socket": """
fd = os.open('out/x', os.O_RDWR | os.O_CREAT); os.write(fd, b'good')
left, right = socket.socketpair()
socket.send_fds(left, [b'x'], [fd]); os.close(fd)
""",
    "a writable mapping": """
fd = os.open('out/x', os.O_RDWR | os.O_CREAT); os.write(fd, b'good')
mapping = mmap.mmap(fd, 4, mmap.MAP_SHARED); os.close(fd)
""",
    "a child's descriptor": """
there, here = os.pipe()
fd = os.open('out/x', os.O_RDWR | os.O_CREAT); os.write(fd, b'good')
child = os.fork()
if child == 0:
    os.close(here); os.read(there, 1); os.pwrite(fd, b'evil', 0); os._exit(0)
os.close(fd)
""",
}
WRITE_LATER = {
    "a descriptor": "os.pwrite(kept, b'evil', 0)",
    "a descriptor queued in a socket": "fd = socket.recv_fds(right, 1, 1)[1][0]; os.pwrite(fd, b'evil', 0)",
    "a writable mapping": "mapping[:] = b'evil'; mapping.flush()",
    "a child's descriptor": "os.write(here, b'x'); os.waitpid(child, 0)",
}


@pytest.mark.parametrize("how", KEEP)
def test_an_output_that_is_kept_open_for_writing_is_given_back_as_a_copy(
    staged: StagedAction, hostile: Hostile, action: Path, how: str
) -> None:
    assert hostile.run(KEEP[how]) is None
    assert staged.collect() == Collected(outputs=1, copied=1)
    assert hostile.run(WRITE_LATER[how]) is None
    assert (action / "out/x").read_bytes() == b"good"
    all_is_sealed(action)


MAKE_WRITABLE = """
libc = ctypes.CDLL(None, use_errno=True)
line, = [line for line in open('/proc/self/maps') if '/out/x' in line]
begin = ctypes.c_void_p(int(line.split('-')[0], 16))
if libc.mprotect(begin, 4096, mmap.PROT_READ | mmap.PROT_WRITE):
    raise OSError(ctypes.get_errno(), 'mprotect')
"""


def test_a_sealed_output_is_opened_for_writing_by_no_detour(
    staged: StagedAction, hostile: Hostile, action: Path, execroot: ActionExecroot
) -> None:
    hostile.run(
        "open('out/x', 'w').write('good'); read = os.open('out/x', os.O_RDONLY)\n"
        "path = os.open('out/x', os.O_PATH); out = os.open('out', os.O_RDONLY)\n"
        "view = mmap.mmap(read, 4, mmap.MAP_SHARED, mmap.PROT_READ)"
    )
    assert staged.collect() == Collected(outputs=1)
    assert hostile.run("os.open(f'/proc/self/fd/{read}', os.O_WRONLY)") == "EACCES"
    assert hostile.run("os.open(f'/proc/self/fd/{path}', os.O_WRONLY)") == "EACCES"
    assert hostile.run("os.fchmod(read, 0o666)") == "EPERM"
    assert hostile.run("os.fchown(read, worker, worker)") == "EPERM"
    assert hostile.run(MAKE_WRITABLE) == "EACCES"
    if execroot.strategy is Strategy.RENAME:  # the directory that it holds is the host's again
        assert hostile.run("open('y', 'w', opener=lambda p, f: os.open(p, f, dir_fd=out))") == "EACCES"
        assert hostile.run("os.unlink('x', dir_fd=out)") == "EACCES"
    assert (action / "out/x").read_bytes() == b"good"


def test_a_hard_link_kept_elsewhere_is_of_no_use(
    staged: StagedAction, execroot: ActionExecroot, action: Path, tmp_path: Path
) -> None:
    shelter = tmp_path / "shelter"
    shelter.mkdir()
    os.chown(shelter, WORKER_ID, WORKER_ID)
    with opened(shelter) as fd, Hostile(execroot.path, pass_fds=(fd,)) as hostile:
        hostile.run(f"open('out/x', 'w').write('good'); os.link('out/x', 'x', dst_dir_fd={fd})")
        assert (shelter / "x").stat().st_nlink == 2
        assert staged.collect() == Collected(outputs=1)
        assert hostile.run(f"os.open('x', os.O_WRONLY, dir_fd={fd})") == "EACCES"
        assert hostile.run(f"os.chmod('x', 0o666, dir_fd={fd})") == "EPERM"
    assert (action / "out/x").read_bytes() == b"good"
    all_is_sealed(action)


def test_all_names_of_an_output_that_is_kept_open_are_copied(
    staged: StagedAction, hostile: Hostile, action: Path
) -> None:
    hostile.run(
        "kept = os.open('out/x', os.O_RDWR | os.O_CREAT); os.write(kept, b'good')\n"
        "os.link('out/x', 'out/y'); os.link('out/x', 'a'); os.link('out/x', 'src/z')"
    )
    assert staged.collect() == Collected(outputs=4, copied=4)
    hostile.run("os.pwrite(kept, b'evil', 0)")
    for name in ("out/x", "out/y", "a", "src/z"):
        assert (action / name).read_bytes() == b"good"
    all_is_sealed(action)


def test_a_copy_is_bounded_by_what_the_file_was_and_holes_stay_holes(
    staged: StagedAction, hostile: Hostile, action: Path
) -> None:
    hostile.run(
        "kept = os.open('out/x', os.O_RDWR | os.O_CREAT)\n"
        "os.truncate(kept, 1 << 40); os.pwrite(kept, b'y', 1 << 39)"
    )
    assert staged.collect().copied == 1
    info = os.stat(action / "out/x")
    assert info.st_size == 1 << 40
    assert info.st_blocks * 512 < 1 << 20
    with (action / "out/x").open("rb") as file:
        file.seek(1 << 39)
        assert file.read(2) == b"y\0"


def test_a_write_lease_on_an_output_does_not_make_us_wait(
    staged: StagedAction, hostile: Hostile, execroot: ActionExecroot, action: Path
) -> None:
    hostile.run(
        "signal.signal(signal.SIGIO, signal.SIG_IGN)\n"
        "open('out/x', 'w').close(); lease = os.open('out/x', os.O_RDONLY)\n"
        "fcntl.fcntl(lease, fcntl.F_SETLEASE, fcntl.F_WRLCK)"
    )
    with pytest.raises(RuntimeUnavailable, match="write lease"):
        staged.collect()
    assert not (action / "out/x").exists()


# Lists that give the worker's uid everything; the format is that of the kernel.
SET_ACCESS_LISTS = """
def entry(tag, permissions, who=0xffffffff):
    return struct.pack('<HHI', tag, permissions, who)
entries = [entry(1, 7), entry(2, 7, worker), *(entry(tag, 7) for tag in (4, 16, 32))]
acl = struct.pack('<I', 2) + b''.join(entries)
open('out/x', 'w').write('good'); os.mkdir('out/d')
x, out, gen = (os.open(path, os.O_RDONLY) for path in ('out/x', 'out/d', 'out/gen'))
for path in ('out/x', 'out/d', 'out/gen'):
    os.setxattr(path, 'system.posix_acl_access', acl)
for path in ('out/d', 'out/gen'):
    os.setxattr(path, 'system.posix_acl_default', acl)
kept = open('out/d/kept', 'w')
"""


def test_access_lists_do_not_outlive_the_collection(
    staged: StagedAction, hostile: Hostile, action: Path, execroot: ActionExecroot
) -> None:
    hostile.run(SET_ACCESS_LISTS)
    assert staged.collect() == Collected(outputs=2, copied=1)
    assert hostile.run("os.open(f'/proc/self/fd/{x}', os.O_WRONLY)") == "EACCES"
    if execroot.strategy is Strategy.RENAME:
        assert hostile.run("os.open('new', os.O_WRONLY | os.O_CREAT, dir_fd=out)") == "EACCES"
        assert hostile.run("os.open('new', os.O_WRONLY | os.O_CREAT, dir_fd=gen)") == "EACCES"
        assert hostile.run("os.open('kept', os.O_WRONLY, dir_fd=out)") == "EACCES"
    all_is_sealed(action)


@pytest.fixture
def precious(tmp_path: Path) -> Iterator[Path]:
    """What is not the worker's, and must not change."""
    path = tmp_path / "precious"
    (path / "dir").mkdir(parents=True)
    (path / "dir/x").write_text("secret")
    (path / "dir/x").chmod(0o600)
    before = look(path)
    yield path
    assert look(path) == before


def test_links_to_elsewhere_are_given_back_as_links_and_never_followed(
    staged: StagedAction, hostile: Hostile, action: Path, precious: Path
) -> None:
    hostile.run(
        f"os.symlink('/etc/shadow', 'out/x'); os.symlink({str(precious)!r}, 'out/d')\n"
        f"shutil.rmtree('out/gen'); os.symlink({str(precious / 'dir')!r}, 'out/gen')\n"
        f"shutil.rmtree('src'); os.symlink({str(precious / 'dir')!r}, 'src')"
    )
    assert staged.collect() == Collected(outputs=4)
    assert os.readlink(action / "out/x") == "/etc/shadow"
    assert (action / "src").is_symlink()
    all_is_sealed(action)


# In a thread, as fast as it can, through descriptors that it has kept: what was a file becomes a link, a
# directory, another file; times are forged. Whatever fails, fails.
SWAP = """
def swap():
    global turns
    while not done:
        turns += 1
        for base in bases:
            for step in (
                lambda: os.rename('spare-link', 'x', src_dir_fd=base, dst_dir_fd=base),
                lambda: os.symlink(precious, 'spare-link', dir_fd=base),
                lambda: os.unlink('x', dir_fd=base),
                lambda: os.mkdir('x', dir_fd=base),
                lambda: os.rename('x', 'y', src_dir_fd=base, dst_dir_fd=base),
                lambda: os.symlink(precious, 'x', dir_fd=base),
                lambda: os.unlink('x', dir_fd=base),
                lambda: os.close(os.open('x', os.O_WRONLY | os.O_CREAT, dir_fd=base)),
                lambda: os.rename('x', 'A.java', src_dir_fd=base, dst_dir_fd=base),
                lambda: os.utime(base, ns=forged),
                lambda: os.rmdir('y', dir_fd=base),
                lambda: os.fchmod(base, 0o777),
            ):
                try: step()
                except OSError: pass
turns = 0
"""


def test_outputs_swapped_while_they_are_collected_do_no_harm(
    world: ActionWorld, execroot: ActionExecroot, precious: Path
) -> None:
    swaps = 0
    with Hostile(execroot.path) as hostile:
        hostile.run(SWAP)
        for number in range(ROUNDS):
            action = world.make_action(INPUTS, f"action{number}")
            blobs = world.blobs()
            with opened(action) as fd:
                staged = execroot.stage(fd)
            hostile.run(
                f"precious = {str(precious / 'dir')!r}; done = False\n"
                "forged = (os.stat('src').st_mtime_ns,) * 2\n"
                "bases = [os.open(p, os.O_RDONLY) for p in ('.', 'src', 'out', 'out/gen')]\n"
                "kept = os.open('out/held', os.O_RDWR | os.O_CREAT); os.write(kept, b'good')\n"
                "threading.Thread(target=swap, daemon=True).start()"
            )
            staged.collect()
            before = look(action)
            all_is_sealed(action)
            swaps += hostile.run(
                "done = True; result = turns; turns = 0; os.pwrite(kept, b'evil', 0)\n"
                "for fd in [*bases, kept]: os.close(fd)"
            )
            assert look(action) == before
            assert before["out/held"].content == b"good"
            assert world.blobs() == blobs
    assert swaps > ROUNDS / 10, "nothing was swapped while it was collected"


AT_HOME = """
import threading
turns, done, shut = 0, False, []
def look():
    global turns
    while not done:
        try: os.close(os.open('.', os.O_RDONLY))
        except OSError as error: shut.append(error.errno)
        turns += 1
threading.Thread(target=look).start()
"""


def test_the_way_home_is_never_shut(world: ActionWorld, execroot: ActionExecroot, hostile: Hostile) -> None:
    """A JVM opens its working directory when it starts, to come back to it: else it stays elsewhere."""
    hostile.run(AT_HOME)
    for number in range(ROUNDS):
        action = world.make_action({"src/A.java": "class A"}, f"action{number}")
        with opened(action) as fd:
            execroot.stage(fd).collect()
    turns, shut = hostile.run("done = True; result = (turns, shut)")
    assert shut == []
    assert turns > ROUNDS


RUSH = """
import threading
turns, done = 0, False
paths = ['src/deep/er', 'src/deep/25', 'src/deep/49', 'src/deep', 'src', 'out/gen', 'out', 'src/added']
def rush():
    global turns
    while not done:
        for path in paths:
            for attack in (
                lambda: os.mkdir(path + '/added'),
                lambda: os.rename(path, path + '.away'),
                lambda: os.symlink('/etc', path),
                lambda: os.symlink('/etc', path + '/link'),
            ):
                try: attack(); turns += 1
                except OSError: pass
threading.Thread(target=rush).start()
"""


def test_who_rushes_into_a_tree_that_is_being_staged_finds_closed_gates(
    world: ActionWorld, execroot: ActionExecroot, hostile: Hostile
) -> None:
    tree = {"src/A.java": "class A", "src/deep/er/B.java": "class B", "out/gen": None, "flags": "-g"}
    tree |= {f"src/deep/{number}/C.java": "class C" for number in range(50)}
    hostile.run(RUSH)
    for number in range(ROUNDS // 10):
        action = world.make_action(tree, f"action{number}")
        blobs = world.blobs()
        with opened(action) as fd:
            staged = execroot.stage(fd)  # raises if anything is not where it was
        time.sleep(0.001)
        staged.collect()
        all_is_sealed(action)
        assert world.blobs() == blobs
    assert hostile.run("done = True; result = turns") > ROUNDS, "nobody got in afterwards"


def test_a_worker_that_keeps_its_cwd_in_a_given_back_directory_only_looks_on(
    staged: StagedAction, hostile: Hostile, action: Path, execroot: ActionExecroot
) -> None:
    hostile.run("open('out/gen/x', 'w').close(); os.chdir('out/gen')")
    staged.collect()
    if execroot.strategy is Strategy.RENAME:
        assert hostile.run("open('later', 'w')") == "EACCES"
        assert hostile.run("os.unlink('x')") == "EACCES"
        assert hostile.run("os.chmod('.', 0o777)") == "EPERM"
    else:  # a mirror is gone
        assert hostile.run("open('later', 'w')") == "ENOENT"
    assert not (action / "out/gen/later").exists()
    all_is_sealed(action)


def test_somebody_who_breaks_our_lease_does_not_end_us(tmp_path: Path) -> None:
    code = (
        "import os, sys\n"
        "from wrapper.execroot import seal\n"
        "fd = os.open(sys.argv[1], os.O_RDONLY)\n"
        "assert seal._nobody_writes(fd)\n"
        "try: os.open(sys.argv[1], os.O_WRONLY | os.O_NONBLOCK)\n"
        "except BlockingIOError: print('broken, and alive')\n"
    )
    file = tmp_path / "file"
    file.touch()
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "broken, and alive\n"), done
