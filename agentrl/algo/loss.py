"""The policy loss: a surrogate over token log-ratios, an aggregator, and auxiliary terms.

Everything is flat over trained tokens: tensors are [m], one entry per sampled token of a micro-batch.
The aggregator turns the *global* mini-batch into one weight per token, so that the loss is
sum(weight * token_loss) however the mini-batch is split into micro-batches.

torch is imported inside the functions: choosing a loss in a configuration does not load it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from agentrl.algo.component import Component
from agentrl.errors import UsageError
from agentrl.trajectory import Floats, Member

if TYPE_CHECKING:
    from torch import Tensor

LOSS_WEIGHTS = "loss_weight"
"""The name in `member.arrays` of what the aggregator weighed each token with: per turn [n_sampled]."""
_LOG_RATIO_BOUND = 20.0  # exp() of more overflows float32 long before it means anything


@dataclass(slots=True, eq=False)
class Tokens:
    """The trained tokens of one micro-batch, each tensor [m].

    `behaviour` is the log-prob in the ratio's denominator, `correction` a detached weight for engine
    mismatch (ones where unused), `reference` None unless a term needs it.
    """

    logprobs: Tensor
    behaviour: Tensor
    advantages: Tensor
    correction: Tensor
    weights: Tensor
    trajectories: Tensor
    entropies: Tensor | None = None
    reference: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Units:
    """For every trained token of a mini-batch [M] the row, turn and trajectory it belongs to (dense ids)."""

    rows: NDArray[np.int64]
    turns: NDArray[np.int64]
    trajectories: NDArray[np.int64]


# -- whose log-prob is the denominator -----------------------------------------------------------


class BehaviourModel(Component):
    """Point 7a. Which policy's log-prob the ratio divides by, and a correction weight per token."""

    point: ClassVar[str] = "behaviour"

    def denominator(self, member: Member) -> tuple[list[Floats], list[Floats] | None]:
        """(log-probs, correction weights or None = ones), one array per turn, [n_sampled]."""
        raise NotImplementedError

    def report(self, correction: Floats) -> dict[str, float]:
        """What the correction weights of an update [m] did, as metrics; nothing where there is no correction."""
        return {}


class RolloutBehaviour(BehaviourModel):
    """The engine's own log-probs: the ratio holds staleness and engine mismatch at once."""

    type: Literal["rollout"] = "rollout"

    def denominator(self, member: Member) -> tuple[list[Floats], list[Floats] | None]:
        return [turn.logprobs for turn in member.trajectory.turns], None


class OldBehaviour(BehaviourModel):
    """The trainer's recomputed log-probs (annotator `old_logprobs`); staleness and engine mismatch are corrected.

    correction "tis": weight min(w, cap); "mis": masked where w is outside [low, cap]. w is pi_old / pi_rollout of the
    token at level "token"; at level "sequence" it is the product over the trajectory's sampled tokens, and all of
    them are weighted or masked together.
    """

    type: Literal["old"] = "old"
    correction: Literal["none", "tis", "mis"] = "none"
    level: Literal["token", "sequence"] = "token"
    cap: float = Field(default=2.0, gt=0)
    low: float = Field(default=0.5, ge=0)

    @model_validator(mode="after")
    def _used(self) -> OldBehaviour:
        if self.level != "token" and self.correction == "none":
            raise ValueError("level does nothing without a correction; set correction: tis or mis")
        return self

    def denominator(self, member: Member) -> tuple[list[Floats], list[Floats] | None]:
        if "old" not in member.arrays:
            raise UsageError("behaviour 'old' needs the annotator 'old_logprobs'; add it to annotators")
        old = member.arrays["old"]
        if self.correction == "none":
            return old, None
        return old, [importance_weights(r, self.correction, self.low, self.cap) for r in self.ratios(member)]

    def ratios(self, member: Member) -> list[Floats]:
        """What is bounded, at every sampled token: the token's pi_old / pi_rollout, or the sequence's product."""
        logs = [a - turn.logprobs for a, turn in zip(member.arrays["old"], member.trajectory.turns, strict=True)]
        return [np.exp(values) for values in logs] if self.level == "token" else sequence_ratios(logs)

    def report(self, correction: Floats) -> dict[str, float]:
        if self.correction == "none" or not correction.size:
            return {}
        mean = {"correction/mean_weight": float(correction.mean(dtype=np.float64))}
        if self.correction == "tis":
            return mean | {"correction/truncated": float((correction >= np.float32(self.cap)).mean())}
        return mean | {"correction/masked": float((correction == 0).mean())}


def sequence_ratios(logs: Sequence[Floats]) -> list[Floats]:
    """The product of all ratios whose logarithms are given, at every token: arrays of the shapes of `logs`."""
    total = sum(float(values.sum(dtype=np.float64)) for values in logs)
    product = np.float32(np.exp(np.clip(total, -_LOG_RATIO_BOUND, _LOG_RATIO_BOUND)))
    return [np.full(values.shape, product, dtype=np.float32) for values in logs]


def importance_weights(ratios: Floats, kind: Literal["tis", "mis"], low: float, cap: float) -> Floats:
    """Truncated ("tis") or masked ("mis") importance weights of `ratios` [m]."""
    if kind == "tis":
        return np.minimum(ratios, np.float32(cap))
    return ((ratios >= low) & (ratios <= cap)).astype(np.float32)


# -- the surrogate --------------------------------------------------------------------------------


class Surrogate(Component):
    """Point 7b. A loss per token."""

    point: ClassVar[str] = "surrogate"

    def loss(self, tokens: Tokens) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss [m], metrics [m] each; metrics are averaged with the token weights)."""
        raise NotImplementedError


class PPOClip(Surrogate):
    """max(-A rho, -A clip(rho, 1 - low, 1 + high)); with `dual`, at most -A * dual where A < 0.

    Clip-higher is `high` > `low` (DAPO: .2 / .28). `low_is_inverse` bounds rho from below by
    1 / (1 + low), as LOOP does.
    """

    type: Literal["ppo_clip"] = "ppo_clip"
    low: float = Field(default=0.2, ge=0)
    high: float = Field(default=0.28, ge=0)
    dual: float | None = Field(default=None, gt=1)
    low_is_inverse: bool = False

    def loss(self, tokens: Tokens) -> tuple[Tensor, dict[str, Tensor]]:
        import torch

        log_ratio = (tokens.logprobs - tokens.behaviour).clamp(-_LOG_RATIO_BOUND, _LOG_RATIO_BOUND)
        ratio = log_ratio.exp()
        floor = 1 / (1 + self.low) if self.low_is_inverse else 1 - self.low
        clipped = ratio.clamp(floor, 1 + self.high)
        plain, bound = -tokens.advantages * ratio, -tokens.advantages * clipped
        loss = torch.maximum(plain, bound)
        if self.dual is not None:
            loss = torch.where(tokens.advantages < 0, torch.minimum(loss, -tokens.advantages * self.dual), loss)
        with torch.no_grad():
            metrics = {
                "clip_fraction": (bound > plain).float(),
                "ratio": ratio,
                "approx_kl": ratio - 1 - log_ratio,
            }
        return loss, metrics


# -- aggregation ----------------------------------------------------------------------------------


class Aggregator(Component):
    """Point 7c. One weight per token of the global mini-batch; names its unit."""

    point: ClassVar[str] = "aggregator"

    def weigh(self, units: Units) -> NDArray[np.float64]:
        """Weights [M] such that loss = sum(weights * token losses)."""
        raise NotImplementedError


def mean_of_means(unit: NDArray[np.int64]) -> NDArray[np.float64]:
    """Mean over units of the mean over each unit's tokens, as weights [M]."""
    _, inverse, counts = np.unique(unit, return_inverse=True, return_counts=True)
    return 1.0 / (counts[inverse] * len(counts))


class TokenMean(Aggregator):
    """Every token of the mini-batch weighs the same (DAPO)."""

    type: Literal["token_mean"] = "token_mean"

    def weigh(self, units: Units) -> NDArray[np.float64]:
        return np.full(units.rows.size, 1.0 / max(1, units.rows.size))


class UnitMean(Aggregator):
    """Mean over tokens, then over units: `row` (original GRPO), `turn`, or `trajectory` (LOOP)."""

    type: Literal["unit_mean"] = "unit_mean"
    unit: Literal["row", "turn", "trajectory"] = "row"

    def weigh(self, units: Units) -> NDArray[np.float64]:
        return mean_of_means({"row": units.rows, "turn": units.turns, "trajectory": units.trajectories}[self.unit])


class TurnThenTrajectory(Aggregator):
    """Mean over tokens, then over a trajectory's turns, then over trajectories (Flow-GRPO's objective)."""

    type: Literal["turn_trajectory"] = "turn_trajectory"

    def weigh(self, units: Units) -> NDArray[np.float64]:
        turns, first, inverse, counts = np.unique(
            units.turns, return_index=True, return_inverse=True, return_counts=True
        )
        per_turn = mean_of_means(units.trajectories[first])
        return (per_turn / counts)[inverse] if turns.size else np.zeros(0)


class ConstantNorm(Aggregator):
    """Sum over a row's tokens divided by a constant, then the mean over rows (Dr.GRPO)."""

    type: Literal["constant"] = "constant"
    length: float = Field(gt=0, description="the constant number of tokens that every row's sum is divided by")

    def weigh(self, units: Units) -> NDArray[np.float64]:
        return np.full(units.rows.size, 1.0 / (self.length * max(1, np.unique(units.rows).size)))


# -- auxiliary terms ------------------------------------------------------------------------------


class AuxTerm(Component):
    """Point 7d. A further loss per token, aggregated like the surrogate."""

    point: ClassVar[str] = "aux"
    needs: ClassVar[frozenset[Literal["reference", "entropy"]]] = frozenset()

    def loss(self, tokens: Tokens) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss [m], its coefficient included; metrics [m])."""
        raise NotImplementedError


class KL(AuxTerm):
    """coef * KL(pi || pi_ref), estimated per token (Schulman's k1, k2, k3)."""

    type: Literal["kl"] = "kl"
    needs = frozenset({"reference"})
    coef: float = Field(default=0.001, ge=0)
    estimator: Literal["k1", "k2", "k3"] = "k3"

    def loss(self, tokens: Tokens) -> tuple[Tensor, dict[str, Tensor]]:
        if tokens.reference is None:
            raise UsageError("the term 'kl' needs the annotator 'reference_logprobs'; add it to annotators")
        value = kl_estimate(tokens.logprobs - tokens.reference, self.estimator)
        return self.coef * value, {"kl_reference": value.detach()}


def kl_estimate(log_ratio: Tensor, estimator: Literal["k1", "k2", "k3"]) -> Tensor:
    """Per-token estimate of KL(pi || ref) from log pi - log ref [m]."""
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio.square()
    bounded = log_ratio.clamp(-_LOG_RATIO_BOUND, _LOG_RATIO_BOUND)
    return ((-bounded).exp() + bounded - 1).clamp(-10, 10)


class EntropyBonus(AuxTerm):
    """-coef * H(pi): rewards (coef > 0) or punishes (coef < 0) entropy."""

    type: Literal["entropy"] = "entropy"
    needs = frozenset({"entropy"})
    coef: float = 0.0

    def loss(self, tokens: Tokens) -> tuple[Tensor, dict[str, Tensor]]:
        if tokens.entropies is None:
            raise UsageError("the term 'entropy' was given no entropies; this is a bug in the trainer")
        return -self.coef * tokens.entropies, {}


def policy_loss(tokens: Tokens, surrogate: Surrogate, terms: Sequence[AuxTerm]) -> tuple[Tensor, dict[str, float]]:
    """The micro-batch's share of the loss: a scalar with gradient, and weighted sums of the metrics."""
    per_token, metrics = surrogate.loss(tokens)
    per_token = per_token * tokens.correction
    for term in terms:
        extra, more = term.loss(tokens)
        per_token = per_token + extra
        metrics |= more
    loss = (per_token * tokens.weights).sum()
    return loss, {name: float((value.detach() * tokens.weights).sum()) for name, value in metrics.items()}
