"""Pure functions of group statistics and credit. Arrays in, arrays out; no project types.

Sources: ALGORITHMS of GRPO (DeepSeekMath, eq. 3), Dr.GRPO (Liu et al. 2025), RLOO (Ahmadian et al.
2024), GAE (Schulman et al. 2016).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def grpo(rewards: Sequence[float], eps: float = 1e-6, std: Literal["sample", "population"] = "sample") -> Array:
    """(r - mean) / (std + eps). Shape [n] -> [n].

    `std` "sample" divides by n - 1, as torch.std does. A group of one has mean 0 and std 1: its raw
    reward is its advantage.
    """
    r = np.asarray(rewards, dtype=np.float64)
    if r.size == 1:
        return r.copy()
    spread = float(r.std(ddof=1 if std == "sample" else 0))
    return np.asarray((r - r.mean()) / (spread + eps), dtype=np.float64)


def centred(rewards: Sequence[float]) -> Array:
    """r - mean (Dr.GRPO). Shape [n] -> [n]; a group of one keeps its raw reward."""
    r = np.asarray(rewards, dtype=np.float64)
    return r.copy() if r.size == 1 else r - r.mean()


def leave_one_out(rewards: Sequence[float]) -> Array:
    """r_i - mean of the others (RLOO). Shape [n] -> [n]; a group of one keeps its raw reward."""
    r = np.asarray(rewards, dtype=np.float64)
    n = r.size
    return r.copy() if n == 1 else (r - r.mean()) * n / (n - 1)


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
