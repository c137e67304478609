"""Actors: who speaks in an episode. A trained policy behind an engine, or a scripted expert.

An actor opens one `Conversation` per episode. A conversation turns messages into what the actor says;
the episode neither knows engines nor tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Generator as Script
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

from agentrl.chat import ChatFormat, Dialogue, Message, Parsed
from agentrl.engines import Engine, Generation, Request
from agentrl.env import Env, Obs, Say
from agentrl.errors import EnvError, UsageError
from agentrl.host import CLOSE_SECONDS
from agentrl.instance import Local, generator
from agentrl.task import Task
from agentrl.trajectory import (
    Context,
    FinishReason,
    Origin,
    Sampling,
    Source,
    Span,
    Turn,
    as_floats,
    as_ids,
    ids_of,
)


@dataclass(frozen=True, slots=True, eq=False)
class Spoken:
    """One utterance: the context it was spoken in, its spans (none for actors without token ids), and
    its meaning."""

    context: Context
    output: tuple[Span, ...]
    parsed: Parsed
    finish: FinishReason
    sampling: Sampling
    cost: float = 0.0


class Conversation(Protocol):
    """One actor's side of one episode."""

    @property
    def n_tokens(self) -> int:
        """Length of the present context in tokens (0 where the actor has none)."""

    def start(self, messages: Sequence[Message]) -> None:
        """Begin, or begin afresh, with `messages`."""

    def extend(self, messages: Sequence[Message]) -> None:
        """Add what the environment answered."""

    async def speak(self, max_tokens: int, seed: int, heard: str | None, recorded: Turn | None = None) -> Spoken | None:
        """The next utterance, of at most `max_tokens` new tokens; None where the actor has nothing
        more to say. `heard` is what the environment last answered (None at the first turn); `recorded`
        is the same turn from a record: it is spoken again to the letter."""

    async def fork(self, session: str) -> Self:
        """The same conversation for a branch named `session`."""

    @property
    def speaker(self) -> str:
        """Who is asked, and where, for people."""

    @property
    def trouble(self) -> str | None:
        """Why the actor cannot speak at present, for no fault of its own; None where it can."""

    async def close(self) -> None:
        """Release what is held. Idempotent."""


class Actor(Protocol):
    """Opens conversations. `max_context` is in tokens, None where the actor has no limit of its own."""

    name: str
    source: Source
    max_context: int | None
    vocab_size: int

    def open(
        self, session: str, group: str, tools: Sequence[dict[str, Any]], expert: Expert | None, priority: int = 0
    ) -> Conversation:
        """A conversation for the episode `session` in `group`, with the environment's tools. `priority`: that of its
        requests (`agentrl.engines.Request`)."""


class Expert:
    """The environment's scripted expert at work. It sees an instance of its own, reset like the
    episode's, so that it may look at hidden state without touching the episode's."""

    def __init__(self, template: Env, task: Task, host_seed: tuple[int, ...], seed: tuple[int, ...]) -> None:
        self._instance = Local.spawn(template)
        self._task = task
        self._host_seed = host_seed
        self._seed = seed
        self._script: Script[Say, Obs, None] | None = None

    async def say(self, heard: str | None, limit: float | None = None) -> Say | None:
        """The next message, in answer to what the environment said; None at the end of the script.
        Raises `EnvError` for whatever the script raises."""
        if self._script is None:
            await self._instance.reset(self._task, self._host_seed, limit)
            self._script = self._instance.env.demonstrate(self._task, generator(self._seed))
        try:
            return next(self._script) if heard is None else self._script.send(Obs(heard))
        except StopIteration:
            return None
        except Exception as error:  # the environment's own code: whatever it raises is its failure
            name = type(self._instance.env).__name__
            raise EnvError(f"{name}.demonstrate failed with {type(error).__name__}: {error}") from error

    async def close(self) -> None:
        """Release the expert's instance."""
        if self._script is not None:
            self._script.close()
        await self._instance.close(CLOSE_SECONDS)


class PolicyActor:
    """A policy that an engine samples. Token ids in, token ids out."""

    source: Source = "policy"

    def __init__(
        self,
        engine: Engine,
        chat: ChatFormat,
        sampling: Sampling,
        *,
        name: str = "policy",
        requests: asyncio.Semaphore | None = None,
    ) -> None:
        if chat.pictures is not None and not engine.capabilities.images:
            raise UsageError(
                "the policy's model takes pictures and its engine serves text only; set engine.type to sglang or vllm"
            )
        self.engine = engine
        self.chat = chat
        self.vocab_size = chat.vocab_size
        self.sampling = replace(sampling, stop_ids=chat.stop_ids)
        self.name = name
        self.max_context: int | None = engine.capabilities.max_context or None
        self.requests: contextlib.AbstractAsyncContextManager[Any] = requests or contextlib.nullcontext()

    def open(
        self, session: str, group: str, tools: Sequence[dict[str, Any]], expert: Expert | None, priority: int = 0
    ) -> Conversation:
        return _PolicyConversation(self, session, group, tools, priority)


class TokenConversation:
    """What conversations in token ids share: a dialogue, begun afresh whenever a context is rebuilt."""

    def __init__(self, chat: ChatFormat, tools: Sequence[dict[str, Any]], name: str) -> None:
        self._chat = chat
        self._tools = tools
        self._name = name
        self._dialogue = Dialogue(chat, tools, actor=name)

    @property
    def n_tokens(self) -> int:
        return self._dialogue.n_tokens

    def start(self, messages: Sequence[Message]) -> None:
        self._dialogue = Dialogue(self._chat, self._tools, actor=self._name)
        self._dialogue.start(messages)

    def extend(self, messages: Sequence[Message]) -> None:
        self._dialogue.extend(messages)

    def retell(self, turn: Turn) -> Spoken:
        """Say the words of a recorded turn again, by the very span of the record; no engine is asked."""
        return self._told(turn.output[0], turn.finish, turn.sampling)

    def say(self, say: Say, origin: Origin, actor: str) -> Spoken:
        """Say what somebody else wrote, in the form in which the policy would have said it."""
        ids = self._chat.say(self._dialogue, say)
        return self._told(Span(ids, "assistant", origin, actor), "stop", Sampling(max_tokens=max(1, len(ids))))

    def _told(self, span: Span, finish: FinishReason, sampling: Sampling) -> Spoken:
        context, parsed = self._dialogue.context, self._dialogue.parse(span.ids)
        return Spoken(context, self._dialogue.heard(span, parsed), parsed, finish, sampling)

    @property
    def speaker(self) -> str:
        return self._name

    @property
    def trouble(self) -> str | None:
        return None


class _PolicyConversation(TokenConversation):
    def __init__(
        self, actor: PolicyActor, session: str, group: str, tools: Sequence[dict[str, Any]], priority: int
    ) -> None:
        super().__init__(actor.chat, tools, actor.name)
        self._actor = actor
        self._session = session
        self._group = group
        self._priority = priority

    async def speak(self, max_tokens: int, seed: int, heard: str | None, recorded: Turn | None = None) -> Spoken | None:
        actor = self._actor
        context = self._dialogue.context
        sampling = replace(actor.sampling, max_tokens=min(max_tokens, actor.sampling.max_tokens), seed=seed)
        if recorded is not None and not actor.engine.capabilities.forced:
            reply = _recorded_reply(recorded)  # servers find what they cached by its ids alone
        else:
            forced = _recorded_reply(recorded).ids if recorded is not None else None
            images, places = self._dialogue.shown()
            request = Request(
                ids_of(context), sampling, self._session, self._group, forced, images, places, self._priority
            )
            try:
                async with actor.requests:
                    reply = await actor.engine.generate(request)
            except asyncio.CancelledError:
                await actor.engine.abort(self._session)
                raise
            if recorded is not None:  # the weights may be newer by now: log-probs stay those it was sampled with
                reply = _recorded_reply(recorded)
        parsed = self._dialogue.parse(reply.ids)
        span = Span(
            reply.ids,
            "assistant",
            "sampled",
            actor.name,
            reply.logprobs,
            reply.entropies,
            reply.entropy,
            reply.versions,
        )
        return Spoken(context, self._dialogue.heard(span, parsed), parsed, reply.finish, sampling)

    async def fork(self, session: str) -> _PolicyConversation:
        await self._actor.engine.fork(self._session, session)
        child = _PolicyConversation(self._actor, session, self._group, self._tools, self._priority)
        child._dialogue = self._dialogue.fork()
        return child

    @property
    def speaker(self) -> str:
        return self._actor.engine.where(self._session)

    @property
    def trouble(self) -> str | None:
        return self._actor.engine.trouble

    async def close(self) -> None:
        await self._actor.engine.release(self._session)


def complaint(turn: Turn) -> str | None:
    """What a recorded turn's reader complained of (a call that could not be read); None where it did not. The
    complaint follows the results of the calls that could be read."""
    if turn.error != "parse":
        return None
    results = "\n".join(use.result.text for use in turn.tools)
    return turn.observation[len(results) :].removeprefix("\n").removeprefix("Error: ")


def _recorded_reply(turn: Turn) -> Generation:
    """The engine's reply that became `turn`."""
    spans = turn.sampled
    if not spans:
        return Generation(as_ids([]), as_floats([]), turn.finish, ())
    (span,) = spans  # a turn is one reply
    assert span.logprobs is not None
    return Generation(span.ids, span.logprobs, turn.finish, span.versions, span.entropies, span.entropy)


class ExpertActor:
    """The environment's own scripted expert (`Env.demonstrate`), rendered in the policy's chat format."""

    source: Source = "demo"
    max_context: int | None = None

    def __init__(self, chat: ChatFormat, *, name: str = "policy", origin: Origin = "demo") -> None:
        self.chat = chat
        self.vocab_size = chat.vocab_size
        self.name = name
        self.origin = origin

    def open(
        self, session: str, group: str, tools: Sequence[dict[str, Any]], expert: Expert | None, priority: int = 0
    ) -> Conversation:
        if expert is None:
            raise EnvError("the episode has no scripted expert; this is a bug in the rollout manager")
        return _ExpertConversation(self, expert, tools)


class _ExpertConversation(TokenConversation):
    def __init__(self, actor: ExpertActor, expert: Expert, tools: Sequence[dict[str, Any]]) -> None:
        super().__init__(actor.chat, tools, actor.name)
        self._origin: Origin = actor.origin
        self._expert = expert

    async def speak(self, max_tokens: int, seed: int, heard: str | None, recorded: Turn | None = None) -> Spoken | None:
        say = await self._expert.say(heard)
        if say is None:
            return None
        return self.say(say, self._origin, self._name)

    async def fork(self, session: str) -> _ExpertConversation:
        raise EnvError("a scripted expert cannot be forked: generators cannot be copied")

    async def close(self) -> None:
        await self._expert.close()
