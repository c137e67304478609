"""Reward shaping: the number that is compared within a group, made of named parts.

Shapers run in order, before anything is dropped, and may look at the whole group. They may not drop
trajectories. `success` is a channel of its own that no shaper touches.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from agentrl.algo.component import Component
from agentrl.algo.state import StateStore
from agentrl.trajectory import Group, Member


class RewardShaper(Component):
    """Point 4. Rewrites `member.reward` (never from or to None) and says in `member.parts` what it added."""

    point: ClassVar[str] = "shaper"

    def shape(self, group: Group, store: StateStore) -> None:
        """Shape the scored members of one group in place."""
        raise NotImplementedError


def set_reward(member: Member, name: str, reward: float, **numbers: float) -> None:
    """Give `member` its new total and record the change under `name`, with the `numbers` that it came from."""
    member.parts[name] = member.parts.get(name, 0.0) + reward - (member.reward or 0.0)
    member.notes.update({f"{name}/{number}": float(value) for number, value in numbers.items()})
    member.reward = reward


class ToolCost(RewardShaper):
    """What tools cost is taken off the reward.

    mode "subtract": r - weight * cost, with the costs that the tools declare.
    mode "discount": r * factor ** (calls - fewest calls of a successful member): the fewest calls that
    were enough are free, and a wrong answer gains nothing by calling less.
    """

    type: Literal["tool_cost"] = "tool_cost"
    mode: Literal["subtract", "discount"] = "subtract"
    weight: float = Field(default=1.0, ge=0)
    factor: float = Field(default=0.7, gt=0, le=1)

    def shape(self, group: Group, store: StateStore) -> None:
        scored = group.scored
        if self.mode == "subtract":
            for member in scored:
                cost = member.trajectory.tool_cost
                reward = (member.reward or 0.0) - self.weight * cost
                set_reward(member, "tool_cost", reward, cost=cost, weight=self.weight)
            return
        fewest = min((m.trajectory.n_tool_calls for m in scored if m.trajectory.success), default=0)
        for member in scored:
            extra = max(0, member.trajectory.n_tool_calls - fewest)
            factor = self.factor**extra
            reward = (member.reward or 0.0) * factor
            set_reward(member, "tool_cost", reward, calls=extra + fewest, fewest=fewest, factor=factor)
