"""The rollout manager: one asyncio loop drives every episode; nothing waits in lock-step.

Each episode generates as soon as its last tool call returned. The manager keeps the limits, tries
again where infrastructure failed, names what is stuck, and returns groups in the order in which they
were submitted. It knows nothing of advantages or training.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from agentrl.algo.sampler import TaskDraw
from agentrl.content import Image
from agentrl.context import AppendOnly, ContextPolicy
from agentrl.env import Env, settled
from agentrl.errors import EnvError, InfraError, RunFailed
from agentrl.host import Host
from agentrl.rollout.actors import Actor, Expert
from agentrl.rollout.deadlines import Deadlines
from agentrl.rollout.episode import Hooks, Limits, LiveEpisode
from agentrl.rollout.seeds import seed_of
from agentrl.rollout.strategy import RolloutStrategy
from agentrl.trajectory import Group, Member, Trajectory, Turn

ENV_FAILURES = 0.01  # more broken episodes than this share stop the run
PROGRESS_SECONDS = 0.2


class Recorder(Protocol):
    """Where turns go as they end, and images as they appear (the store's writer, or nothing)."""

    def turn(self, trajectory_id: str, attempt: int, index: int, turn: Turn) -> None:
        """Write a turn ahead of its episode's end."""

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

    async def run(
        self,
        draws: Sequence[TaskDraw],
        actor: Actor,
        *,
        stage: str,
        strategy: RolloutStrategy,
        context: ContextPolicy | None = None,
        attempt: int = 0,
        recorded: Recorded | None = None,
    ) -> list[Group]:
        """Play all `draws` at once; groups come back in the order of `draws`.

        Raises `RunFailed` when too many episodes broke in the environment. Cancelling cancels every
        episode and releases what it holds.
        """
        batch = _Batch(stage, sum(draw.samples for draw in draws), asyncio.Semaphore(self.limits.episodes))
        plays = [
            Play(self, draw, actor, stage, context or AppendOnly(), attempt, recorded or Recorded(), batch)
            for draw in draws
        ]
        watchdog = asyncio.create_task(self._watch(), name="watchdog")
        try:
            async with asyncio.TaskGroup() as tasks:
                running = [tasks.create_task(strategy.run(play.draw, play)) for play in plays]
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

    async def begin(self, play: Play, sample: int, attempt: int) -> LiveEpisode:
        """An opened episode."""
        draw = play.draw
        id = f"{play.group_id}/{sample}"
        stream = (self.seed, play.stage, draw.step, draw.index, draw.task.id, sample)
        host_seed = seed_of(*stream, "env")
        deadlines = self.limits.deadlines
        host = Host(
            self.env,
            draw.task,
            (host_seed,),
            max_tool_seconds=deadlines.tool,
            max_env_seconds=deadlines.turn,
        )
        expert = (
            await self._expert(draw, host_seed, seed_of(*stream, "expert")) if play.actor.source == "demo" else None
        )
        episode = LiveEpisode(
            id=id,
            group=play.group_id,
            task=draw.task,
            host=host,
            conversation=play.actor.open(id, play.group_id, self._schemas, expert),
            context=play.context,
            limits=Limits(
                max_turns=self.env.max_turns,
                max_tokens=self.limits.max_tokens,
                max_episode_tokens=self.limits.max_episode_tokens,
                max_context=play.actor.max_context,
                turn_seconds=deadlines.turn,
                episode_seconds=deadlines.episode,
            ),
            hooks=Hooks(self._turn, self._image, self._diverged),
            stream=stream,
            actor=play.actor.name,
            source=play.actor.source,
            attempt=attempt,
            recorded=play.recorded.inflight.get(id, ()),
        )
        self.live[id] = episode
        await episode.open()
        return episode

    async def _expert(self, draw: TaskDraw, host_seed: int, seed: int) -> Expert:
        """The scripted expert on an instance of its own, reset like the episode's, so that it may look
        at the hidden state without touching it."""
        instance = self.env.spawn()
        try:
            await settled(instance.reset(draw.task, _rng(host_seed)))
            return instance.demonstrate(draw.task, _rng(seed))
        except Exception as error:  # the environment's code: whatever it raises is its failure
            raise EnvError(f"{type(self.env).__name__}.demonstrate cannot start: {error}") from error

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
            self.recorder.turn(episode.id, episode.attempt, index, turn)

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
                        f"{episode.doing} for {now - episode.since:.0f} s"
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


class Play:
    """One draw's view of the manager: the primitives a strategy may use."""

    def __init__(
        self,
        manager: RolloutManager,
        draw: TaskDraw,
        actor: Actor,
        stage: str,
        context: ContextPolicy,
        attempt: int,
        recorded: Recorded,
        batch: _Batch,
    ) -> None:
        self.draw = draw
        self.actor = actor
        self.stage = stage
        self.context = context
        self.recorded = recorded
        self.group_id = f"{stage}-{draw.step}/{draw.index:04d}"
        self._manager = manager
        self._attempt = attempt
        self._batch = batch

    def rng(self, *keys: str | int) -> np.random.Generator:
        """A random stream of the strategy's own, named by `keys`."""
        draw = self.draw
        return _rng(seed_of(self._manager.seed, self.stage, draw.step, draw.index, draw.task.id, "strategy", *keys))

    async def episode(self, sample: int) -> Trajectory:
        """Play one episode from the prompt to its score. Infrastructure failures are tried again."""
        stored = self.recorded.finished.get(f"{self.group_id}/{sample}")
        if stored is not None:
            self._manager.count(stored, self._batch)
            return stored
        retries = self._manager.limits.retries
        for retry in range(retries + 1):
            async with self._batch.places:
                episode = await self.begin(sample, retry)
                while await episode.step() is not None:
                    pass
                outcome = episode.outcome
                if outcome is None or outcome.why != "infra" or retry == retries:
                    return await self.finish(episode)
                await self.discard(episode)
        raise AssertionError("unreachable: the last try returns")

    async def begin(self, sample: int, retry: int = 0) -> LiveEpisode:
        """Open one episode for a strategy that steps it itself."""
        try:
            return await self._manager.begin(self, sample, self._attempt + retry)
        except InfraError as error:
            raise RunFailed(f"episodes cannot begin: {error}") from error

    async def finish(self, episode: LiveEpisode) -> Trajectory:
        """Score and freeze an episode that is over (or that the strategy gives up)."""
        trajectory = await episode.finish()
        self._manager.forget(episode, trajectory, self._batch)
        return trajectory

    async def discard(self, episode: LiveEpisode) -> None:
        """Drop an episode whose infrastructure failed; it will be played again."""
        await episode.close()
        self._manager.live.pop(episode.id, None)

    async def fork(self, episode: LiveEpisode) -> LiveEpisode:
        """Branch an episode between two turns."""
        child = await episode.fork()
        child.replay(self.recorded.inflight.get(child.id, ())[len(child.turns) :])
        self._manager.live[child.id] = child
        return child

    def group(self, trajectories: Sequence[Trajectory]) -> Group:
        """The draw's group."""
        members = [Member(trajectory, trajectory.source) for trajectory in trajectories]
        return Group(self.group_id, self.draw.task.id, members, self.draw.step, dict(self.draw.options))


def _rng(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed,))))


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error of a group of tasks: its siblings were cancelled because of it."""
    error: BaseException = errors.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error

