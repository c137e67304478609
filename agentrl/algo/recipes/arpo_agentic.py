"""ARPO, agentic (Dong et al. 2025, arXiv 2507.19849): branch where tool results make the policy unsure.

Of M samples N start from the prompt; the rest are branches that share their parent's prefix, spent
after tool results whose next words have a higher entropy than the trajectory's first. The stochastic
rule is the authors' code; the paper's threshold rule is `rule: threshold`.
"""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field

from agentrl.algo.sampler import TaskDraw
from agentrl.rollout.strategy import RolloutStrategy
from agentrl.trajectory import Group, Trajectory, Turn

if TYPE_CHECKING:
    from agentrl.rollout.episode import LiveEpisode
    from agentrl.rollout.play import Play


def branches(u: float, gain: float, *, weight: float, probability: float) -> bool:
    """The code's rule: branch iff clip(u - weight * gain, 0, 1) <= probability, u ~ U(0, 1)."""
    return min(max(u - weight * gain, 0.0), 1.0) <= probability


class EntropyBranch(RolloutStrategy):
    """`initial` samples from the prompt, the rest of the draw's samples as branches (or fresh ones, where
    nothing branched). Entropy is summed over the first `tokens` tokens of a turn, over log |V|."""

    type: Literal["arpo_agentic"] = "arpo_agentic"
    needs_entropy: ClassVar[bool] = True
    needs_fork: ClassVar[bool] = True
    initial: int = Field(default=8, ge=1)
    beam: int = Field(default=2, ge=2, description="paths after a branch point, the parent's included")
    weight: float = 0.2
    probability: float = Field(default=0.5, ge=0, le=1)
    tokens: int = Field(default=20, ge=1)
    rule: Literal["random", "threshold"] = "random"
    threshold: float = Field(default=0.5, description="of the threshold rule: probability + weight * gain > threshold")

    async def run(self, draw: TaskDraw, play: Play) -> Group:
        rng = play.rng("branch")
        done: list[Trajectory] = []
        active = list(await asyncio.gather(*(play.begin(i) for i in range(min(self.initial, draw.samples)))))
        begun = len(active)
        while active or begun < draw.samples:
            if not active:
                active.append(await play.begin(begun))
                begun += 1
            turns = await asyncio.gather(*(episode.step() for episode in active))
            for episode, turn in list(zip(active, turns, strict=True)):
                for _ in range(self._copies(episode, turn, play, float(rng.random()), draw.samples - begun)):
                    active.append(await play.fork(episode))
                    begun += 1
            done += [await play.finish(episode) for episode in active if episode.over]
            active = [episode for episode in active if not episode.over]
        return play.group(done)

    def _copies(self, episode: LiveEpisode, turn: Turn | None, play: Play, u: float, budget: int) -> int:
        if turn is None or turn.entropies is None:
            return 0
        entropy = float(np.sum(turn.entropies[: self.tokens])) / math.log(play.vocab_size)
        # H_init belongs to the trajectory; a fork copies `extra`, so branches inherit it.
        gain = entropy - episode.extra.setdefault("entropy_init", entropy)
        if episode.over or not turn.tools:
            return 0
        if self.rule == "threshold":
            branch = self.probability + self.weight * gain > self.threshold
        else:
            branch = branches(u, gain, weight=self.weight, probability=self.probability)
        return min(self.beam - 1, budget) if branch else 0
