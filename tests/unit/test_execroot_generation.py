"""Generations: the dead are found however they died, the living never, and each is wiped once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from wrapper.errors import ConfigError
from wrapper.execroot.action_execroot import ActionExecroot
from wrapper.generation import Generation, take_over

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tmp_path / "execroots"


def python(code: str, *arguments: str, close_fds: bool = True) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        close_fds=close_fds,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def end(process: subprocess.Popen[str], number: int = signal.SIGKILL) -> None:
    process.send_signal(number)
    process.communicate()


# Stops in the middle of staging: some of the entries are in the worker's execroot, some not yet.
DIES_IN_MID_STAGE = """
import os, signal, sys
from wrapper.execroot.action_execroot import ActionExecroot
from wrapper.generation import Generation
generation = Generation.begin(sys.argv[1])
uid = 1000 if os.geteuid() == 0 else os.geteuid()
execroot = ActionExecroot.make(generation.path, "w1", uid=uid, gid=uid)
real, count = os.rename, 0
def rename(*args, **kwargs):
    global count
    real(*args, **kwargs)
    count += 1
    if count == 2:
        print(generation.name, flush=True)
        signal.pause()
os.rename = rename
execroot.stage(os.open(sys.argv[2], os.O_RDONLY))
"""


@pytest.fixture
def action(tmp_path: Path) -> Path:
    tree = tmp_path / "action"
    for name in ("a", "b", "c"):
        (tree / name).mkdir(parents=True)
        (tree / name / "in").write_text(name)
        (tree / name / "in").chmod(0o444)
    return tree


@pytest.fixture
def killed(base: Path, action: Path) -> str:
    """The name of the generation of a process that was killed in the middle of staging."""
    process = python(DIES_IN_MID_STAGE, str(base), str(action))
    name = line(process)
    assert take_over(str(base)) == []
    end(process)
    return name


def test_what_a_process_killed_in_mid_stage_left_is_found_and_wiped(
    base: Path, action: Path, killed: str
) -> None:
    assert len(list(action.iterdir())) == 1
    assert len(list((base / killed / "w1").iterdir())) == 2
    own = Generation.begin(str(base))
    (dead,) = take_over(str(base))
    assert dead.name == killed
    assert (base / killed).exists()
    dead.wipe()
    dead.wipe()
    assert sorted(path.name for path in base.iterdir()) == [own.name]
    assert take_over(str(base)) == []
    own.wipe()


def test_a_generation_is_private_and_its_lock_is_not_inherited_by_what_it_starts(base: Path) -> None:
    own = Generation.begin(str(base))
    assert os.stat(own.path).st_mode & 0o777 == 0o700
    assert os.stat(base).st_mode & 0o777 == 0o700
    child = python("print('up', flush=True); input()", close_fds=False)
    try:
        assert line(child) == "up"
        own.leave()
        (dead,) = take_over(str(base))
        dead.wipe()
    finally:
        end(child)
    assert list(base.iterdir()) == []


def test_of_several_who_start_at_once_exactly_one_gets_each_dead_generation(base: Path) -> None:
    dead = [Generation.begin(str(base)) for _ in range(20)]
    for generation in dead:
        Path(generation.path, "deep").mkdir()
        generation.leave()
    code = """
import sys
from wrapper.generation import Generation, take_over
print("ready", flush=True)
input()
own = Generation.begin(sys.argv[1])
found = take_over(sys.argv[1])
print(",".join(g.name for g in found), flush=True)
for generation in found:
    generation.wipe()
print(take_over(sys.argv[1]), flush=True)
input()
"""
    starters = [python(code, str(base)) for _ in range(5)]
    try:
        assert [line(starter) for starter in starters] == ["ready"] * 5
        for starter in starters:
            assert starter.stdin is not None
            starter.stdin.write("\n")
            starter.stdin.flush()
        taken = [name for starter in starters for name in line(starter).split(",") if name]
        assert sorted(taken) == sorted(generation.name for generation in dead)
        assert [line(starter) for starter in starters] == ["[]"] * 5
        assert len(list(base.iterdir())) == 5
    finally:
        for starter in starters:
            end(starter)


def test_one_who_dies_before_wiping_leaves_the_work_to_the_next(base: Path, killed: str) -> None:
    first = take_over(str(base))
    assert take_over(str(base)) == []
    for generation in first:
        generation.leave()
    second = take_over(str(base))
    assert [generation.name for generation in second] == [killed]
    second[0].wipe()


def test_what_is_no_generation_is_left_alone(base: Path, tmp_path: Path) -> None:
    base.mkdir(mode=0o700)
    (base / "other").mkdir()
    (base / "generation-file").write_text("x")
    (base / "generation-link").symlink_to(tmp_path)
    assert take_over(str(base)) == []
    assert len(list(base.iterdir())) == 3


@pytest.mark.parametrize("mode", [0o777, 0o720])
def test_a_base_that_others_may_write_to_is_refused(base: Path, mode: int) -> None:
    base.mkdir()
    base.chmod(mode)
    with pytest.raises(ConfigError, match="writable for nobody else"):
        Generation.begin(str(base))
    with pytest.raises(ConfigError, match="writable for nobody else"):
        take_over(str(base))


def test_a_base_that_is_a_link_or_a_file_is_refused(base: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    base.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="cannot be used"):
        Generation.begin(str(base))
    base.unlink()
    base.write_text("")
    with pytest.raises(ConfigError, match="cannot be used"):
        take_over(str(base))


@pytest.fixture
def execroot(base: Path) -> Iterator[ActionExecroot]:
    own = Generation.begin(str(base))
    yield ActionExecroot.make(own.path, "w1", uid=os.geteuid(), gid=os.getegid())
    own.wipe()


def test_wiping_takes_execroots_with_all_that_workers_left_in_them(execroot: ActionExecroot) -> None:
    deep = Path(execroot.path, "d")
    deep.mkdir()
    (deep / "x").mkdir()
    (deep / "x" / "f").write_text("f")
    deep.chmod(0)
    execroot.remove()
    assert not os.path.exists(execroot.path)
