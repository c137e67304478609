"""The global random number generators: whether somebody moved them, and putting them back."""

from __future__ import annotations

import random
import sys
from typing import Any

import numpy as np


class GlobalGenerators:
    """The states of Python's, NumPy's and (where it is loaded) torch's generator at one moment."""

    def __init__(self) -> None:
        self._python = random.getstate()
        self._numpy: Any = np.random.get_state()  # noqa: NPY002
        torch = sys.modules.get("torch")
        self._torch = None if torch is None else torch.get_rng_state()

    def moved(self) -> list[str]:
        """The modules whose generator is in another state now."""
        names = []
        if random.getstate() != self._python:
            names.append("random")
        state: Any = np.random.get_state()  # noqa: NPY002
        if state[2] != self._numpy[2] or not np.array_equal(state[1], self._numpy[1]):
            names.append("numpy.random")
        if self._torch is not None and not sys.modules["torch"].equal(
            sys.modules["torch"].get_rng_state(), self._torch
        ):
            names.append("torch")
        return names

    def restore(self) -> None:
        """Set every generator back to this moment."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)  # noqa: NPY002
        if self._torch is not None:
            sys.modules["torch"].set_rng_state(self._torch)
