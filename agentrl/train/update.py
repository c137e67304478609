"""One policy update: credited members become rows, rows become a loss, the loss becomes a step.

The loss is sum(weight * token loss) with one weight per token computed over the whole mini-batch, so
how it is cut into micro-batches changes nothing but memory.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agentrl.algo.loss import LOSS_WEIGHTS, Aggregator, AuxTerm, BehaviourModel, Surrogate, Tokens, Units, policy_loss
from agentrl.algo.staleness import AGES
from agentrl.errors import RunFailed
from agentrl.train.forward import plan, score_rows, token_logprobs
from agentrl.train.optim import Optimizer
from agentrl.train.packing import Share
from agentrl.train.policy import Policy
from agentrl.trajectory import Floats, Member, Row, as_floats, rows_of


@dataclass(frozen=True, slots=True)
class Objective:
    """The loss's four slots."""

    behaviour: BehaviourModel
    surrogate: Surrogate
    aggregator: Aggregator
    aux: tuple[AuxTerm, ...] = ()

    @property
    def needs_entropy(self) -> bool:
        return any("entropy" in term.needs for term in self.aux)

    @property
    def needs_reference(self) -> bool:
        return any("reference" in term.needs for term in self.aux)


@dataclass(slots=True, eq=False)
class TrainRow:
    """A row with its tokens' numbers, each [m] in the order of `row.targets`."""

    row: Row
    member: int
    advantages: Floats
    behaviour: Floats
    correction: Floats
    weights: Floats
    rollout: Floats
    ages: Floats
    reference: Floats | None = None


@dataclass(slots=True)
class UpdateReport:
    """What an update did. `metrics` are token-weighted means over the update's mini-batches."""

    metrics: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    trained: int = 0
    seconds: float = 0.0


def train_rows(members: Sequence[Member], objective: Objective) -> list[TrainRow]:
    """The training rows of all credited members, in order. Rows without any advantage train nothing."""
    out: list[TrainRow] = []
    for index, member in enumerate(members):
        if member.advantages is None:
            continue
        old, correction = objective.behaviour.denominator(member)
        ones = member.spread([1.0] * len(member.trajectory.turns))
        for row in rows_of(member.trajectory):
            out.append(
                TrainRow(
                    row=row,
                    member=index,
                    advantages=at(member.advantages, row),
                    behaviour=at(old, row),
                    correction=at(correction or ones, row),
                    weights=at(member.weights or ones, row),
                    rollout=at([turn.logprobs for turn in member.trajectory.turns], row),
                    ages=at(member.arrays.get(AGES) or member.spread([0.0] * len(member.trajectory.turns)), row),
                    reference=at(member.arrays["reference"], row) if objective.needs_reference else None,
                )
            )
    return out


def at(per_turn: Sequence[Floats], row: Row) -> Floats:
    """Pick a row's tokens from arrays laid out per turn. Shape [m]."""
    starts = np.cumsum([0, *(len(values) for values in per_turn[:-1])])
    flat = np.concatenate(per_turn) if per_turn else as_floats([])
    return np.asarray(flat[starts[row.turns] + row.offsets], dtype=np.float32)


def forward_members(
    policy: Policy, members: Sequence[Member], *, temperature: float, token_budget: int
) -> list[list[Floats]]:
    """Log-probs of the members' sampled tokens without gradient: per member one array per turn, [n_sampled]."""
    out = [[np.zeros(turn.n_sampled, dtype=np.float32) for turn in m.trajectory.turns] for m in members]
    rows = [(index, row) for index, member in enumerate(members) for row in rows_of(member.trajectory)]
    scored = score_rows(policy, [row for _, row in rows], token_budget=token_budget, temperature=temperature)
    for (index, row), (values, _) in zip(rows, scored, strict=True):
        for turn in np.unique(row.turns):
            mine = row.turns == turn
            out[index][int(turn)][row.offsets[mine]] = values.cpu().numpy()[mine]
    return out


def units_of(rows: Sequence[TrainRow]) -> Units:
    """Which row, turn and trajectory every trained token belongs to."""
    n = [len(r.row.targets) for r in rows]
    members = np.repeat([r.member for r in rows], n) if rows else np.zeros(0, np.int64)
    turns = np.concatenate([r.row.turns for r in rows]) if rows else np.zeros(0, np.int64)
    stride = int(turns.max()) + 1 if turns.size else 1
    return Units(np.repeat(np.arange(len(rows)), n), members * stride + turns, members.astype(np.int64))


def split(rows: Sequence[TrainRow], parts: int) -> list[list[TrainRow]]:
    """Cut `rows` into `parts` mini-batches of near-equal numbers of rows, never inside a trajectory."""
    starts = [i for i, r in enumerate(rows) if i == 0 or rows[i - 1].member != r.member]
    parts = min(parts, len(starts))
    wanted = [round(k * len(rows) / parts) for k in range(1, parts)] if parts else []
    cuts = sorted({min(starts[1:], key=lambda s: abs(s - w)) for w in wanted}) if len(starts) > 1 else []
    return [list(rows[a:b]) for a, b in zip([0, *cuts], [*cuts, len(rows)], strict=True)] if rows else []


def note_weights(members: Sequence[Member], batches: Sequence[Sequence[TrainRow]], aggregator: Aggregator) -> None:
    """Write what each token weighs in its mini-batch's loss beside the members' other arrays, 0 where it does not."""
    for index in {row.member for batch in batches for row in batch}:
        members[index].arrays[LOSS_WEIGHTS] = members[index].spread([0.0] * len(members[index].trajectory.turns))
    for batch in batches:
        weights = aggregator.weigh(units_of(batch))
        edges = np.cumsum([0, *(len(r.row.targets) for r in batch)])
        for row, start, stop in zip(batch, edges, edges[1:], strict=False):
            arrays = members[row.member].arrays[LOSS_WEIGHTS]
            for turn in np.unique(row.row.turns):
                mine = row.row.turns == turn
                arrays[int(turn)][row.row.offsets[mine]] = weights[start:stop][mine]


def update(
    policy: Policy,
    optimizer: Optimizer,
    members: Sequence[Member],
    objective: Objective,
    *,
    temperature: float,
    minibatches: int,
    tokens_per_batch: int,
    share_prompts: Share = "auto",
    crash_file: Path | None = None,
) -> UpdateReport:
    """Update the policy on `members`, `minibatches` optimiser steps over their rows once.

    Raises `RunFailed` on a loss or gradient that is not finite, with the mini-batch saved to
    `crash_file`. An empty list of rows changes nothing.
    """
    started = time.perf_counter()
    report = UpdateReport()
    batches = split(train_rows(members, objective), minibatches)
    note_weights(members, batches, objective.aggregator)
    for number, batch in enumerate(batches):
        metrics = _step(
            policy,
            optimizer,
            batch,
            objective,
            temperature,
            tokens_per_batch,
            share_prompts,
            crash_file,
            first=not number,
        )
        for name, value in metrics.items():
            scale = 1.0 if name.startswith("gap") else 1 / len(batches)
            report.metrics[name] = report.metrics.get(name, 0.0) + value * scale
        report.tokens += sum(len(r.row) for r in batch)
        report.trained += sum(len(r.row.targets) for r in batch)
    corrections = [row.correction for batch in batches for row in batch]
    report.metrics |= objective.behaviour.report(np.concatenate(corrections) if corrections else as_floats([]))
    report.seconds = time.perf_counter() - started
    return report


def backward(
    policy: Policy,
    batch: Sequence[TrainRow],
    objective: Objective,
    *,
    temperature: float,
    tokens_per_batch: int,
    share_prompts: Share = "auto",
) -> tuple[dict[str, float], Floats]:
    """Accumulate the gradient of one mini-batch; returns its metrics (with "loss") and the trainer's
    log-probs [M] as they were before the step."""
    units = units_of(batch)
    weights = objective.aggregator.weigh(units)
    edges = np.cumsum([0, *(len(r.row.targets) for r in batch)])
    logprobs = np.zeros(int(edges[-1]), dtype=np.float32)
    metrics: dict[str, float] = {}
    for picked in plan([r.row for r in batch], token_budget=tokens_per_batch, share_prompts=share_prompts):
        rows = [batch[i] for i in picked]
        places = np.concatenate([np.arange(edges[i], edges[i + 1]) for i in picked])
        outputs = token_logprobs(
            policy,
            [r.row for r in rows],
            temperature=temperature,
            entropy=objective.needs_entropy,
            share_prompts=share_prompts,
        )
        tokens = _tokens(rows, outputs.logprobs, outputs.entropies, weights[places], units.trajectories[places])
        loss, more = policy_loss(tokens, objective.surrogate, objective.aux)
        loss.backward()  # type: ignore[no-untyped-call]
        logprobs[places] = outputs.logprobs.detach().float().cpu().numpy()
        for name, value in {"loss": float(loss.detach()), **more}.items():
            metrics[name] = metrics.get(name, 0.0) + value
    return metrics, logprobs


def _tokens(
    rows: Sequence[TrainRow],
    logprobs: torch.Tensor,
    entropies: torch.Tensor | None,
    weights: np.ndarray[Any, Any],
    trajectories: np.ndarray[Any, Any],
) -> Tokens:
    device = logprobs.device

    def tensor(arrays: Sequence[np.ndarray[Any, Any]]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(arrays)).to(device)

    own = np.concatenate([r.weights for r in rows])
    references = [r.reference for r in rows if r.reference is not None]
    return Tokens(
        logprobs=logprobs,
        behaviour=tensor([r.behaviour for r in rows]),
        advantages=tensor([r.advantages for r in rows]),
        correction=tensor([r.correction for r in rows]),
        weights=torch.from_numpy((weights * own).astype(np.float32)).to(device),
        trajectories=torch.from_numpy(trajectories).to(device),
        entropies=entropies,
        reference=tensor(references) if references else None,
    )


def _step(
    policy: Policy,
    optimizer: Optimizer,
    batch: list[TrainRow],
    objective: Objective,
    temperature: float,
    tokens_per_batch: int,
    share_prompts: Share,
    crash_file: Path | None,
    *,
    first: bool,
) -> dict[str, float]:
    optimizer.zero_grad()
    metrics, logprobs = backward(
        policy,
        batch,
        objective,
        temperature=temperature,
        tokens_per_batch=tokens_per_batch,
        share_prompts=share_prompts,
    )
    if first:  # these weights sampled the tokens of age 0, so any difference there is the engine's
        rollout, age = (np.concatenate([getattr(r, name) for r in batch]) for name in ("rollout", "ages"))
        for name, which in (("gap", age == 0), ("gap_stale", age > 0), ("gap_unknown", age < 0)):
            metrics |= {f"{name}/{key}": value for key, value in gap(logprobs[which], rollout[which]).items()}
    norm = optimizer.clip()
    metrics["grad_norm"] = norm
    if not (np.isfinite(norm) and np.isfinite(metrics["loss"])):
        where = _save_crash(batch, metrics, crash_file)
        raise RunFailed(
            f"the update is not finite (loss {metrics['loss']}, gradient norm {norm}); the batch is in {where}. "
            "Lower the learning rate, or check the reward for infinities"
        )
    optimizer.step()
    return metrics


def gap(trainer: Floats, engine: Floats) -> dict[str, float]:
    """How far the trainer's log-probs are from the engine's."""
    difference = trainer.astype(np.float64) - engine
    if not difference.size:
        return {}
    return {
        "mean_abs": float(np.abs(difference).mean()),
        "max_abs": float(np.abs(difference).max()),
        "kl": float((np.exp(difference) - 1 - difference).mean()),
    }


def _save_crash(batch: Sequence[TrainRow], metrics: dict[str, float], crash_file: Path | None) -> str:
    if crash_file is None:
        return "nowhere (no run folder)"
    torch.save(
        {
            "metrics": metrics,
            "rows": [
                {
                    "ids": r.row.ids,
                    "targets": r.row.targets,
                    "advantages": r.advantages,
                    "behaviour": r.behaviour,
                    "weights": r.weights,
                }
                for r in batch
            ],
        },
        crash_file,
    )
    return str(crash_file)
