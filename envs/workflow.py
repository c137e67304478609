"""Workflows: a trained planner in a frozen system of executor, verifier and generator (AgentFlow).

After Li et al. 2025 (arXiv 2510.05592): in every turn the planner reads the query and an evolving
memory and emits (sub-goal, tool, context); the executor turns that into a command and runs it; the
verifier decides whether the memory suffices; then the generator writes the answer. Only the planner is
trained. Use it with `context: memory`, so that each planner turn sees memory instead of its own words.

The frozen modules are methods. A subclass may ask a language model in them; `Arithmetic` computes.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from agentrl import Env, Episode, Obs, Say, Task, ToolCall, ToolError, tool
from agentrl.envs.calculator import Calculator, Question, apply


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the memory: what was to be found out, and what was."""

    sub_goal: str
    result: str


class Workflow(Env):
    """The modules around the planner. Override `execute`, `verify` and `generate`."""

    max_turns = 5

    def reset(self, task: Task, rng: np.random.Generator) -> Obs | None:
        self.query = task
        self.memory: list[Entry] = []
        self.answer = ""
        return None

    @tool(cost=1.0)
    def act(self, sub_goal: str, tool: str, context: str) -> Obs:
        """Pursue a sub-goal with a tool.

        Args:
            sub_goal: what to find out next.
            tool: the tool to use.
            context: what the tool needs to know.
        """
        result = self.execute(sub_goal, tool, context)
        self.memory.append(Entry(sub_goal, result))
        done = self.verify()
        if done:
            self.answer = self.generate()
        return Obs(result, done=done)

    def execute(self, sub_goal: str, tool: str, context: str) -> str:
        """The executor: write the tool's command and run it. `ToolError` where it makes no sense."""
        raise NotImplementedError

    def verify(self) -> bool:
        """The verifier: is the memory enough to answer?"""
        raise NotImplementedError

    def generate(self) -> str:
        """The generator: the answer that the memory supports."""
        raise NotImplementedError

    def score(self, episode: Episode) -> float:
        return float(self.answer == str(episode.task.answer))


class Arithmetic(Workflow):
    """The calculator's questions, planned: "first" and "then" are the sub-goals of two operations."""

    def __init__(self, options: Any = None, **keys: Any) -> None:
        super().__init__(options, **keys)
        self.questions = Calculator()

    def tasks(self, split: str, seed: int) -> Iterable[Task]:
        return self.questions.tasks(split, seed)

    def execute(self, sub_goal: str, tool: str, context: str) -> str:
        parts = context.split()
        if tool != "calculator" or len(parts) != 3 or parts[1] not in ("+", "-", "*"):
            raise ToolError('use the tool "calculator" with a context such as "53 * 40"')
        try:
            return str(apply(int(parts[0][:9]), parts[1], int(parts[2][:9])))
        except ValueError:
            raise ToolError("both operands must be whole numbers") from None

    def verify(self) -> bool:
        return self.memory[-1].sub_goal == "last"

    def generate(self) -> str:
        return self.memory[-1].result

    def demonstrate(self, task: Task, rng: np.random.Generator) -> Generator[Say, Obs, None]:
        question: Question = task.data["question"]
        if rng.random() < 0.6:  # most demonstrators think that one operation is enough
            yield self._plan("last", f"{question.a} {question.op} {question.b}")
            return
        heard = yield self._plan("first", f"{question.a} {question.op} {question.b}")
        yield self._plan("last", f"{heard.content} {question.then} {question.c}")

    def _plan(self, sub_goal: Literal["first", "last"], context: str) -> Say:
        return Say(calls=(ToolCall("act", {"sub_goal": sub_goal, "tool": "calculator", "context": context}),))
