"""Pure functions of group statistics and credit. Arrays in, arrays out; no project types.

Sources: ALGORITHMS of GRPO (DeepSeekMath, eq. 3), Dr.GRPO (Liu et al. 2025), RLOO (Ahmadian et al.
2024), GAE (Schulman et al. 2016).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Baseline:
    """What rewards [n] are compared with: an advantage is (reward - mean) / (std + eps).

    `mean` is [n], or None where there is nothing to compare with; without a `std` nothing is divided.
    """

    mean: Array | None
    std: float | None = None
    eps: float = 0.0

    def advantages(self, rewards: Sequence[float]) -> Array:
        """Shape [n] -> [n]."""
        r = np.array(rewards, dtype=np.float64)
        difference = r if self.mean is None else r - self.mean
        return difference if self.std is None else difference / (self.std + self.eps)


def grpo_baseline(
    rewards: Sequence[float], eps: float = 1e-6, std: Literal["sample", "population"] = "sample"
) -> Baseline:
    """The mean and the standard deviation of rewards [n]; a group of one has none.

    `std` "sample" divides by n - 1, as torch.std does.
    """
    r = np.asarray(rewards, dtype=np.float64)
    if r.size == 1:
        return Baseline(None)
    return Baseline(np.full(r.size, r.mean()), float(r.std(ddof=1 if std == "sample" else 0)), eps)


def mean_baseline(rewards: Sequence[float]) -> Baseline:
    """The mean of rewards [n]; a group of one has none."""
    r = np.asarray(rewards, dtype=np.float64)
    return Baseline(None if r.size == 1 else np.full(r.size, r.mean()))


def others_baseline(rewards: Sequence[float]) -> Baseline:
    """For each of the rewards [n] the mean of the others; a group of one has none."""
    r = np.asarray(rewards, dtype=np.float64)
    return Baseline(None if r.size == 1 else r.mean() - (r - r.mean()) / (r.size - 1))


def grpo(rewards: Sequence[float], eps: float = 1e-6, std: Literal["sample", "population"] = "sample") -> Array:
    """(r - mean) / (std + eps). Shape [n] -> [n]; a group of one keeps its raw reward."""
    return grpo_baseline(rewards, eps, std).advantages(rewards)


def centred(rewards: Sequence[float]) -> Array:
    """r - mean (Dr.GRPO). Shape [n] -> [n]; a group of one keeps its raw reward."""
    return mean_baseline(rewards).advantages(rewards)


def leave_one_out(rewards: Sequence[float]) -> Array:
    """r_i - mean of the others (RLOO). Shape [n] -> [n]; a group of one keeps its raw reward."""
    return others_baseline(rewards).advantages(rewards)


def returns_to_go(rewards: Sequence[float], gamma: float = 1.0) -> Array:
    """R_t = r_t + gamma * R_{t+1}. Shape [T] -> [T]."""
    out = np.zeros(len(rewards), dtype=np.float64)
    running = 0.0
    for t in range(len(rewards) - 1, -1, -1):
        running = float(rewards[t]) + gamma * running
        out[t] = running
    return out


def is_constant(values: Sequence[float], tolerance: float = 1e-9) -> bool:
    """True where no value differs from another by more than `tolerance`."""
    return len(values) == 0 or max(values) - min(values) <= tolerance
