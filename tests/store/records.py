"""Records for the store's tests, made from a name alone, and a comparison of two records field by field.

Also run as a program (`writing_child.py` imports it), so it needs nothing but the package.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from agentrl.store import EpisodeKey
from agentrl.trajectory import (
    Fork,
    Outcome,
    Sampling,
    Span,
    ToolCall,
    ToolResult,
    ToolUse,
    Trajectory,
    Turn,
    VersionRun,
    as_floats,
    as_ids,
)

WORDS = ("seven", "plus", "Ünïcode", "<tool>", "\n", "42", "日本", "so")


def key(step: int, task: str, sample: int = 0, **rest: Any) -> EpisodeKey:
    return EpisodeKey(rest.pop("stage", "rl"), step, rest.pop("split", "train"), task, sample, **rest)


def sampled(rng: np.random.Generator, n: int) -> Span:
    half = n // 2
    runs = (VersionRun(1, 0, half), VersionRun(2, half, n)) if half else (VersionRun(1, 0, n),)
    ids = as_ids(rng.integers(0, 500, n))
    return Span(
        ids,
        "assistant",
        "sampled",
        "policy",
        as_floats(-rng.exponential(1, n)),
        as_floats(rng.random(n)),
        "exact",
        runs,
    )


def said(rng: np.random.Generator, n: int) -> str:
    return " ".join(rng.choice(WORDS, n))


def turn_after(rng: np.random.Generator, before: tuple[Turn, ...], prompt: Span, n: int = 8) -> Turn:
    """The next turn of an append-only episode."""
    context = [prompt[:]]
    if before:
        context = [*before[-1].context, *(span[:] for span in before[-1].output)]
        context.append(Span(as_ids(rng.integers(0, 500, n)), "tool", "tool")[:])
    use = ToolUse(
        ToolCall("calc", {"a": int(rng.integers(99)), "op": "+", "deep": [1.5, None, {"x": "y"}]}, "c1"),
        ToolResult(said(rng, 4), (), bool(ok := rng.random() < 0.8), None if ok else "tool", float(rng.random()), 0.25),
    )
    output = (sampled(rng, n), Span(as_ids([2]), "assistant", "forced"))
    return Turn(
        tuple(context), output, said(rng, 5), said(rng, 2), Sampling(stop_ids=(2,), seed=int(rng.integers(1 << 62))),
        "stop",
        tools=(use,), observation=said(rng, 4), reward=0.5 if rng.random() < 0.5 else None, anchor="a",
        seconds=float(rng.random()),
    )  # fmt: skip


def episode(where: EpisodeKey, turns: int = 3, n: int = 8, *, reward: float | None = -1.0, **fields: Any) -> Trajectory:
    """An append-only episode, the same for the same key; `reward` -1 draws one."""
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(f"{where}".encode()).digest()[:8], "little"))
    prompt = Span(as_ids(rng.integers(0, 500, n)), "user", "template")
    made: tuple[Turn, ...] = ()
    for _ in range(turns):
        made = (*made, turn_after(rng, made, prompt, n))
    drawn = round(float(rng.random()), 1)
    reward = drawn if reward == -1.0 else reward
    outcome = Outcome("completed") if reward is not None else Outcome("failed", "infra", "the sandbox died")
    score: dict[str, float | None] = {"score": reward}
    return Trajectory(
        where.id, where.group_id, where.task_id, made, outcome, 7,
        **{"env": "orders", "attempt": where.attempt, "score": score, "reward": reward, "success": drawn > 0.5} | fields
    )  # fmt: skip


def branch(parent: Trajectory, where: EpisodeKey, at: int, turns: int = 1) -> Trajectory:
    """A fork of `parent` after `at` turns that goes on for `turns` of its own, sharing the parent's spans."""
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(where.id.encode()).digest()[:8], "little"))
    made = parent.turns[:at]
    prompt = parent.turns[0].context[0].span
    for _ in range(turns):
        made = (*made, turn_after(rng, made, prompt))
    tokens = sum(len(piece) for piece in made[at].context)
    return dataclasses.replace(
        parent, id=where.id, turns=made, attempt=where.attempt, fork=Fork(parent.id, at, tokens), reward=0.3
    )


def unlike(one: Any, other: Any, path: str = "record") -> str | None:
    """Where two records differ, or None. Arrays count by dtype and bits, lists and tuples alike, NaN equals NaN."""
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        same = type(one) is type(other) and one.dtype == other.dtype and one.shape == other.shape
        return None if same and one.tobytes() == other.tobytes() else path
    if dataclasses.is_dataclass(one):
        if type(one) is not type(other):
            return path
        parts = [(f.name, getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(one)]
    elif isinstance(one, Mapping):
        if not isinstance(other, Mapping) or list(one) != list(other):
            return path
        parts = [(name, one[name], other[name]) for name in one]
    elif isinstance(one, list | tuple):
        if not isinstance(other, list | tuple) or len(one) != len(other):
            return path
        parts = [(str(i), a, b) for i, (a, b) in enumerate(zip(one, other, strict=True))]
    else:
        same = type(one) is type(other) and (one == other or (one != one and other != other))
        return None if same else path
    return next((found for name, a, b in parts if (found := unlike(a, b, f"{path}.{name}"))), None)
