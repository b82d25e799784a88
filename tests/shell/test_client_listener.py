"""The socket of the per-action clients: bounds, descriptors, cancel, and that each gets its one outcome."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from tests.support.client import FRAMES, PlainClient, request_of
from tests.support.loop import eventually, run_async
from wrapper import client_listener
from wrapper.action_outcome import Client
from wrapper.client_listener import ClientListener
from wrapper.client_protocol import ActionRequest, FailureKind
from wrapper.errors import ConfigError

Serve = Callable[[ActionRequest, int, Client], Awaitable[None]]


async def echo(request: ActionRequest, cwd_fd: int, client: Client) -> None:
    """Takes the action and tells what it saw of it."""
    assert client.taken()
    seen = f"{request.argv} {request.key} {os.readlink(f'/proc/self/fd/{cwd_fd}')}"
    client.ended(7, seen.encode())


async def for_ever(_request: ActionRequest, _cwd_fd: int, _client: Client) -> None:
    await asyncio.Event().wait()


@contextlib.asynccontextmanager
async def listening(tmp_path: Path, serve: Serve = echo, *, most: int = 100) -> AsyncIterator[ClientListener]:
    listener = ClientListener(str(tmp_path / "pool.sock"), serve, group=None, max_per_peer=most)
    listener.open()
    try:
        yield listener
    finally:
        await listener.close()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_socket()) == []


def test_a_request_gets_its_outcome_and_the_daemon_sees_the_clients_directory(tmp_path: Path) -> None:
    async def main() -> None:
        async with listening(tmp_path) as listener:
            client = await PlainClient.ask(
                listener.path, request_of("tool", "@flags", key="k"), str(tmp_path)
            )
            frames = await client.frames()
            assert frames[0] == (FRAMES.TAKEN, b"")
            assert frames[1] == (FRAMES.OUTPUT, f"('tool', '@flags') k {tmp_path}".encode())
            assert frames[2] == (FRAMES.END, b"\7\0\0\0")
            await eventually(lambda: listener.in_flight == 0)

    run_async(main())


def test_a_request_may_come_byte_by_byte(tmp_path: Path) -> None:
    async def main() -> None:
        async with listening(tmp_path) as listener:
            client = await PlainClient.ask(listener.path, request_of("tool"), str(tmp_path), chunk=1)
            assert [kind for kind, _ in await client.frames()] == [FRAMES.TAKEN, FRAMES.OUTPUT, FRAMES.END]

    run_async(main())


def test_output_larger_than_the_sockets_buffer_comes_whole(tmp_path: Path) -> None:
    text = os.urandom(3_000_000)

    async def serve(_request: ActionRequest, _cwd_fd: int, client: Client) -> None:
        client.ended(0, text)

    async def main() -> None:
        async with listening(tmp_path, serve) as listener:
            client = await PlainClient.ask(listener.path, request_of("tool"), str(tmp_path))
            frames = await client.frames()
            assert b"".join(data for kind, data in frames if kind == FRAMES.OUTPUT) == text
            assert frames[-1] == (FRAMES.END, b"\0\0\0\0")

    run_async(main())


def test_the_end_of_the_connection_is_a_cancel(tmp_path: Path) -> None:
    cancelled: list[bool] = []

    async def serve(request: ActionRequest, cwd_fd: int, client: Client) -> None:
        try:
            await for_ever(request, cwd_fd, client)
        except asyncio.CancelledError:
            cancelled.append(client.taken())
            raise

    async def main() -> None:
        async with listening(tmp_path, serve) as listener:
            client = await PlainClient.ask(listener.path, request_of("tool"), str(tmp_path))
            await eventually(lambda: listener.in_flight == 1)
            client.close()
            await eventually(lambda: listener.in_flight == 0)

    run_async(main())
    assert cancelled == [False], "the files of a client that is gone must not be taken"


def test_whoever_cancels_and_stays_is_told_when_nothing_is_left(tmp_path: Path) -> None:
    released = asyncio.Event()

    async def serve(request: ActionRequest, cwd_fd: int, client: Client) -> None:
        try:
            await for_ever(request, cwd_fd, client)
        finally:
            await released.wait()

    async def main() -> None:
        async with listening(tmp_path, serve) as listener:
            client = await PlainClient.ask(listener.path, request_of("tool"), str(tmp_path))
            await eventually(lambda: listener.in_flight == 1)
            client.shut_down()
            await asyncio.sleep(0)
            assert await client.said_nothing()
            released.set()
            ((kind, payload),) = await client.frames()
            assert kind == FRAMES.FAILURE
            assert payload[:1] == FailureKind.CANCELLED.value.encode()

    run_async(main())


def test_two_daemons_cannot_have_one_socket_and_a_dead_ones_is_taken_over(tmp_path: Path) -> None:
    async def main() -> None:
        async with listening(tmp_path) as listener:
            second = ClientListener(listener.path, echo, group=None, max_per_peer=1)
            with pytest.raises(ConfigError, match="another daemon serves"):
                second.open()
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(tmp_path / "pool.sock"))
        async with listening(tmp_path) as listener:
            client = await PlainClient.ask(listener.path, request_of("tool"), str(tmp_path))
            assert len(await client.frames()) == 3

    run_async(main())


def test_the_socket_is_for_its_group_and_nobody_else(tmp_path: Path) -> None:
    async def main() -> None:
        async with listening(tmp_path) as listener:
            assert stat.S_IMODE(os.stat(listener.path).st_mode) == 0o660
        with pytest.raises(ConfigError, match="no group 'nobody-has-this'"):
            ClientListener(listener.path, echo, group="nobody-has-this", max_per_peer=1).open()

    run_async(main())


def test_a_peer_has_no_more_connections_than_allowed_and_the_others_are_served(tmp_path: Path) -> None:
    async def main() -> None:
        async with listening(tmp_path, for_ever, most=2) as listener:
            first = [await PlainClient.ask(listener.path, request_of("t"), str(tmp_path)) for _ in range(2)]
            await eventually(lambda: listener.in_flight == 2)
            third = await PlainClient.ask(listener.path, request_of("t"), str(tmp_path))
            ((kind, reason),) = await third.frames()
            assert kind == FRAMES.BUSY
            assert b"max_connections" in reason
            first[0].close()
            await eventually(lambda: listener.in_flight == 1)
            again = await PlainClient.ask(listener.path, request_of("t"), str(tmp_path))
            await eventually(lambda: listener.in_flight == 2)
            again.close()
            first[1].close()

    run_async(main())


@pytest.mark.parametrize(
    ("data", "descriptors"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 1),
        (b"NLA1\xff\xff\xff\xff", 1),
        (None, 0),
        (None, 2),
        (b"", 1),
    ],
    ids=["another protocol", "too long", "no descriptor", "two descriptors", "nothing"],
)
def test_what_is_no_request_is_disconnected_and_nothing_leaks(
    tmp_path: Path, data: bytes | None, descriptors: int
) -> None:
    async def main() -> None:
        async with listening(tmp_path) as listener:
            before = len(os.listdir("/proc/self/fd"))
            for _ in range(20):
                client = await PlainClient.connect(listener.path)
                client.send(request_of("t") if data is None else data, str(tmp_path), descriptors=descriptors)
                client.shut_down()
                assert await client.frames() == []
                client.close()
            await eventually(lambda: listener.in_flight == 0)
            assert len(os.listdir("/proc/self/fd")) == before

    run_async(main())


def test_bytes_after_the_request_cancel_it(tmp_path: Path) -> None:
    async def main() -> None:
        async with listening(tmp_path, for_ever) as listener:
            client = await PlainClient.ask(listener.path, request_of("t"), str(tmp_path))
            await eventually(lambda: listener.in_flight == 1)
            client.send(b"more", str(tmp_path), descriptors=3)
            ((kind, _),) = await client.frames()
            assert kind == FRAMES.FAILURE

    run_async(main())


def test_a_slow_request_is_disconnected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_listener, "REQUEST_TIMEOUT_S", 0.05)

    async def main() -> None:
        async with listening(tmp_path) as listener:
            client = await PlainClient.connect(listener.path)
            client.send(request_of("t")[:10], str(tmp_path))
            assert await client.frames() == []

    run_async(main())


def test_whoever_waits_hears_that_the_daemon_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_listener, "HEARTBEAT_S", 0.02)

    async def main() -> None:
        async with listening(tmp_path, for_ever) as listener:
            client = await PlainClient.ask(listener.path, request_of("t"), str(tmp_path))
            assert await client.frame() == (FRAMES.WAITING, b"")
            assert await client.frame() == (FRAMES.WAITING, b"")
            client.close()

    run_async(main())


def test_a_drain_turns_new_ones_away_and_lets_the_others_end(tmp_path: Path) -> None:
    release = asyncio.Event()

    async def serve(_request: ActionRequest, _cwd_fd: int, client: Client) -> None:
        await release.wait()
        client.ended(0, b"")

    async def main() -> None:
        async with listening(tmp_path, serve) as listener:
            running = await PlainClient.ask(listener.path, request_of("t"), str(tmp_path))
            await eventually(lambda: listener.in_flight == 1)
            listener.refuse_new("stopping")
            late = await PlainClient.ask(listener.path, request_of("t"), str(tmp_path))
            assert await late.frames() == [(FRAMES.BUSY, b"stopping")]
            release.set()
            await listener.wait_until_quiet()
            assert (await running.frames())[-1] == (FRAMES.END, b"\0\0\0\0")

    run_async(main())


def test_an_error_of_our_own_is_told_and_the_next_request_served(tmp_path: Path) -> None:
    async def serve(request: ActionRequest, cwd_fd: int, client: Client) -> None:
        if request.argv == ("bad",):
            raise ValueError("a bug")
        await echo(request, cwd_fd, client)

    async def main() -> None:
        async with listening(tmp_path, serve) as listener:
            bad = await PlainClient.ask(listener.path, request_of("bad"), str(tmp_path))
            ((kind, payload),) = await bad.frames()
            assert (kind, payload[:1]) == (FRAMES.FAILURE, FailureKind.LOST.value.encode())
            good = await PlainClient.ask(listener.path, request_of("good"), str(tmp_path))
            assert len(await good.frames()) == 3

    run_async(main())


def test_a_client_that_is_killed_in_mid_answer_takes_nothing_down(tmp_path: Path) -> None:
    async def serve(_request: ActionRequest, _cwd_fd: int, client: Client) -> None:
        client.ended(0, bytes(5_000_000))

    async def main() -> None:
        async with listening(tmp_path, serve) as listener:
            for _ in range(5):
                client = await PlainClient.ask(listener.path, request_of("t"), str(tmp_path))
                await client.frame()
                client.close()
            await eventually(lambda: listener.in_flight == 0)

    run_async(main())
