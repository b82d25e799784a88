"""The pool daemon as its operator starts it: what happens to actions, one after the other and all at once."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.action_world import needs_root
from tests.support.client import FRAMES, PlainClient, request_of
from tests.support.daemon import HOST_ID, PYTHON, Daemon, Node, eventually_true
from tests.support.loop import run_async

pytestmark = [pytest.mark.e2e, needs_root]


@pytest.fixture
def node() -> Iterator[Node]:
    with Node() as made:
        yield made


def echo_pool(node: Node, *flags: str, **changes: Any) -> dict[str, Any]:
    """A pool whose own command is the echo worker."""
    command = [PYTHON, "-I", "-S", str(node.tools / "echo_worker.py"), *flags]
    tools = [{"pattern": "echo_worker.py"}]
    return {"worker_command": command, "min_warm_workers": 1, "tools": tools, **changes}


def own_tool(node: Node, *flags: str) -> list[str]:
    """The start of a command line of an action whose tool is the echo worker."""
    return [PYTHON, "-I", "-S", str(node.tools / "echo_worker.py"), *flags]


TOOL = "echo_worker.py"


def processes_below(folder: Path) -> list[str]:
    """Pids of those whose temporary directory is there."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"{folder}/".encode() in path.read_bytes():
                found.append(path.parent.name)
    return found


def test_an_action_is_served_by_the_pools_own_command(node: Node) -> None:
    async def main(daemon: Daemon) -> None:
        cwd = node.action({"flags": "--read=src/A\n--write=out/A\nhello\n", "src/A": "class A"})
        code, output = await daemon.run(cwd, TOOL, "@flags")
        assert (code, output.split(b"\n")[0]) == (0, output.split(b"\n")[0])
        assert b"hello" in output
        info = os.stat(cwd / "out/A")
        assert (info.st_uid, info.st_mode & 0o7777) == (HOST_ID, 0o444)
        assert (cwd / "src/A").read_text() == "class A"

    with Daemon(node, node.document(echo_pool(node))) as daemon:
        run_async(main(daemon))


def test_an_actions_own_tool_is_found_out_to_be_a_worker_and_stays_warm(node: Node) -> None:
    document = node.document({"tools": [{"pattern": "echo_worker.py"}]})

    async def main(daemon: Daemon) -> None:
        for number in range(5):
            cwd = node.action({"flags": f"--count\nrequest{number}\n"})
            code, output = await daemon.run(cwd, *own_tool(node), "@flags", env={"A": "1"})
            assert code == 0
            assert f"request{number}".encode() in output
        assert daemon.log.read_text().count("worker started") == 1

    with Daemon(node, document) as daemon:
        run_async(main(daemon))


@pytest.mark.parametrize("flag", ["--json", "--proto"])
def test_the_protocol_is_detected(node: Node, flag: str) -> None:
    flags = ["--json"] if flag == "--json" else []
    document = node.document({"tools": [{"pattern": "echo_worker.py"}]})

    async def main(daemon: Daemon) -> None:
        for number in range(3):
            cwd = node.action({"flags": f"request{number}\n"})
            code, output = await daemon.run(cwd, *own_tool(node, *flags), "@flags")
            assert (code, output) == (0, f"echo:request{number}".encode())

    with Daemon(node, document) as daemon:
        run_async(main(daemon))


def test_a_tool_that_is_no_worker_leaves_the_tree_as_it_was_and_is_not_tried_again(node: Node) -> None:
    tool = "#!/bin/sh\necho junk > out/junk; echo this is no worker\n"
    document = node.document({"tools": [{"pattern": "no_worker"}]})

    async def main(daemon: Daemon) -> None:
        program = node.tools / "no_worker"
        program.write_text(tool)
        program.chmod(0o755)
        cwd = node.action({"flags": "a\n", "src/A": "a"})
        frames = await daemon.ask(cwd, str(program), "@flags")
        assert frames[-1][0] == FRAMES.ONE_SHOT, frames
        assert sorted(str(path.relative_to(cwd)) for path in cwd.rglob("*")) == [
            "flags",
            "out",
            "src",
            "src/A",
        ]
        starts = daemon.log.read_text().count("worker started")
        ((kind, reason),) = await daemon.ask(node.action({"flags": "a\n"}), str(program), "@flags")
        assert kind == FRAMES.ONE_SHOT
        assert b"not used for now" in reason
        assert daemon.log.read_text().count("worker started") == starts

    with Daemon(node, document) as daemon:
        run_async(main(daemon))


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["/usr/bin/gcc", "@flags"], b"not known to be a persistent worker"),
        (["/bin/sh", "-c", "true"], b"not known to be a persistent worker"),
    ],
)
def test_what_is_no_workers_action_runs_as_it_stands(node: Node, argv: list[str], reason: bytes) -> None:
    async def main(daemon: Daemon) -> None:
        for _ in range(2):
            ((kind, text),) = await daemon.ask(node.action({"flags": "-c\n"}), *argv)
            assert kind == FRAMES.ONE_SHOT
            assert reason in text
        log = daemon.log.read_text()
        assert log.count(f"INFO without a worker: {argv[0]} of key 'key'") == 1

    with Daemon(node, node.document({})) as daemon:
        run_async(main(daemon))


def test_a_tool_from_the_inputs_serves_as_long_as_it_is_the_same(node: Node) -> None:
    echo = (node.tools / "echo_worker.py").read_text()
    document = node.document({"tools": [{"pattern": "echo_worker.py"}]})

    async def run(daemon: Daemon, text: str, number: int) -> bytes:
        files = {"tool/echo_worker.py": text, "flags": f"--read=tool/echo_worker.py\nnumber{number}\n"}
        cwd = node.action(files)
        argv = [PYTHON, "-I", "-S", "tool/echo_worker.py"]
        code, output = await daemon.run(cwd, *argv, "@flags")
        assert code == 0
        return output

    async def main(daemon: Daemon) -> None:
        for number in range(3):
            assert f"number{number}".encode() in await run(daemon, echo, number)
        assert daemon.log.read_text().count("worker started") == 1
        changed = echo + "\n# another version\n"
        assert b"number9" in await run(daemon, changed, 9)
        assert daemon.log.read_text().count("worker started") == 2
        await run(daemon, echo, 4)
        assert daemon.log.read_text().count("worker started") == 2

    with Daemon(node, document) as daemon:
        run_async(main(daemon))


def test_with_a_working_directory_paths_count_from_there(node: Node) -> None:
    async def main(daemon: Daemon) -> None:
        for _ in range(2):
            cwd = node.action({"flags": "--print-cwd\n--write=out/made\n"}, below="sub/dir")
            inode = cwd.stat().st_ino
            code, output = await daemon.run(cwd, TOOL, "@flags")
            assert code == 0
            assert b"/sub/dir" in output
            assert (cwd / "out/made").exists()
            assert cwd.stat().st_ino == inode

    with Daemon(node, node.document(echo_pool(node))) as daemon:
        run_async(main(daemon))


def test_an_action_that_takes_too_long_is_ended_and_the_next_served(node: Node) -> None:
    async def main(daemon: Daemon) -> None:
        cwd = node.action({"flags": "--hang\n"})
        frames = await daemon.ask(cwd, TOOL, "@flags", timeout_ms=200)
        assert frames[-1][0] == FRAMES.FAILURE
        assert frames[-1][1][:1] == b"t"
        assert list(cwd.iterdir()) == []
        assert (await daemon.run(node.action({"flags": "a\n"}), TOOL, "@flags"))[0] == 0

    with Daemon(node, node.document(echo_pool(node))) as daemon:
        run_async(main(daemon))


def test_a_worker_that_dies_is_told_as_lost_and_after_some_in_a_row_the_tool_is_left_alone(
    node: Node,
) -> None:
    async def main(daemon: Daemon) -> None:
        for _ in range(3):
            frames = await daemon.ask(node.action({"flags": "--die\n"}), TOOL, "@flags")
            assert frames[-1][0] == FRAMES.FAILURE
            assert frames[-1][1][:1] == b"l"
        ((kind, reason),) = await daemon.ask(node.action({"flags": "a\n"}), TOOL, "@flags")
        assert kind == FRAMES.ONE_SHOT
        assert b"not used for now" in reason

    with Daemon(node, node.document(echo_pool(node))) as daemon:
        run_async(main(daemon))


def test_a_client_that_is_gone_takes_its_worker_with_it_and_nobody_elses(node: Node) -> None:
    async def main(daemon: Daemon) -> None:
        assert (await daemon.run(node.action({"flags": "a\n"}), TOOL, "@flags"))[0] == 0
        cwd = node.action({"flags": "--hang\n"})
        client = await PlainClient.ask(daemon.socket, request_of(TOOL, "@flags"), str(cwd))
        assert await client.frame() == (FRAMES.TAKEN, b"")
        client.close()
        await eventually_true(lambda: "cancelled in mid-request" in daemon.log.read_text())
        assert list(cwd.iterdir()) == []
        assert (await daemon.run(node.action({"flags": "a\n"}), TOOL, "@flags"))[0] == 0

    with Daemon(node, node.document(echo_pool(node))) as daemon:
        run_async(main(daemon))


def test_many_actions_at_once_each_get_their_own_answer_and_outputs(node: Node) -> None:
    async def one(daemon: Daemon, number: int) -> None:
        files = {"flags": f"--write=out/{number}\nnumber{number}\n", "src": str(number)}
        cwd = node.action(files)
        code, output = await daemon.run(cwd, TOOL, "@flags")
        assert code == 0
        assert output.endswith(f"number{number}".encode())
        assert [path.name for path in (cwd / "out").iterdir()] == [str(number)]
        assert (cwd / "src").read_text() == str(number)

    async def main(daemon: Daemon) -> None:
        for _ in range(5):
            await asyncio.gather(*(one(daemon, number) for number in range(40)))

    with Daemon(node, node.document(echo_pool(node, max_workers=4))) as daemon:
        run_async(main(daemon))


@pytest.mark.parametrize("flag", ["@/etc/shadow", "@../../../etc/passwd", "@link", "@missing", "@loop"])
def test_flagfiles_that_lead_out_of_the_action_are_its_own_error(node: Node, flag: str) -> None:
    async def main(daemon: Daemon) -> None:
        cwd = node.action({"loop": "@loop\n"})
        os.symlink("/etc/shadow", cwd / "link")
        frames = await daemon.ask(cwd, TOOL, flag)
        ((kind, payload),) = frames
        assert kind == FRAMES.FAILURE
        assert payload[:2] == b"r\x40", payload
        assert b"root:" not in payload

    with Daemon(node, node.document(echo_pool(node))) as daemon:
        run_async(main(daemon))


def test_a_directory_that_is_no_actions_is_left_alone(node: Node, tmp_path: Path) -> None:
    async def main(daemon: Daemon) -> None:
        cwd = node.action({"flags": "a\n"})
        for directory in (Path("/etc"), node.work, cwd.parent, node.folder, tmp_path):
            ((kind, _),) = await daemon.ask(directory, TOOL, "@flags")
            assert kind == FRAMES.ONE_SHOT

    with Daemon(node, node.document(echo_pool(node))) as daemon:
        run_async(main(daemon))


@pytest.mark.parametrize(("domains", "workers"), [(("a", "b"), 2), (("a", "a"), 1)], ids=["two", "one"])
def test_actions_of_different_trust_domains_never_share_a_worker(
    node: Node, domains: tuple[str, str], workers: int
) -> None:
    first, second = node.work, node.folder / "second"
    second.mkdir()
    roots = [
        {"path": str(path), "trust_domain": one} for path, one in zip((first, second), domains, strict=True)
    ]
    document = node.document({"tools": [{"pattern": "echo_worker.py"}]}, actions={"work_roots": roots})

    async def main(daemon: Daemon) -> None:
        for _ in range(3):
            for node.work in (first, second):
                cwd = node.action({"flags": "--write=out/x\n"})
                assert (await daemon.run(cwd, *own_tool(node), "@flags"))[0] == 0
                assert (cwd / "out/x").exists()
        assert daemon.log.read_text().count("worker started") == workers

    with Daemon(node, document) as daemon:
        run_async(main(daemon))


def test_two_requests_for_one_directory_are_one_too_many(node: Node) -> None:
    async def main(daemon: Daemon) -> None:
        cwd = node.action({"flags": "--sleep-ms=300\n"})
        first = asyncio.create_task(daemon.run(cwd, TOOL, "@flags"))
        await eventually_true(lambda: not list(cwd.iterdir()))
        ((kind, payload),) = await daemon.ask(cwd, TOOL, "@flags")
        assert (kind, payload[:1]) == (FRAMES.FAILURE, b"r")
        assert (await first)[0] == 0

    with Daemon(node, node.document(echo_pool(node))) as daemon:
        run_async(main(daemon))


def test_the_kill_switch_works_at_once_and_is_undone(node: Node) -> None:
    async def main(daemon: Daemon) -> None:
        assert daemon.command("off", "--reason", "a bad day").stdout == "workers are off: a bad day\n"
        ((kind, reason),) = await daemon.ask(node.action({"flags": "a\n"}), TOOL, "@flags")
        assert (kind, reason) == (FRAMES.ONE_SHOT, b"a bad day")
        assert daemon.command("on").stdout == "workers are on\n"
        assert (await daemon.run(node.action({"flags": "a\n"}), TOOL, "@flags"))[0] == 0

    with Daemon(node, node.document(echo_pool(node))) as daemon:
        run_async(main(daemon))


def test_a_reload_keeps_the_workers_of_pools_that_did_not_change(node: Node) -> None:
    one, two = echo_pool(node, keys=["one"]), echo_pool(node, keys=["two"])

    async def pid(daemon: Daemon, key: str) -> bytes:
        _, output = await daemon.run(node.action({"flags": "--print-cwd\n"}), TOOL, "@flags", key=key)
        return output

    async def main(daemon: Daemon) -> None:
        before = {key: await pid(daemon, key) for key in ("one", "two")}
        daemon.configure(node.document(one, {**two, "env": {"CHANGED": "1"}}))
        done = daemon.command("reload")
        assert done.stdout == "pools that changed: pool1\n", done
        await eventually_true(lambda: "configuration changed" in daemon.log.read_text())
        assert await pid(daemon, "one") == before["one"]
        assert await pid(daemon, "two") != before["two"]
        daemon.config.write_text("{pools: [")
        assert daemon.process is not None
        daemon.process.send_signal(signal.SIGHUP)
        await eventually_true(lambda: "the configuration stays as it is" in daemon.log.read_text())
        assert await pid(daemon, "one") == before["one"]

    with Daemon(node, node.document(one, two)) as daemon:
        run_async(main(daemon))


def test_sigterm_lets_running_actions_end_and_turns_new_ones_away(node: Node) -> None:
    async def main(daemon: Daemon) -> None:
        cwd = node.action({"flags": "--sleep-ms=3000\n--write=out/x\n"})
        running = asyncio.create_task(daemon.run(cwd, TOOL, "@flags"))
        await eventually_true(lambda: not list(cwd.iterdir()))
        assert daemon.process is not None
        daemon.process.send_signal(signal.SIGTERM)
        await eventually_true(lambda: "draining" in daemon.log.read_text())
        ((kind, _),) = await daemon.ask(node.action({"flags": "a\n"}), TOOL, "@flags")
        assert kind == FRAMES.BUSY
        assert (await running)[0] == 0
        assert (cwd / "out/x").exists()
        assert daemon.process.wait(30) == 0

    with Daemon(node, node.document(echo_pool(node))) as daemon:
        run_async(main(daemon))


def test_after_a_kill_the_next_daemon_takes_over_and_removes_what_was_left(node: Node) -> None:
    document = node.document(echo_pool(node))

    async def hang(daemon: Daemon) -> None:
        cwd = node.action({"flags": "--sleep-ms=60000\n"})
        client = await PlainClient.ask(daemon.socket, request_of(TOOL, "@flags"), str(cwd))
        assert await client.frame() == (FRAMES.TAKEN, b"")
        await eventually_true(lambda: not list(cwd.iterdir()))
        await asyncio.sleep(0.2)  # the request follows, which nothing outside shows
        assert daemon.process is not None
        daemon.process.kill()
        daemon.process.wait(30)
        assert await client.frame() is None
        client.close()

    async def serve(daemon: Daemon) -> None:
        assert (await daemon.run(node.action({"flags": "a\n"}), TOOL, "@flags"))[0] == 0

    first = Daemon(node, document).start().wait_ready()
    run_async(hang(first))
    assert node.leftovers()
    (dead,) = (node.folder / "state" / "processes").iterdir()
    assert processes_below(dead), "the worker hangs, and does not see the end of its input"
    with Daemon(node, document) as second:
        run_async(serve(second))
        assert len(node.leftovers()) == 1
        assert not dead.exists()
        assert processes_below(dead) == []
    assert list((node.folder / "state" / "processes").iterdir()) == []


def test_systemd_is_told_when_the_workers_are_warm_and_when_it_stops(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(node.folder / "notify.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind(path)
        notified.settimeout(30)
        monkeypatch.setenv("NOTIFY_SOCKET", path)
        daemon = Daemon(node, node.document(echo_pool(node, min_warm_workers=2))).start()
        said: list[str] = []
        while "READY=1" not in (said[-1:] or [""])[0]:
            said.append(notified.recv(4096).decode())
        assert said[0] == "STATUS=waiting for 2 of pool pool0"
        assert daemon.command("reload").returncode == 0
        assert notified.recv(4096).startswith(b"RELOADING=1\nMONOTONIC_USEC=")
        assert notified.recv(4096) == b"READY=1"
        assert daemon.stop() == 0
        assert notified.recv(4096) == b"STOPPING=1"


def test_a_work_root_on_another_mount_is_refused_at_the_start_with_what_to_do(node: Node) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "none", node.work], check=True)
    try:
        daemon = Daemon(node, node.document(echo_pool(node))).start()
        assert daemon.process is not None
        assert daemon.process.wait(30) == 78
        assert "use strategy link" in daemon.log.read_text()
        assert node.leftovers() == []
    finally:
        subprocess.run(["umount", node.work], check=True)


def test_a_second_daemon_on_the_socket_says_so_and_ends(node: Node) -> None:
    document = node.document(echo_pool(node))
    with Daemon(node, document):
        second = Daemon(node, document)
        second.log = node.folder / "second.log"
        second.start()
        assert second.process is not None
        assert second.process.wait(30) == 78
        assert "another daemon serves" in second.log.read_text()


def test_a_root_daemon_refuses_workers_that_could_overwrite_inputs(node: Node) -> None:
    document = node.document(echo_pool(node))
    del document["pools"][0]["isolation"]
    daemon = Daemon(node, document).start()
    assert daemon.process is not None
    assert daemon.process.wait(30) == 78
    assert "set isolation.run_as_user" in daemon.log.read_text()
