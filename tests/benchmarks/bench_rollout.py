"""The rollout manager against lock-step rounds and a zero-overhead simulation of the same trace.

The engine is modelled: a request takes 20 ms plus 4 ms per token, however many run
beside it. Tools wait for heavy-tailed (log-normal) times. Everything that is not waiting is the
manager's own cost: rendering, parsing, tool dispatch, the record.

    python tests/benchmarks/bench_rollout.py [--episodes 512] [--in-flight 128] [--runs 3] [--json OUT]
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import json
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe
from rich.console import Console
from rich.table import Table

from agentrl import Env, Episode, Task, tool
from agentrl.algo.sampler import TaskDraw
from agentrl.chat import ChatFormat
from agentrl.engines import Capabilities, EngineStats, Generation, Request
from agentrl.rollout.actors import PolicyActor
from agentrl.rollout.manager import RolloutLimits, RolloutManager
from agentrl.rollout.strategy import FlatRollouts
from agentrl.train.options import ScratchTokenizer
from agentrl.train.tokenizer import bootstrap_tokenizer
from agentrl.trajectory import Sampling, VersionRun, as_floats, as_ids

FIRST, EACH = 0.02, 0.004  # seconds: prefill, and one token


@dataclass(frozen=True, slots=True)
class Plan:
    """One episode: seconds of generation per turn, and seconds of the tool after it (none after the last)."""

    speak: tuple[float, ...]
    tools: tuple[float, ...]


def plans(n: int, seed: int = 0) -> list[Plan]:
    """A published trace: 1 to 6 turns, 8 to 160 tokens a turn, tools log-normal with a heavy tail (capped at 4 s)."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(n):
        turns = int(rng.integers(1, 7))
        tokens = np.clip(rng.lognormal(3.4, 0.7, turns), 8, 160)
        tools = np.minimum(rng.lognormal(-2.0, 1.2, turns - 1), 4.0)
        out.append(Plan(tuple((FIRST + EACH * tokens).tolist()), tuple(tools.tolist())))
    return out


def simulate(trace: list[Plan], in_flight: int) -> float:
    """Seconds that the trace takes with no overhead at all: each episode runs alone, `in_flight` at once, in order."""
    busy: list[float] = []
    for plan in trace:
        start = heapq.heappop(busy) if len(busy) >= in_flight else 0.0
        heapq.heappush(busy, start + sum(plan.speak) + sum(plan.tools))
    return max(busy)


def lock_step(trace: list[Plan], in_flight: int) -> float:
    """Seconds in lock-step rounds of `in_flight` episodes: every turn waits for the slowest of its round."""
    total = 0.0
    for i in range(0, len(trace), in_flight):
        batch = trace[i : i + in_flight]
        for turn in range(max(len(plan.speak) for plan in batch)):
            total += max((plan.speak[turn] for plan in batch if turn < len(plan.speak)), default=0.0)
            total += max((plan.tools[turn] for plan in batch if turn < len(plan.tools)), default=0.0)
    return total


class Waiting(Env):
    """Tools that wait as long as the trace says."""

    max_turns = 8

    def __init__(self, trace: list[Plan]) -> None:
        super().__init__()
        self.trace = trace

    def tasks(self, split: str, seed: int) -> Iterable[Task]:
        return (Task(str(i), f"Episode {i}.", data={"plan": plan}) for i, plan in enumerate(self.trace))

    @tool(timeout=20)
    async def wait(self, seconds: float) -> str:
        """Wait.

        Args:
            seconds: how long.
        """
        await asyncio.sleep(seconds)
        return "waited"

    def score(self, episode: Episode) -> float:
        return float(episode.final_text == "done")


class Modelled:
    """An engine that takes the trace's time and says the trace's calls."""

    capabilities = Capabilities(max_context=100_000)

    def __init__(self, trace: list[Plan], chat: ChatFormat) -> None:
        self.trace, self.chat = trace, chat
        self.stats = EngineStats()
        self.turn: dict[str, int] = {}

    async def generate(self, request: Request) -> Generation:
        plan = self.trace[int(request.session.split("/")[1])]
        turn = self.turn.get(request.session, 0)
        self.turn[request.session] = turn + 1
        arrived = time.perf_counter()
        if turn < len(plan.tools):
            call = {"name": "wait", "arguments": {"seconds": plan.tools[turn]}}
            text = f"<tool_call>\n{json.dumps(call)}\n</tool_call>"
        else:
            text = "done"
        ids = [*self.chat.tokenizer.encode(text, add_special_tokens=False), self.chat.stop_ids[0]]
        # Making up the words is the model's work, not the manager's: it is inside the modelled time.
        await asyncio.sleep(max(0.0, plan.speak[turn] - (time.perf_counter() - arrived)))
        n = len(ids)
        return Generation(as_ids(ids), as_floats([-1.0] * n), "stop", (VersionRun(0, 0, n),))

    async def release(self, session: str) -> None:
        self.turn.pop(session, None)

    async def abort(self, session: str | None = None) -> None:
        """Nothing runs on."""


def real(trace: list[Plan], in_flight: int, chat: ChatFormat) -> float:
    """Seconds that the manager takes."""
    env = Waiting(trace)
    manager = RolloutManager(env, limits=RolloutLimits(max_tokens=400, episodes=in_flight), seed=0)
    actor = PolicyActor(Modelled(trace, chat), chat, Sampling())  # type: ignore[arg-type]
    draws = [TaskDraw(task, 1, 0, i) for i, task in enumerate(env.tasks("train", 0))]
    started = time.perf_counter()
    groups = asyncio.run(manager.run(draws, actor, stage="bench", strategy=FlatRollouts()))
    seconds = time.perf_counter() - started
    wrong = [m.trajectory for g in groups for m in g.members if not m.trajectory.success]
    assert not wrong, f"{len(wrong)} episodes did not follow the trace, first: {wrong[0].outcome}"
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=512)
    parser.add_argument("--in-flight", type=int, default=128)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    chat = ChatFormat(bootstrap_tokenizer(ScratchTokenizer()))
    trace = plans(options.episodes)
    bound, rounds = simulate(trace, options.in_flight), lock_step(trace, options.in_flight)
    real(trace[:32], 32, chat)  # warm the template caches
    runs = [real(trace, options.in_flight, chat) for _ in range(options.runs)]
    median = statistics.median(runs)
    result: dict[str, Any] = {
        "episodes": options.episodes,
        "turns": sum(len(plan.speak) for plan in trace),
        "in_flight": options.in_flight,
        "bound_s": bound,
        "manager_s": {"median": median, "min": min(runs), "max": max(runs), "runs": len(runs)},
        "lock_step_s": rounds,
        "manager_share_of_bound": bound / median,
        "lock_step_share_of_bound": bound / rounds,
        "machine": describe(),
    }
    table = Table(title=f"{options.episodes} episodes, {result['turns']} turns, {options.in_flight} in flight")
    for column in ("", "seconds", "share of the bound"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("zero-overhead simulation", f"{bound:.2f}", "100 %")
    table.add_row(f"rollout manager, median of {len(runs)}", f"{median:.2f}", f"{100 * bound / median:.1f} %")
    table.add_row("lock-step rounds, simulated without overhead", f"{rounds:.2f}", f"{100 * bound / rounds:.1f} %")
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
