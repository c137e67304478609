"""Runs under faults: nothing is lost, doubled or stuck, and what no fault met is as if there had been none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import agentrl
from agentrl.chaos import Chaos, ChaosOptions
from agentrl.errors import InfraError, UsageError
from agentrl.metrics import canonical_metrics
from agentrl.store import StoreReader
from agentrl.trajectory import Trajectory

MakeConfig = Callable[..., dict[str, Any]]


def train(small: MakeConfig, name: str, **keys: Any) -> tuple[Path, dict[str, Trajectory]]:
    """A deterministic run; its folder, and its training episodes by id."""
    config = small(name=name, deterministic=True, eval=None, **keys)
    config["rollout"] = config["rollout"] | {"retries": 8}
    agentrl.train(config)
    folder = Path(config["out"]) / name
    with StoreReader(folder) as reader:
        return folder, {id: reader.get(id) for step in range(4) for id in reader.finished(step, "rl")}


def said(trajectory: Trajectory) -> list[Any]:
    """What a trajectory consists of but for its clocks."""
    return [
        (turn.text, turn.observation, [span.ids.tolist() for span in turn.output], turn.logprobs.tolist())
        for turn in trajectory.turns
    ]


def test_what_no_fault_met_is_as_if_there_had_been_none(small: MakeConfig) -> None:
    """And what one met is played again to the same end, so that training does not notice at all."""
    calm_run, calm = train(small, "calm")
    chaos = {"tools": 0.05, "kill_every": 60, "slow": 0.02, "seconds": 0.01}
    struck_run, struck = train(small, "struck", chaos=chaos)
    assert len(calm) == 4 * 4 * 6 and calm.keys() == struck.keys(), "none lost, none doubled"
    assert all(trajectory.reward is not None for trajectory in struck.values())
    again = {id for id, trajectory in struck.items() if trajectory.attempt != calm[id].attempt}
    assert 0 < len(again) < len(calm), "some were struck and played again, not all"
    assert all(said(struck[id]) == said(calm[id]) for id in calm)
    assert canonical_metrics(struck_run / "metrics.jsonl") == canonical_metrics(calm_run / "metrics.jsonl")


def test_only_servers_suffer_what_servers_suffer(small: MakeConfig) -> None:
    with pytest.raises(UsageError, match="only servers can suffer garbage"):
        agentrl.train(small(chaos={"garbage": 0.1}), dry_run=True)


def test_rates_are_kept() -> None:
    chaos = Chaos(ChaosOptions(tools=0.1))
    for _ in range(2000):
        try:
            chaos.tool("calc")
        except InfraError as error:
            assert "the service behind calc is away" in str(error)
    assert 140 < chaos.counts["tools"] < 260 and chaos.report() == f"chaos: {chaos.counts['tools']} tools"
