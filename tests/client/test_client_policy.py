"""The policy file beside the program: what is read from it, and from whom it is believed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.support.client_world import PROGRAM, ClientWorld
from wrapper import client_protocol

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="a file of another user needs root")
USER = 4242


def refused(world: ClientWorld, *words: str) -> None:
    """The client says so, and neither runs the action nor asks the daemon."""
    ended = world.run(["/bin/echo", "direct"])
    assert (ended.code, ended.stdout) == (78, b"")
    said = ended.stderr.decode()
    assert said.startswith(f"{PROGRAM}: {world.policy_file}: "), said
    assert said.count("\n") == 1
    for word in words:
        assert word in said, said
    assert world.nobody_connects()


def test_without_a_policy_file_every_action_runs_directly(world: ClientWorld) -> None:
    world.policy_file.unlink()
    assert world.run(["/bin/echo", "direct"]) == (0, b"direct\n", b"")
    assert world.nobody_connects()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n\n# only = comments\n",
        "lost = fail",
        "work_root = {root}x",
        "work_root = {root}/operation-1/work",  # the cwd itself is not beneath it
    ],
)
def test_without_a_work_root_above_it_an_action_runs_directly(world: ClientWorld, text: str) -> None:
    world.policy_text(f"socket = {world.socket_path}\n" + text.format(root=world.work_root))
    assert world.run(["/bin/echo", "direct"]) == (0, b"direct\n", b"")
    assert world.nobody_connects()


def test_comments_blanks_and_several_work_roots_are_understood(world: ClientWorld) -> None:
    others = "".join(f"work_root = /nowhere/{number}\n" for number in range(15))
    world.policy_text(
        f"# a comment\r\n\r\n \t \n{others}\t work_root\t=  {world.work_root}//  \r\n"
        f"  # another = one\nfallback=fail\nsilence_s=1.5\nsocket = {world.socket_path}"
    )
    assert world.converse(client_protocol.taken() + client_protocol.end(7)).code == 7
    world.socket_path.unlink()
    assert world.run(["/bin/echo"]).code == 75


def test_of_a_name_that_is_there_twice_the_last_counts(world: ClientWorld) -> None:
    world.policy_text(
        f"socket = /nowhere\nwork_root = {world.work_root}\nsocket = {world.socket_path}\n"
        "fallback = fail\nfallback = one-shot\n"
    )
    assert world.converse(client_protocol.taken() + client_protocol.end(7)).code == 7


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sockets = /x", "no such name: sockets"),
        ("Socket = /x", "no such name: Socket"),
        ("= /x", "no such name: "),
        ("socket", 'not "name = value": socket'),
        ("socket = pool.sock", "wrong value for socket"),
        ("socket =", "wrong value for socket"),
        ("socket = /" + "x" * 107, "wrong value for socket"),
        ("work_root = work", "wrong value for work_root"),
        ("work_root = /", "wrong value for work_root"),
        ("work_root =", "wrong value for work_root"),
        ("work_root = /" + "x" * 4096, "wrong value for work_root"),
        ("work_root = /x\n" * 17, "wrong value for work_root"),
        ("fallback = yes", "wrong value for fallback"),
        ("fallback = one-shot # not a comment", "wrong value for fallback"),
        ("lost = one-shot", "wrong value for lost"),
        ("timeouts = Host", "wrong value for timeouts"),
        *(
            (f"silence_s = {value}", "wrong value for silence_s")
            for value in (
                "",
                "0",
                "0.000",
                "-1",
                "1.",
                ".5",
                "1.2345",
                "86400.001",
                "1e3",
                "86401",
                "9" * 30,
                "1,5",
                "1.-5",
            )
        ),
        ("lost = fail\n\0", "NUL"),
        ("#" * 65536 + "\n", "more than 64 KiB"),
    ],
)
def test_a_wrong_line_is_an_error(world: ClientWorld, text: str, words: str) -> None:
    world.policy_text(text)
    refused(world, words)


def test_the_largest_values_are_taken(world: ClientWorld) -> None:
    world.policy_text("socket = /" + "x" * 106 + "\nwork_root = /" + "x" * 4094 + "\nsilence_s = 86400.0\n")
    assert world.run(["/bin/echo", "direct"]) == (0, b"direct\n", b"")
    world.policy_text("#" * 65536)
    assert world.run(["/bin/echo", "direct"]) == (0, b"direct\n", b"")


def test_a_wrong_file_stops_an_action_without_a_key_too(world: ClientWorld) -> None:
    world.policy_text("?")
    assert world.run(["/bin/echo", "direct"], {}).code == 78


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o666, 0o777])
def test_a_file_that_others_may_write_is_not_believed(world: ClientWorld, mode: int) -> None:
    world.policy_file.chmod(mode)
    refused(world, "writable by nobody else")


@needs_root
def test_the_file_of_a_third_user_is_not_believed(world: ClientWorld) -> None:
    os.chown(world.policy_file, USER, USER)
    refused(world, "belong to root or to the program's owner")


@needs_root
def test_the_file_of_the_programs_owner_is_believed(world: ClientWorld) -> None:
    os.chown(world.policy_file, USER, USER)
    os.chown(world.program, USER, USER)
    assert world.converse(client_protocol.taken() + client_protocol.end(7)).code == 7


@needs_root
def test_a_file_that_cannot_be_read_is_an_error(world: ClientWorld) -> None:
    world.policy_file.chmod(0o600)
    prefix = ("/usr/bin/setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups")
    if world.is_python:
        shutil.copy(shutil.which("python3", path="/usr/bin") or "", world.folder / "python")
        text = world.program.read_bytes().partition(b"\n")[2]
        world.program.write_bytes(b"#!%s -IS\n" % bytes(world.folder / "python") + text)
    ended = world.run(["/bin/echo"], prefix=prefix)
    assert ended.code == 78
    assert b"cannot be opened: Permission denied" in ended.stderr


@pytest.mark.parametrize("kind", ["directory", "fifo", "device"])
def test_what_is_no_regular_file_is_an_error_and_not_waited_for(world: ClientWorld, kind: str) -> None:
    world.policy_file.unlink()
    if kind == "directory":
        world.policy_file.mkdir()
    elif kind == "fifo":
        os.mkfifo(world.policy_file, 0o644)
    else:
        world.policy_file.symlink_to("/dev/zero")
    refused(world, "not a regular file")


def test_the_file_lies_beside_the_real_program_not_beside_a_link_to_it(world: ClientWorld) -> None:
    elsewhere = world.folder / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / f"{PROGRAM}.conf").write_text("?")
    link = elsewhere / "another-name"
    link.symlink_to(world.program)
    world.program = link
    assert world.converse(client_protocol.taken() + client_protocol.end(7)).code == 7


def test_a_link_to_the_file_is_followed(world: ClientWorld, tmp_path: Path) -> None:
    world.policy_file.rename(tmp_path / "policy")
    world.policy_file.symlink_to(tmp_path / "policy")
    assert world.converse(client_protocol.taken() + client_protocol.end(7)).code == 7


def test_the_environment_cannot_name_a_socket_or_a_policy(world: ClientWorld, tmp_path: Path) -> None:
    world.policy_file.unlink()
    names = ("NL_SOCKET", "SOCKET", "NATIVELINK_WORKER_SOCKET", "NL_WORKER_SOCKET", "NL_POLICY", "WORK_ROOT")
    forged = dict.fromkeys(names, str(world.socket_path))
    python = {"PYTHONPATH": str(tmp_path), "PYTHONSTARTUP": "/x", "PYTHONHOME": "/x", "LD_PRELOAD": ""}
    ended = world.run(["/bin/echo", "direct"], world.environment(**forged, **python))
    assert ended == (0, b"direct\n", b"")
    assert world.nobody_connects()
