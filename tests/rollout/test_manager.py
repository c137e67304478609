"""The manager with a scripted engine: outcomes, retries, deadlines, cancelling, order, replay."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from scripted import CHAT, END, Door, ScriptedEngine, call

from agentrl.algo.advantage import GRPO
from agentrl.algo.sampler import TaskDraw
from agentrl.context import Memory
from agentrl.engines import Request
from agentrl.errors import InfraError, RunFailed
from agentrl.rollout.actors import PolicyActor
from agentrl.rollout.deadlines import Deadlines
from agentrl.rollout.manager import RolloutLimits, RolloutManager
from agentrl.rollout.play import Recorded
from agentrl.rollout.strategy import FlatRollouts, RolloutStrategy
from agentrl.trajectory import Group, Sampling, Trajectory, ids_of, rows_of


class Told:
    """A watcher and recorder that remembers."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.stuck_texts: list[str] = []
        self.turns: list[tuple[str, int]] = []
        self.forgotten: list[str] = []

    def progress(self, stage: str, done: int, total: int, info: dict[str, float]) -> None:
        assert done <= total

    def stuck(self, text: str) -> None:
        self.stuck_texts.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def turn(self, key: Any, index: int, turn: Any) -> None:
        self.turns.append((key.id, index))

    def forget(self, key: Any) -> None:
        self.forgotten.append(key.id)

    def image(self, image: Any) -> None:
        raise AssertionError("no images here")


class Scene:
    """One manager with one scripted engine."""

    def __init__(self, script: Callable[[Request, int], Any], max_context: int = 4096, **limits: Any) -> None:
        self.engine = ScriptedEngine(script, max_context)
        self.told = Told()
        self.env = Door()
        settings = RolloutLimits(**({"max_tokens": 200} | limits))
        self.manager = RolloutManager(self.env, limits=settings, seed=7, recorder=self.told, watcher=self.told)
        self.actor = PolicyActor(self.engine, CHAT, Sampling())  # type: ignore[arg-type]

    async def play(self, tasks: int = 1, samples: int = 1, **options: Any) -> list[Group]:
        draws = [
            TaskDraw(task, samples, 0, i) for i, task in zip(range(tasks), self.env.tasks("train", 0), strict=False)
        ]
        return await self.manager.run(draws, self.actor, stage="rl", **({"strategy": FlatRollouts()} | options))


def one(script: Callable[[Request, int], Any], max_context: int = 4096, **limits: Any) -> tuple[Trajectory, Scene]:
    scene = Scene(script, max_context, **limits)
    (group,) = asyncio.run(scene.play())
    return group.members[0].trajectory, scene


def says(*texts: str) -> Callable[[Request, int], str]:
    return lambda request, turn: texts[min(turn, len(texts) - 1)]


def test_a_completed_episode_is_recorded_to_the_token() -> None:
    trajectory, scene = one(says(call("look", where="left"), "key"))
    assert str(trajectory.outcome) == "completed" and trajectory.reward == 0.75 and not trajectory.success
    first, second = trajectory.turns
    assert first.tools[0].call.name == "look" and first.tools[0].result.ok and first.tools[0].result.cost == 0.5
    assert first.observation.startswith("nothing left") and second.final_text == "key"
    before = [*ids_of(first.context).tolist(), *first.output[0].ids.tolist()]
    assert ids_of(second.context).tolist()[: len(before)] == before
    assert len(rows_of(trajectory)) == 1
    assert scene.told.turns == [(trajectory.id, 0), (trajectory.id, 1)]
    assert not scene.engine.held and not scene.manager.live


@pytest.mark.parametrize(
    ("script", "limits", "outcome", "reward"),
    [
        (says(call("win")), {}, "terminated", 0.25),
        (says(call("look")), {}, "truncated(turns)", 0.0),
        (says("on and on and on…"), {"max_tokens": 4}, "truncated(tokens)", 0.0),
        (says(call("look")), {"max_episode_tokens": 100}, "truncated(tokens)", 0.0),
        (says(call("ruin")), {}, "failed(policy)", 0.0),
        (says(call("wrong"), "key"), {}, "completed", 0.75),
        (says(call("broken_service")), {"retries": 0}, "failed(infra)", None),
    ],
)
def test_outcomes(script: Any, limits: dict[str, Any], outcome: str, reward: float | None) -> None:
    trajectory, _ = one(script, **limits)
    assert str(trajectory.outcome) == outcome
    assert trajectory.reward == reward


def test_the_context_limit_truncates() -> None:
    length = len(one(says("key"))[0].turns[0].context[0])
    trajectory, _ = one(says(call("look")), max_context=length + 120)
    assert str(trajectory.outcome) == "truncated(context)"


def test_a_broken_score_is_missing_and_many_of_them_stop_the_run() -> None:
    trajectory, scene = one(says("raise"))
    assert str(trajectory.outcome) == "failed(env)" and trajectory.reward is None
    assert "score is broken" in scene.told.warnings[0]
    with pytest.raises(RunFailed, match="broke in the environment"):
        asyncio.run(Scene(says("raise")).play(tasks=4))


@pytest.mark.parametrize(("away", "outcome", "reward"), [(2, "completed", 0.0), (3, "failed(infra)", None)])
def test_a_judge_that_is_away_is_asked_again(
    away: int, outcome: str, reward: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Door, "judge_is_away", away)
    trajectory, _ = one(says("judge"), retries=2)
    assert str(trajectory.outcome) == outcome and trajectory.reward == reward
    assert len(trajectory.turns) == 1, "the episode itself is not played again"


def test_infrastructure_is_tried_again_then_left_out_of_the_statistics() -> None:
    tried: list[str] = []

    def script(request: Request, turn: int) -> str:
        tried.append(request.session)
        return (
            call("broken_service")
            if request.session.endswith("/1")
            else "key"
            if request.session.endswith("/0")
            else "no"
        )

    scene = Scene(script, retries=2)
    (group,) = asyncio.run(scene.play(samples=3))
    assert [str(m.trajectory.outcome) for m in group.members] == ["completed", "failed(infra)", "completed"]
    assert tried.count(group.members[1].trajectory.id) == 3 and len(scene.told.forgotten) == 2
    assert group.members[1].trajectory.attempt == 2
    GRPO().estimate([group])
    assert group.members[1].advantages is None and group.members[0].advantages is not None


def test_an_engine_that_fails_once_is_tried_again() -> None:
    failures = [InfraError("connection reset")]

    def script(request: Request, turn: int) -> str:
        if failures:
            raise failures.pop()
        return "key"

    trajectory, _ = one(script)
    assert str(trajectory.outcome) == "completed" and trajectory.attempt == 1


def test_a_malformed_call_is_an_observation_and_not_an_answer() -> None:
    trajectory, _ = one(says('<tool_call>\n{"name": "look", "arguments": {\n</tool_call>', "key"))
    assert trajectory.turns[0].error == "parse" and "JSON" in trajectory.turns[0].observation
    assert trajectory.turns[0].observation.startswith("Error: ")
    assert trajectory.reward == 0.75


def test_a_cut_call_gets_a_forced_end_that_never_trains() -> None:
    long = call("look", where="x" * 400) + "…"
    trajectory, _ = one(says(long, "key"), max_tokens=60)
    cut = trajectory.turns[0]
    assert [span.origin for span in cut.output] == ["sampled", "forced"] and cut.output[1].ids[0] == END
    assert cut.error == "parse" and cut.finish == "length"
    (row,) = rows_of(trajectory)
    forced_at = len(ids_of(cut.context)) + len(cut.output[0])
    assert row.ids[forced_at] == END and forced_at not in row.targets


def test_parallel_calls_keep_their_order() -> None:
    two = call("look", where="a") + "\n" + call("look", where="b")
    trajectory, _ = one(says(two, "key"))
    assert [use.call.arguments["where"] for use in trajectory.turns[0].tools] == ["a", "b"]
    assert trajectory.n_tool_calls == 2 and trajectory.tool_cost == 1.0


def test_deadlines_end_turns_and_the_episode_is_scored() -> None:
    deadlines = Deadlines(tool=5.0, turn=5.1, episode=5.2).model_copy(update={"turn": 0.2, "episode": 10.0})
    trajectory, _ = one(says(call("slow", seconds=30.0)), deadlines=deadlines)
    assert str(trajectory.outcome) == "truncated(deadline)" and "running slow" in trajectory.outcome.detail
    assert trajectory.reward == 0.0 and len(trajectory.turns) == 1

    async def never(request: Request, turn: int) -> str:
        await asyncio.sleep(30)
        return "key"

    trajectory, scene = one(never, deadlines=deadlines)
    assert str(trajectory.outcome) == "truncated(deadline)" and trajectory.turns == ()
    assert scene.engine.aborted == [trajectory.id]


def test_an_engine_that_is_away_is_no_policy_that_is_slow() -> None:
    """A turn that nobody was there to sample is tried again, and then missing: it is not scored."""

    async def never(request: Request, turn: int) -> str:
        await asyncio.sleep(30)
        return "key"

    async def main() -> Trajectory:
        deadlines = Deadlines().model_copy(update={"turn": 0.1, "watchdog": 0.04})
        scene = Scene(never, deadlines=deadlines)
        scene.engine.away = "http://one: it ended with code -9"
        (group,) = await scene.play()
        assert len(scene.engine.aborted) == 3, "one try and two more"
        assert "turn 0: generating by the script" in scene.told.stuck_texts[0]
        return group.members[0].trajectory

    trajectory = asyncio.run(main())
    assert str(trajectory.outcome) == "failed(infra)" and "it ended with code -9" in trajectory.outcome.detail
    assert trajectory.reward is None


def test_nothing_waits_in_lock_step() -> None:
    """Episode 1 may only go on after episode 0 is wholly done: in lock-step rounds this would never end."""

    async def main() -> list[Group]:
        done = asyncio.Event()

        async def script(request: Request, turn: int) -> str:
            if request.session.endswith("/0"):
                if turn == 1:
                    done.set()
                return call("look") if turn == 0 else "key"
            if turn == 0:
                await done.wait()
            return "key"

        return await Scene(script).play(samples=2)

    (group,) = asyncio.run(asyncio.wait_for(main(), 30))
    assert [len(m.trajectory.turns) for m in group.members] == [2, 1]


def test_groups_come_back_in_the_order_of_the_draws() -> None:
    async def script(request: Request, turn: int) -> str:
        await asyncio.sleep(0.05 if "train0" in request.session else 0)
        return "key"

    groups = asyncio.run(Scene(script).play(tasks=3, samples=2))
    assert [group.task_id for group in groups] == ["train0", "train1", "train2"]


def test_no_more_episodes_at_once_than_allowed() -> None:
    now, most = 0, 0

    async def script(request: Request, turn: int) -> str:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.001)
        now -= 1
        return "key"

    asyncio.run(Scene(script, episodes=3).play(tasks=4, samples=4))
    assert most == 3


def test_cancelling_is_clean() -> None:
    async def main() -> Scene:
        async def script(request: Request, turn: int) -> str:
            if turn:
                await asyncio.sleep(60)
            return call("look")

        scene = Scene(script)
        Door.opened = Door.closed = 0
        task = asyncio.create_task(scene.play(tasks=2, samples=3))
        while len(scene.told.turns) < 6:  # noqa: ASYNC110  the manager has no event to wait for
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        left = [t for t in asyncio.all_tasks() if t is not asyncio.current_task() and "close" not in repr(t)]
        assert not left, left
        return scene

    scene = asyncio.run(main())
    assert not scene.manager.live and not scene.engine.held
    assert Door.opened == Door.closed == 6


def test_the_watchdog_names_what_is_stuck() -> None:
    deadlines = Deadlines(watchdog=0.05)
    _, scene = one(says(call("slow", seconds=0.3), "key"), deadlines=deadlines)
    assert len(scene.told.stuck_texts) == 1
    assert "train0" in scene.told.stuck_texts[0] and "running slow" in scene.told.stuck_texts[0]


def test_memory_makes_each_turn_a_row() -> None:
    scene = Scene(says(call("look", where="left"), call("look", where="right"), "key"))
    (group,) = asyncio.run(scene.play(context=Memory()))
    trajectory = group.members[0].trajectory
    assert len(rows_of(trajectory)) == len(trajectory.turns) == 3
    last = CHAT.tokenizer.decode(ids_of(trajectory.turns[2].context).tolist())
    assert 'Memory:\n1. look("left") -> nothing left' in last and '2. look("right")' in last
    assert "<tool_call>\n{" not in last.split("Question 0")[1], "its own earlier words are not in the prompt"


class ForkOnce(RolloutStrategy):
    async def run(self, draw: TaskDraw, play: Any) -> Group:
        parent = await play.begin(0)
        await parent.step()
        child = await play.fork(parent)
        for episode in (parent, child):
            while await episode.step() is not None:
                pass
        return play.group([await play.finish(parent), await play.finish(child)])  # type: ignore[no-any-return]


def test_a_fork_shares_its_prefix_and_nothing_else() -> None:
    scene = Scene(lambda request, turn: call("look", where=f"{turn}") if turn < 2 else "key")
    (group,) = asyncio.run(scene.play(samples=2, strategy=ForkOnce()))
    parent, child = (member.trajectory for member in group.members)
    assert child.fork is not None and (child.fork.parent, child.fork.turn) == (parent.id, 1)
    assert child.turns[0] is parent.turns[0] and child.turns[1] is not parent.turns[1]
    # each branch's environment counts its own looks from the shared one on
    assert [t.turns[1].observation.split()[-1] for t in (parent, child)] == ["2", "2"]
    assert parent.seed != child.seed and child.id == f"{parent.id}.1"
    assert (child.id, 0) in scene.told.turns, "an inherited turn is written ahead for the branch too"
    assert not scene.engine.held


def test_recorded_turns_are_spoken_again_to_the_letter() -> None:
    script = says(call("look", where="left"), call("look", where="right"), "key")
    original, _ = one(script)
    scene = Scene(script)
    recorded = Recorded(inflight={original.id: original.turns[:2]})
    (group,) = asyncio.run(scene.play(recorded=recorded))
    again = group.members[0].trajectory
    assert [r.forced.tolist() for r in scene.engine.forced if r.forced is not None] == [
        turn.output[0].ids.tolist() for turn in original.turns[:2]
    ]
    assert [t.observation for t in again.turns] == [t.observation for t in original.turns]
    assert again.reward == original.reward and not scene.told.warnings


def test_a_divergence_is_named_and_the_episode_goes_on_live() -> None:
    original, _ = one(says(call("look", where="left"), "key"))
    moved, _ = one(says(call("look", where="left"), "key"))
    changed = [moved.turns[0].__class__(**{**_fields(moved.turns[0]), "observation": "something else"}), moved.turns[1]]
    scene = Scene(says(call("look", where="left"), "key"))
    (group,) = asyncio.run(scene.play(recorded=Recorded(inflight={original.id: changed})))
    assert len(scene.engine.forced) == 1, "only the turn before the divergence is forced"
    assert "turn 0" in scene.told.warnings[0] and "something else" in scene.told.warnings[0]
    assert group.members[0].trajectory.reward == 0.75


def _fields(turn: Any) -> dict[str, Any]:
    return {name: getattr(turn, name) for name in turn.__dataclass_fields__}


def test_finished_episodes_of_a_killed_run_are_taken_over() -> None:
    original, _ = one(says("key"))
    scene = Scene(says("never asked"))
    (group,) = asyncio.run(scene.play(recorded=Recorded(finished={original.id: original})))
    assert group.members[0].trajectory is original and not scene.engine.turns


def test_a_task_drawn_twice_has_two_groups() -> None:
    scene = Scene(says("key"))
    task = next(iter(scene.env.tasks("train", 0)))

    async def main() -> list[Group]:
        draws = [TaskDraw(task, 2, 0, 0), TaskDraw(task, 2, 0, 1)]
        return await scene.manager.run(draws, scene.actor, stage="rl", strategy=FlatRollouts())

    groups = asyncio.run(main())
    assert len({group.id for group in groups}) == 2
    assert len({m.trajectory.id for group in groups for m in group.members}) == 4


def test_impossible_deadlines_are_refused() -> None:
    with pytest.raises(ValueError, match="tool < turn < episode"):
        Deadlines(tool=60, turn=30)
