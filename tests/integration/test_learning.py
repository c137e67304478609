"""The learning itself: real runs from the configurations, minutes each, with what they promise asserted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import agentrl
from agentrl.metrics import Summary
from agentrl.store import StoreReader
from agentrl.trajectory import rows_of

CONFIGS = Path(__file__).parents[2] / "configs"
pytestmark = pytest.mark.learning


def run(name: str, tmp_path: Path, *overrides: str) -> tuple[dict[tuple[str, str, int], dict[str, Any]], Path]:
    """Train from a configuration; its evaluations by (stage, decode, step), and the run folder."""
    summary = agentrl.train(CONFIGS / f"{name}.yaml", overrides=[f"out={tmp_path}", *overrides])
    assert isinstance(summary, Summary) and summary.status == "completed"
    return {(e["stage"], e["decode"], e["step"]): dict(e) for e in summary.eval}, tmp_path / name


def last(evals: dict[tuple[str, str, int], dict[str, Any]], stage: str, decode: str) -> dict[str, Any]:
    return [e for (s, d, _), e in sorted(evals.items(), key=lambda item: item[0][2]) if (s, d) == (stage, decode)][-1]


def test_the_quickstart_learns_to_use_a_tool(tmp_path: Path) -> None:
    evals, folder = run("quickstart", tmp_path)
    assert last(evals, "sft", "sampled")["success"] <= 0.40
    assert last(evals, "sft", "greedy")["success"] <= 0.05
    assert last(evals, "rl", "sampled")["success"] >= 0.86
    assert last(evals, "rl", "greedy")["success"] >= 0.93
    assert last(evals, "rl", "greedy")["n"] == 1024
    assert (folder / "curve.png").stat().st_size > 10_000
    assert json.loads((folder / "summary.json").read_text())["status"] == "completed"


def test_otc_calls_fall_at_equal_success(tmp_path: Path) -> None:
    evals, folder = run("otc_grpo", tmp_path, "stages.1.steps=40")
    before, after = last(evals, "sft", "sampled"), last(evals, "rl", "sampled")
    assert after["success"] >= before["success"] + 0.05
    assert last(evals, "rl", "greedy")["tool_calls"] <= 0.75 * last(evals, "sft", "greedy")["tool_calls"]
    progress = json.loads((folder / "checkpoints" / "best" / "progress.json").read_text())
    remembered = progress["store"]["otc_grpo"]
    assert remembered and set(remembered.values()) <= {0, 1, 2, 3}


def test_flow_grpo_trains_one_row_per_planner_turn(tmp_path: Path) -> None:
    evals, folder = run("agentflow_flow_grpo", tmp_path, "stages.1.steps=20")
    assert last(evals, "rl", "greedy")["success"] >= last(evals, "sft", "greedy")["success"] + 0.3
    with StoreReader(folder) as reader:
        ids = reader.finished(19, "rl")
        several = 0
        for id in ids:
            trajectory, credit = reader.get(id), reader.credit(id, 19)
            assert len(rows_of(trajectory)) == len(trajectory.turns)
            if credit is not None and credit.advantages and len(trajectory.turns) > 1:
                several += 1
                values = {float(a) for turn in credit.advantages for a in turn}
                assert len(values) == 1, "the outcome is broadcast to each turn"
    assert len(ids) == 128 and several > 20


def test_arpo_branches_share_their_prefix(tmp_path: Path) -> None:
    evals, folder = run("arpo_agentic", tmp_path, "stages.1.steps=15")
    assert last(evals, "rl", "greedy")["success"] >= 0.8
    with StoreReader(folder) as reader:
        forks = 0
        for id in reader.finished(14, "rl"):
            child = reader.get(id)
            if child.fork is None:
                continue
            forks += 1
            parent = reader.get(child.fork.parent)
            for mine, its in zip(child.turns[: child.fork.turn], parent.turns, strict=False):
                assert mine.output[0].ids.tolist() == its.output[0].ids.tolist()
                assert mine.logprobs.tolist() == its.logprobs.tolist()
        assert forks >= 16
