"""Where the action runs, and where the side-channel file is written: never where a variable says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.client_world import SIDE_CHANNEL, ClientWorld
from wrapper.client_protocol import FailureKind, failure, taken

LOST = taken() + failure(FailureKind.LOST, "gone")
TIMED_OUT = taken() + failure(FailureKind.TIMEOUT, "too slow")


@pytest.mark.parametrize("depth", ["", "a", "a/b/c/d"])
def test_a_working_directory_is_deeper_and_changes_nothing(world: ClientWorld, depth: str) -> None:
    directory = world.cwd / depth
    directory.mkdir(parents=True, exist_ok=True)
    process = world.start(["/bin/echo"], cwd=directory)
    connection = world.accept()
    connection.request()
    assert os.path.samestat(os.fstat(connection.cwd), directory.stat())
    connection.send(LOST)
    assert world.end(process).code == 75
    assert world.side_channel() is not None


def test_the_action_directory_itself_is_good_enough(world: ClientWorld) -> None:
    world.cwd.rmdir()
    world.cwd = world.action_directory
    assert world.converse(LOST).code == 75
    assert (world.action_directory / SIDE_CHANNEL).exists()


def test_the_work_root_itself_is_no_action_directory(world: ClientWorld) -> None:
    process = world.start(["/bin/echo", "direct"], cwd=world.work_root)
    assert world.end(process) == (0, b"direct\n", b"")
    assert world.nobody_connects()


def test_a_work_root_may_be_named_by_a_link(world: ClientWorld) -> None:
    link = world.folder / "link"
    link.symlink_to(world.work_root)
    world.policy(work_root=str(link))
    assert world.converse(LOST).code == 75
    assert world.side_channel() is not None


@pytest.mark.parametrize(
    "forged",
    [
        "{elsewhere}/{name}",
        "{action}/../../{name}",
        "{action}/work/../../../elsewhere/{name}",
        "{name}",
        "../{name}",
        "{elsewhere}/link/{name}",
    ],
)
def test_of_the_side_channels_variable_only_the_name_counts(world: ClientWorld, forged: str) -> None:
    elsewhere = world.folder / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "link").symlink_to(world.work_root)
    text = forged.format(elsewhere=elsewhere, action=world.action_directory, name=SIDE_CHANNEL)
    env = world.environment(NL_SIDE_CHANNEL=text, NL_ACTION_DIR=str(elsewhere))
    assert world.converse(TIMED_OUT, env=env).code == 124
    assert world.side_channel() == '{"failure": "timeout"}'
    found = [path for path in world.folder.rglob("*") if path.name.endswith((SIDE_CHANNEL, ".new"))]
    assert found == [world.action_directory / SIDE_CHANNEL]


@pytest.mark.parametrize(
    "name",
    [
        "",
        "..",
        "work",
        SIDE_CHANNEL[:-1],
        SIDE_CHANNEL + "0",
        SIDE_CHANNEL.upper(),
        SIDE_CHANNEL[:-1] + "g",
        SIDE_CHANNEL + "/",
        SIDE_CHANNEL + "\n",
        "." + SIDE_CHANNEL[:-1],
    ],
)
def test_a_name_of_another_form_is_not_written_and_the_exit_code_is_the_same(
    world: ClientWorld, name: str
) -> None:
    env = world.environment(NL_SIDE_CHANNEL=f"{world.action_directory}/{name}")
    ended = world.converse(LOST, env=env)
    assert ended.code == 75
    assert b"NativeLink cannot be told" in ended.stderr
    assert ended.stderr.endswith(b": gone\n")
    assert world.side_channel() is None
    assert os.listdir(world.cwd) == []


def test_what_the_action_has_put_there_is_replaced_and_not_followed(
    world: ClientWorld, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("whole")
    for name in (SIDE_CHANNEL, f".{SIDE_CHANNEL}.new"):
        (world.action_directory / name).symlink_to(victim)
    assert world.converse(TIMED_OUT).code == 124
    assert world.side_channel() == '{"failure": "timeout"}'
    assert victim.read_text() == "whole"


def test_a_side_channel_that_cannot_be_written_is_told_and_leaves_no_empty_file(world: ClientWorld) -> None:
    (world.action_directory / SIDE_CHANNEL).mkdir()
    ended = world.converse(TIMED_OUT)
    assert ended.code == 124
    assert b"cannot be told by its side-channel file: " in ended.stderr
    assert not list((world.action_directory / SIDE_CHANNEL).iterdir())


def test_a_directory_that_was_moved_is_none_of_the_work_roots(world: ClientWorld) -> None:
    """The cwd is a real directory beneath the root; what `..` says of it decides, as the kernel sees it."""
    moved = world.folder / "moved"
    script = 'mv "$1" "$2" && shift 2 && exec "$@"'
    prefix = ("/bin/sh", "-c", script, "sh", str(world.action_directory), str(moved))
    ended = world.run(["/bin/echo", "direct"], prefix=prefix)
    assert ended == (0, b"direct\n", b"")
    assert world.nobody_connects()


def test_a_directory_that_is_deleted_makes_the_action_run_directly(world: ClientWorld) -> None:
    prefix = ("/bin/sh", "-c", 'rmdir "$1" && shift && exec "$@"', "sh", str(world.cwd))
    ended = world.run(["/bin/echo", "direct"], prefix=prefix)
    assert (ended.code, ended.stdout) == (0, b"direct\n")
    assert world.nobody_connects()


def test_the_policy_decides_what_the_host_is_told(world: ClientWorld) -> None:
    world.policy(timeouts="host", lost="fail")
    assert world.converse(TIMED_OUT).code == 124
    ended = world.converse(LOST)
    assert (ended.code, ended.stderr) == (70, b"nativelink_worker_entrypoint: gone\n")
    assert world.side_channel() is None


def test_a_full_disk_leaves_no_empty_file_that_would_mean_to_run_it_again(
    world: ClientWorld,
) -> None:
    full = ("/bin/sh", "-c", 'trap "" XFSZ; ulimit -f 0; exec "$@"', "sh")
    process = world.start(["/bin/echo"], prefix=full)
    connection = world.accept()
    connection.request()
    connection.send(TIMED_OUT)
    ended = world.end(process)
    assert ended.code == 124
    assert b"cannot be told by its side-channel file: File too large" in ended.stderr
    assert world.side_channel() is None
