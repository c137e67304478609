"""Shared by all tests: how to make records without an engine, and the smallest policy that learns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import hypothesis
import pytest

from agentrl.trajectory import (
    Group,
    Member,
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
from agentrl.tuning import tune

hypothesis.settings.register_profile("agentrl", deadline=None)  # how long an example takes is no property of it
hypothesis.settings.load_profile("agentrl")
tune()  # before torch is loaded: threads that spin make every test with two of them slow on shared cores

MakeTurn = Callable[..., Turn]
MakeTrajectory = Callable[..., Trajectory]


def make_turn(
    n: int = 3, calls: int = 0, context: Sequence[int] = (1, 2), start: int = 10, entropy: float | None = None
) -> Turn:
    """A turn of `n` sampled tokens after a one-span context."""
    prompt = Span(as_ids(context), "user", "template")
    versions = (VersionRun(0, 0, n),) if n else ()
    entropies = None if entropy is None else as_floats([entropy] * n)
    sampled = Span(
        as_ids(range(start, start + n)),
        "assistant",
        "sampled",
        logprobs=as_floats([-1.0] * n),
        entropies=entropies,
        entropy="none" if entropy is None else "exact",
        versions=versions,
    )
    uses = tuple(ToolUse(ToolCall("calc", {"a": i}), ToolResult("1", cost=1.0)) for i in range(calls))
    return Turn((prompt[:],), (sampled,), "text", "text", Sampling(), "stop", tools=uses)


def make_trajectory(
    id: str, reward: float | None, *, turns: Sequence[Turn] | None = None, calls: int = 0, success: bool | None = None
) -> Trajectory:
    """A finished trajectory; `calls` tool calls sit in its first turn."""
    outcome = Outcome("failed", "infra") if reward is None else Outcome("completed")
    made = tuple(turns) if turns is not None else (make_turn(calls=calls),)
    won = (reward is not None and reward > 0) if success is None else success
    return Trajectory(id, "g", "task", made, outcome, 0, reward=reward, success=None if reward is None else won)


def make_group(rewards: Sequence[float | None], **each: Sequence[object]) -> Group:
    """A group with one member per reward; keyword sequences go to `make_trajectory` one by one."""
    members = [
        Member(make_trajectory(f"t{i}", reward, **{name: values[i] for name, values in each.items()}))  # type: ignore[arg-type]
        for i, reward in enumerate(rewards)
    ]
    return Group("g", "task", members)


@pytest.fixture
def turn() -> MakeTurn:
    return make_turn


@pytest.fixture
def trajectory() -> MakeTrajectory:
    return make_trajectory


@pytest.fixture
def group() -> Callable[..., Group]:
    return make_group


@pytest.fixture(scope="session")
def arch() -> dict[str, Any]:
    """A Qwen3 of 40 thousand parameters beside its embedding."""
    return {
        "model_type": "qwen3",
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 24,
        "intermediate_size": 96,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "initializer_range": 0.06,
    }


@pytest.fixture(scope="session")
def muon() -> dict[str, Any]:
    """An optimiser under which it learns in a minute; `lr` is the stage's own."""
    return {"name": "muon", "momentum": 0.95, "betas": [0.9, 0.95], "clip": 1.0}
