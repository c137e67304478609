"""A shaper that pays infinity: what a broken reward does to a run."""

from __future__ import annotations

import math
from typing import Literal

from agentrl.algo.reward import RewardShaper, set_reward
from agentrl.algo.state import StateStore
from agentrl.trajectory import Group


class Explode(RewardShaper):
    """Infinite reward for the first member."""

    type: Literal["explode"] = "explode"

    def shape(self, group: Group, store: StateStore) -> None:
        set_reward(group.members[0], self.type, math.inf)
