"""Gymnasium environments come in through the adapter."""

from __future__ import annotations

import asyncio
import itertools

import pytest

import agentrl.gym  # noqa: F401  (registers agentrl/Guess-v0, which serves as a text environment here)
from agentrl.check import check_env
from agentrl.envs.from_gym import FromGym
from agentrl.errors import UsageError
from agentrl.textual import TextEpisode

LAKE = FromGym(
    id="FrozenLake-v1", kwargs={"is_slippery": False}, actions=("left", "down", "right", "up"), prompt="Cross the lake."
)


def play(env: FromGym, moves: list[str]) -> tuple[list[str], str, float | None, bool | None]:
    async def main() -> tuple[list[str], str, float | None, bool | None]:
        episode = TextEpisode(env, next(iter(env.tasks("test", 0))), (0,))
        first = await episode.open()
        heard = [first, *[(await episode.say(move)).observation for move in moves]]
        _, total, success = await episode.score()
        await episode.close()
        return heard, str(episode.outcome), total, success

    return asyncio.run(main())


def test_a_discrete_game_is_played_by_names_and_numbers() -> None:
    heard, outcome, total, success = play(LAKE, ["down", "fly", "1", "right", "right", "down", "right"])
    assert heard[0] == "Cross the lake.\n\n0"
    assert heard[1:3] == ["4", "Say one of left, down, right, up."]
    assert (heard[-1], outcome, total, success) == ("15", "terminated", 1.0, True)
    assert play(LAKE, ["down", "right"])[1:] == ("terminated", 0.0, False)


def test_a_text_game_is_played_in_words() -> None:
    game = FromGym(id="agentrl/Guess-v0", kwargs={"largest": 2}, prompt="Guess.", max_turns=4)
    heard, outcome, total, success = play(game, ["zero", "1"])
    assert heard[1] == "Say one number from 1 to 2."
    if outcome == "None":
        assert heard[2] == "Higher."
        heard, outcome, total, success = play(game, ["1", "2"])
    assert (heard[-1], outcome, total, success) == ("Right.", "terminated", 1.0, True)


def test_the_checker_has_nothing_to_say() -> None:
    assert [finding for finding in check_env(LAKE, other_process=False) if finding.level != "ok"] == []


def test_splits_do_not_meet_and_what_cannot_be_said_is_refused() -> None:
    seeds = [{task.id for task in itertools.islice(LAKE.tasks(split, 0), 50)} for split in ("train", "test")]
    assert not seeds[0] & seeds[1]
    with pytest.raises(UsageError, match="only Text and Discrete"):
        FromGym(id="Pendulum-v1")
    with pytest.raises(UsageError, match="no environment 'Nope-v0'"):
        FromGym(id="Nope-v0")
