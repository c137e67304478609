"""Streams of groups: landing one by one, shared places, errors, dropping; and what an update takes from them."""

from __future__ import annotations

import asyncio
import random
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from scripted import CHAT, Door, ScriptedEngine, call
from test_manager import Told

from agentrl.algo.sampler import TaskDraw, TaskStream
from agentrl.algo.state import StateStore
from agentrl.config import prepare
from agentrl.engines import Request
from agentrl.errors import RunFailed, UsageError
from agentrl.rollout.actors import PolicyActor
from agentrl.rollout.manager import RolloutLimits, RolloutManager
from agentrl.rollout.places import Places
from agentrl.rollout.play import Recorded
from agentrl.rollout.strategy import FlatRollouts, RolloutStrategy
from agentrl.rollout.stream import Flight, GroupStream
from agentrl.task import Task
from agentrl.train.stages import RLStage
from agentrl.train.supply import Supply, usable
from agentrl.trajectory import Group, Sampling, Trajectory

prepare()


class Scene:
    """One manager, one scripted engine, one stream."""

    def __init__(self, script: Callable[[Request, int], Any], **limits: Any) -> None:
        self.engine = ScriptedEngine(script)
        self.told = Told()
        settings = RolloutLimits(**({"max_tokens": 200} | limits))
        self.manager = RolloutManager(Door(), limits=settings, seed=7, recorder=self.told, watcher=self.told)
        self.actor = PolicyActor(self.engine, CHAT, Sampling())  # type: ignore[arg-type]
        self.kept: list[tuple[int, str]] = []

    def stream(self, recorded: Recorded | None = None) -> GroupStream:
        def keep(draw: TaskDraw, trajectory: Trajectory) -> None:
            self.kept.append((draw.step, trajectory.id))

        return GroupStream(self.manager, stage="rl", keep=keep, recorded=recorded)

    def submit(self, stream: GroupStream, *draws: TaskDraw, strategy: RolloutStrategy | None = None) -> list[Flight]:
        return stream.submit(draws, self.actor, strategy=strategy or FlatRollouts())

    def assert_clean(self) -> None:
        assert not self.manager.live and not self.engine.held
        assert self.manager.places.free == self.manager.places.total
        left = [t for t in asyncio.all_tasks() if t is not asyncio.current_task() and "wait_for()" not in repr(t)]
        assert not left, left


def draw(task: str, step: int = 0, samples: int = 2) -> TaskDraw:
    return TaskDraw(Task(task, f"Question {task}", answer="key"), samples, step)


class Gates:
    """A script in which a task's episodes answer once its gate is open."""

    def __init__(self) -> None:
        self.gates: dict[str, asyncio.Event] = {}

    def gate(self, task: str) -> asyncio.Event:
        return self.gates.setdefault(task, asyncio.Event())

    async def __call__(self, request: Request, turn: int) -> str:
        if turn == 0:
            return call("look")
        await self.gate(request.session.split("/")[1]).wait()
        return "key"


def test_groups_land_in_the_order_in_which_they_finish() -> None:
    async def main() -> None:
        gates = Gates()
        scene = Scene(gates)
        async with scene.stream() as stream:
            slow, fast = scene.submit(stream, draw("slow"), draw("fast"))
            gates.gate("fast").set()
            await stream.until(lambda: fast.landed > 0)
            assert not slow.landed and [m.trajectory.reward for m in fast.group.members] == [0.75, 0.75]
            (late,) = scene.submit(stream, draw("late", step=1))
            gates.gate("late").set()
            await stream.until(lambda: late.landed > 0)
            gates.gate("slow").set()
            await stream.until(lambda: not stream.flying)
            assert [fast.landed, late.landed, slow.landed] == [1, 2, 3]
            assert [step for step, _ in scene.kept] == [0, 0, 1, 1, 0, 0]  # of siblings either may be first
            assert sorted(scene.kept[2:4]) == [(1, "rl-1/late/0"), (1, "rl-1/late/1")]
        scene.assert_clean()

    asyncio.run(asyncio.wait_for(main(), 30))


def test_numbers_of_interleaved_steps_do_not_mix() -> None:
    async def main() -> list[str]:
        scene = Scene(lambda request, turn: "key")
        async with scene.stream() as stream:
            first = scene.submit(stream, draw("t"), draw("t", step=1))
            evaluated = await scene.manager.run([draw("t")], scene.actor, stage="eval", strategy=FlatRollouts())
            assert evaluated[0].id == "eval-0/t"
            again = scene.submit(stream, draw("t"), draw("t", step=1), draw("t"))
            await stream.until(lambda: not stream.flying)
            return [m.trajectory.id for f in [*first, *again] for m in f.group.members]

    ids = asyncio.run(main())
    assert ids[::2] == ["rl-0/t/0", "rl-1/t/0", "rl-0/t/2", "rl-1/t/2", "rl-0/t/4"] and len(set(ids)) == 10


def test_an_error_in_any_episode_reaches_whoever_waits_for_another() -> None:
    async def main() -> None:
        never = asyncio.Event()

        async def script(request: Request, turn: int) -> str:
            if "good" in request.session:
                await never.wait()
            return "raise"

        scene = Scene(script)
        with pytest.raises(RunFailed, match="broke in the environment"):
            async with scene.stream() as stream:
                (good,) = scene.submit(stream, draw("good"))
                scene.submit(stream, draw("bad", samples=4))
                await stream.until(lambda: good.landed > 0)
        scene.assert_clean()

    asyncio.run(asyncio.wait_for(main(), 30))


def test_a_dropped_group_leaves_nothing_and_the_others_go_on() -> None:
    async def main() -> None:
        gates = Gates()
        scene = Scene(gates)
        Door.opened = Door.closed = 0
        async with scene.stream() as stream:
            slow, fast = scene.submit(stream, draw("slow"), draw("fast"))
            while len(scene.told.turns) < 4:  # noqa: ASYNC110  until all four wait at their gates
                await asyncio.sleep(0.001)
            await stream.drop([slow])
            assert sorted(scene.told.forgotten) == ["rl-0/slow/0", "rl-0/slow/1"]
            assert set(scene.manager.live) == {"rl-0/fast/0", "rl-0/fast/1"}
            assert scene.engine.aborted and all("slow" in str(session) for session in scene.engine.aborted)
            gates.gate("fast").set()
            await stream.until(lambda: fast.landed > 0)
        scene.assert_clean()
        assert Door.opened == Door.closed == 4

    asyncio.run(asyncio.wait_for(main(), 30))


def test_closing_keeps_the_turns_for_a_resumed_run() -> None:
    async def main() -> None:
        scene = Scene(Gates())
        async with scene.stream() as stream:
            scene.submit(stream, draw("slow"))
            while len(scene.told.turns) < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        assert not scene.told.forgotten
        scene.assert_clean()

    asyncio.run(asyncio.wait_for(main(), 30))


@pytest.mark.parametrize("seed", range(20))
def test_cancelling_at_any_moment_is_clean(seed: int) -> None:
    rng = random.Random(seed)

    async def main() -> None:
        async def script(request: Request, turn: int) -> str:
            await asyncio.sleep(rng.random() * 0.004)
            return call("slow", seconds=rng.random() * 0.004) if turn < 2 else "key"

        scene = Scene(script, episodes=5)
        Door.opened = Door.closed = 0

        async def train() -> None:
            async with scene.stream() as stream:
                for step in range(50):
                    flights = scene.submit(stream, *(draw(f"t{i}", step, samples=3) for i in range(3)))
                    await stream.until(lambda flights=flights: flights[0].landed > 0)  # type: ignore[misc]

        task = asyncio.create_task(train())
        await asyncio.sleep(rng.random() * 0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        scene.assert_clean()
        assert Door.opened <= Door.closed  # one that is cancelled before its reset begins is closed all the same

    asyncio.run(asyncio.wait_for(main(), 30))


def test_places_are_shared_by_streams_and_taken_whole_by_forking_groups() -> None:
    class Pairs(RolloutStrategy):
        needs_fork = True

        async def run(self, draw: TaskDraw, play: Any) -> Group:
            first = await play.episode(0)
            await asyncio.sleep(0.001)
            return play.group([first, await play.episode(1)])  # type: ignore[no-any-return]

    async def main() -> None:
        most = 0

        async def script(request: Request, turn: int) -> str:
            nonlocal most
            most = max(most, scene.manager.places.total - scene.manager.places.free)
            await asyncio.sleep(0.001)
            return "key"

        scene = Scene(script, episodes=4)
        async with scene.stream() as stream:
            scene.submit(stream, *(draw(f"p{i}") for i in range(5)), strategy=Pairs())
            scene.submit(stream, *(draw(f"f{i}", samples=3) for i in range(5)))
            await scene.manager.run(
                [draw("e", samples=9)], scene.actor, stage="eval", strategy=FlatRollouts(), split="test"
            )
            await stream.until(lambda: not stream.flying)
        assert most == 4
        scene.assert_clean()

    asyncio.run(asyncio.wait_for(main(), 30))


def test_places_are_given_in_order_and_survive_cancelling() -> None:
    async def main() -> None:
        places = Places(3)
        order: list[str] = []
        leave = asyncio.Event()

        async def hold(name: str, n: int) -> None:
            async with places.take(n):
                order.append(name)
                await leave.wait()

        first = asyncio.create_task(hold("first", 2))
        await asyncio.sleep(0)
        whole, single = asyncio.create_task(hold("whole", 9)), asyncio.create_task(hold("single", 1))
        await asyncio.sleep(0)
        assert order == ["first"], "one place is free, but the one who asked for all came before"
        whole.cancel()
        await asyncio.gather(whole, return_exceptions=True)
        await asyncio.sleep(0)
        assert order == ["first", "single"]
        leave.set()
        await asyncio.gather(first, single)
        assert places.free == 3

    asyncio.run(asyncio.wait_for(main(), 30))


def test_places_go_to_the_larger_priority_first() -> None:
    async def main() -> None:
        places, order = Places(1), list[str]()

        async def hold(name: str, priority: int) -> None:
            async with places.take(priority=priority):
                order.append(name)
                await asyncio.sleep(0)

        asked = [("first", -9), ("old", -2), ("new", -3), ("evaluation", 0), ("old too", -2)]
        await asyncio.gather(*(hold(*each) for each in asked))
        assert order == ["first", "evaluation", "old", "old too", "new"]
        assert places.free == 1

    asyncio.run(asyncio.wait_for(main(), 30))


def test_a_place_may_be_left_while_one_who_waits_for_it_is_cancelled() -> None:
    async def main() -> None:
        places = Places(1)

        async def hold() -> None:
            async with places.take():
                await asyncio.sleep(0)
                waiting.cancel()

        async def wait() -> None:
            async with places.take():
                raise AssertionError("it was cancelled")

        holding, waiting = asyncio.create_task(hold()), asyncio.create_task(wait())
        await asyncio.wait({holding, waiting})
        assert waiting.cancelled() and places.free == 1

    asyncio.run(asyncio.wait_for(main(), 30))


# -- what an update takes ------------------------------------------------------------------------


class Line:
    """A supply over a scripted engine, with a trainer that does nothing but count versions."""

    def __init__(self, script: Callable[[Request, int], Any], recorded: Recorded | None = None, **options: Any) -> None:
        defaults = {"steps": 6, "prompts": 2, "samples": 2, "optimizer": {"lr": 1e-3}}
        self.stage = RLStage.model_validate(defaults | options)
        self.scene = Scene(script)
        self.version = 10
        self.recorded = recorded
        self.tasks = TaskStream(lambda: (Task(f"t{i}", f"Question {i}", answer="key") for i in range(1000)))

    def supply(self, stream: GroupStream, start: int = 0) -> Supply:
        return Supply(
            self.stage,
            stream,
            self.tasks,
            StateStore(),
            version=lambda: self.version,
            actor=lambda stage: self.scene.actor,
            start=start,
        )


def names(groups: Sequence[Group]) -> list[str]:
    return [group.task_id for group in groups]


@pytest.mark.parametrize("bound", [0, 1, 3])
def test_every_task_is_trained_once_within_the_bound(bound: int) -> None:
    rng = random.Random(bound)

    async def script(request: Request, turn: int) -> str:
        await asyncio.sleep(rng.random() ** 4 * 0.02)
        return call("look") if turn == 0 else "key"

    async def main() -> None:
        line = Line(script, steps=12, max_staleness=bound)
        born: dict[str, int] = {}
        trained: list[str] = []
        async with line.scene.stream() as stream:
            supply = line.supply(stream)
            submit = stream.submit

            def watched(draws: Sequence[TaskDraw], *args: Any, **keys: Any) -> list[Flight]:
                born.update({d.task.id: line.version for d in draws})
                done = line.version - 10
                assert len(born) <= (done + bound + 1) * 2
                return submit(draws, *args, **keys)

            stream.submit = watched  # type: ignore[method-assign]
            for step in range(12):
                groups = await supply.take(step)
                assert len(groups) == 2
                assert all(line.version - born[g.task_id] <= bound for g in groups)
                trained += names(groups)
                supply.trained(step)
                line.version += 1
                await asyncio.sleep(rng.random() * 0.005)
            assert not stream.flying and len(born) == 24
        assert Counter(trained) == Counter(f"t{i}" for i in range(24))
        if bound == 0:
            assert trained == [f"t{i}" for i in range(24)]
        line.scene.assert_clean()

    asyncio.run(asyncio.wait_for(main(), 60))


def test_requests_of_an_earlier_update_come_before_later_ones_and_after_evaluation() -> None:
    asked: dict[str, set[int]] = {}

    async def script(request: Request, turn: int) -> str:
        asked.setdefault(request.session.split("/")[1], set()).add(request.priority)
        return call("look") if turn == 0 else "key"

    async def main() -> None:
        line = Line(script, steps=3, max_staleness=2)
        async with line.scene.stream() as stream:
            await line.supply(stream).take(0)
            scene = line.scene
            await scene.manager.run([draw("held out", step=7)], scene.actor, stage="eval", strategy=FlatRollouts())
            await stream.until(lambda: not stream.flying)

    asyncio.run(asyncio.wait_for(main(), 30))
    assert asked == {f"t{i}": {-1 - i // 2} for i in range(6)} | {"held out": {0}}


def test_what_finished_first_is_trained_first_until_something_is_due() -> None:
    async def main() -> None:
        gates = Gates()
        line = Line(gates, max_staleness=2)
        async with line.scene.stream() as stream:
            supply = line.supply(stream)
            for task in ("t3", "t5"):
                gates.gate(task).set()
            assert names(await supply.take(0)) == ["t3", "t5"]
            line.version += 1
            for task in ("t1", "t2", "t6"):
                gates.gate(task).set()
                await asyncio.sleep(0.01)
            assert names(await supply.take(1)) == ["t1", "t2"]
            line.version += 1
            # t0 and t4 were submitted two updates ago: the update waits for them although t6 and t7 are there
            gates.gate("t7").set()
            waiting = asyncio.create_task(supply.take(2))
            await asyncio.sleep(0.05)
            assert not waiting.done()
            gates.gate("t4").set()
            await asyncio.sleep(0.02)
            assert not waiting.done()
            gates.gate("t0").set()
            assert names(await waiting) == ["t0", "t4"] and supply.waited > 0.05

    asyncio.run(asyncio.wait_for(main(), 30))


def test_the_first_batches_are_all_trained_before_they_are_too_old() -> None:
    """They are of one age: where faster groups of later batches took their places, some would be left over."""

    async def main() -> None:
        gates = Gates()
        line = Line(gates, max_staleness=2)
        async with line.scene.stream() as stream:
            supply = line.supply(stream)
            for task in ("t6", "t7", "t0", "t1"):
                gates.gate(task).set()
            assert names(await supply.take(0)) == ["t0", "t1"]
            line.version += 1
            taking = asyncio.create_task(supply.take(1))
            await asyncio.sleep(0.05)
            assert not taking.done(), "t6 and t7 are there, but t2 to t5 need the places of two updates"
            gates.gate("t4").set()
            await asyncio.sleep(0.02)
            gates.gate("t5").set()
            assert names(await taking) == ["t4", "t5"]
            line.version += 1
            gates.gate("t2").set()
            gates.gate("t3").set()
            assert names(await supply.take(2)) == ["t2", "t3"]
            line.version += 1
            assert names(await supply.take(3)) == ["t6", "t7"], "from here on the fastest are first"

    asyncio.run(asyncio.wait_for(main(), 30))


def test_overdue_groups_are_dropped_and_replaced_where_asked() -> None:
    async def main() -> None:
        gates = Gates()
        line = Line(gates, max_staleness=1, overdue="drop", steps=3)
        trained: list[str] = []
        async with line.scene.stream() as stream:
            supply = line.supply(stream)
            for task in (f"t{i}" for i in range(1, 20)):
                gates.gate(task).set()
            trained += names(await supply.take(0))
            assert supply.dropped == []
            line.version += 1
            trained += names(await supply.take(1))
            assert supply.dropped == ["rl-0/t0"], "the bound says it may not get any older"
            line.version += 1
            trained += names(await supply.take(2))
            assert not stream.flying
        assert len(trained) == 6 == len(set(trained)) and "t0" not in trained
        assert "t6" in trained, "another task came in its place"
        line.scene.assert_clean()

    asyncio.run(asyncio.wait_for(main(), 30))


def test_a_restored_supply_goes_on_with_the_very_same_episodes() -> None:
    async def main() -> None:
        gates = Gates()
        line = Line(gates, max_staleness=1)
        async with line.scene.stream() as stream:
            supply = line.supply(stream)
            for task in ("t0", "t1"):
                gates.gate(task).set()
            await supply.take(0)
            gates.gate("t2").set()
            await supply.refill(0, 1) if gates.gate("t4").set() is None else None
            supply.trained(0)
            line.version += 1
            state, at_play = supply.state(), sorted(f.play.group_id for f in supply._open)
        again = Line(lambda request, turn: "key", max_staleness=1)
        again.version = line.version
        again.tasks.seek(line.tasks.position)
        async with again.scene.stream() as stream:
            supply = again.supply(stream, start=1)
            supply.restore(state)
            assert sorted(f.play.group_id for f in supply._open) == at_play
            assert supply.state() == state
            trained = [name for step in range(1, 6) for name in await _step(again, supply, step)]
        assert Counter(trained) == Counter(f"t{i}" for i in range(13)) - Counter(["t0", "t1", "t4"])

    asyncio.run(asyncio.wait_for(main(), 30))


async def _step(line: Line, supply: Supply, step: int) -> list[str]:
    groups = await supply.take(step)
    supply.trained(step)
    line.version += 1
    return names(groups)


def test_a_task_that_is_gone_is_named() -> None:
    tasks = TaskStream(lambda: [Task("a", "A"), Task("b", "B")])
    tasks.take(2)
    assert set(tasks.find({"b"})) == {"b"}
    with pytest.raises(UsageError, match="'c' was drawn before the run stopped"):
        tasks.find({"a", "c"})


def test_what_later_weights_sampled_is_not_taken_over() -> None:
    async def played() -> Trajectory:
        scene = Scene(lambda request, turn: call("look") if turn < 2 else "key")  # all of version 1
        (group,) = await scene.manager.run([draw("t")], scene.actor, stage="rl", strategy=FlatRollouts())
        return group.members[0].trajectory

    trajectory = asyncio.run(played())
    both = Recorded({trajectory.id: trajectory}, {"other": trajectory.turns[:2]})
    assert usable(both, 1).finished == {trajectory.id: trajectory}
    assert list(usable(both, 1).inflight) == ["other"]
    assert usable(both, 0) == Recorded({}, {})
