"""An environment whose tools do everything wrong, for the tests of the host. Loaded by path, so that a
worker process can load it too."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from agentrl import Env, Image, InfraError, Obs, Task, ToolError, tool


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no message for you")


class Hostile(Env):
    """Counts, and misbehaves on request."""

    reward_range = (0.0, 100.0)

    def tasks(self, split: str, seed: int) -> Iterable[Task]:
        yield Task("only", "Count.")

    def reset(self, task: Task, rng: Any) -> None:
        self.n = 0
        self.rng = rng

    @tool(cost=0.5)
    def add(self, x: int) -> str:
        """Add x."""
        self.n += x
        return f"{self.n}"

    @tool
    def draw(self) -> str:
        return str(self.rng.integers(10**6))

    @tool(cost=1.0, cost_per_token=0.25)
    async def later(self, x: int) -> str:
        await asyncio.sleep(0)
        self.n += x
        return f"later {self.n}"

    @tool(timeout=0.1)
    def hang(self) -> str:
        self.n += 1000
        time.sleep(0.6)
        return "too late"

    @tool(timeout=0.1)
    async def hang_async(self) -> str:
        await asyncio.sleep(60)
        return "too late"

    @tool(timeout=0.1)
    async def stubborn(self) -> str:
        """Swallows its cancellation."""
        self.n += 1000
        for _ in range(20):
            try:
                await asyncio.sleep(0.05)
            except asyncio.CancelledError:
                continue
        return "too late"

    @tool(timeout=0.3)
    def loop(self) -> str:
        while True:
            pass

    @tool
    def die(self) -> str:
        os._exit(7)

    @tool
    def leave(self) -> str:
        sys.exit(3)

    @tool
    async def leave_async(self) -> str:
        raise SystemExit(3)

    @tool
    def interrupt(self) -> str:
        raise KeyboardInterrupt

    @tool
    async def cancel(self) -> str:
        raise asyncio.CancelledError

    @tool
    def stop(self) -> str:
        raise StopIteration("done")

    @tool
    def unprintable(self) -> str:
        raise Unprintable

    @tool
    def secret(self) -> str:
        raise ValueError("first line\npassword = 'hunter2'")

    @tool
    def recurse(self) -> str:
        return self.recurse()

    @tool
    def nested(self) -> list[Any]:
        value: list[Any] = []
        for _ in range(100_000):
            value = [value]
        return value

    @tool
    def huge(self) -> str:
        return str(10**100_000)

    @tool(max_chars=50)
    def flood(self) -> str:
        return "x" * 10**8

    @tool(max_chars=50)
    def flood_parts(self) -> list[str]:
        return ["abc"] * 100_000

    @tool
    def nothing(self) -> None:
        return None

    @tool
    def number(self) -> int:
        return 3

    @tool
    def endless(self) -> Iterator[str]:
        while True:
            yield "x"

    @tool
    def surrogate(self) -> str:
        return "half \ud83d of a smile"

    @tool
    def not_a_reward(self) -> Obs:
        return Obs("paid", reward=float("nan"))

    @tool
    def refuse(self) -> str:
        raise ToolError("not today")

    @tool
    def broken_service(self) -> str:
        raise InfraError("the index is gone")

    @tool
    def win(self) -> Obs:
        return Obs(("you win ", Image(b"png")), reward=0.5, done=True)

    @tool(parallel=True)
    def together(self, seconds: float) -> str:
        time.sleep(seconds)
        return f"{seconds}"

    def reply(self, text: str) -> Obs | None:
        if text == "refuse":
            raise ToolError("I did not get that")
        if text == "break":
            raise KeyError("reply")
        if text == "hang":
            time.sleep(0.6)
        return Obs(f"you said {text}") if text.startswith("hi") else None

    def score(self, episode: Any) -> float:
        return self.n
