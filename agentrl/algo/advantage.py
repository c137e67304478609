"""Credit: from a group's rewards to one advantage per sampled token.

Statistics are per *trajectory*, never per turn row: turn rows would give longer trajectories more
weight in the baseline (`stats_unit: row` reproduces the repositories that do so). Members without a
reward get no credit and enter no statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np

from agentrl.algo import statistics
from agentrl.algo.component import Component
from agentrl.trajectory import Group, Member


class AdvantageEstimator(Component):
    """Point 6. Sets `member.advantages` (one array per turn, [n_sampled]) for every scored member."""

    point: ClassVar[str] = "estimator"

    def estimate(self, groups: Sequence[Group]) -> None:
        """Give credit in place; never reads the policy."""
        raise NotImplementedError


class AdvantageTransform(Component):
    """Point 6, second half: rewrites advantages after the estimator, in order."""

    point: ClassVar[str] = "transform"

    def transform(self, groups: Sequence[Group]) -> None:
        """Rewrite `member.advantages` in place."""
        raise NotImplementedError


class _Outcome(AdvantageEstimator):
    """Shared by the estimators that broadcast one number per trajectory to all its sampled tokens."""

    stats_unit: Literal["trajectory", "row"] = "trajectory"

    def normalise(self, rewards: Sequence[float]) -> statistics.Array:
        raise NotImplementedError

    def estimate(self, groups: Sequence[Group]) -> None:
        for group in groups:
            scored = group.scored
            if not scored:
                continue
            copies = [1 if self.stats_unit == "trajectory" else max(1, len(m.trajectory.turns)) for m in scored]
            rewards = np.repeat([float(m.reward or 0.0) for m in scored], copies)
            values = self.normalise(rewards.tolist())
            first = np.cumsum([0, *copies[:-1]])
            for member, value in zip(scored, values[first], strict=True):
                member.advantages = member.spread([float(value)] * len(member.trajectory.turns))


class GRPO(_Outcome):
    """(r - mean) / (std + eps) over the group's trajectories, spread over all turns and tokens."""

    type: Literal["grpo"] = "grpo"
    eps: float = 1e-6
    std: Literal["sample", "population"] = "sample"

    def normalise(self, rewards: Sequence[float]) -> statistics.Array:
        return statistics.grpo(rewards, self.eps, self.std)


class DrGRPO(_Outcome):
    """r - mean; pair it with the aggregator `constant`."""

    type: Literal["dr_grpo"] = "dr_grpo"

    def normalise(self, rewards: Sequence[float]) -> statistics.Array:
        return statistics.centred(rewards)


class RLOO(_Outcome):
    """r minus the mean of the *other* members."""

    type: Literal["rloo"] = "rloo"

    def normalise(self, rewards: Sequence[float]) -> statistics.Array:
        return statistics.leave_one_out(rewards)


class SharedPrefix(AdvantageTransform):
    """How tokens that several branches share are weighted (ARPO, arXiv 2507.19849).

    "hard": a turn shared by d branches gets the mean of their d advantages in each of its d rows.
    "soft": every branch keeps its own (plain GRPO on full copies); in the on-policy limit the sum is
    the same. `count: once` divides the weight of shared tokens by d, so that each is trained once.
    """

    type: Literal["shared_prefix"] = "shared_prefix"
    mode: Literal["soft", "hard"] = "hard"
    count: Literal["each", "once"] = "each"

    def transform(self, groups: Sequence[Group]) -> None:
        for group in groups:
            credited = [member for member in group.members if member.advantages is not None]
            sharing: dict[int, list[tuple[Member, int]]] = {}
            for member in credited:
                for index, turn in enumerate(member.trajectory.turns):
                    sharing.setdefault(id(turn), []).append((member, index))
            for places in sharing.values():
                if len(places) > 1:
                    self._weigh(places)

    def _weigh(self, places: list[tuple[Member, int]]) -> None:
        if self.mode == "hard":
            mean = np.mean([(member.advantages or [])[index] for member, index in places], axis=0, dtype=np.float64)
            for member, index in places:
                if member.advantages is not None:
                    member.advantages[index] = np.asarray(mean, dtype=np.float32)
        if self.count == "once":
            for member, index in places:
                if member.weights is None:
                    member.weights = member.spread([1.0] * len(member.trajectory.turns))
                member.weights[index] = np.asarray(member.weights[index] / len(places), dtype=np.float32)
