"""The training-step benchmark's task as an environment: the same questions, tool and reward as its peers see."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import chain
import numpy as np

from agentrl import Env, Task, tool
from agentrl.env import Episode, Split


class Chain(Env):
    """Three dependent calculator calls, then the answer."""

    max_turns = chain.TOOL_TURNS + 1

    def tasks(self, split: Split, seed: int) -> Iterator[Task]:
        """The problems of `chain.problems(seed)`, in their order."""
        for index, problem in zip(count(), chain.problems(seed), strict=False):
            yield Task(f"{split}-{seed}-{index}", problem.question, answer=problem.answer, system=chain.SYSTEM)

    def reset(self, task: Task, rng: np.random.Generator) -> None:
        """Nothing to set up: the question holds all."""

    @tool
    def calc(self, a: int, op: str, b: int) -> str:
        """Do one binary operation on two whole numbers and return the result.

        Args:
            a: The number on the left of the operator.
            op: The operator, one of + - *.
            b: The number on the right of the operator.
        """
        return chain.calc(a, op, b)

    def score(self, episode: Episode) -> float:
        """Closeness of the answer, in [0, 1]."""
        return chain.reward(episode.final_text, int(episode.task.answer))
