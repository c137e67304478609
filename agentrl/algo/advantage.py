"""Credit: from a group's rewards to one advantage per sampled token.

Statistics are per *trajectory*, never per turn row: turn rows would give longer trajectories more
weight in the baseline (`stats_unit: row` reproduces the repositories that do so). Members without a
reward get no credit and enter no statistics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np

from agentrl.algo import statistics
from agentrl.algo.component import Component
from agentrl.trajectory import Group, Member


@dataclass(frozen=True, slots=True)
class Comparison:
    """How one reward became an advantage, told by the estimator that made it: see `formula`.

    `baseline` is None where there is nothing to compare with, `std` None where nothing is divided. `of` says in words
    what the baseline is, `name` what `formula` calls it, and `numbers` hold what it was made of.
    """

    reward: float
    baseline: float | None
    of: str
    name: str = "mean"
    std: float | None = None
    eps: float = 0.0
    numbers: Mapping[str, float] = field(default_factory=dict)

    @property
    def value(self) -> float:
        """The advantage."""
        difference = self.reward if self.baseline is None else self.reward - self.baseline
        return difference if self.std is None else difference / (self.std + self.eps)

    @property
    def formula(self) -> str:
        """`value` in the names of `terms`."""
        difference = "reward" if self.baseline is None else f"reward - {self.name}"
        return difference if self.std is None else f"({difference}) / (std + eps)"

    @property
    def terms(self) -> dict[str, float]:
        """The numbers that `formula` names."""
        out = {"reward": self.reward}
        if self.baseline is not None:
            out[self.name] = self.baseline
        return out if self.std is None else out | {"std": self.std, "eps": self.eps}


class AdvantageEstimator(Component):
    """Point 6. Sets `member.advantages` (one array per turn, [n_sampled]) for every scored member."""

    point: ClassVar[str] = "estimator"

    def estimate(self, groups: Sequence[Group]) -> None:
        """Give credit in place; never reads the policy."""
        raise NotImplementedError

    def account(self, group: Group) -> Sequence[Comparison] | None:
        """How the numbers of `group.scored` come about, in that order; None where they are not one a trajectory."""
        return None


class AdvantageTransform(Component):
    """Point 6, second half: rewrites advantages after the estimator, in order."""

    point: ClassVar[str] = "transform"

    def transform(self, groups: Sequence[Group]) -> None:
        """Rewrite `member.advantages` in place."""
        raise NotImplementedError


class _Outcome(AdvantageEstimator):
    """Shared by the estimators that broadcast one number per trajectory to all its sampled tokens."""

    stats_unit: Literal["trajectory", "row"] = "trajectory"

    over: ClassVar[str] = "all"  # or "others": whose mean the baseline is

    def baseline(self, rewards: Sequence[float]) -> statistics.Baseline:
        raise NotImplementedError

    def account(self, group: Group) -> Sequence[Comparison]:
        scored = group.scored
        if not scored:
            return []
        copies = [1 if self.stats_unit == "trajectory" else max(1, len(m.trajectory.turns)) for m in scored]
        rewards = np.repeat([float(m.reward or 0.0) for m in scored], copies)
        against = self.baseline(rewards.tolist())
        out = []
        for n, first in zip(copies, np.cumsum([0, *copies[:-1]]), strict=True):
            numbers = {"n": float(rewards.size)}
            if self.stats_unit == "row":
                numbers = {"members": float(len(scored)), "rows": float(rewards.size), "rows of this one": float(n)}
            numbers |= {"lowest": float(rewards.min()), "highest": float(rewards.max())}
            out.append(
                Comparison(
                    float(rewards[first]),
                    None if against.mean is None else float(against.mean[first]),
                    self._words(rewards.size),
                    "mean" if self.over == "all" else "mean of the others",
                    against.std,
                    against.eps,
                    numbers,
                )
            )
        return out

    def _words(self, n: int) -> str:
        if n == 1:
            return "none: a group of one has nothing to be compared with, and its reward is its advantage"
        others = "other " if self.over == "others" else ""
        if self.stats_unit == "row":
            return f"the mean over the group's {others}rows, where a shaped reward counts once for each turn"
        return f"the mean of the {others}members' shaped rewards"

    def estimate(self, groups: Sequence[Group]) -> None:
        for group in groups:
            for member, comparison in zip(group.scored, self.account(group), strict=True):
                member.advantages = member.spread([comparison.value] * len(member.trajectory.turns))


class GRPO(_Outcome):
    """(r - mean) / (std + eps) over the group's trajectories, spread over all turns and tokens."""

    type: Literal["grpo"] = "grpo"
    eps: float = 1e-6
    std: Literal["sample", "population"] = "sample"

    def baseline(self, rewards: Sequence[float]) -> statistics.Baseline:
        return statistics.grpo_baseline(rewards, self.eps, self.std)


class DrGRPO(_Outcome):
    """r - mean; pair it with the aggregator `constant`."""

    type: Literal["dr_grpo"] = "dr_grpo"

    def baseline(self, rewards: Sequence[float]) -> statistics.Baseline:
        return statistics.mean_baseline(rewards)


class RLOO(_Outcome):
    """r minus the mean of the *other* members."""

    type: Literal["rloo"] = "rloo"
    over: ClassVar[str] = "others"

    def baseline(self, rewards: Sequence[float]) -> statistics.Baseline:
        return statistics.others_baseline(rewards)


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
