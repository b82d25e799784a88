"""The descriptors that a worker host gives us: pipes, files, and readers that go away."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.loop import eventually, run_async
from wrapper.upstream import READ_BYTES, WRITE_HIGH_WATER_BYTES, UpstreamReader, UpstreamWriter

MORE_THAN_A_PIPE = 1 << 20


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """(read end, write end); a test closes what it does not give away, or dups it."""
    ends = os.pipe()
    yield ends
    for fd in ends:
        try:
            os.close(fd)
        except OSError:
            pass  # the test did


class Heard:
    """What a reader was told."""

    def __init__(self) -> None:
        self.data = b""
        self.ends = 0

    def __call__(self, data: bytes) -> None:
        self.data += data
        self.ends += not data


def writer_of(fd: int) -> tuple[UpstreamWriter, list[str]]:
    told: list[str] = []
    return UpstreamWriter(fd, lambda: told.append("gone"), lambda: told.append("drained")), told


# ---- reading ---------------------------------------------------------------------------------------


def test_a_pipe_is_read_until_its_end_which_is_told_once(pipe: tuple[int, int]) -> None:
    async def main() -> None:
        heard = Heard()
        reader = UpstreamReader(os.dup(pipe[0]), heard)
        reader.resume()
        os.write(pipe[1], b"hello")
        await eventually(lambda: heard.data == b"hello")
        assert heard.ends == 0
        os.write(pipe[1], b" again")
        os.close(pipe[1])
        await eventually(lambda: heard.ends)
        assert (heard.data, heard.ends) == (b"hello again", 1)
        reader.close()
        reader.close()

    run_async(main())


@pytest.mark.parametrize("size", [0, 1, READ_BYTES, 3 * READ_BYTES + 1])
def test_a_regular_file_as_stdin_is_read_to_its_end(tmp_path: Path, size: int) -> None:
    """epoll takes no regular files, and a host may redirect one: `wrapper < requests`."""

    async def main() -> None:
        path = tmp_path / "requests"
        path.write_bytes(os.urandom(size))
        heard = Heard()
        reader = UpstreamReader(os.open(path, os.O_RDONLY), heard)
        reader.resume()
        await eventually(lambda: heard.ends)
        assert (heard.data, heard.ends) == (path.read_bytes(), 1)
        reader.close()

    run_async(main())


def test_dev_null_as_stdin_ends_at_once() -> None:
    async def main() -> None:
        heard = Heard()
        reader = UpstreamReader(os.open(os.devnull, os.O_RDONLY), heard)
        reader.resume()
        await eventually(lambda: heard.ends)
        reader.close()

    run_async(main())


@pytest.mark.parametrize("kind", ["pipe", "file"])
def test_a_paused_reader_hears_nothing_until_it_goes_on(
    kind: str, pipe: tuple[int, int], tmp_path: Path
) -> None:
    async def main() -> None:
        (tmp_path / "file").write_bytes(b"x" * 2 * READ_BYTES)
        fd = os.dup(pipe[0]) if kind == "pipe" else os.open(tmp_path / "file", os.O_RDONLY)
        heard: list[bytes] = []

        def once(data: bytes) -> None:
            heard.append(data)
            reader.pause()

        reader = UpstreamReader(fd, once)
        os.write(pipe[1], b"y" * 1000)
        reader.resume()
        reader.resume()  # twice is once
        await eventually(lambda: heard)
        os.write(pipe[1], b"y" * 1000)
        for _ in range(20):
            await asyncio.sleep(0)
        assert len(heard) == 1
        reader.resume()
        await eventually(lambda: len(heard) == 2)
        reader.close()

    run_async(main())


def test_a_closed_reader_hears_nothing_and_leaves_the_descriptor_blocking_for_its_owner(
    pipe: tuple[int, int],
) -> None:
    async def main() -> None:
        heard = Heard()
        reader = UpstreamReader(os.dup(pipe[0]), heard)
        reader.resume()
        assert not os.get_blocking(pipe[0])
        os.write(pipe[1], b"too late")
        reader.close()
        reader.resume()
        await asyncio.sleep(0)
        assert heard.data == b""
        assert os.get_blocking(pipe[0])  # the flag is shared with whoever gave it to us

    run_async(main())


# ---- writing ---------------------------------------------------------------------------------------


def test_frames_come_out_whole_and_in_order_however_slow_the_reader_is(pipe: tuple[int, int]) -> None:
    async def main() -> None:
        writer, told = writer_of(os.dup(pipe[1]))
        os.close(pipe[1])
        frames = [bytes([n]) * (MORE_THAN_A_PIPE // 4) for n in range(6)]
        for frame in frames:
            writer.write(frame)
        heard = Heard()
        reader = UpstreamReader(os.dup(pipe[0]), heard)
        reader.resume()
        await writer.flush()
        writer.close()
        await eventually(lambda: heard.ends)
        assert heard.data == b"".join(frames)
        assert told == []
        reader.close()

    run_async(main())


def test_a_small_frame_is_written_at_once_without_a_turn_of_the_loop(pipe: tuple[int, int]) -> None:
    async def main() -> None:
        writer, _ = writer_of(os.dup(pipe[1]))
        writer.write(b"answer")
        assert os.read(pipe[0], 100) == b"answer"
        await writer.flush()
        writer.close()

    run_async(main())


def test_a_congestion_is_seen_and_its_end_is_told_once(pipe: tuple[int, int]) -> None:
    async def main() -> None:
        writer, told = writer_of(os.dup(pipe[1]))
        assert not writer.is_congested
        writer.write(b"x" * (WRITE_HIGH_WATER_BYTES + MORE_THAN_A_PIPE))
        assert writer.is_congested
        heard = Heard()
        reader = UpstreamReader(os.dup(pipe[0]), heard)
        reader.resume()
        await writer.flush()
        assert told == ["drained"]
        assert not writer.is_congested
        writer.close()
        reader.close()

    run_async(main())


@pytest.mark.parametrize("unsent", [False, True])
def test_a_reader_that_is_gone_is_told_once_and_nothing_waits_for_it(
    pipe: tuple[int, int], unsent: bool
) -> None:
    async def main() -> None:
        writer, told = writer_of(os.dup(pipe[1]))
        if unsent:
            writer.write(b"x" * MORE_THAN_A_PIPE)
        os.close(pipe[0])
        writer.write(b"answer")
        await eventually(lambda: told)
        writer.write(b"another")
        await writer.flush()
        for _ in range(5):
            await asyncio.sleep(0)
        assert told == ["gone"]
        writer.close()

    run_async(main())


def test_a_regular_file_as_stdout_takes_everything(tmp_path: Path) -> None:
    async def main() -> None:
        path = tmp_path / "answers"
        writer, _ = writer_of(os.open(path, os.O_WRONLY | os.O_CREAT))
        writer.write(b"one")
        writer.write(b"two")
        await writer.flush()
        writer.close()
        writer.close()
        assert path.read_bytes() == b"onetwo"

    run_async(main())


# ---- stdio -----------------------------------------------------------------------------------------

CLAIM = """
import os, subprocess
from wrapper.upstream import claim_stdio
stdin_fd, stdout_fd = claim_stdio()
print("printed by a library", flush=True)
subprocess.run(["sh", "-c", "echo printed by a child; cat"], check=True)
os.write(stdout_fd, b"answer to " + os.read(stdin_fd, 100))
"""


def test_after_the_claim_nobody_else_can_write_answers_or_eat_requests() -> None:
    done = subprocess.run([sys.executable, "-c", CLAIM], input=b"request", capture_output=True)
    assert (done.returncode, done.stdout) == (0, b"answer to request")
    assert done.stderr == b"printed by a library\nprinted by a child\n"
