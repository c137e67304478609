"""Who is in the batch: dropping, replacing, injecting and asking for more.

Editors run in two phases: `pre_adv` before advantages (they may ask for new rollouts), `post_adv`
after. They may change membership but never the reward of a sampled trajectory.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, ClassVar, Literal

from agentrl.algo.component import Component
from agentrl.algo.state import StateStore
from agentrl.algo.statistics import is_constant
from agentrl.trajectory import Group

Regenerate = Callable[[int], Awaitable[list[Group]]]
"""Asks the sampler and the strategies for that many fresh groups, scored and shaped."""


class GroupEditor(Component):
    """Point 5. `edit` returns the groups that go on."""

    point: ClassVar[str] = "editor"
    phase: ClassVar[Literal["pre_adv", "post_adv"]] = "pre_adv"

    async def edit(self, groups: Sequence[Group], store: StateStore, rng: Any, regenerate: Regenerate) -> list[Group]:
        """The groups that stay (edited copies or the same objects)."""
        raise NotImplementedError


class DropConstant(GroupEditor):
    """Drop groups that teach nothing: fewer than two scored members, or all values equal.

    `on` "reward" looks at the shaped reward (an all-correct group whose tool counts differ still
    teaches); "success" is DAPO's dynamic sampling, which with `refill` draws new groups until the
    batch is full again, at most `rounds` times.
    """

    type: Literal["drop_constant"] = "drop_constant"
    on: Literal["reward", "success"] = "reward"
    refill: bool = False
    rounds: int = 10

    async def edit(self, groups: Sequence[Group], store: StateStore, rng: Any, regenerate: Regenerate) -> list[Group]:
        kept = [group for group in groups if self._teaches(group)]
        for _ in range(self.rounds if self.refill else 0):
            if len(kept) >= len(groups):
                break
            kept += [group for group in await regenerate(len(groups) - len(kept)) if self._teaches(group)]
        return kept[: len(groups)] if self.refill else kept

    def _teaches(self, group: Group) -> bool:
        scored = group.scored
        if len(scored) < 2:
            return False
        if self.on == "success":
            return not is_constant([float(bool(member.trajectory.success)) for member in scored])
        # Turn rewards give credit within a trajectory even where the totals are equal.
        turn_credit = any(any(member.turn_rewards or ()) for member in scored)
        return turn_credit or not is_constant([float(member.reward or 0.0) for member in scored])
