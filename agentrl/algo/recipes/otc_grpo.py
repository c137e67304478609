"""OTC-GRPO: optimal tool calls (Wang et al. 2025, arXiv 2504.14870, eq. 5-7).

The reward of a correct answer is multiplied by how close its number of tool calls is to the fewest
that were ever enough for the question. The product matters: a wrong answer gains nothing by calling
less. `c` and `alpha` are not given in the paper; the values here are readings, so they are options.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from agentrl.algo.reward import RewardShaper, set_reward
from agentrl.algo.state import StateStore
from agentrl.trajectory import Group


def call_reward(calls: int, fewest: int, c: float) -> float:
    """r_tool for `calls` tool calls where `fewest` are known to be enough. In [0, 1]; 1 at the optimum.

    No call where some are needed scores 0; where none is needed the score falls with every call.
    """
    if fewest == 0:
        return 1.0 if calls == 0 else math.cos(calls * math.pi / (2 * calls + c))
    f = 2 * fewest * calls / (calls + fewest)
    return math.sin(f * math.pi / (2 * fewest))


class OTCReward(RewardShaper):
    """alpha * r_tool * r, with the fewest calls of a correct answer remembered across epochs.

    `c` smooths the penalty of calls where none is needed; a choice free of the paper is the number of
    calls that the environment allows.
    """

    type: Literal["otc_grpo"] = "otc_grpo"
    c: float = Field(default=4.0, gt=0)
    alpha: float = Field(default=1.0, gt=0)

    def shape(self, group: Group, store: StateStore) -> None:
        correct = [m.trajectory.n_tool_calls for m in group.scored if m.trajectory.success]
        known = store.get(self.type, group.task_id)
        seen = correct if known is None else [*correct, known]
        if not seen:
            return  # nobody has ever answered: every product is 0 as it stands
        fewest = min(seen)
        store.put(self.type, group.task_id, fewest)
        for member in group.scored:
            calls = member.trajectory.n_tool_calls
            factor = self.alpha * call_reward(calls, fewest, self.c)
            set_reward(member, self.type, factor * (member.reward or 0.0), calls=calls, fewest=fewest, factor=factor)
