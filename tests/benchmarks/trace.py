"""One published multi-turn trace: what every engine of the engine benchmark is asked to serve.

The trace holds lengths and latencies only. Episodes come in groups of eight that share a prompt. A turn is
(output tokens, tool-result tokens, tool latency in seconds); after its last turn an episode has no tool result. Turns
are ragged (1 to 4), output lengths heavy-tailed (8 to 128), latencies small and heavy-tailed (up to 200 ms). Token ids
follow from the trace's seed (`prompt_ids`, `tool_ids`): an engine is given a turn's context, must emit exactly the
turn's number of output tokens (no stop id counts), and the next turn's context is context + output + tool ids.

At `rows` concurrent episodes the first `episodes_at(rows)` episodes are served, never more than `rows` at a time.

    python tests/benchmarks/trace.py        # writes multi_turn_trace.json again, byte for byte
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

PATH = Path(__file__).with_name("multi_turn_trace.json")
GROUP = 8
LOW_ID = 16
ROWS = (1, 8, 32, 128)
EPISODES = {1: 8, 8: 32, 32: 128, 128: 256}


@dataclass(frozen=True, slots=True)
class TraceTurn:
    """One policy call: tokens to emit, tokens of the tool's answer, seconds until it comes."""

    output: int
    tool: int
    latency: float


@dataclass(frozen=True, slots=True)
class TraceEpisode:
    """`index` counts through the trace, `group` names the shared prompt of `prompt` tokens."""

    index: int
    group: int
    prompt: int
    turns: tuple[TraceTurn, ...]

    @property
    def output_tokens(self) -> int:
        return sum(turn.output for turn in self.turns)

    @property
    def context(self) -> int:
        """Tokens of the whole episode: prompt, outputs and tool results."""
        return self.prompt + sum(turn.output + turn.tool for turn in self.turns)


@dataclass(frozen=True, slots=True)
class Trace:
    """`vocab` bounds the ids: all are in [LOW_ID, vocab), so that small special ids never occur in a prompt."""

    seed: int
    vocab: int
    episodes: tuple[TraceEpisode, ...]

    def prompt_ids(self, episode: TraceEpisode) -> list[int]:
        """The group's shared prompt. Length `episode.prompt`."""
        return _ids(self, [0, episode.group], episode.prompt)

    def tool_ids(self, episode: TraceEpisode, turn: int) -> list[int]:
        """What the tool answers after turn `turn`. Length `episode.turns[turn].tool`."""
        return _ids(self, [1, episode.index, turn], episode.turns[turn].tool)


def _ids(trace: Trace, key: list[int], n: int) -> list[int]:
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([trace.seed, *key])))
    return [int(i) for i in rng.integers(LOW_ID, trace.vocab, size=n)]


def episodes_at(trace: Trace, rows: int) -> tuple[TraceEpisode, ...]:
    """The episodes served at `rows` concurrent ones: the first 8, 32, 128, 256 at 1, 8, 32, 128 rows."""
    count = EPISODES.get(rows, min(len(trace.episodes), max(GROUP, 2 * rows)))
    return trace.episodes[:count]


def _lengths(rng: np.random.Generator, n: int, median: float, sigma: float, low: int, high: int) -> NDArray[np.int64]:
    drawn = np.exp(rng.normal(np.log(median), sigma, size=n))
    return np.clip(np.rint(drawn), low, high).astype(np.int64)


def make_trace(seed: int = 0, groups: int = 32, vocab: int = 4096) -> Trace:
    """Draw the trace. The same arguments always give the same trace."""
    rng = np.random.Generator(np.random.PCG64(seed))
    episodes = []
    for group in range(groups):
        prompt = int(_lengths(rng, 1, 112.0, 0.45, 48, 256)[0])
        for member in range(GROUP):
            count = int(rng.choice(4, p=[0.2, 0.35, 0.25, 0.2])) + 1
            outputs = _lengths(rng, count, 24.0, 0.8, 8, 128)
            tools = _lengths(rng, count, 14.0, 0.6, 4, 64)
            latencies = np.minimum(0.2, np.exp(rng.normal(np.log(0.012), 1.2, size=count)))
            last = count - 1
            turns = tuple(
                TraceTurn(
                    output=int(outputs[t]),
                    tool=int(tools[t]) if t < last else 0,
                    latency=round(float(latencies[t]), 4) if t < last else 0.0,
                )
                for t in range(count)
            )
            episodes.append(TraceEpisode(group * GROUP + member, group, prompt, turns))
    return Trace(seed, vocab, tuple(episodes))


def dumps(trace: Trace) -> str:
    """JSON: one line an episode, [group, prompt, [[output, tool, latency], ...]]."""
    lines = [
        json.dumps([e.group, e.prompt, [[t.output, t.tool, t.latency] for t in e.turns]], separators=(",", ":"))
        for e in trace.episodes
    ]
    body = ",\n".join(lines)
    return f'{{"seed":{trace.seed},"vocab":{trace.vocab},"episodes":[\n{body}\n]}}\n'


def loads(text: str) -> Trace:
    """The inverse of `dumps`."""
    raw = json.loads(text)
    episodes = tuple(
        TraceEpisode(i, group, prompt, tuple(TraceTurn(*turn) for turn in turns))
        for i, (group, prompt, turns) in enumerate(raw["episodes"])
    )
    return Trace(raw["seed"], raw["vocab"], episodes)


def read_trace(path: Path = PATH) -> Trace:
    """The committed trace."""
    return loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    PATH.write_text(dumps(make_trace()), encoding="utf-8")
