"""One draw at play: the primitives a strategy may use, and what they leave behind if it ends early."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from agentrl.algo.sampler import TaskDraw
from agentrl.context import ContextPolicy
from agentrl.rollout.actors import Actor
from agentrl.rollout.episode import LiveEpisode
from agentrl.rollout.seeds import seed_of
from agentrl.rollout.strategy import RolloutStrategy
from agentrl.store.key import EpisodeKey
from agentrl.trajectory import Group, Member, Trajectory, Turn

if TYPE_CHECKING:
    from agentrl.rollout.manager import RolloutManager

Keep = Callable[[TaskDraw, Trajectory], None]
"""Takes an episode as it is finished (and not one that a record already held)."""


@dataclass(slots=True)
class Recorded:
    """What a killed run left of the steps to come: finished episodes, and the turns of those in flight."""

    finished: Mapping[str, Trajectory] = field(default_factory=dict)
    inflight: Mapping[str, Sequence[Turn]] = field(default_factory=dict)


@dataclass(slots=True)
class Tally:
    """What progress is counted against: the episodes of a stream that nobody has taken yet."""

    stage: str
    total: int = 0
    done: int = 0
    told: float = 0.0


@dataclass(frozen=True, slots=True)
class Setting:
    """How a draw is played. `priority`: larger ones are given places, and the engine's, before others."""

    actor: Actor
    strategy: RolloutStrategy
    context: ContextPolicy
    recorded: Recorded
    keep: Keep | None = None
    priority: int = 0


class Play:
    """One draw's view of the manager: the primitives a strategy may use."""

    def __init__(
        self, manager: RolloutManager, draw: TaskDraw, setting: Setting, tally: Tally, first: EpisodeKey, group_id: str
    ) -> None:
        self.draw = draw
        self.setting = setting
        self.group_id = group_id
        self.unwanted = False
        self._manager = manager
        self._tally = tally
        self._first = first
        self._live: list[LiveEpisode] = []

    @property
    def vocab_size(self) -> int:
        """The policy's vocabulary: entropies are measured against its logarithm."""
        return self.setting.actor.vocab_size

    def rng(self, *keys: str | int) -> np.random.Generator:
        """A random stream of the strategy's own, named by `keys`."""
        return _rng(seed_of(self._manager.seed, self.group_id, "strategy", *keys))

    def key(self, sample: int, retry: int = 0) -> EpisodeKey:
        """The key of the draw's `sample`-th episode. Retries count as attempts of their own."""
        attempt = self._first.attempt * (self._manager.limits.retries + 1) + retry
        return replace(self._first, sample=self._first.sample + sample, attempt=attempt)

    async def run(self) -> Group:
        """The draw's group. An error or a cancellation leaves nothing open."""
        strategy, places = self.setting.strategy, self._manager.places
        try:
            if not strategy.needs_fork:
                return await strategy.run(self.draw, self)
            async with places.take(self.draw.samples, self.setting.priority):
                return await strategy.run(self.draw, self)
        finally:
            await self._release()

    async def episode(self, sample: int) -> Trajectory:
        """Play one episode from the prompt to its score. Infrastructure failures are tried again."""
        stored = self.setting.recorded.finished.get(self.key(sample).id)
        if stored is not None:
            self._manager.count(stored, self._tally)
            return stored
        if self.setting.strategy.needs_fork:  # its group holds the places
            return await self._tried(sample)
        async with self._manager.places.take(priority=self.setting.priority):
            return await self._tried(sample)

    async def begin(self, sample: int, retry: int = 0) -> LiveEpisode:
        """Open one episode for a strategy that steps it itself."""
        episode = self._manager.make(self, self.key(sample, retry))
        self._enter(episode)
        await episode.open()
        return episode

    async def finish(self, episode: LiveEpisode) -> Trajectory:
        """Score and freeze an episode that is over (or that the strategy gives up). It is kept as it is now."""
        trajectory = await episode.finish()  # cancelled in there, it is still among the live ones to be closed
        self._leave(episode)
        if self.setting.keep is not None:
            self.setting.keep(self.draw, trajectory)
        self._manager.count(trajectory, self._tally)
        return trajectory

    async def fork(self, episode: LiveEpisode) -> LiveEpisode:
        """Branch an episode between two turns."""
        child = await episode.fork()
        child.replay(self.setting.recorded.inflight.get(child.id, ()))
        self._enter(child)
        return child

    def group(self, trajectories: Sequence[Trajectory]) -> Group:
        """The draw's group."""
        members = [Member(trajectory, trajectory.source) for trajectory in trajectories]
        return Group(self.group_id, self.draw.task.id, members, self.draw.step, dict(self.draw.options))

    async def _tried(self, sample: int) -> Trajectory:
        retries = self._manager.limits.retries
        for retry in range(retries):
            episode = await self._played(sample, retry)
            if episode.outcome is None or episode.outcome.why != "infra":
                return await self.finish(episode)
            await self._discard(episode)
        return await self.finish(await self._played(sample, retries))

    async def _played(self, sample: int, retry: int) -> LiveEpisode:
        episode = await self.begin(sample, retry)
        while await episode.step() is not None:
            pass
        return episode

    async def _discard(self, episode: LiveEpisode) -> None:
        """Drop an episode whose infrastructure failed; it will be played again."""
        await episode.close()
        self._leave(episode)
        self._forget(episode)

    async def _release(self) -> None:
        """Close what an error or a cancellation left open; turns of a group that nobody wants any more go."""
        left = list(self._live)
        for episode in left:
            self._leave(episode)
            if self.unwanted:
                self._forget(episode)
        if left:
            await asyncio.shield(asyncio.gather(*(episode.close() for episode in left), return_exceptions=True))

    def _enter(self, episode: LiveEpisode) -> None:
        self._live.append(episode)
        self._manager.live[episode.id] = episode

    def _leave(self, episode: LiveEpisode) -> None:
        self._live.remove(episode)
        self._manager.live.pop(episode.id, None)

    def _forget(self, episode: LiveEpisode) -> None:
        if self._manager.recorder is not None:
            self._manager.recorder.forget(episode.key)


def _rng(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed,))))
