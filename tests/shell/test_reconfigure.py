"""Another configuration while workers serve: who stays, who is replaced, and that nobody who asks notices."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace

from tests.fakes.fake_runtime import FakeRuntime, Script
from tests.shell.test_pool import KEY, World
from tests.support.loop import eventually, run_virtual
from tests.support.tools import proto_tool
from wrapper.errors import PoolDraining
from wrapper.pool.limits import PoolLimits, TotalLimits
from wrapper.pool.pool import WorkerPool
from wrapper.pool.settings import PoolSettings
from wrapper.pool.worker_key import WorkerKey
from wrapper.pool.worker_states import StopReason, WorkerState

LIMITS = PoolLimits(min_warm_workers=2, max_workers=4)
OTHER_POOL = replace(KEY, pool="q")


def settings(limits: PoolLimits = LIMITS) -> dict[str, PoolSettings]:
    return {name: PoolSettings(name, limits) for name in ("p", "q")}


class Reconfigured(World):
    """Two pools, each with a minimum of two workers of its own command."""

    def __init__(self) -> None:
        self.first = FakeRuntime(lambda _: Script(tool=proto_tool()))
        pool = WorkerPool(
            settings(),
            {"p": self.first, "q": self.first},
            total=TotalLimits(),
            minimum_keys={"p": KEY, "q": OTHER_POOL},
        )
        super().__init__(pool, self.first)
        pool.start()

    def workers(self, name: str) -> set[int]:
        return {one for one, worker in self.pool._workers.items() if worker.key.pool == name}

    def idle(self, name: str) -> int:
        return self.pool.pool_states()[name].states[WorkerState.IDLE]

    async def all_warm(self) -> None:
        await eventually(lambda: self.idle("p") == self.idle("q") == 2)

    def change(
        self,
        *changed: str,
        pools: Mapping[str, PoolSettings] | None = None,
        keys: Mapping[str, WorkerKey] | None = None,
    ) -> FakeRuntime:
        pools = settings() if pools is None else pools
        new = FakeRuntime(lambda _: Script(tool=proto_tool()))
        self.pool.reconfigure(
            pools,
            {name: new if name in changed else self.first for name in pools},
            total=TotalLimits(),
            minimum_keys={"p": KEY, "q": OTHER_POOL} if keys is None else keys,
            changed=frozenset(changed),
        )
        return new

    async def end(self) -> None:
        await self.pool.close()
        assert not self.workers("p")
        assert not self.workers("q")


def test_workers_of_pools_that_did_not_change_stay_and_the_others_are_replaced() -> None:
    async def main() -> None:
        world = Reconfigured()
        await world.all_warm()
        stay, go = world.workers("q"), world.workers("p")
        world.change("p")
        await eventually(lambda: world.idle("p") == 2 and not world.workers("p") & go)
        assert world.workers("q") == stay
        assert world.stops == {StopReason.RECONFIGURED: 2}
        await world.end()

    run_virtual(main())


def test_there_is_a_warm_worker_all_the_time() -> None:
    async def main() -> None:
        world = Reconfigured()
        await world.all_warm()
        go = world.workers("p")
        fewest = 2
        world.change("p")
        while world.workers("p") & go:
            fewest = min(fewest, world.idle("p"))
            await asyncio.sleep(0.01)
        assert fewest >= 1
        await world.end()

    run_virtual(main())


def test_a_request_that_is_running_ends_on_its_old_worker() -> None:
    async def main() -> None:
        world = Reconfigured()
        await world.all_warm()
        lease = await world.pool.acquire(KEY)
        world.change("p")
        await eventually(lambda: len(world.workers("p") - {lease.worker_id}) >= 2)
        assert lease.worker_id in world.workers("p")
        lease.release()
        await eventually(lambda: lease.worker_id not in world.workers("p"))
        await world.end()

    run_virtual(main())


def test_a_new_command_is_kept_warm_and_the_old_ones_workers_end() -> None:
    async def main() -> None:
        world = Reconfigured()
        await world.all_warm()
        new = replace(KEY, argv=("/bin/new",))
        world.change("p", keys={"p": new, "q": OTHER_POOL})
        await eventually(
            lambda: [w.key.argv for w in world.pool._workers.values() if w.key.pool == "p"] == [new.argv] * 2
        )
        assert await world.ask(key=new) == b"hello"
        await world.end()

    run_virtual(main())


def test_a_pool_that_is_gone_ends_and_one_that_is_new_begins() -> None:
    async def main() -> None:
        world = Reconfigured()
        await world.all_warm()
        added = {"q": settings()["q"], "r": PoolSettings("r", LIMITS)}
        world.change("r", pools=added, keys={"q": OTHER_POOL, "r": replace(KEY, pool="r")})
        await eventually(lambda: not world.workers("p") and world.idle("r") == 2)
        try:
            await world.pool.acquire(KEY)
        except PoolDraining:
            pass
        else:
            raise AssertionError("a pool that is gone has served")
        await world.end()

    run_virtual(main())


def test_a_pool_that_comes_back_serves_again() -> None:
    async def main() -> None:
        world = Reconfigured()
        await world.all_warm()
        world.change(pools={"q": settings()["q"]}, keys={"q": OTHER_POOL})
        world.change()
        await eventually(lambda: world.idle("p") == 2)
        assert await world.ask() == b"hello"
        await world.end()

    run_virtual(main())


def test_limits_hold_from_now_on() -> None:
    async def main() -> None:
        world = Reconfigured()
        await world.all_warm()
        world.change(pools=settings(replace(LIMITS, min_warm_workers=3)))
        await eventually(lambda: world.idle("p") == world.idle("q") == 3)
        assert world.stops == {}
        await world.end()

    run_virtual(main())
