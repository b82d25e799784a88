"""The loops that other tests stand on."""

from __future__ import annotations

import asyncio
import os
import time

import pytest

from tests.support.loop import eventually, run_async, run_virtual


def test_virtual_time_jumps_over_idle_hours_in_order() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        start_s = loop.time()
        seen: list[float] = []
        for hours in (3, 1, 2):
            loop.call_later(hours * 3600, seen.append, hours)
        await asyncio.sleep(4 * 3600)
        assert seen == [1, 2, 3]
        assert loop.time() - start_s == pytest.approx(4 * 3600)

    run_virtual(main())


def test_a_ready_descriptor_comes_before_the_clock_moves() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        read_end, write_end = os.pipe()
        got: asyncio.Future[bytes] = loop.create_future()
        loop.add_reader(read_end, lambda: got.set_result(os.read(read_end, 10)))
        os.write(write_end, b"x")
        start_s = loop.time()
        async with asyncio.timeout(0.001):
            assert await got == b"x"
        assert loop.time() == start_s
        loop.remove_reader(read_end)
        os.close(read_end)
        os.close(write_end)

    run_virtual(main())


def test_time_stands_still_while_a_thread_works() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(0.001):
            await loop.run_in_executor(None, time.sleep, 0.02)

    run_virtual(main())


def test_a_loop_that_can_only_wait_for_ever_is_an_error() -> None:
    async def main() -> None:
        await asyncio.get_running_loop().create_future()

    with pytest.raises(RuntimeError, match="deadlock"):
        run_virtual(main())


def test_a_task_left_behind_fails_the_test() -> None:
    async def main() -> None:
        main.task = asyncio.create_task(asyncio.sleep(1000))  # type: ignore[attr-defined]

    with pytest.raises(AssertionError, match="leaves tasks behind"):
        run_async(main())


def test_an_error_in_a_callback_fails_the_test() -> None:
    async def main() -> None:
        asyncio.get_running_loop().call_soon(lambda: 1 // 0)
        await asyncio.sleep(0)

    with pytest.raises(AssertionError, match="errors that nobody handled"):
        run_async(main())


def test_eventually_waits_for_a_condition() -> None:
    async def main() -> None:
        count = iter(range(100))
        await eventually(lambda: next(count) == 5)
        with pytest.raises(AssertionError, match="not within"):
            await eventually(lambda: False, within_s=0.01)

    run_async(main())
