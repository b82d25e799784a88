"""WarmWorkerPoolManager on the fake runtime, in virtual time: leases, metrics and the names it offers."""

from __future__ import annotations

import asyncio
import gc
import os
from dataclasses import fields
from pathlib import Path

import pytest

import wrapper
from tests.fakes.fake_runtime import Script
from tests.support.loop import eventually, run_virtual
from tests.support.manager_world import make, pool, world
from tests.support.tools import proto_tool, request, response
from wrapper.errors import (
    ConfigError,
    RequestRefused,
    UnknownPool,
    WorkerProtocolError,
    WorkerStartFailed,
    WrapperError,
)
from wrapper.manager import PoolMetrics
from wrapper.pool.lease import WorkerOutcome
from wrapper.runtime.base import Leftovers, WorkerSpec
from wrapper.worker_protocol.messages import WorkRequest

JAVA = pool("java", language="jvm", worker_command=["/bin/java"], keys=["java-*"])
TOOLS = pool("tools", worker_command=[], keys=["*"])


# ---- leases ----------------------------------------------------------------------------------------


def test_a_lease_names_its_worker_and_executes_requests() -> None:
    async def main() -> None:
        async with world() as w:
            async with w.manager.lease("p") as lease:
                assert lease.worker_id == 1
                answer = await lease.execute(request(b"compile", b"this"))
                assert (answer.pb.exit_code, answer.pb.output) == (0, b"compile this")
            assert await w.ask() == b"hello"
            assert len(w.runtime.workers) == 1

    run_virtual(main())


def test_a_pool_is_found_by_its_name_or_by_a_key_that_it_serves() -> None:
    async def main() -> None:
        async with world(pools=[JAVA, TOOLS]) as w:
            assert await w.ask("java") == b"hello"
            assert await w.ask("java-17") == b"hello"
            assert {worker.spec.argv for worker in w.runtime.workers} == {("/bin/java",)}
            with pytest.raises(ConfigError, match="'tools' has no worker_command"):
                await w.ask("rust")

    run_virtual(main())


def test_a_name_that_nothing_serves_is_an_error_that_lists_what_there_is() -> None:
    async def main() -> None:
        async with world(keys=["a-*", "b"]) as w:
            with pytest.raises(UnknownPool, match=r"'nothing'.* p: a-\*, b$"):
                await w.manager.acquire("nothing")
            with pytest.raises(UnknownPool, match="'nothing'"):
                w.manager.metrics("nothing")
            with pytest.raises(UnknownPool):
                w.manager.metrics("b")  # a key is no name

    run_virtual(main())


def test_a_worker_released_as_completed_serves_again_and_a_failed_one_never() -> None:
    async def main() -> None:
        async with world() as w:
            first = await w.manager.acquire("p")
            first.release(WorkerOutcome.COMPLETED)
            second = await w.manager.acquire("p")
            assert second.worker_id == first.worker_id
            second.release(WorkerOutcome.FAILED)
            second.release(WorkerOutcome.COMPLETED)  # too late: it changes nothing
            third = await w.manager.acquire("p")
            assert third.worker_id != first.worker_id
            third.release(WorkerOutcome.COMPLETED)
            assert w.stop_reasons() == ["its user reported it as failed"]

    run_virtual(main())


def test_a_lease_that_is_dropped_stops_its_worker_and_frees_its_slot() -> None:
    async def main() -> None:
        async with world(max_workers=1) as w:
            lease = await w.manager.acquire("p")
            worker_id = lease.worker_id
            del lease
            gc.collect()
            async with w.manager.lease("p") as again:
                assert again.worker_id != worker_id
            assert w.stop_reasons() == ["lease dropped without release"]

    run_virtual(main())


def test_a_non_zero_exit_code_is_an_answer_and_no_reason_to_stop_the_worker() -> None:
    async def main() -> None:
        def fails(_: WorkerSpec) -> Script:
            return Script(tool=proto_tool(lambda r: response(r, b"error: ';' expected", exit_code=1)))

        async with world(fails) as w:
            for _ in range(3):
                async with w.manager.lease("p") as lease:
                    assert (await lease.execute(request(b"x"))).pb.exit_code == 1
            assert len(w.runtime.workers) == 1

    run_virtual(main())


def test_an_exception_in_the_block_stops_the_worker_unless_it_saw_nothing_of_the_request() -> None:
    async def main() -> None:
        async with world(worker_protocol="json") as w:
            with pytest.raises(RequestRefused):  # JSON cannot carry it
                await w.ask(text=b"\xff")
            assert w.stop_reasons() == []
            with pytest.raises(ZeroDivisionError):
                async with w.manager.lease("p"):
                    raise ZeroDivisionError
            assert w.stop_reasons() == ["its user reported it as failed"]

    run_virtual(main())


def test_several_requests_on_one_lease_are_one_job_and_each_gets_its_own_answer() -> None:
    async def main() -> None:
        async with world(limits={"max_requests_per_worker_at_once": 1}) as w:
            async with w.manager.lease("p") as lease:
                for text in (b"one", b"two", b"three"):
                    assert (await lease.execute(request(text))).pb.output == text
            await w.until_ready(1)
            assert w.manager.metrics().cleans == 1

    run_virtual(main())


def test_a_late_second_answer_on_one_lease_is_never_the_next_requests() -> None:
    """The tool echoes no ids, so only its silence tells one answer from the next."""

    async def main() -> None:
        def answer_twice(asked: WorkRequest) -> bytes:
            frame = response(request(*asked.pb.arguments))
            asyncio.get_running_loop().call_later(0.001, w.runtime.workers[0].say, frame)
            return frame

        async with world(lambda _: Script(tool=proto_tool(answer_twice), answer_delay_s=0.01)) as w:
            lease = await w.manager.acquire("p")
            assert (await lease.execute(request(b"one"))).pb.output == b"one"
            with pytest.raises(WorkerProtocolError, match="nobody asked for after its last answer"):
                await lease.execute(request(b"two"))
            lease.release(WorkerOutcome.COMPLETED)  # it is stopped all the same
            assert w.stop_reasons() == ["stray output"]

    run_virtual(main())


def test_a_released_lease_sends_nothing() -> None:
    async def main() -> None:
        async with world() as w:
            lease = await w.manager.acquire("p")
            lease.release()
            with pytest.raises(WrapperError, match="released already"):
                await lease.execute(request(b"x"))
            assert "released" in repr(lease)

    run_virtual(main())


def test_a_multiplex_worker_in_the_middle_of_one_answer_takes_another_lease() -> None:
    async def main() -> None:
        silent = Script(tool=lambda _: b"")
        async with world(lambda _: silent, limits={"max_requests_per_worker_at_once": 4}) as w:
            first = await w.manager.acquire("p")
            running = asyncio.create_task(first.execute(request(b"x")))
            await asyncio.sleep(0.01)
            frame = response(request(b"y" * 1000, request_id=11))
            w.runtime.workers[0].say(frame[:500])
            await asyncio.sleep(0.01)
            second = await w.manager.acquire("p")
            w.runtime.workers[0].say(frame[500:])
            assert (await running).pb.output == b"y" * 1000
            first.release()
            second.release()
            assert first.worker_id == second.worker_id

    run_virtual(main())


def test_a_block_that_is_cancelled_in_mid_request_stops_the_worker() -> None:
    async def main() -> None:
        async with world(lambda _: Script(tool=proto_tool(), answer_delay_s=50.0)) as w:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(5), w.manager.lease("p") as lease:
                    await lease.execute(request(b"x"))
            await eventually(lambda: not w.runtime.alive)
            assert w.stop_reasons() == ["cancelled in mid-request"]

    run_virtual(main())


def test_a_worker_that_cannot_start_is_reported_with_its_stderr() -> None:
    async def main() -> None:
        def broken(_: WorkerSpec) -> Script:
            return Script(start_error=WorkerStartFailed("it cannot", stderr_tail=b"no such jar"))

        async with world(broken) as w:
            with pytest.raises(WorkerStartFailed) as failed:
                await w.manager.acquire("p")
            assert "no such jar" in failed.value.report()
            assert w.manager.metrics().recycled_workers == 0  # there never was one

    run_virtual(main())


# ---- metrics ---------------------------------------------------------------------------------------


def test_the_metrics_follow_a_worker_through_its_life() -> None:
    async def main() -> None:
        def slow(_: WorkerSpec) -> Script:
            leftovers = [Leftovers((1,))] * 9
            return Script(start_delay_s=5.0, tool=proto_tool(), leftovers=leftovers, clean_delay_s=5.0)

        async with world(slow, lifecycle={"max_jobs_per_worker": 2}) as w:
            seen = [w.manager.metrics("p")]
            waiting = asyncio.create_task(w.manager.acquire("p"))
            await asyncio.sleep(1)
            seen.append(w.manager.metrics("p"))
            lease = await waiting
            seen.append(w.manager.metrics("p"))
            await lease.execute(request(b"x"))
            lease.release()
            seen.append(w.manager.metrics("p"))
            await w.until_ready(1)
            seen.append(w.manager.metrics("p"))
            await w.ask()
            await eventually(lambda: not w.runtime.alive)
            seen.append(w.manager.metrics("p"))
            assert w.manager.metrics() == seen[-1]
            fields = ("ready_workers", "active_workers", "provisioning_workers", "recycled_workers")
            assert [tuple(getattr(one, name) for name in fields) for one in seen] == [
                (0, 0, 0, 0),
                (0, 0, 1, 0),
                (0, 1, 0, 0),
                (0, 1, 0, 0),  # it is being cleaned
                (1, 0, 0, 0),
                (0, 0, 0, 1),
            ]
            assert [(one.gets, one.cleans, one.prepares) for one in seen] == [
                (0, 0, 0),
                (0, 0, 0),
                (1, 0, 1),
                (1, 0, 1),
                (1, 1, 1),
                (2, 1, 1),
            ]

    run_virtual(main())


def test_the_metrics_of_all_pools_are_the_sums_and_zero_before_the_start() -> None:
    async def main() -> None:
        w = make(pools=[pool("p"), pool("q")])
        assert w.manager.metrics() == PoolMetrics(*[0] * len(fields(PoolMetrics)))
        async with w.manager:
            await asyncio.gather(w.ask("p"), w.ask("q"))
            assert w.manager.metrics("p").gets == w.manager.metrics("q").gets == 1
            assert w.manager.metrics().gets == w.manager.metrics().prepares == 2

    run_virtual(main())


def test_start_statistics_are_those_of_a_pool_or_of_all() -> None:
    async def main() -> None:
        w = make(pools=[pool("p"), pool("q")])
        assert w.manager.start_statistics().cold_requests == 0
        async with w.manager:
            await w.ask("p")
            await w.ask("p")
            await w.ask("q")
            of_p, of_all = w.manager.start_statistics("p"), w.manager.start_statistics()
            assert (of_p.cold_requests, of_p.warm_requests, of_p.starts) == (1, 1, 1)
            assert (of_all.cold_requests, of_all.warm_requests, of_all.starts) == (2, 1, 2)
            with pytest.raises(UnknownPool):
                w.manager.start_statistics("nobody")

    run_virtual(main())


def test_a_pool_whose_workers_cannot_be_started_is_not_healthy() -> None:
    async def main() -> None:
        w = make(pools=[pool("p", worker_command=["missing"], min_warm_workers=1), pool("q")])
        assert w.manager.is_healthy("p")
        async with w.manager:
            await eventually(lambda: not w.manager.is_healthy("p"))
            assert w.manager.is_healthy("q")
            with pytest.raises(UnknownPool):
                w.manager.is_healthy("nobody")

    run_virtual(main())


def test_the_minimum_of_warm_workers_becomes_ready_without_anybody_asking() -> None:
    async def main() -> None:
        async with world(min_warm_workers=3) as w:
            await w.until_ready(3)
            await w.ask()
            assert w.manager.metrics().prepares == 3

    run_virtual(main())


# ---- the rest of the API ---------------------------------------------------------------------------


def test_the_package_offers_every_public_name_and_no_other() -> None:
    for name in wrapper.__all__:
        assert getattr(wrapper, name).__doc__, name
    with pytest.raises(AttributeError, match="nonsense"):
        _ = wrapper.nonsense


def test_a_program_found_on_path_is_watched_for_changes(tmp_path: Path) -> None:
    tool = tmp_path / "tool"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)

    async def main() -> None:
        async with world(worker_command=["tool"], env={"PATH": str(tmp_path)}, min_warm_workers=2) as w:
            await w.until_ready(2)
            assert {worker.spec.argv for worker in w.runtime.workers} == {(str(tool),)}
            os.utime(tool, (1, 1))
            await w.ask()
            assert "tool changed" in w.stop_reasons()

    run_virtual(main())


def test_a_relative_working_directory_is_made_absolute() -> None:
    async def main() -> None:
        w = make(cwd=".")
        await w.ask()
        assert w.runtime.workers[0].spec.cwd == os.getcwd()
        await w.manager.close()

    run_virtual(main())
