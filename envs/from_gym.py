"""Any Gymnasium environment that can be played in text: `agentrl.envs.from_gym:FromGym`, option `id`.

A message is an action: the text itself where the action space is `Text`, a number or one of the `actions`'
names where it is `Discrete`. Observations are shown as text. The return, clipped to the declared range, is the score.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from pydantic import BaseModel, Field

from agentrl import Env, Episode, Obs, Score, Task, ToolError
from agentrl.errors import UsageError


class FromGym(Env):
    """A Gymnasium environment, played in text."""

    class Options(BaseModel, extra="forbid", frozen=True):
        """`id` and `kwargs` as for `gymnasium.make`; `actions` name the numbers 0, 1, … of a discrete space;
        the return is clipped to `low` … `high` and is a success from `success_at` on."""

        id: str
        kwargs: dict[str, Any] = {}
        prompt: str = ""
        actions: tuple[str, ...] = ()
        max_turns: int = Field(50, ge=1)
        low: float = 0.0
        high: float = 1.0
        success_at: float = 1.0

    def __init__(self, options: Any = None, **keys: Any) -> None:
        super().__init__(options, **keys)
        self.max_turns = self.options.max_turns
        self.reward_range = (self.options.low, self.options.high)
        self.success_at = self.options.success_at
        try:
            probe = gymnasium.make(self.options.id, **self.options.kwargs)
        except gymnasium.error.Error as error:
            raise UsageError(f"Gymnasium has no environment {self.options.id!r}: {error}") from error
        space = probe.action_space
        probe.close()
        if not isinstance(space, spaces.Text | spaces.Discrete):
            raise UsageError(f"{self.options.id} takes {space} as actions; only Text and Discrete can be said")
        self.moves = space

    def tasks(self, split: str, seed: int) -> Iterable[Task]:
        """A task is a seed of the game: even ones for test, odd ones for the other splits."""
        rng = np.random.default_rng(seed)
        while True:
            number = 2 * int(rng.integers(2**30)) + (split != "test")
            yield Task(f"{self.options.id}-{number}", self.options.prompt or self._rules(), data={"seed": number})

    def reset(self, task: Task, rng: np.random.Generator) -> Obs:
        self.earned = 0.0
        self.game = gymnasium.make(self.options.id, **self.options.kwargs)
        observation, _ = self.game.reset(seed=task.data["seed"])
        return Obs(str(observation))

    def reply(self, text: str) -> Obs:
        observation, reward, terminated, truncated, _ = self.game.step(self._action(text.strip()))
        self.earned += float(reward)
        return Obs(str(observation), done=bool(terminated or truncated))

    def score(self, episode: Episode) -> Score:
        total = min(max(self.earned, self.options.low), self.options.high)
        return Score({"return": total}, total >= self.success_at)

    async def close(self) -> None:
        game = getattr(self, "game", None)
        if game is not None:
            game.close()

    def _action(self, text: str) -> Any:
        if isinstance(self.moves, spaces.Text):
            action: Any = text
        elif text in self.options.actions:
            action = int(self.moves.start) + self.options.actions.index(text)
        else:
            action = int(text) if text.isascii() and text.lstrip("-").isdigit() and len(text) < 10 else None
        if action is None or not self.moves.contains(action):
            raise ToolError(self._rules())
        return action

    def _rules(self) -> str:
        if isinstance(self.moves, spaces.Text):
            return "Say your next move."
        first, last = int(self.moves.start), int(self.moves.start + self.moves.n) - 1
        return f"Say one of {', '.join(self.options.actions) or f'the numbers {first} to {last}'}."
