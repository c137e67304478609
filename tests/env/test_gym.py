"""An environment is a real `gymnasium.Env`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import gymnasium
import pytest
from gymnasium.utils.env_checker import check_env

from agentrl import Env, Episode, Obs, Task, tool
from agentrl.envs.calculator import Calculator
from agentrl.errors import EnvError, UsageError
from agentrl.gym import GymEnv, Words, register


@pytest.mark.parametrize("id", ["agentrl/Calculator-v0", "agentrl/Guess-v0"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_gymnasiums_own_checker_has_nothing_to_say(id: str, split: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = gymnasium.make(f"agentrl.gym:{id}", split=split)
        check_env(made.unwrapped)
        made.close()


def call(name: str, **arguments: Any) -> str:
    import json

    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def test_an_episode_of_calls_and_an_answer() -> None:
    env = gymnasium.make("agentrl/Calculator-v0", kind="mixed", split="test", render_mode="ansi")
    observation, info = env.reset(seed=3)
    assert observation == "Compute 1 + 9."
    assert info["tools"][0]["function"]["name"] == "calc"
    observation, reward, terminated, truncated, info = env.step(call("calc", a=1, op="+", b=9))
    assert (observation, reward, terminated, truncated) == ("10", 0.0, False, False)
    assert info["calls"] == [{"name": "calc", "ok": True, "error": None, "cost": 1.0}]
    observation, _, terminated, _, _ = env.step('<tool_call>{"name": "calc"')
    assert observation.startswith("Error: The tool call is not valid JSON")
    assert not terminated
    observation, reward, terminated, truncated, info = env.step("The answer is 10.")
    assert (observation, reward, terminated, truncated) == ("", 1.0, True, False)
    assert (info["outcome"], info["success"]) == ("completed", True)
    assert "> The answer is 10." in str(env.render())
    env.close()


def test_limits_truncate() -> None:
    env = Calculator().as_gym()
    env.reset()
    for turn in range(7):
        _, reward, terminated, truncated, info = env.step(call("calc", a=turn, op="+", b=1))
        assert not terminated
        assert truncated == (turn == 6)
    assert reward == 0.0
    assert info["outcome"] == "truncated(turns)"
    with pytest.raises(EnvError, match="call reset"):
        env.step("more")


class Game(Env):
    """Turn rewards, unicode, an early end, a finite split."""

    def tasks(self, split: str, seed: int) -> Iterator[Task]:
        yield Task("a", "Grüße ✓ 漢字", system="Be brief.")
        yield Task("b", "two")

    def reset(self, task: Task, rng: Any) -> Obs:
        return Obs("first look")

    @tool
    def pay(self) -> Obs:
        return Obs("paid", reward=0.25)

    def reply(self, text: str) -> Obs:
        return Obs("bye ✓", reward=0.125, done=True)

    def score(self, episode: Episode) -> float:
        return 0.5


def test_turn_rewards_unicode_and_finite_splits() -> None:
    env = Game().as_gym()
    first, _ = env.reset(seed=1)
    assert first == "Be brief.\n\nGrüße ✓ 漢字\n\nfirst look"
    assert first in env.observation_space
    assert env.step(call("pay") + call("pay"))[1] == 0.5
    observation, reward, terminated, _, info = env.step("ok")
    assert (observation, reward, terminated, info["outcome"]) == ("bye ✓", 0.625, True, "terminated")
    assert env.reset()[1]["task_id"] == "b"
    assert env.reset()[1]["task_id"] == "a"
    assert env.reset(options={"task": Task("mine", "own")})[0] == "own\n\nfirst look"
    with pytest.raises(UsageError, match="option 'task'"):
        env.reset(options={"tusk": 1})


def test_it_works_inside_a_running_loop() -> None:
    import asyncio

    async def main() -> str:
        return Game().as_gym().reset(seed=0)[0]

    assert "first look" in asyncio.run(main())


def test_classes_of_ones_own_are_registered_by_spec() -> None:
    id = register("agentrl.envs.guess:Guess")
    assert id == "agentrl/Guess-v0"
    made = gymnasium.make(id, largest=3)
    assert "from 1 to 3" in made.reset()[0]
    with pytest.raises(UsageError, match="options"):
        GymEnv(Calculator(), kind="mixed")


def test_the_space_holds_any_text_and_samples_short_ones() -> None:
    space = Words(seed=0)
    assert "ünï ✓\n" in space
    assert "" in space
    assert 3 not in space
    assert all(len(space.sample()) <= 80 for _ in range(100))
