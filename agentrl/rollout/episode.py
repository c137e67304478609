"""One running episode: turns are taken one at a time, and whatever happens becomes part of the record.

The episode is the one place where a turn is made: context, words, tool calls, results, observation.
Strategies step it, fork it and finish it; the manager decides what a failure means.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from agentrl.chat import Message
from agentrl.content import Content, Image, images_of, parts_of, text_of
from agentrl.context import ContextPolicy
from agentrl.env import Episode, Obs
from agentrl.errors import EnvError, InfraError, PolicyError, ToolError
from agentrl.host import Answer, Host
from agentrl.instance import Scored
from agentrl.rollout import opening
from agentrl.rollout.actors import Conversation, Spoken
from agentrl.rollout.seeds import seed_of
from agentrl.store.key import EpisodeKey
from agentrl.task import Task
from agentrl.trajectory import Fork, Outcome, Source, ToolUse, Trajectory, Turn

GENERATING = "generating"


@dataclass(frozen=True, slots=True)
class Limits:
    """What ends an episode. Tokens are sampled tokens; seconds are wall-clock."""

    max_turns: int
    max_tokens: int
    max_episode_tokens: int | None
    max_context: int | None
    turn_seconds: float
    episode_seconds: float
    retries: int = 0  # of its score, where infrastructure failed


@dataclass(frozen=True, slots=True)
class Hooks:
    """Where an episode reports: turns as they end (write-ahead), and images as they appear."""

    turn: Callable[[LiveEpisode, int, Turn], None]
    image: Callable[[Image], None]
    diverged: Callable[[LiveEpisode, int, str], None]


class LiveEpisode:
    """An episode in progress. Used once; `finish` freezes it into a `Trajectory`."""

    def __init__(
        self,
        *,
        key: EpisodeKey,
        group: str,
        task: Task,
        host: Host,
        conversation: Conversation,
        context: ContextPolicy,
        limits: Limits,
        hooks: Hooks,
        stream: tuple[str | int, ...],
        actor: str = "policy",
        source: Source = "policy",
        recorded: Sequence[Turn] = (),
    ) -> None:
        self.key = key
        self.group = group
        self.task = task
        self.turns: list[Turn] = []
        self.outcome: Outcome | None = None
        self.extra: dict[str, Any] = {}
        self.fork_point: Fork | None = None
        self.doing = "waiting for a place"
        self.since = time.monotonic()
        self._host = host
        self._conversation = conversation
        self._context = context
        self._limits = limits
        self._hooks = hooks
        self._stream = stream
        self._actor = actor
        self._source = source
        self._recorded = list(recorded)
        self._prompt: list[Message] = []
        self._opening: dict[str, Any] = {}
        self._deadline = time.monotonic() + limits.episode_seconds
        self._children = 0
        self._closing: asyncio.Task[None] | None = None

    # -- the primitives of strategies ----------------------------------------------------------

    @property
    def id(self) -> str:
        """The trajectory's id."""
        return self.key.id

    @property
    def over(self) -> bool:
        """True once the episode has an outcome."""
        return self.outcome is not None

    @property
    def seed(self) -> int:
        """The episode's own random stream, for strategies and the record."""
        return seed_of(*self._stream)

    async def open(self) -> None:
        """Reset the environment and render the first prompt."""
        self._now("resetting the environment")
        try:
            first = await self._host.reset()
        except EnvError as error:
            self.outcome = Outcome("failed", "env", str(error))
            return
        except InfraError as error:
            self.outcome = Outcome("failed", "infra", str(error))
            return
        self._opening = {opening.KEY: opening.opening_of(self.task, first)}
        if self.task.system is not None:
            self._prompt.append(Message("system", self.task.system))
        prompt: Content = self.task.prompt
        if first is not None:
            prompt = (*parts_of(prompt), "\n\n", *parts_of(first.content)) if text_of(prompt) else first.content
        self._keep(images_of(prompt))
        self._prompt.append(Message("user", prompt))
        self._tell(self._conversation.start, self._prompt)
        if first is not None and first.done and not self.over:
            self.outcome = Outcome("terminated")

    async def step(self) -> Turn | None:
        """Take one turn: the policy speaks, its calls run, the next context stands. None once over."""
        if self.over:
            return None
        room = self._room()
        if room is None:
            return None
        started = time.monotonic()
        limit = min(started + self._limits.turn_seconds, self._deadline)
        spoken: Spoken | None = None
        answers: list[Answer] = []
        reply: Obs | None = None
        anchor: str | None = None
        try:
            async with asyncio.timeout(limit - started):
                anchor = await self._host.anchor()
                self._now(GENERATING)
                heard = self.turns[-1].observation if self.turns else None
                seed = seed_of(*self._stream, len(self.turns))
                spoken = await self._conversation.speak(room, seed, heard, self._next_record())
                if spoken is None:
                    self.outcome = Outcome("completed")
                    return None
                if spoken.parsed.calls:
                    self._now("running " + ", ".join(call.name for call in spoken.parsed.calls))
                    answers = await self._host.call_all(spoken.parsed.calls)
                elif spoken.parsed.error is None and spoken.finish == "stop":
                    self._now("waiting for the environment's reply")
                    reply = await self._reply(spoken.parsed.final_text)
        except TimeoutError:
            self.outcome = self._late(time.monotonic() - started)
        except EnvError as error:
            self.outcome = Outcome("failed", "env", str(error))
        except InfraError as error:
            self.outcome = Outcome("failed", "infra", str(error))
        except PolicyError as error:
            self.outcome = Outcome("failed", "policy", str(error))
        self._now("recording")
        if spoken is None:
            return None
        turn = self._record(spoken, answers, reply, anchor, time.monotonic() - started)
        return turn

    def _late(self, seconds: float) -> Outcome:
        """A turn took too long: not the policy's doing where nobody was there to sample it."""
        trouble = self._conversation.trouble if self.doing.startswith(GENERATING) else None
        if trouble is not None:
            return Outcome("failed", "infra", f"no engine for {seconds:.1f} s: {trouble}")
        return Outcome("truncated", "deadline", f"{self.doing} after {seconds:.1f} s")

    async def fork(self) -> LiveEpisode:
        """A branch that shares everything so far: environment, words, cached keys and values.

        `Env.fork` copies the environment's state; counters and `extra` are copied deep.
        """
        if self.over:
            raise EnvError(f"{self.id} is over and cannot be forked")
        self._children += 1
        child = object.__new__(LiveEpisode)
        child.__dict__.update(self.__dict__)
        child.key = replace(self.key, branch=(*self.key.branch, self._children))
        child.turns = list(self.turns)
        child.extra = dict(self.extra)
        child._stream = (*self._stream[:-1], child.id)
        child._children = 0
        child._recorded = []
        child.fork_point = Fork(self.id, len(self.turns), self._conversation.n_tokens)
        child._host = await self._host.fork()
        child._conversation = await self._conversation.fork(child.id)
        for index, turn in enumerate(child.turns):
            self._hooks.turn(child, index, turn)
        return child

    def replay(self, recorded: Sequence[Turn]) -> None:
        """Speak these turns again to the letter before going on live (a resumed run)."""
        self._recorded = list(recorded)

    async def finish(self) -> Trajectory:
        """Score the record, release everything, and freeze it."""
        outcome = self.outcome or Outcome("truncated", "turns")
        parts: dict[str, float | None] = {}
        total: float | None = None
        success: bool | None = None
        try:
            if outcome.kind == "failed" and outcome.why == "policy":
                total, success = self._host.template.reward_range[0], False
            elif not outcome.missing:
                self._now("scoring")
                parts, total, success = await self._judged(Episode(self.task, self.turns, outcome, self.extra))
        except TimeoutError:
            outcome = Outcome("failed", "env", f"score() took longer than the turn's {self._limits.turn_seconds:g} s")
        except EnvError as error:
            outcome = Outcome("failed", "env", str(error))
        except InfraError as error:
            outcome = Outcome("failed", "infra", str(error))
        finally:
            await self.close()
        if outcome.missing:
            total, success = None, None
        elif total is not None:
            total += sum(turn.reward or 0.0 for turn in self.turns)
        self.outcome = outcome
        weights = dict(self._host.template.reward_weights)
        return Trajectory(
            id=self.id,
            group_id=self.group,
            task_id=self.task.id,
            turns=tuple(self.turns),
            outcome=outcome,
            seed=self.seed,
            env=self._host.template.spec_hash,
            fork=self.fork_point,
            attempt=self.key.attempt,
            source=self._source,
            score=parts,
            reward=total,
            success=success,
            extra=dict(self.extra) | self._opening | ({"reward_weights": weights} if weights else {}),
        )

    async def _judged(self, episode: Episode) -> Scored:
        """The environment's verdict, asked for again where infrastructure failed: `score` is idempotent."""
        for tries_left in range(self._limits.retries, -1, -1):
            try:
                async with asyncio.timeout(self._limits.turn_seconds):
                    return await self._host.score(episode)
            except InfraError:
                if not tries_left:
                    raise
        raise AssertionError("unreachable: the last try returns or raises")

    async def close(self) -> None:
        """Release the conversation and the environment. Idempotent; a cancellation in the middle of it does not stop
        it, and whoever closes again waits for its end."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._close(), name=f"close {self.id}")
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        try:
            await self._conversation.close()
        finally:
            await self._host.close()

    @property
    def waits_for(self) -> str:
        """What the episode waits for now, in words: for the watchdog."""
        return f"{self.doing} by {self._conversation.speaker}" if self.doing == GENERATING else self.doing

    # -- how a turn becomes a record -----------------------------------------------------------

    def _room(self) -> int | None:
        """How many tokens the next turn may have; sets the outcome where there is no room for one."""
        room = self._limits.max_tokens
        if len(self.turns) >= self._limits.max_turns:
            self.outcome = Outcome("truncated", "turns")
        elif time.monotonic() >= self._deadline:
            self.outcome = Outcome("truncated", "deadline")
        if self._limits.max_episode_tokens is not None:
            room = min(room, self._limits.max_episode_tokens - sum(turn.n_sampled for turn in self.turns))
            if room < 1 and not self.over:
                self.outcome = Outcome("truncated", "tokens")
        if self._limits.max_context is not None:
            room = min(room, self._limits.max_context - self._conversation.n_tokens)
            if room < 1 and not self.over:
                self.outcome = Outcome("truncated", "context")
        return None if self.over else room

    async def _reply(self, text: str) -> Obs | None:
        try:
            return await self._host.reply(text)
        except ToolError as error:  # the environment refuses the message: the policy reads why
            return Obs(f"Error: {error}")

    def _record(
        self, spoken: Spoken, answers: Sequence[Answer], reply: Obs | None, anchor: str | None, seconds: float
    ) -> Turn:
        parsed = spoken.parsed
        messages = [
            Message("tool", answer.content, name=call.name, call_id=call.id)
            for call, answer in zip(parsed.calls, answers, strict=False)
        ]
        rewards = [answer.reward for answer in answers if answer.reward is not None]
        if parsed.error is not None:
            messages.append(Message("tool", f"Error: {parsed.error}"))
        if reply is not None:
            messages.append(Message("user", reply.content))
            rewards += [reply.reward] if reply.reward is not None else []
        for message in messages:
            self._keep(images_of(message.content))
        turn = Turn(
            context=spoken.context,
            output=spoken.output,
            text=parsed.text,
            final_text=parsed.final_text,
            sampling=spoken.sampling,
            finish=spoken.finish,
            actor=self._actor,
            tools=tuple(ToolUse(c, a.result) for c, a in zip(parsed.calls, answers, strict=False)),
            observation="\n".join(text_of(message.content) for message in messages),
            error="parse" if parsed.error is not None else None,
            reward=float(sum(rewards)) if rewards else None,
            anchor=anchor,
            cost=spoken.cost,
            seconds=seconds,
        )
        self._compare(turn)
        self.turns.append(turn)
        self._hooks.turn(self, len(self.turns) - 1, turn)
        if not self.over:
            self._decide(turn, messages, done=any(a.done for a in answers) or (reply is not None and reply.done))
        return turn

    def _decide(self, turn: Turn, messages: Sequence[Message], *, done: bool) -> None:
        """Is it over? If not, let the next context stand."""
        if done:
            self.outcome = Outcome("terminated")
        elif turn.finish == "abort":
            self.outcome = Outcome("failed", "infra", "the engine aborted the turn")
        elif not messages:
            # Nobody answered: a whole message was the final answer, a cut one ran out of tokens.
            self.outcome = Outcome("completed") if turn.finish == "stop" else Outcome("truncated", "tokens")
        else:
            fresh = self._context.rebuild(self._prompt, Episode(self.task, self.turns, None, self.extra))
            if fresh is None:
                self._tell(self._conversation.extend, messages)
            else:
                self._tell(self._conversation.start, fresh)

    def _tell(self, say: Callable[[Sequence[Message]], None], messages: Sequence[Message]) -> None:
        """Let the policy hear `messages`; a picture that cannot be read is the environment's failure."""
        try:
            say(messages)
        except EnvError as error:
            self.outcome = Outcome("failed", "env", str(error))

    def _next_record(self) -> Turn | None:
        index = len(self.turns)
        return self._recorded[index] if index < len(self._recorded) else None

    def _compare(self, turn: Turn) -> None:
        """Name the first divergence of a replayed turn, and go on live from there."""
        recorded = self._next_record()
        if recorded is None or recorded.observation == turn.observation:
            return
        self._hooks.diverged(self, len(self.turns), f"recorded {recorded.observation!r}, now {turn.observation!r}")
        self._recorded = []

    def _keep(self, images: Sequence[Image]) -> None:
        for image in images:
            self._hooks.image(image)

    def _now(self, doing: str) -> None:
        self.doing, self.since = doing, time.monotonic()
