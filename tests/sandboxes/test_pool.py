"""The pool's own logic, over a backend that is scripted: failures, deaths, waiting, closing."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from agentrl.errors import InfraError, UsageError
from agentrl.sandbox import Enforcement, Limits, Result, pool


class Toy:
    def __init__(self, backend: Scripted, number: int) -> None:
        self.backend, self.name, self.alive = backend, f"toy-{number}", True

    async def exec(self, code: str, seconds: float | None = None) -> Result:
        return Result("ok")

    async def close(self) -> None:
        self.alive = False
        await asyncio.sleep(self.backend.closing)
        self.backend.living -= 1


class Scripted:
    """`plan` decides each start: None opens, an exception is raised."""

    name = "scripted"

    def __init__(self, *plan: Exception | None, opening: float = 0.0, closing: float = 0.0) -> None:
        self.plan, self.opening, self.closing = list(plan), opening, closing
        self.opened = self.living = self.peak = self.reaped = self.tried = 0
        self.toys: list[Toy] = []
        self.lives: list[float] = []
        self.starting = self.starting_peak = 0

    async def missing(self) -> str | None:
        return None

    async def enforcement(self, limits: Limits) -> Enforcement:
        return Enforcement()

    async def open(self, limits: Limits) -> Toy:
        self.tried += 1
        self.lives.append(limits.life)
        self.starting += 1
        self.starting_peak = max(self.starting_peak, self.starting)
        try:
            await asyncio.sleep(self.opening)
        finally:
            self.starting -= 1
        if self.plan and (error := self.plan.pop(0)) is not None:
            raise error
        self.opened += 1
        self.living += 1
        self.peak = max(self.peak, self.living)
        self.toys.append(Toy(self, self.opened))
        return self.toys[-1]

    async def reap(self) -> int:
        self.reaped += 1
        return 0

    async def close(self) -> None:
        pass


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "FIRST_PAUSE", 0.005)
    monkeypatch.setattr(pool, "LONGEST_PAUSE", 0.02)
    monkeypatch.setattr(pool, "CHECK_SECONDS", 0.02)


def run(story: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(story, 20))


def make(backend: Any, **options: Any) -> pool.Pool:
    return pool.Pool(backend, **({"warm": 2, "most": 4, "patience": 5.0} | options))


def test_warm_ones_are_ready_and_replaced() -> None:
    async def story() -> None:
        backend = Scripted()
        async with make(backend) as boxes:
            await asyncio.sleep(0.02)
            assert boxes.metrics()["ready"] == 2
            box = await boxes.lease()
            boxes.give_back(box)
            await asyncio.sleep(0.02)
            assert boxes.metrics()["ready"] == 2 and boxes.stats.closed == 1
            other = await boxes.lease()
            assert other is not box, "what was used is never used again"
        assert backend.living == 0 and backend.reaped == 2

    run(story())


def test_no_more_than_most_exist_and_those_who_wait_come_in_order() -> None:
    async def story() -> None:
        backend = Scripted(closing=0.01)
        done: list[int] = []

        async def use(boxes: pool.Pool, number: int) -> None:
            async with boxes.leased():
                done.append(number)
                await asyncio.sleep(0.005)

        async with make(backend, most=3) as boxes:
            await asyncio.gather(*(use(boxes, number) for number in range(20)))
            assert boxes.stats.waited_s > 0
        assert done == list(range(20)) and backend.peak <= 3 and backend.living == 0

    run(story())


def test_starts_that_fail_are_tried_again() -> None:
    async def story() -> None:
        backend = Scripted(*[InfraError("the daemon restarts")] * 5)
        async with make(backend, starters=1) as boxes:
            assert (await boxes.lease()).alive
            assert boxes.stats.failed == 5

    run(story())


def test_whoever_waits_too_long_hears_why() -> None:
    async def story() -> None:
        async with make(Scripted(*[InfraError("no daemon")] * 10_000), patience=0.1) as boxes:
            with pytest.raises(InfraError, match=r"within 0\.1 s: no daemon"):
                await boxes.lease()
        async with make(Scripted(), most=2, patience=0.1) as boxes:
            await boxes.lease()
            await boxes.lease()
            with pytest.raises(InfraError, match="all 2 are in use"):
                await boxes.lease()

    run(story())


def test_what_will_not_mend_itself_is_told_at_once() -> None:
    async def story() -> None:
        async with make(Scripted(*[UsageError("no image")] * 100), warm=0) as boxes:
            with pytest.raises(UsageError, match="no image"):
                await boxes.lease()

    run(story())


def test_dead_ones_are_skipped_and_replaced() -> None:
    async def story() -> None:
        backend = Scripted()
        async with make(backend) as boxes:
            await asyncio.sleep(0.01)
            for box in backend.toys:
                box.alive = False
            assert (await boxes.lease()).alive
            await asyncio.sleep(0.1)
            assert boxes.stats.found_dead == 2 and boxes.metrics()["ready"] == 2

    run(story())


def test_a_lease_that_is_cancelled_leaks_nothing() -> None:
    async def story() -> None:
        backend = Scripted(opening=0.02)
        async with make(backend, warm=0, most=2) as boxes:
            waiting = [asyncio.ensure_future(boxes.lease()) for _ in range(6)]
            await asyncio.sleep(0.01)
            for task in waiting[:3]:
                task.cancel()
            got = await asyncio.wait_for(waiting[3], 1)
            boxes.give_back(got)
            boxes.give_back(await asyncio.wait_for(waiting[4], 1))
            boxes.give_back(await asyncio.wait_for(waiting[5], 1))
            await asyncio.gather(*waiting[:3], return_exceptions=True)
        assert backend.living == 0

    run(story())


def test_closing_takes_the_leased_ones_along_and_wakes_who_waits() -> None:
    async def story() -> None:
        backend = Scripted()
        boxes = make(backend, most=1, warm=0)
        await boxes.start()
        await boxes.lease()
        waiter = asyncio.ensure_future(boxes.lease())
        await asyncio.sleep(0.01)
        await boxes.close()
        with pytest.raises(InfraError, match="closed"):
            await waiter
        with pytest.raises(InfraError, match="closed"):
            await boxes.lease()
        assert backend.living == 0

    run(story())


def test_impossible_numbers_are_refused() -> None:
    with pytest.raises(UsageError, match="warm=5"):
        pool.Pool(Scripted(), warm=5, most=2)  # type: ignore[arg-type]


def test_the_real_thing(anyone: Any) -> None:
    async def story() -> None:
        async with make(anyone, patience=30.0) as boxes:

            async def use() -> None:
                async with boxes.leased() as box:
                    await box.exec("x = 20")
                    assert (await box.exec("x + 1")).value == "21"

            await asyncio.gather(*(use() for _ in range(8)))
            assert boxes.stats.leased == 8

    run(story())
