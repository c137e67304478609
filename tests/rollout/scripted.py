"""A scripted engine and a small environment for tests of the manager: what is said is decided by the test."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from agentrl import Env, Episode, Obs, Task, ToolError, tool
from agentrl.chat import ChatFormat
from agentrl.engines import Capabilities, EngineStats, Generation, Request
from agentrl.errors import InfraError, PolicyError
from agentrl.train.options import ScratchTokenizer
from agentrl.train.tokenizer import bootstrap_tokenizer
from agentrl.trajectory import VersionRun, as_floats, as_ids

CHAT = ChatFormat(bootstrap_tokenizer(ScratchTokenizer()))
END = CHAT.stop_ids[0]


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


class ScriptedEngine:
    """Says what `script(request, turn)` returns; a text that ends in "…" is cut at the limit instead of ended."""

    def __init__(self, script: Callable[[Request, int], Any], max_context: int = 4096) -> None:
        self.script = script
        self.capabilities = Capabilities(max_context=max_context)
        self.stats = EngineStats()
        self.turns: Counter[str] = Counter()
        self.held: set[str] = set()
        self.aborted: list[str | None] = []
        self.forced: list[Request] = []
        self.away: str | None = None

    async def generate(self, request: Request) -> Generation:
        self.held.add(request.session)
        turn = self.turns[request.session]
        self.turns[request.session] += 1
        said = self.script(request, turn)
        if asyncio.iscoroutine(said):
            said = await said
        ids = CHAT.tokenizer.encode(said.removesuffix("…"), add_special_tokens=False)
        ids = ids[: request.sampling.max_tokens] if said.endswith("…") else [*ids, END]
        if request.forced is not None:
            self.forced.append(request)
            ids = request.forced.tolist()
        n = len(ids)
        finish = "length" if said.endswith("…") else "stop"
        return Generation(
            as_ids(ids), as_floats([-0.5] * n), finish, (VersionRun(1, 0, n),), as_floats([0.7] * n), "exact"
        )

    async def fork(self, parent: str, child: str) -> None:
        self.turns[child] = self.turns[parent]
        self.held.add(child)

    async def release(self, session: str) -> None:
        self.held.discard(session)

    async def abort(self, session: str | None = None) -> None:
        self.aborted.append(session)

    def where(self, session: str) -> str:
        return "the script"

    @property
    def trouble(self) -> str | None:
        return self.away


class Door(Env):
    """Find the key. What a tool does is in its name."""

    max_turns = 4
    opened: int = 0
    closed: int = 0
    judge_is_away: int = 0

    def tasks(self, split: str, seed: int) -> Iterable[Task]:
        return (Task(f"{split}{i}", f"Question {i}", answer="key") for i in range(4))

    def reset(self, task: Task, rng: np.random.Generator) -> Obs | None:
        self.seen: list[str] = []
        self.luck = int(rng.integers(1000))
        type(self).opened += 1
        return None

    @tool(cost=0.5)
    def look(self, where: str = "here") -> str:
        """Look."""
        self.seen.append(where)
        return f"nothing {where} {self.luck} {len(self.seen)}"

    @tool
    def win(self) -> Obs:
        """End the episode with a turn reward."""
        return Obs("won", reward=0.25, done=True)

    @tool
    def broken_service(self) -> str:
        """The machinery fails."""
        raise InfraError("the sandbox is gone")

    @tool
    def wrong(self) -> str:
        """The call is wrong."""
        raise ToolError("no such door")

    @tool
    def ruin(self) -> str:
        """The policy breaks the episode."""
        raise PolicyError("the policy deleted the house")

    @tool(timeout=60)
    async def slow(self, seconds: float) -> str:
        """Wait."""
        await asyncio.sleep(seconds)
        return "waited"

    def score(self, episode: Episode) -> float:
        if episode.final_text == "raise":
            raise RuntimeError("score is broken")
        if episode.final_text == "judge" and type(self).judge_is_away:
            type(self).judge_is_away -= 1
            raise InfraError("the judge's sandbox is gone")
        return 0.75 if episode.final_text == episode.task.answer else 0.0

    async def close(self) -> None:
        type(self).closed += 1
