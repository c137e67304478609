"""Evaluation: held-out tasks, one episode each, sampled and greedy, with confidence intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from agentrl.algo.sampler import TaskDraw
from agentrl.errors import RunFailed
from agentrl.metrics import wilson
from agentrl.task import Task
from agentrl.trajectory import Group

Decode = Literal["sampled", "greedy"]


def why_missing(groups: Sequence[Group]) -> tuple[str, int]:
    """Why most episodes without a reward have none, in words, and how many: ("", 0) where all have one."""
    missing = (m.trajectory for group in groups for m in group.members if m.trajectory.reward is None)
    details = Counter(trajectory.outcome.detail or str(trajectory.outcome) for trajectory in missing)
    return next(iter(details.most_common(1)), ("", 0))


def check_played(groups: Sequence[Group]) -> None:
    """Raises `RunFailed` where infrastructure failed every episode: a step that trains on nothing says nothing."""
    outcomes = [member.trajectory.outcome for group in groups for member in group.members]
    if outcomes and all(outcome.why == "infra" for outcome in outcomes):
        why, count = why_missing(groups)
        raise RunFailed(f"infrastructure failed all {len(outcomes)} episodes of a step; {count} of them: {why}")


def draws_for(tasks: Sequence[Task], step: int, samples: int = 1) -> list[TaskDraw]:
    """One draw per held-out task."""
    return [TaskDraw(task, samples, step, index) for index, task in enumerate(tasks)]


def summarise(groups: Sequence[Group], *, stage: str, step: int, decode: Decode) -> dict[str, Any]:
    """The `eval` record of summary.json: success with its 95 % interval, rewards, calls, tokens, cost,
    reward parts, outcomes, and pass@k where tasks were sampled more than once."""
    trajectories = [member.trajectory for group in groups for member in group.members]
    scored = [t for t in trajectories if t.reward is not None]
    n, k = len(scored), sum(bool(t.success) for t in scored)
    record: dict[str, Any] = {
        "stage": stage,
        "step": step,
        "decode": decode,
        "n": n,
        "success": k / n if n else None,
        "ci95": list(wilson(k, n)) if n else None,
        "mean_reward": _mean([t.reward or 0.0 for t in scored]),
        "tool_calls": _mean([t.n_tool_calls for t in scored]),
        "tokens": None if any(t.source == "endpoint" for t in scored) else _mean([t.n_sampled for t in scored]),
        "tool_cost": _mean([t.tool_cost for t in scored]),
        "cost": float(sum(turn.cost for t in trajectories for turn in t.turns)),
        "missing": len(trajectories) - n,
    }
    parts = sorted({name for t in scored for name in t.score})
    record["parts"] = {name: _mean([float(t.score.get(name) or 0.0) for t in scored]) for name in parts}
    outcomes: dict[str, int] = {}
    for trajectory in trajectories:
        outcomes[str(trajectory.outcome)] = outcomes.get(str(trajectory.outcome), 0) + 1
    record["outcomes"] = dict(sorted(outcomes.items()))
    samples = max((len(group.members) for group in groups), default=1)
    if samples > 1:
        record["pass_at"] = {str(k): pass_at(groups, k) for k in _powers(samples)}
    return record


def numbers(record: dict[str, Any]) -> dict[str, float]:
    """The record's numbers as metrics, named by decode mode."""
    prefix = f"eval/{record['decode']}"
    values = {f"{prefix}/{k}": float(v) for k, v in record.items() if isinstance(v, int | float) and k != "step"}
    return values | {f"{prefix}/part/{k}": float(v) for k, v in record["parts"].items() if v is not None}


def pass_at(groups: Sequence[Group], k: int) -> float | None:
    """The unbiased pass@k of Chen et al. 2021 (eq. 1), averaged over tasks with at least k scored samples."""
    values = []
    for group in groups:
        n = len(group.scored)
        if n >= k:
            correct = sum(bool(member.trajectory.success) for member in group.scored)
            values.append(_pass(n, correct, k))
    return _mean(values)


def _pass(n: int, correct: int, k: int) -> float:
    if n - correct < k:
        return 1.0
    return 1.0 - float(np.prod(1.0 - k / np.arange(n - correct + 1, n + 1)))


def _powers(n: int) -> list[int]:
    return [2**i for i in range(n.bit_length()) if 2**i <= n]


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None
