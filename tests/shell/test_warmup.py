"""From a start to ready, in virtual time: phases, budget, priming, and whose turn it is."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.fakes.fake_runtime import FakeRuntime, Script
from tests.shell.test_pool import World, world
from tests.support.loop import eventually, run_virtual
from tests.support.recordings import record
from tests.support.tools import proto_tool, response
from wrapper.errors import ConfigError, WorkerDied, WorkerStartFailed, WrapperError
from wrapper.events import Event, EventKind
from wrapper.execroot.worker_execroot import FOLDER
from wrapper.pool.limits import PoolLimits, TotalLimits
from wrapper.pool.pool import WorkerPool
from wrapper.pool.settings import PoolSettings, WarmupRules
from wrapper.pool.worker_key import WorkerKey
from wrapper.pool.worker_states import StopReason, WorkerState
from wrapper.runtime.base import CommandResult, CommandSpec, GcReport, Leftovers, WorkerSpec
from wrapper.worker_protocol.messages import WorkRequest

KEY = WorkerKey("p", ("/bin/tool",), "/")
WARM, WARM_2 = CommandSpec(("warm",), 30.0), CommandSpec(("warm2",), 30.0)
VERIFY = CommandSpec(("verify",), 30.0)


def own(folder: Path, **fields: object) -> WorkerKey:
    """A key whose workers have an execroot of their own, under this folder."""
    return WorkerKey("p", ("/bin/tool",), str(folder), own_execroot=True, **fields)  # type: ignore[arg-type]


def runs(w: World) -> list[str]:
    return [call for call in w.runtime.workers[0].calls if call.startswith("run")]


def done(w: World) -> Event:
    (event,) = w.happened(EventKind.WARMUP_DONE)
    return event


# ---- phases and budget -----------------------------------------------------------------------------


def test_each_phase_is_timed_and_reported_with_the_memory_after_it() -> None:
    async def main() -> None:
        def script(_: WorkerSpec) -> Script:
            return Script(start_delay_s=0.3, tool=proto_tool(), run_delay_s=0.5, memory_bytes=lambda: 42)

        settings = PoolSettings("p", warmup=(WARM, WARM_2), verification=(VERIFY,))
        async with world(script, settings=settings) as w:
            await w.ask()
            assert runs(w) == ["run warm", "run warm2", "run verify"]
            numbers = done(w).numbers
            assert numbers["load_s"] == pytest.approx(0.3)
            assert numbers["preload_s"] == pytest.approx(1.0)
            assert numbers["verify_s"] == pytest.approx(0.5)
            assert numbers["total_s"] == pytest.approx(1.8)
            assert (numbers["queued_s"], numbers["cut_short"], numbers["target_met"]) == (0.0, 0.0, 0.0)
            assert numbers["preload_memory_bytes"] == numbers["memory_bytes"] == 42

    run_virtual(main())


def test_a_worker_without_a_warm_up_tells_its_start_and_no_memory_is_measured() -> None:
    async def main() -> None:
        def script(_: WorkerSpec) -> Script:
            return Script(start_delay_s=0.3, tool=proto_tool(), memory_bytes=lambda: 1 // 0)

        async with world(script) as w:
            await w.ask()
            (ready,) = w.happened(EventKind.WORKER_READY)
            assert ready.numbers["load_s"] == ready.numbers["total_s"] == pytest.approx(0.3)
            assert not w.happened(EventKind.WARMUP_DONE)

    run_virtual(main())


def test_the_first_request_of_each_worker_is_told_with_its_latency() -> None:
    async def main() -> None:
        async with world(lambda _: Script(tool=proto_tool(), answer_delay_s=0.4)) as w:
            for _ in range(3):
                await w.ask()
            (first,) = w.happened(EventKind.FIRST_REQUEST)
            assert first.numbers["first_request_s"] == pytest.approx(0.4)
            assert first.worker_id == 1

    run_virtual(main())


def test_a_warm_up_that_reaches_its_target_says_so() -> None:
    async def main() -> None:
        rules = WarmupRules(target_s=2.0)
        settings = PoolSettings("p", warmup=(WARM,), warmup_rules=rules)
        async with world(lambda _: Script(tool=proto_tool(), run_delay_s=1.5), settings=settings) as w:
            await w.ask()
            assert done(w).numbers["target_met"] == 1.0

    run_virtual(main())


def test_when_the_time_is_over_the_command_is_abandoned_and_the_worker_used_once_it_is_verified() -> None:
    async def main() -> None:
        settings = PoolSettings(
            "p", warmup=(WARM, WARM_2), verification=(VERIFY,), warmup_rules=WarmupRules(max_s=5.0)
        )
        async with world(lambda _: Script(tool=proto_tool(), run_delay_s=7.0), settings=settings) as w:
            assert await w.ask() == b"hello"
            assert runs(w) == ["run warm", "run verify"]
            numbers = done(w).numbers
            assert numbers["cut_short"] == 1.0
            assert "max_warmup_ms is over" in done(w).detail
            assert numbers["preload_s"] == pytest.approx(5.0)
            assert numbers["verify_s"] == pytest.approx(7.0)

    run_virtual(main())


def test_a_command_that_needs_more_than_its_own_time_is_a_failed_warm_up() -> None:
    async def main() -> None:
        settings = PoolSettings("p", warmup=(CommandSpec(("warm",), 2.0),))
        async with world(lambda _: Script(tool=proto_tool(), run_delay_s=3.0), settings=settings) as w:
            with pytest.raises(WorkerStartFailed, match="timed out"):
                await w.ask()
            assert w.stops == {StopReason.WARMUP_FAILED: 1}

    run_virtual(main())


def test_preload_false_runs_the_verification_only() -> None:
    async def main() -> None:
        settings = PoolSettings(
            "p", warmup=(WARM,), verification=(VERIFY,), warmup_rules=WarmupRules(preload=False)
        )
        async with world(settings=settings) as w:
            await w.ask()
            assert runs(w) == ["run verify"]

    run_virtual(main())


@pytest.mark.parametrize("lazy", [True, False])
def test_lazy_loading_gives_a_waiting_request_the_worker_as_it_is(lazy: bool) -> None:
    async def main() -> None:
        settings = PoolSettings(
            "p",
            PoolLimits(min_warm_workers=1),
            warmup=(WARM, WARM_2),
            verification=(VERIFY,),
            warmup_rules=WarmupRules(lazy_loading=lazy),
        )
        script = Script(tool=proto_tool(), run_delay_s=1.0)
        async with world(lambda _: script, settings=settings, minimum=KEY) as w:
            await asyncio.sleep(0.5)  # nobody waits: it preloads
            assert await w.ask() == b"hello"
            assert runs(w) == (
                ["run warm", "run verify"] if lazy else ["run warm", "run warm2", "run verify"]
            )
            assert done(w).detail == ("cut short: a request waits" if lazy else "")

    run_virtual(main())


def test_a_failing_verification_is_shown_and_each_makes_the_next_start_wait_longer() -> None:
    async def main() -> None:
        def script(_: WorkerSpec) -> Script:
            return Script(tool=proto_tool(), run=lambda _: CommandResult(3, b"no compiler"))

        settings = PoolSettings("p", PoolLimits(min_warm_workers=1), verification=(VERIFY,))
        async with world(script, settings=settings, minimum=KEY) as w:
            starts: list[float] = []
            loop = asyncio.get_running_loop()
            w.pool.events.subscribe(
                lambda e: starts.append(loop.time()) if e.kind is EventKind.WORKER_STARTED else None
            )
            await asyncio.sleep(100)
            assert "no compiler" in w.happened(EventKind.WORKER_START_FAILED)[0].detail
            pauses = [after - before for before, after in itertools.pairwise(starts)]
            assert pauses[:4] == pytest.approx([0.2, 0.4, 0.8, 1.6])
            assert pauses[-1] == pytest.approx(30.0)

    run_virtual(main())


def test_a_pool_is_unhealthy_after_so_many_failures_in_a_row_until_a_start_succeeds() -> None:
    async def main() -> None:
        results = [CommandResult(3, b"broken")] * 4 + [CommandResult(0, b"")]

        def script(_: WorkerSpec) -> Script:
            return Script(tool=proto_tool(), run=lambda _: results.pop(0))

        settings = PoolSettings("p", PoolLimits(min_warm_workers=1), verification=(VERIFY,))
        async with world(script, settings=settings, minimum=KEY) as w:
            health = w.pool.pool_states()["p"]
            await eventually(lambda: w.stops == {StopReason.WARMUP_FAILED: 2})
            assert health.is_healthy
            assert not w.happened(EventKind.POOL_UNHEALTHY)
            await eventually(lambda: w.happened(EventKind.POOL_UNHEALTHY))
            assert not health.is_healthy
            await eventually(lambda: w.happened(EventKind.POOL_HEALTHY))
            assert health.is_healthy
            (sick,), (well,) = w.happened(EventKind.POOL_UNHEALTHY), w.happened(EventKind.POOL_HEALTHY)
            assert "3 starts in a row failed" in sick.detail
            assert "broken" in sick.detail
            assert well.detail == "after 4 starts that failed"

    run_virtual(main())


# ---- priming ---------------------------------------------------------------------------------------


class Priming:
    """A pool whose workers have an execroot of their own, and what its tool saw of each request."""

    def __init__(self, folder: Path, *requests: tuple[bytes, dict[bytes, bytes]], **rules: object) -> None:
        self.host = folder / "host"
        self.host.mkdir()
        self.folder = folder
        path = record(folder / "a.rec", *requests)
        self.rules = WarmupRules(requests=(path,), **rules)  # type: ignore[arg-type]
        self.key = own(self.host)
        self.seen: list[tuple[bytes, list[str]]] = []
        """The argument of each request, and the files in the execroot then."""
        self.script = Script(tool=self.tool())

    def tool(self, answer: Callable[[WorkRequest], bytes] | None = None) -> Callable[[bytes], bytes]:
        """A tool that looks at its execroot, and leaves an output there."""

        def look(request: WorkRequest) -> bytes:
            (root,) = [p for p in (self.host / FOLDER).iterdir() if ".prime-" not in p.name]
            argument = request.pb.arguments[0]
            found = sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())
            self.seen.append((argument, found))
            (root / "output").write_text("made")
            return answer(request) if answer is not None else response(request)

        return proto_tool(look)

    def settings(self, **limits: object) -> PoolSettings:
        return PoolSettings("p", PoolLimits(**limits), warmup_rules=self.rules)  # type: ignore[arg-type]


FORTY: tuple[tuple[bytes, dict[bytes, bytes]], ...] = tuple((b"r%d" % n, {}) for n in range(40))
THREE = tuple((b"r%d" % n, {b"src/%d" % n: b"x", b"lib/common": b"y"}) for n in (1, 2, 3))


def test_recorded_requests_run_before_the_first_real_one_each_with_its_own_files(tmp_path: Path) -> None:
    p = Priming(tmp_path, *THREE)
    p.script.gc = lambda: GcReport(300, 100, 0.05)
    p.script.gc_delay_s = 0.25

    async def main() -> None:
        async with world(lambda _: p.script, settings=p.settings()) as w:
            await w.ask(b"real", key=p.key)
            assert p.seen[:3] == [(b"r%d" % n, ["lib/common", f"src/{n}"]) for n in (1, 2, 3)]
            assert [argument for argument, _ in p.seen[3:]] == [b"real"]
            numbers = done(w).numbers
            assert (numbers["primed"], numbers["primed_failed"], numbers["cut_short"]) == (3, 0, 0)
            assert numbers["gc_s"] == pytest.approx(0.25)
            assert w.runtime.workers[0].calls.count("collect_garbage") == 1
            # They are nobody's jobs, and nothing of them is left.
            assert w.pool.pool_states()["p"].counts["jobs"] == 1
            assert w.pool.pool_states()["p"].counts["acquire"] == 1
            assert not [name for name in os.listdir(p.host / FOLDER) if ".prime-" in name]
            assert sorted(os.listdir(p.host)) == [FOLDER]
        assert os.listdir(p.host) == []

    run_virtual(main())


def test_what_a_recorded_request_left_behind_is_removed_before_the_first_real_one(tmp_path: Path) -> None:
    p = Priming(tmp_path, THREE[0])
    p.script.leftovers = [Leftovers((7,), ("trash",))]

    async def main() -> None:
        async with world(lambda _: p.script, settings=p.settings()) as w:
            await w.ask(b"real", key=p.key)
            calls = w.runtime.workers[0].calls
            assert calls.index("remove_leftovers") < calls.index("collect_garbage")
            assert len(w.happened(EventKind.LEFTOVERS_REMOVED)) == 1
            assert w.happened(EventKind.LEFTOVERS_REMOVED)[0].numbers["processes"] == 1

    run_virtual(main())


def test_a_recorded_request_that_fails_is_counted_and_the_worker_serves(tmp_path: Path) -> None:
    p = Priming(tmp_path, *THREE)
    p.script.tool = p.tool(lambda request: response(request, exit_code=int(request.pb.arguments[0] == b"r2")))

    async def main() -> None:
        async with world(lambda _: p.script, settings=p.settings()) as w:
            assert await w.ask(b"real", key=p.key) == b"real"
            assert (done(w).numbers["primed"], done(w).numbers["primed_failed"]) == (3, 1)

    run_virtual(main())


def test_a_request_that_a_worker_died_of_is_not_replayed_again(tmp_path: Path) -> None:
    p = Priming(tmp_path, *THREE)

    async def main() -> None:
        def script(_: WorkerSpec) -> Script:
            good = p.tool()
            return Script(tool=lambda data: None if b"r2" in data else good(data))

        async with world(script, settings=p.settings()) as w:
            with pytest.raises(WorkerDied):
                await w.ask(b"real", key=p.key)
            await eventually(lambda: w.happened(EventKind.WORKER_START_FAILED))
            assert "while it was primed" in w.happened(EventKind.WORKER_START_FAILED)[0].detail
            await asyncio.sleep(60)
            assert not w.happened(EventKind.WARMUP_DONE)
            p.seen.clear()
            assert await w.ask(b"real", key=p.key) == b"real"
            assert [argument for argument, _ in p.seen] == [b"r1", b"r3", b"real"]
            assert done(w).numbers["primed"] == 2
            assert w.pool.pool_states()["p"].counts["start"] == 2

    run_virtual(main())


def test_a_worker_that_does_not_come_back_from_a_recorded_request_is_stopped(tmp_path: Path) -> None:
    p = Priming(tmp_path, *THREE, max_s=2.0)

    async def main() -> None:
        def script(_: WorkerSpec) -> Script:
            good = p.tool()
            return Script(tool=lambda data: b"" if b"r2" in data else good(data))

        async with world(script, settings=p.settings()) as w:
            began = asyncio.get_running_loop().time()
            with pytest.raises(WrapperError, match=r"request 2 of .*a\.rec was not answered within 7 s"):
                await w.ask(b"real", key=p.key)
            assert asyncio.get_running_loop().time() - began == pytest.approx(7.0)
            assert w.stops == {StopReason.WARMUP_FAILED: 1}

    run_virtual(main())


def test_stray_output_while_it_is_primed_stops_the_worker(tmp_path: Path) -> None:
    p = Priming(tmp_path, *THREE)
    p.script.tool = p.tool(lambda request: response(request) * 2)

    async def main() -> None:
        async with world(lambda _: p.script, settings=p.settings()) as w:
            with pytest.raises(WrapperError, match="nobody asked for"):
                await w.ask(b"real", key=p.key)
            assert w.stops == {StopReason.STRAY_OUTPUT: 1}

    run_virtual(main())


def test_priming_ends_when_the_time_is_over_and_the_worker_is_used(tmp_path: Path) -> None:
    p = Priming(tmp_path, *FORTY, max_s=5.0)
    p.script.answer_delay_s = 0.9

    async def main() -> None:
        async with world(lambda _: p.script, settings=p.settings()) as w:
            await w.ask(b"real", key=p.key)
            numbers = done(w).numbers
            assert (numbers["primed"], numbers["cut_short"]) == (6, 1)  # the one in flight is waited for
            assert numbers["prime_s"] == pytest.approx(5.4)
            assert "collect_garbage" not in w.runtime.workers[0].calls

    run_virtual(main())


def test_with_lazy_loading_priming_ends_after_the_batch_when_a_request_waits(tmp_path: Path) -> None:
    p = Priming(tmp_path, *FORTY, max_s=100.0, lazy_loading=True, batch_size=8)
    p.script.answer_delay_s = 0.1

    async def main() -> None:
        settings = p.settings(min_warm_workers=1)
        async with world(lambda _: p.script, settings=settings, minimum=p.key) as w:
            await asyncio.sleep(0.95)  # in the second batch
            await w.ask(b"real", key=p.key)
            assert done(w).numbers["primed"] == 16
            assert done(w).detail == "cut short: a request waits"

    run_virtual(main())


def test_a_request_that_waits_from_the_begin_gets_a_lazy_worker_unprimed(tmp_path: Path) -> None:
    p = Priming(tmp_path, *THREE, lazy_loading=True)

    async def main() -> None:
        async with world(lambda _: p.script, settings=p.settings()) as w:
            await w.ask(b"real", key=p.key)
            assert [argument for argument, _ in p.seen] == [b"real"]

    run_virtual(main())


def test_a_multiplex_worker_gets_so_many_at_once_as_far_as_their_files_agree(tmp_path: Path) -> None:
    requests = [
        (b"r1", {b"a": b"1"}),
        (b"r2", {b"a": b"1", b"b": b"2"}),
        (b"r3", {b"a": b"other"}),
        (b"r4", {b"c": b"4"}),
    ]
    p = Priming(tmp_path, *requests)
    p.key = replace(p.key, multiplex=True)

    async def main() -> None:
        settings = p.settings(max_requests_per_worker_at_once=3, min_warm_workers=1)
        async with world(lambda _: p.script, settings=settings, minimum=p.key) as w:
            await eventually(lambda: w.happened(EventKind.WARMUP_DONE))
            assert done(w).numbers["primed"] == 4
            together, apart = ["a", "b"], ["a", "c"]
            files = [[name for name in found if name != "output"] for _, found in p.seen]
            assert files == [together, together, apart, apart]

    run_virtual(main())


def test_a_worker_in_its_hosts_directory_is_never_primed_and_that_is_told_once(tmp_path: Path) -> None:
    p = Priming(tmp_path, *THREE)

    async def main() -> None:
        in_place = replace(p.key, own_execroot=False)
        async with world(settings=p.settings(max_jobs_per_worker=1)) as w:
            for _ in range(3):
                await w.ask(b"real", key=in_place)
            (skipped,) = w.happened(EventKind.WARMUP_SKIPPED)
            assert "no execroot of its own" in skipped.detail
            assert os.listdir(p.host) == []

    run_virtual(main())


@pytest.mark.parametrize("allowed", [False, True])
def test_requests_of_another_trust_domain_are_replayed_only_if_that_is_asked_for(
    tmp_path: Path, allowed: bool
) -> None:
    p = Priming(tmp_path, *THREE, allow_foreign_requests=allowed)
    p.key = replace(p.key, trust_domain="theirs")

    async def main() -> None:
        async with world(lambda _: p.script, settings=p.settings()) as w:
            await w.ask(b"real", key=p.key)
            assert done(w).numbers["primed"] == (3 if allowed else 0)
            assert len(w.happened(EventKind.WARMUP_SKIPPED)) == (0 if allowed else 1)

    run_virtual(main())


def test_precompile_false_needs_no_record_file(tmp_path: Path) -> None:
    async def main() -> None:
        rules = WarmupRules(requests=(str(tmp_path / "missing.rec"),), precompile=False)
        async with world(settings=PoolSettings("p", warmup_rules=rules)) as w:
            assert await w.ask() == b"hello"

    run_virtual(main())


def test_a_bad_record_file_is_an_error_when_the_pool_is_made(tmp_path: Path) -> None:
    async def main() -> None:
        good = record(tmp_path / "a.rec", (b"r", {}))
        (tmp_path / "b.rec").write_bytes(b"no tar")
        rules = WarmupRules(requests=(good, str(tmp_path / "b.rec")))
        with pytest.raises(ConfigError, match=r"b\.rec: "):
            WorkerPool({"p": PoolSettings("p", warmup_rules=rules)}, {"p": FakeRuntime()})

    run_virtual(main())


@pytest.mark.parametrize("turns", [*range(0, 60, 3)])
def test_a_pool_that_is_closed_while_a_worker_is_primed_leaves_nothing(tmp_path: Path, turns: int) -> None:
    p = Priming(tmp_path, *THREE)
    p.script.answer_delay_s = 0.01

    async def main() -> None:
        async with world(lambda _: p.script, settings=p.settings(min_warm_workers=1), minimum=p.key):
            for turn in range(turns):
                await asyncio.sleep(0.003 if turn % 4 == 3 else 0)
        assert os.listdir(p.host) == []

    run_virtual(main())


# ---- whose turn it is ------------------------------------------------------------------------------


def keys(count: int) -> list[WorkerKey]:
    return [WorkerKey("p", (f"/bin/tool{n}",), "/") for n in range(count)]


def test_no_more_workers_are_between_start_and_ready_than_there_are_places() -> None:
    async def main() -> None:
        settings = PoolSettings("p", warmup=(WARM,))
        script = Script(start_delay_s=1.0, tool=proto_tool(), run_delay_s=1.0)
        async with world(
            lambda _: script, settings=settings, total=TotalLimits(max_concurrent_warmups=2)
        ) as w:
            asking = [asyncio.create_task(w.ask(key=key)) for key in keys(5)]
            await asyncio.sleep(0.5)
            assert (w.pool.warmups.active(), w.pool.warmups.pending("p")) == (2, 3)
            assert w.runtime.starting == 2
            await asyncio.sleep(1.0)  # started, and warming: the places are still taken
            assert (w.runtime.starting, w.pool.warmups.active()) == (0, 2)
            await asyncio.gather(*asking)
            assert asyncio.get_running_loop().time() == pytest.approx(6.0)
            assert (w.pool.warmups.active(), w.pool.warmups.pending()) == (0, 0)
            queued = [event.numbers["queued_s"] for event in w.happened(EventKind.WARMUP_DONE)]
            assert queued == pytest.approx([0, 0, 2, 2, 4])

    run_virtual(main())


def test_a_key_that_a_request_waits_for_overtakes_the_minimum() -> None:
    async def main() -> None:
        script = Script(start_delay_s=1.0, tool=proto_tool())
        limits = PoolLimits(min_warm_workers=3)
        total = TotalLimits(max_concurrent_warmups=1)
        async with world(lambda _: script, settings=PoolSettings("p", limits), total=total, minimum=KEY) as w:
            await asyncio.sleep(1.5)  # the second of the minimum is being started
            other, third = keys(2)
            asking = [asyncio.create_task(w.ask(key=key)) for key in (other, third)]
            await eventually(lambda: w.count(WorkerState.IDLE) == 5)
            started = [worker.spec.argv[0] for worker in w.runtime.workers]
            assert started == ["/bin/tool", "/bin/tool", "/bin/tool0", "/bin/tool1", "/bin/tool"]
            await asyncio.gather(*asking)

    run_virtual(main())


@pytest.mark.parametrize("start_error", [None, WorkerStartFailed("no")])
def test_a_start_that_fails_or_is_called_off_gives_its_place_back(start_error: Exception | None) -> None:
    async def main() -> None:
        def script(spec: WorkerSpec) -> Script:
            error = start_error if spec.argv[0] == "/bin/tool0" else None
            return Script(start_delay_s=1.0, start_error=error, tool=proto_tool())

        async with world(script, total=TotalLimits(max_concurrent_warmups=1)) as w:
            tasks = [asyncio.create_task(w.ask(key=key)) for key in keys(3)]
            await asyncio.sleep(0.5)
            if start_error is None:
                w.pool.retire(1, StopReason.UNHEALTHY)  # in the middle of its start
                w.pool.retire(2, StopReason.UNHEALTHY)  # while it waits for its turn
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert results[1:] == [b"hello", b"hello"]
            assert isinstance(results[0], WorkerStartFailed) == (start_error is not None)
            assert (w.pool.warmups.active(), w.pool.warmups.pending()) == (0, 0)

    run_virtual(main())


def test_a_place_is_free_while_its_worker_is_still_being_stopped() -> None:
    async def main() -> None:
        def script(spec: WorkerSpec) -> Script:
            result = CommandResult(int(spec.argv[0] == "/bin/tool0"), b"")
            return Script(tool=proto_tool(), run=lambda _: result, run_delay_s=1.0, stop_delay_s=4.0)

        settings = PoolSettings("p", verification=(VERIFY,))
        async with world(script, settings=settings, total=TotalLimits(max_concurrent_warmups=1)) as w:
            fails, serves = (asyncio.create_task(w.ask(key=key)) for key in keys(2))
            assert await serves == b"hello"
            assert asyncio.get_running_loop().time() == pytest.approx(2.0)
            assert w.count(WorkerState.STOPPING) == 1
            with pytest.raises(WorkerStartFailed):
                await fails

    run_virtual(main())


def test_a_pool_that_is_closed_while_starts_wait_for_their_turn_leaves_nothing() -> None:
    async def main() -> None:
        script = Script(start_delay_s=5.0, tool=proto_tool())
        async with world(lambda _: script, total=TotalLimits(max_concurrent_warmups=1)) as w:
            tasks = [asyncio.create_task(w.ask(key=key)) for key in keys(3)]
            await asyncio.sleep(1)
            await w.pool.close()
            assert all(
                isinstance(e, WrapperError) for e in await asyncio.gather(*tasks, return_exceptions=True)
            )
            assert (w.pool.warmups.active(), w.pool.warmups.pending()) == (0, 0)
            assert not w.runtime.workers

    run_virtual(main())


# ---- statistics ------------------------------------------------------------------------------------


def test_a_request_is_cold_if_its_worker_was_not_ready_when_it_asked() -> None:
    async def main() -> None:
        script = Script(start_delay_s=2.0, tool=proto_tool(), answer_delay_s=0.5)
        async with world(lambda _: script) as w:
            await w.ask()  # cold: 2.5 s
            await w.ask()  # warm: 0.5 s
            await asyncio.gather(w.ask(), w.ask())  # warm: 0.5 s, and 1 s in turn
            recorder = w.pool.pool_states()["p"].starts
            summary = recorder.summary([recorder])
            assert (summary.cold_requests, summary.warm_requests, summary.cold_share) == (1, 3, 0.25)
            assert summary.cold_latency_s == pytest.approx(2.5)
            assert summary.warm_latency_s == pytest.approx(2.0 / 3)
            assert (summary.starts, summary.first_requests) == (1, 1)
            assert summary.start_p95_s == pytest.approx(2.0)
            assert summary.first_request_s == pytest.approx(0.5)

    run_virtual(main())
