"""How old the trained tokens are: by how many updates their weights are behind, and what was done about it.

An update trains version v of the weights; a token that version u sampled has the age v - u (as AReaL
counts staleness, arXiv 2505.24298). An episode that was at play during an update has tokens of several ages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from agentrl.algo.advantage import AdvantageTransform
from agentrl.trajectory import Floats, Group, Member, Trajectory, Turn

AGES = "age"
"""The name in `member.arrays` of the tokens' ages: per turn [n_sampled], whole numbers."""
UNKNOWN = -1.0
"""The age of a token whose engine did not say which weights sampled it."""


def ages(trajectory: Trajectory, version: int) -> list[Floats]:
    """Each sampled token's age where weights `version` are trained: one array per turn, [n_sampled]."""
    out = []
    for turn in trajectory.turns:
        versions = versions_of(turn)
        age = np.where(versions < 0, UNKNOWN, version - versions).astype(np.float32)
        out.append(age)
    return out


def versions_of(turn: Turn) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The weight version that sampled each token of a turn, -1 where unknown. Shape [n_sampled]."""
    parts = [np.full(run.stop - run.start, run.version) for span in turn.sampled for run in span.versions]
    return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)


def stamp(members: Sequence[Member], version: int) -> None:
    """Write the ages of the members' tokens beside their other arrays."""
    for member in members:
        member.arrays[AGES] = ages(member.trajectory, version)


def crossed(trajectory: Trajectory) -> bool:
    """True where the episode went on over an update: its tokens are of more than one version."""
    return len({run.version for turn in trajectory.turns for span in turn.sampled for run in span.versions}) > 1


class MaxAge(AdvantageTransform):
    """Tokens older than `updates` updates get weight 0. They still count in the aggregator's mean, like masked ones;
    tokens of unknown age stay."""

    type: Literal["max_age"] = "max_age"
    updates: int = Field(ge=0)

    def transform(self, groups: Sequence[Group]) -> None:
        for group in groups:
            for member in group.members:
                if member.advantages is None or AGES not in member.arrays:
                    continue
                weights = member.weights or member.spread([1.0] * len(member.trajectory.turns))
                kept = [age <= self.updates for age in member.arrays[AGES]]
                member.weights = [np.asarray(w * k, np.float32) for w, k in zip(weights, kept, strict=True)]


def report(members: Sequence[Member], bound: int, transforms: Sequence[AdvantageTransform] = ()) -> dict[str, float]:
    """The trained members' ages as metrics: mean and largest age of their tokens, the share of each age, of unknown
    ages, and of those that `MaxAge` dropped; and the share of episodes that went on over an update."""
    per_turn = [age for member in members for age in member.arrays.get(AGES, ())]
    age = np.concatenate(per_turn) if per_turn else np.zeros(0, np.float32)
    known = age[age >= 0]
    out = {
        "staleness/mean": float(known.mean()) if known.size else 0.0,
        "staleness/max": float(known.max()) if known.size else 0.0,
        "staleness/crossed": float(np.mean([crossed(m.trajectory) for m in members])) if members else 0.0,
        "staleness/unknown": _share(age == UNKNOWN),
    }
    out |= {f"staleness/age_{n}": _share(age == n) for n in range(bound + 1)}
    limits = [transform.updates for transform in transforms if isinstance(transform, MaxAge)]
    if limits:
        out["correction/too_old"] = _share(age > min(limits))
    return out


def _share(which: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> float:
    return float(which.mean()) if which.size else 0.0
