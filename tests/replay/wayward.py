"""An environment whose ways of breaking a replay are switched on by the task's kind or by its options."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Generator, Iterable

import numpy as np
from pydantic import BaseModel

from agentrl import Env, Episode, InfraError, Obs, Say, Score, Task, ToolCall, tool

COUNT = [0]  # outlives the episodes of a process
CLOSED: set[str] = set()  # tools that must not be called any more
GONE: set[str] = set()  # services that are away
SEEN: list[str] = []


class Wayward(Env):
    """Look twice, then answer."""

    max_turns = 6
    reward_range = (-5.0, 5.0)
    weight = 1.0

    class Options(BaseModel, extra="forbid", frozen=True):
        """`bonus` is added to every score; `reads`: what the score reads beside the record."""

        kind: str = "steady"
        bonus: float = 0.0
        reads: str = ""
        tasks: int = 8

    def tasks(self, split: str, seed: int) -> Iterable[Task]:
        return (Task(f"{split}{n}", f"Question {n}", answer="key") for n in range(self.options.tasks))

    def reset(self, task: Task, rng: np.random.Generator) -> Obs:
        if "reset" in GONE:
            raise InfraError("the service is away")
        self.luck = int(rng.integers(10**6))
        self.looked: list[str] = []
        return Obs(f"Luck {self.luck}.")

    @tool
    def look(self, where: str) -> str:
        """Look."""
        if "look" in CLOSED:
            raise RuntimeError("look was called")
        self.looked.append(where)
        SEEN.append(where)
        return f"{where}: {self.luck + len(self.looked)}"

    @tool
    def count(self) -> str:
        """Count over all episodes."""
        COUNT[0] += 1
        return f"call {COUNT[0]} of a tool that remembers other episodes"

    @tool
    def earn(self) -> Obs:
        """Pay by the clock."""
        return Obs("paid", reward=time.time() % 1)

    @tool
    def hide(self) -> str:
        """Change what only the anchor tells."""
        self.hidden = time.time_ns()
        return "hidden"

    @tool(timeout=0.1)
    async def sleep(self) -> str:
        """Never come back in time."""
        await asyncio.sleep(60)
        return "awake"

    @tool(timeout=60)
    async def linger(self) -> str:
        """Outlast the turn."""
        await asyncio.sleep(60)
        return "awake"

    @tool
    def service(self) -> str:
        """Fail for no fault of the policy."""
        raise InfraError("the service is away")

    @tool
    def leave(self) -> Obs:
        """End the episode."""
        return Obs("over", done=True)

    def anchor(self) -> object:
        return (len(self.looked), getattr(self, "hidden", 0))

    def score(self, episode: Episode) -> Score:
        total = self.options.bonus + len(episode.calls) / 10
        if self.options.reads == "state":
            total += len(self.looked)
        elif self.options.reads == "class":
            total += self.weight
        elif self.options.reads == "guarded":
            total += len(getattr(self, "looked", []))
        elif self.options.reads == "global":
            total += len(SEEN) % 5
        elif self.options.reads == "clock":
            total += time.time() % 1
        return Score({"score": total}, episode.final_text == episode.task.answer)

    def demonstrate(self, task: Task, rng: np.random.Generator) -> Generator[Say, Obs, None]:
        yield Say(calls=(ToolCall("look", {"where": "here"}),))
        kind = self.options.kind
        again = () if kind == "steady" else (ToolCall(kind, {}),) * (3 if kind == "linger" else 1)
        yield Say(calls=(ToolCall("look", {"where": "there"}), *again))
        yield Say("key")
