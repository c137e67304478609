"""The host of one episode: it owns the environment's instance and decides what a failure means.

Whatever breaks becomes one of three things here, and only here: an *observation* (the policy's
fault, or a tool's bug: the episode goes on), `InfraError` (the machinery's: the episode is retried)
or `EnvError` (the environment's: the episode has no reward).

A call that does not come back costs the episode its instance, not its life: a fresh one is made and
brought to the same state by replaying the record, and every replayed result must equal the recorded one.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from agentrl.content import Content, images_of, text_of
from agentrl.effect import Effect
from agentrl.env import Env, Episode, Obs
from agentrl.errors import EnvError, EpisodeError
from agentrl.instance import Instance, Local, Lost, Scored
from agentrl.task import Task
from agentrl.tool import Tool, ToolOptions
from agentrl.trajectory import ToolCall, ToolResult

CLOSE_SECONDS = 5.0
_OVER = "Error: the episode has ended; this call was not run."


@dataclass(frozen=True, slots=True)
class Answer:
    """Of one tool call: the result for the record, the content for the policy, a turn reward, and whether it ended
    the episode."""

    result: ToolResult
    content: Content
    reward: float | None = None
    done: bool = False


@dataclass(frozen=True, slots=True)
class Event:
    """Something that changed the environment's state, and what it answered. `lost` calls are not replayed."""

    said: ToolCall | str
    heard: Effect | Obs | None
    lost: bool = False


class Host:
    """One episode's environment.

    Args:
        template: the environment as configured; the episode runs on a spawn of it.
        task: what the episode is about.
        seed: the key of the episode's random numbers; equal keys give equal episodes.
        max_tool_seconds: caps every tool's own timeout.
        max_env_seconds: the limit of reset, reply, anchor, score and fork; `EnvError` beyond it.
        count_tokens: for tools with a cost per token; without it four characters count as one token.
        faults: called with a tool's name before each of its calls; it may raise `InfraError` (`agentrl.chaos`).

    A cost per second uses measured time, so it is the one cost that two equal runs do not share.
    The flat cost of a call is charged once its tool was reached: not for an unknown tool or for
    arguments that were refused.
    """

    def __init__(
        self,
        template: Env,
        task: Task,
        seed: tuple[int, ...],
        *,
        max_tool_seconds: float | None = None,
        max_env_seconds: float = 60.0,
        count_tokens: Callable[[str], int] | None = None,
        faults: Callable[[str], None] | None = None,
    ) -> None:
        self.template = template.template
        self.task = task
        self.seed = seed
        self.max_tool_seconds = max_tool_seconds
        self.max_env_seconds = max_env_seconds
        self.count_tokens = count_tokens
        self.faults = faults
        self._tools: dict[str, Tool] = {name: made for name, (_, made) in self.template.toolbox().items()}
        self._instance: Instance | None = None
        self._started = False
        self._first: Obs | None = None
        self._events: list[Event] = []
        self._last: Content = task.prompt
        self._done = False
        self._closed = False
        self._leaving: set[asyncio.Task[None]] = set()

    async def reset(self) -> Obs | None:
        """Begin the episode: the first observation, where the prompt is not all. Raises `EnvError`, `InfraError`."""
        self._events.clear()
        self._done, self._last = False, self.task.prompt
        if self._instance is not None:
            self._drop()
        instance, self._first = await self._begin()
        self._instance, self._started = instance, True
        if self._first is not None:
            self._last, self._done = self._first.content, self._first.done
        return self._first

    async def call(self, call: ToolCall) -> Answer:
        """Run one tool call. Never raises for the policy's mistakes; raises `InfraError` and `PolicyError`
        when a tool did, `EnvError` when the instance was lost and cannot be rebuilt."""
        return (await self._together([call]))[0]

    async def call_all(self, calls: Iterable[ToolCall]) -> list[Answer]:
        """Run a turn's calls one after another, consecutive `parallel` ones at the same time. Answers
        keep the order of the calls; once one has ended the episode, the rest are refused."""
        answers: list[Answer] = []
        batch: list[ToolCall] = []
        for call in calls:
            if batch and not (self._parallel(batch[-1]) and self._parallel(call)):
                answers += await self._together(batch)
                batch = []
            batch.append(call)
        return answers + (await self._together(batch) if batch else [])

    async def reply(self, text: str) -> Obs | None:
        """What the environment says to a message without calls; None = that was the final answer."""
        if self._done:
            return None
        instance = await self._ready()
        try:
            obs = await instance.reply(text, self.max_env_seconds)
        except Lost as lost:
            raise self._late("reply", lost) from lost
        except asyncio.CancelledError:
            self._drop()
            raise
        self._events.append(Event(text, obs))
        if obs is not None:
            self._last, self._done = obs.content, self._done or obs.done
        return obs

    async def anchor(self) -> str:
        """The present state's key: the environment's own, else a hash of the last observation."""
        try:
            key = await (await self._ready()).anchor(self.max_env_seconds)
        except Lost as lost:
            raise self._late("anchor", lost) from lost
        return hashlib.sha256(text_of(self._last).encode()).hexdigest()[:16] if key is None else key

    async def score(self, episode: Episode) -> Scored:
        """(parts, total, success) of the finished episode; total None = missing. Raises `EnvError`
        when the environment's `score` fails or leaves `reward_range`."""
        try:
            return await (await self._ready()).score(episode, self.max_env_seconds)
        except Lost as lost:
            raise self._late("score", lost) from lost

    async def fork(self) -> Host:
        """A second host in the same state: by copy where the environment can be copied, else by replay."""
        instance = await self._ready()
        child = Host(
            self.template,
            self.task,
            self.seed,
            max_tool_seconds=self.max_tool_seconds,
            max_env_seconds=self.max_env_seconds,
            count_tokens=self.count_tokens,
            faults=self.faults,
        )
        child._started, child._first, child._done = True, self._first, self._done
        child._events, child._last = list(self._events), self._last
        try:
            child._instance = await instance.fork(self.max_env_seconds)
        except Lost as lost:
            raise self._late("fork", lost) from lost
        return child

    async def close(self) -> None:
        """Release the instance. Idempotent, and over within seconds whatever the environment does."""
        self._closed = True
        if self._instance is not None:
            self._drop()
        if self._leaving:
            await asyncio.wait(set(self._leaving))

    # -- tool calls --------------------------------------------------------------------------------

    def _parallel(self, call: ToolCall) -> bool:
        return call.name in self._tools and self._tools[call.name].options.parallel

    async def _together(self, calls: Sequence[ToolCall]) -> list[Answer]:
        """Run `calls` at the same time, record them in their order."""
        if self._done:
            refused = ToolResult(_OVER, ok=False, error="tool")
            return [Answer(refused, _OVER) for _ in calls]
        instance = await self._ready()
        try:
            if len(calls) == 1:
                timed = [await self._timed(instance, calls[0])]
            else:
                timed = await asyncio.gather(*(self._timed(instance, call) for call in calls))
        except asyncio.CancelledError:  # a thread may still be at work in there
            self._drop()
            raise
        answers: list[Answer] = []
        for call, (effect, seconds) in zip(calls, timed, strict=True):
            if isinstance(effect, EpisodeError):
                raise effect
            if isinstance(effect, Lost):
                if effect.gone and self._instance is instance:
                    self._drop()
                effect, lost = Effect(_lost_text(call, effect), effect.kind), True
            else:
                lost = False
            if effect.ran:
                self._events.append(Event(call, effect, lost))
            self._last, self._done = effect.content, self._done or effect.done
            answers.append(self._answer(call, effect, seconds))
        return answers

    async def _timed(self, instance: Instance, call: ToolCall) -> tuple[Effect | Lost | EpisodeError, float]:
        start = time.perf_counter()
        effect: Effect | Lost | EpisodeError
        try:
            await instance.prepare(call, None)
            start = time.perf_counter()
            if self.faults is not None:
                self.faults(call.name)
            effect = await instance.call(call, self._limit(call))
        except (Lost, EpisodeError) as error:
            effect = error
        return effect, time.perf_counter() - start

    def _options(self, call: ToolCall) -> ToolOptions:
        return self._tools[call.name].options if call.name in self._tools else ToolOptions()

    def _limit(self, call: ToolCall) -> float:
        own = self._options(call).timeout
        return own if self.max_tool_seconds is None else min(own, self.max_tool_seconds)

    def _answer(self, call: ToolCall, effect: Effect, seconds: float) -> Answer:
        text, options = text_of(effect.content), self._options(call)
        cost = 0.0
        if effect.ran:
            cost = options.cost + options.cost_per_second * seconds
            if options.cost_per_token:
                tokens = self.count_tokens(text) if self.count_tokens else -(-len(text) // 4)
                cost += options.cost_per_token * tokens
        images = tuple(image.sha256 for image in images_of(effect.content))
        result = ToolResult(text, images, effect.error is None, effect.error, seconds, cost, effect.hint)
        return Answer(result, effect.content, effect.reward, effect.done)

    # -- the instance ------------------------------------------------------------------------------

    async def _begin(self) -> tuple[Instance, Obs | None]:
        """A fresh instance, reset."""
        instance = self._spawn()
        try:
            return instance, await instance.reset(self.task, self.seed, self.max_env_seconds)
        except BaseException as error:
            self._let_go(instance)
            if isinstance(error, Lost):
                raise self._late("reset", error) from error
            raise

    def _spawn(self) -> Instance:
        if self.template.isolation == "process":
            from agentrl.process import Remote

            return Remote(self.template)
        return Local.spawn(self.template)

    async def _ready(self) -> Instance:
        """The instance; after a loss, a fresh one brought to the recorded state."""
        if self._closed or not self._started:
            raise RuntimeError("a Host is used between reset() and close()")
        if self._instance is None:
            instance, first = await self._begin()
            try:
                self._same("reset", first, self._first)
                for number, event in enumerate(self._events, 1):
                    if not event.lost:
                        await self._replay(instance, number, event)
            except BaseException:
                self._let_go(instance)
                raise
            self._instance = instance
        return self._instance

    async def _replay(self, instance: Instance, number: int, event: Event) -> None:
        try:
            if isinstance(event.said, str):
                what, heard = f"reply, event {number}", await instance.reply(event.said, self.max_env_seconds)
                self._same(what, heard, event.heard)
            else:
                what = f"call {event.said.name}, event {number}"
                await instance.prepare(event.said, None)
                self._same(what, await instance.call(event.said, self._limit(event.said)), event.heard)
        except Lost as lost:
            raise self._late(f"replay of event {number}", lost) from lost

    def _same(self, what: str, heard: Effect | Obs | None, recorded: Effect | Obs | None) -> None:
        if heard != recorded:
            raise EnvError(
                f"{self._name}: the episode cannot be rebuilt, {what} answered {_short(heard)} where the record "
                f"has {_short(recorded)}; let all randomness come from reset's rng and all state live in the instance"
            )

    def _drop(self) -> None:
        """Give the instance up; it is closed in the background, for a stuck one may take its time."""
        instance, self._instance = self._instance, None
        if instance is not None:
            self._let_go(instance)

    def _let_go(self, instance: Instance) -> None:
        task = asyncio.ensure_future(instance.close(CLOSE_SECONDS))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    def _late(self, what: str, lost: Lost) -> EnvError:
        return EnvError(f"{self._name}.{what} gave {lost}; make it faster, or raise the limit")

    @property
    def _name(self) -> str:
        return type(self.template).__name__


def _lost_text(call: ToolCall, lost: Lost) -> str:
    if lost.kind == "timeout":
        return f"Error: {call.name} timed out ({lost})."
    return f"Error: {call.name} took its process down ({lost})."


def _short(heard: Effect | Obs | None) -> str:
    if heard is None:
        return "nothing"
    text = text_of(heard.content)
    return repr(text if len(text) <= 80 else text[:79] + "…")
