"""Rollout strategies: how a task's samples are spent.

A strategy drives episodes through the primitives of `Play`; it never computes advantages and knows
nothing of engines, retries or deadlines.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, ClassVar, Literal

from agentrl.algo.component import Component
from agentrl.algo.sampler import TaskDraw
from agentrl.trajectory import Group

if TYPE_CHECKING:
    from agentrl.rollout.play import Play


class RolloutStrategy(Component):
    """Point 3. `run` plays one draw and returns its group, with every member scored or missing."""

    point: ClassVar[str] = "strategy"
    needs_entropy: ClassVar[bool] = False
    needs_fork: ClassVar[bool] = False

    async def run(self, draw: TaskDraw, play: Play) -> Group:
        """Play `draw.samples` episodes in any shape."""
        raise NotImplementedError


class FlatRollouts(RolloutStrategy):
    """Independent samples of the task."""

    type: Literal["flat"] = "flat"

    async def run(self, draw: TaskDraw, play: Play) -> Group:
        async with asyncio.TaskGroup() as tasks:  # an error ends the siblings, too
            running = [tasks.create_task(play.episode(sample)) for sample in range(draw.samples)]
        return play.group([task.result() for task in running])
