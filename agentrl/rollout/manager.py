"""The rollout manager: one asyncio loop drives every episode; nothing waits in lock-step.

Each episode generates as soon as its last tool call returned. The manager keeps the limits, tries
again where infrastructure failed, names what is stuck, and returns groups in the order in which they
were submitted. It knows nothing of advantages or training.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from agentrl.algo.sampler import TaskDraw
from agentrl.content import Image
from agentrl.context import AppendOnly, ContextPolicy
from agentrl.env import Env
from agentrl.errors import RunFailed
from agentrl.host import Host
from agentrl.rollout.actors import Actor, Expert
from agentrl.rollout.deadlines import Deadlines
from agentrl.rollout.episode import Hooks, Limits, LiveEpisode
from agentrl.rollout.seeds import seed_of
from agentrl.rollout.strategy import RolloutStrategy
from agentrl.store.key import EpisodeKey
from agentrl.trajectory import Group, Member, Trajectory, Turn

ENV_FAILURES = 0.01  # more broken episodes than this share stop the run
PROGRESS_SECONDS = 0.2


class Recorder(Protocol):
    """Where turns go as they end, and images as they appear (the store's writer, or nothing)."""

    def turn(self, key: EpisodeKey, index: int, turn: Turn) -> None:
        """Write a turn ahead of its episode's end."""

    def forget(self, key: EpisodeKey) -> None:
        """The episode will never finish."""

    def image(self, image: Image) -> None:
        """Keep an image by its hash."""


class Watcher(Protocol):
    """Who is told how it goes."""

    def progress(self, stage: str, done: int, total: int, info: dict[str, float]) -> None:
        """So many episodes are over."""

    def stuck(self, text: str) -> None:
        """An episode has waited too long for one thing."""

    def warn(self, text: str) -> None:
        """Something odd that does not stop the run."""


@dataclass(frozen=True, slots=True)
class RolloutLimits:
    """The manager's limits: tokens per turn and episode, episodes at once, retries, deadlines."""

    max_tokens: int = 256
    max_episode_tokens: int | None = None
    episodes: int = 256
    retries: int = 2
    deadlines: Deadlines = field(default_factory=Deadlines)


@dataclass(slots=True)
class Recorded:
    """What a killed run left of a step: finished episodes, and the turns of those in flight."""

    finished: Mapping[str, Trajectory] = field(default_factory=dict)
    inflight: Mapping[str, Sequence[Turn]] = field(default_factory=dict)


class RolloutManager:
    """Plays draws with one environment and one actor. An object without globals: it may live anywhere."""

    def __init__(
        self,
        env: Env,
        *,
        limits: RolloutLimits,
        seed: int,
        recorder: Recorder | None = None,
        watcher: Watcher | None = None,
    ) -> None:
        self.env = env.template
        self.limits = limits
        self.seed = seed
        self.recorder = recorder
        self.watcher = watcher
        self.live: dict[str, LiveEpisode] = {}
        self.episodes = 0
        self.env_failures = 0
        self._schemas = self.env.tool_schemas()
        self._moment: tuple[str, int, str] | None = None
        self._drawn: Counter[str] = Counter()
        self._samples: Counter[str] = Counter()

    async def run(
        self,
        draws: Sequence[TaskDraw],
        actor: Actor,
        *,
        stage: str,
        strategy: RolloutStrategy,
        context: ContextPolicy | None = None,
        split: str = "train",
        attempt: int = 0,
        recorded: Recorded | None = None,
    ) -> list[Group]:
        """Play all `draws` at once; groups come back in the order of `draws`.

        Raises `RunFailed` when too many episodes broke in the environment. Cancelling cancels every
        episode and releases what it holds.
        """
        samples = max((draw.samples for draw in draws), default=1)
        # A forking strategy holds a whole group of episodes, so it is admitted by groups: admitting its
        # episodes one by one could leave every group waiting for the last places of the others.
        groups = max(1, self.limits.episodes // samples) if strategy.needs_fork else len(draws)
        admitted = asyncio.Semaphore(max(1, groups))
        batch = _Batch(stage, sum(draw.samples for draw in draws), asyncio.Semaphore(self.limits.episodes))
        setting = Setting(stage, split, actor, context or AppendOnly(), attempt, recorded or Recorded())
        plays = [Play(self, draw, setting, batch, self._key(draw, setting)) for draw in draws]
        watchdog = asyncio.create_task(self._watch(), name="watchdog")
        try:
            async with asyncio.TaskGroup() as tasks:
                running = [tasks.create_task(_admit(admitted, strategy, play)) for play in plays]
        except BaseExceptionGroup as errors:
            raise _first(errors) from errors
        finally:
            watchdog.cancel()
            await self._release(plays)
        if self.watcher is not None:
            self.watcher.progress(stage, batch.done, batch.total, self.waits())
        return [task.result() for task in running]

    def waits(self) -> dict[str, float]:
        """How many live episodes wait for what: generating, tools, and the rest."""
        counts = {"generating": 0.0, "in tools": 0.0, "other": 0.0}
        for episode in self.live.values():
            kind = "generating" if episode.doing == "generating" else "in tools"
            counts[kind if episode.doing.startswith(("generating", "running")) else "other"] += 1
        return counts

    # -- for Play ------------------------------------------------------------------------------

    async def begin(self, play: Play, key: EpisodeKey) -> LiveEpisode:
        """An opened episode."""
        draw, actor = play.draw, play.setting.actor
        stream = (self.seed, key.id)
        host_seed = seed_of(*stream, "env")
        deadlines = self.limits.deadlines
        host = Host(
            self.env,
            draw.task,
            (host_seed,),
            max_tool_seconds=deadlines.tool,
            max_env_seconds=deadlines.turn,
        )
        expert = None
        if actor.source == "demo":
            expert = Expert(self.env, draw.task, (host_seed,), (seed_of(*stream, "expert"),))
        episode = LiveEpisode(
            key=key,
            group=play.group_id,
            task=draw.task,
            host=host,
            conversation=actor.open(key.id, play.group_id, self._schemas, expert),
            context=play.setting.context,
            limits=Limits(
                max_turns=self.env.max_turns,
                max_tokens=self.limits.max_tokens,
                max_episode_tokens=self.limits.max_episode_tokens,
                max_context=actor.max_context,
                turn_seconds=deadlines.turn,
                episode_seconds=deadlines.episode,
                retries=self.limits.retries,
            ),
            hooks=Hooks(self._turn, self._image, self._diverged),
            stream=stream,
            actor=actor.name,
            source=actor.source,
            recorded=play.setting.recorded.inflight.get(key.id, ()),
        )
        self.live[key.id] = episode
        await episode.open()
        return episode

    def _key(self, draw: TaskDraw, setting: Setting) -> tuple[EpisodeKey, str]:
        """The key of a draw's first sample, and its group's id. A task drawn again in the same step
        (a small task set, a refill) counts its samples on and gets a group of its own."""
        moment = (setting.stage, draw.step, setting.split)
        if moment != self._moment:
            self._moment = moment
            self._drawn.clear()
            self._samples.clear()
        task = draw.task.id
        first = EpisodeKey(setting.stage, draw.step, setting.split, task, self._samples[task], (), setting.attempt)
        again = self._drawn[task]
        self._drawn[task] += 1
        self._samples[task] += draw.samples
        return first, first.group_id + (f"~{again}" if again else "")

    def forget(self, episode: LiveEpisode, trajectory: Trajectory, batch: _Batch) -> None:
        """An episode is over: count it, and stop the run if the environment is broken."""
        self.live.pop(episode.id, None)
        self.count(trajectory, batch)

    def count(self, trajectory: Trajectory, batch: _Batch) -> None:
        """Count a finished episode; raises `RunFailed` when too many broke in the environment."""
        self.episodes += 1
        batch.done += 1
        if trajectory.outcome.kind == "failed" and trajectory.outcome.why == "env":
            self.env_failures += 1
            if self.watcher is not None:
                self.watcher.warn(f"{trajectory.id}: {trajectory.outcome.detail}")
            if self.env_failures > max(1.0, ENV_FAILURES * self.episodes):
                raise RunFailed(
                    f"{self.env_failures} of {self.episodes} episodes broke in the environment "
                    f"(last: {trajectory.outcome.detail}); run `agentrl env check` on it"
                )
        now = time.monotonic()
        if self.watcher is not None and now - batch.told >= PROGRESS_SECONDS:
            batch.told = now
            self.watcher.progress(batch.stage, batch.done, batch.total, self.waits())

    def _turn(self, episode: LiveEpisode, index: int, turn: Turn) -> None:
        if self.recorder is not None:
            self.recorder.turn(episode.key, index, turn)

    def _image(self, image: Image) -> None:
        if self.recorder is not None:
            self.recorder.image(image)

    def _diverged(self, episode: LiveEpisode, turn: int, what: str) -> None:
        if self.watcher is not None:
            self.watcher.warn(f"{episode.id} turn {turn} does not replay ({what}); it goes on live from there")

    async def _watch(self) -> None:
        """Name every episode that has waited longer than the watchdog allows for one thing, once each."""
        patience = self.limits.deadlines.watchdog
        named: set[tuple[str, str, int]] = set()
        while True:
            await asyncio.sleep(patience / 4)
            now = time.monotonic()
            for episode in list(self.live.values()):
                key = (episode.id, episode.doing, len(episode.turns))
                if now - episode.since > patience and key not in named and self.watcher is not None:
                    named.add(key)
                    self.watcher.stuck(
                        f"episode {episode.id} (task {episode.task.id}) turn {len(episode.turns)}: "
                        f"{episode.waits_for} for {now - episode.since:.0f} s"
                    )

    async def _release(self, plays: Sequence[Play]) -> None:
        """Close what an error or a cancellation left open."""
        left = list(self.live.values())
        self.live.clear()
        if left:
            await asyncio.shield(asyncio.gather(*(episode.close() for episode in left), return_exceptions=True))


@dataclass(slots=True)
class _Batch:
    """One call of `run`: what progress is counted against, and the places for episodes."""

    stage: str
    total: int
    places: asyncio.Semaphore
    done: int = 0
    told: float = 0.0


@dataclass(frozen=True, slots=True)
class Setting:
    """What the draws of one `run` share."""

    stage: str
    split: str
    actor: Actor
    context: ContextPolicy
    attempt: int
    recorded: Recorded


class Play:
    """One draw's view of the manager: the primitives a strategy may use."""

    def __init__(
        self, manager: RolloutManager, draw: TaskDraw, setting: Setting, batch: _Batch, key: tuple[EpisodeKey, str]
    ) -> None:
        self.draw = draw
        self.setting = setting
        self._manager = manager
        self._batch = batch
        self._first, self.group_id = key

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

    async def episode(self, sample: int) -> Trajectory:
        """Play one episode from the prompt to its score. Infrastructure failures are tried again."""
        stored = self.setting.recorded.finished.get(self.key(sample).id)
        if stored is not None:
            self._manager.count(stored, self._batch)
            return stored
        retries = self._manager.limits.retries
        async with self._batch.places:
            for retry in range(retries):
                episode = await self._played(sample, retry)
                if episode.outcome is None or episode.outcome.why != "infra":
                    return await self.finish(episode)
                await self._discard(episode)
            return await self.finish(await self._played(sample, retries))

    async def begin(self, sample: int, retry: int = 0) -> LiveEpisode:
        """Open one episode for a strategy that steps it itself."""
        return await self._manager.begin(self, self.key(sample, retry))

    async def finish(self, episode: LiveEpisode) -> Trajectory:
        """Score and freeze an episode that is over (or that the strategy gives up)."""
        trajectory = await episode.finish()
        self._manager.forget(episode, trajectory, self._batch)
        return trajectory

    async def fork(self, episode: LiveEpisode) -> LiveEpisode:
        """Branch an episode between two turns."""
        child = await episode.fork()
        child.replay(self.setting.recorded.inflight.get(child.id, ()))
        self._manager.live[child.id] = child
        return child

    def group(self, trajectories: Sequence[Trajectory]) -> Group:
        """The draw's group."""
        members = [Member(trajectory, trajectory.source) for trajectory in trajectories]
        return Group(self.group_id, self.draw.task.id, members, self.draw.step, dict(self.draw.options))

    async def _played(self, sample: int, retry: int) -> LiveEpisode:
        episode = await self.begin(sample, retry)
        while await episode.step() is not None:
            pass
        return episode

    async def _discard(self, episode: LiveEpisode) -> None:
        """Drop an episode whose infrastructure failed; it will be played again."""
        await episode.close()
        self._manager.live.pop(episode.id, None)
        if self._manager.recorder is not None:
            self._manager.recorder.forget(episode.key)


async def _admit(places: asyncio.Semaphore, strategy: RolloutStrategy, play: Play) -> Group:
    async with places:
        return await strategy.run(play.draw, play)


def _rng(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed,))))


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error of a group of tasks: its siblings were cancelled because of it."""
    error: BaseException = errors.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
