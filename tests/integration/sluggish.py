"""A calculator whose calls take up to 60 ms, every tenth a quarter of a second; and one whose scores fail."""

from __future__ import annotations

import asyncio
from typing import Literal

import numpy as np

from agentrl import Episode, Task, tool
from agentrl.envs.calculator import Calculator


class Sluggish(Calculator):
    """Latency comes from the episode's random numbers."""

    def reset(self, task: Task, rng: np.random.Generator) -> None:
        self.rng = rng
        super().reset(task, rng)

    @tool(cost=1.0)
    async def calc(self, a: int, op: Literal["+", "-", "*"], b: int) -> str:
        """Do one operation on two integers.

        Args:
            a: the left operand.
            op: the operation.
            b: the right operand.
        """
        await asyncio.sleep(0.25 if self.rng.random() < 0.1 else 0.06 * self.rng.random())
        return str({"+": a + b, "-": a - b, "*": a * b}[op])


class Falling(Sluggish):
    """Nobody can say what its episodes are worth."""

    def score(self, episode: Episode) -> float:
        raise RuntimeError("the scorer is gone")
