"""The rollout manager: one asyncio loop drives every episode; nothing waits in lock-step.

Each episode generates as soon as its last tool call returned. The manager keeps the limits, tries
again where infrastructure failed, names what is stuck, and returns groups in the order in which they
were submitted. It knows nothing of advantages or training.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from agentrl.algo.sampler import TaskDraw
from agentrl.content import Image
from agentrl.context import ContextPolicy
from agentrl.env import Env
from agentrl.errors import RunFailed
from agentrl.host import Host
from agentrl.rollout.actors import Actor, Expert
from agentrl.rollout.deadlines import Deadlines
from agentrl.rollout.episode import Hooks, Limits, LiveEpisode
from agentrl.rollout.places import Places
from agentrl.rollout.play import Play, Recorded, Tally
from agentrl.rollout.seeds import seed_of
from agentrl.rollout.strategy import RolloutStrategy
from agentrl.rollout.stream import GroupStream
from agentrl.store.key import EpisodeKey
from agentrl.trajectory import Group, Trajectory, Turn

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
        faults: Callable[[str], None] | None = None,
    ) -> None:
        self.env = env.template
        self.limits = limits
        self.seed = seed
        self.recorder = recorder
        self.watcher = watcher
        self.faults = faults
        self.live: dict[str, LiveEpisode] = {}
        self.episodes = 0
        self.env_failures = 0
        self._schemas = self.env.tool_schemas()
        self.places = Places(limits.episodes)  # of all streams together
        self._named: set[tuple[str, str, int]] = set()

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
        async with GroupStream(self, stage=stage, split=split, attempt=attempt, recorded=recorded) as stream:
            flights = stream.submit(draws, actor, strategy=strategy, context=context)
            await stream.until(lambda: not stream.flying)
            return stream.take(flights)

    def waits(self) -> dict[str, float]:
        """How many live episodes wait for what: generating, tools, and the rest."""
        counts = {"generating": 0.0, "in tools": 0.0, "other": 0.0}
        for episode in self.live.values():
            kind = "generating" if episode.doing == "generating" else "in tools"
            counts[kind if episode.doing.startswith(("generating", "running")) else "other"] += 1
        return counts

    # -- for streams and plays ------------------------------------------------------------------------------

    def make(self, play: Play, key: EpisodeKey) -> LiveEpisode:
        """An episode of `play`, not opened yet."""
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
            faults=self.faults if actor.source == "policy" else None,
        )
        expert = None
        if actor.source == "demo":
            expert = Expert(self.env, draw.task, (host_seed,), (seed_of(*stream, "expert"),))
        return LiveEpisode(
            key=key,
            group=play.group_id,
            task=draw.task,
            host=host,
            conversation=actor.open(key.id, play.group_id, self._schemas, expert, play.setting.priority),
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

    def count(self, trajectory: Trajectory, tally: Tally) -> None:
        """Count a finished episode; raises `RunFailed` when too many broke in the environment."""
        self.episodes += 1
        tally.done += 1
        if trajectory.outcome.kind == "failed" and trajectory.outcome.why == "env":
            self.env_failures += 1
            if self.watcher is not None:
                self.watcher.warn(f"{trajectory.id}: {trajectory.outcome.detail}")
            if self.env_failures > max(1.0, ENV_FAILURES * self.episodes):
                raise RunFailed(
                    f"{self.env_failures} of {self.episodes} episodes broke in the environment "
                    f"(last: {trajectory.outcome.detail}); run `agentrl env check` on it"
                )
        if time.monotonic() - tally.told >= PROGRESS_SECONDS:
            self.tell(tally)

    def tell(self, tally: Tally) -> None:
        """Say how far a stream is."""
        tally.told = time.monotonic()
        if self.watcher is not None:
            self.watcher.progress(tally.stage, tally.done, tally.total, self.waits())

    def _turn(self, episode: LiveEpisode, index: int, turn: Turn) -> None:
        if self.recorder is not None:
            self.recorder.turn(episode.key, index, turn)

    def _image(self, image: Image) -> None:
        if self.recorder is not None:
            self.recorder.image(image)

    def _diverged(self, episode: LiveEpisode, turn: int, what: str) -> None:
        if self.watcher is not None:
            self.watcher.warn(f"{episode.id} turn {turn} does not replay ({what}); it goes on live from there")

    async def watch(self) -> None:
        """Name every episode that has waited longer than the watchdog allows for one thing, once each."""
        patience = self.limits.deadlines.watchdog
        while True:
            await asyncio.sleep(patience / 4)
            now = time.monotonic()
            self._named = {key for key in self._named if key[0] in self.live}
            for episode in list(self.live.values()):
                key = (episode.id, episode.doing, len(episode.turns))
                if now - episode.since > patience and key not in self._named and self.watcher is not None:
                    self._named.add(key)
                    self.watcher.stuck(
                        f"episode {episode.id} (task {episode.task.id}) turn {len(episode.turns)}: "
                        f"{episode.waits_for} for {now - episode.since:.0f} s"
                    )
