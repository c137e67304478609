"""Annotators forward a model over a group's rows and append arrays before anyone needs them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import ClassVar, Literal

from agentrl.algo.component import Component
from agentrl.trajectory import Floats, Member

Forward = Callable[[Sequence[Member], Literal["policy", "reference"]], Awaitable[list[list[Floats]]]]
"""Log-probs of each member's sampled tokens: per member one array per turn, [n_sampled]."""


class Annotator(Component):
    """Point 9. Appends `member.arrays[name]` in the layout of advantages."""

    point: ClassVar[str] = "annotator"
    needs_reference: ClassVar[bool] = False

    async def annotate(self, members: Sequence[Member], forward: Forward) -> None:
        """Annotate the given members; called once before shaping and once for members that editors added."""
        raise NotImplementedError


class OldLogprobs(Annotator):
    """log pi_old, recomputed by the trainer before the first update (`behaviour: old` uses it)."""

    type: Literal["old_logprobs"] = "old_logprobs"

    async def annotate(self, members: Sequence[Member], forward: Forward) -> None:
        for member, arrays in zip(members, await forward(members, "policy"), strict=True):
            member.arrays["old"] = arrays


class ReferenceLogprobs(Annotator):
    """log pi_ref under the policy as it was when the stage began (the KL term uses it)."""

    type: Literal["reference_logprobs"] = "reference_logprobs"
    needs_reference: ClassVar[bool] = True

    async def annotate(self, members: Sequence[Member], forward: Forward) -> None:
        for member, arrays in zip(members, await forward(members, "reference"), strict=True):
            member.arrays["reference"] = arrays
