"""A conversation that begins with recorded turns, and then goes on: with somebody's typed words, with a policy.

The recorded turns are spoken by the spans of the record, and what the chat layer renders between them must come out
as the ids that the engine saw then. So the branch can refer to the record's own slices for everything that the two
have in common: nothing is tokenised anew, and on disk nothing is stored twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from agentrl.chat import ChatFormat, Message
from agentrl.env import Say
from agentrl.errors import EnvError, UsageError
from agentrl.rollout.actors import Conversation, Spoken, TokenConversation
from agentrl.trajectory import Context, Origin, Span, SpanSlice, Trajectory, Turn, ids_of

PERSON = "person"  # the actor of a turn that somebody typed


class Retellable(Conversation, Protocol):
    """A conversation that can be told what was said, besides being asked to speak."""

    def retell(self, turn: Turn) -> Spoken:
        """Say a recorded turn again."""

    def say(self, say: Say, origin: Origin, actor: str) -> Spoken:
        """Say what somebody wrote."""


class Silent(TokenConversation):
    """A conversation in token ids in which nobody speaks on."""

    def __init__(self, chat: ChatFormat, tools: Sequence[dict[str, Any]]) -> None:
        super().__init__(chat, tools, PERSON)

    async def speak(self, max_tokens: int, seed: int, heard: str | None, recorded: Turn | None = None) -> Spoken | None:
        return None

    async def fork(self, session: str) -> Silent:
        raise EnvError("a conversation in which nobody speaks has no branches")

    async def close(self) -> None:
        """Nothing is held."""


class Twins:
    """Which recorded slices the tokens of newly rendered spans are the same as."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Span, list[tuple[int, SpanSlice]]]] = {}  # by identity, which the span keeps

    def learn(self, mine: Context, recorded: Context) -> None:
        """Two contexts with the same ids."""
        left, right = list(reversed(mine)), list(reversed(recorded))
        while left and right:
            a, b = left.pop(), right.pop()
            n = min(len(a), len(b))
            if n < len(a):
                left.append(SpanSlice(a.span, a.start + n, a.stop))
            if n < len(b):
                right.append(SpanSlice(b.span, b.start + n, b.stop))
            if n and a.span is not b.span:
                _, pieces = self._known.setdefault(id(a.span), (a.span, []))
                pieces.append((a.start, SpanSlice(b.span, b.start, b.start + n)))

    def of(self, context: Context) -> Context:
        """`context` by slices of the record, as far as they are known."""
        return tuple(twin for piece in context for twin in self._twin(piece))

    def _twin(self, piece: SpanSlice) -> Context:
        found: list[SpanSlice] = []
        at = piece.start
        while at < piece.stop:
            twin = next((t for t in self._pieces(piece.span, at)), None)
            if twin is None:
                return (piece,)
            stop = min(twin.stop, twin.start + piece.stop - at)
            found.append(SpanSlice(twin.span, twin.start, stop))
            at += stop - twin.start
        return tuple(found) or (piece,)

    def _pieces(self, span: Span, at: int) -> Sequence[SpanSlice]:
        """The recorded slices that begin with token `at` of `span`."""
        _, pieces = self._known.get(id(span), (span, []))
        return [
            SpanSlice(twin.span, twin.start + at - start, twin.stop)
            for start, twin in pieces
            if start <= at < start + len(twin)
        ]


@dataclass(slots=True)
class Retelling:
    """The conversation of a branch: the first `turn` turns of `record`, `said` (where somebody typed something),
    and then whatever `inner` says. `n_shared`: tokens that the branch had when it left the record."""

    record: Trajectory
    turn: int
    inner: Retellable
    said: Say | None = None
    n_shared: int = 0
    _number: int = 0
    _twins: Twins | None = None

    @property
    def n_tokens(self) -> int:
        return self.inner.n_tokens

    @property
    def speaker(self) -> str:
        return self.inner.speaker

    @property
    def trouble(self) -> str | None:
        return self.inner.trouble

    def start(self, messages: Sequence[Message]) -> None:
        self.inner.start(messages)

    def extend(self, messages: Sequence[Message]) -> None:
        self.inner.extend(messages)

    async def speak(self, max_tokens: int, seed: int, heard: str | None, recorded: Turn | None = None) -> Spoken | None:
        number, self._number = self._number, self._number + 1
        twins = self._twins = self._twins or Twins()
        if number < self.turn:
            turn = self.record.turns[number]
            spoken = self.inner.retell(turn)
            if not spoken.context:  # an endpoint has no tokens
                return spoken
            self._same(number, spoken, turn)
            twins.learn(spoken.context, turn.context)
            twins.learn(tuple(span[:] for span in spoken.output), tuple(span[:] for span in turn.output))
            return replace(spoken, context=turn.context, output=turn.output)
        if number == self.turn:
            self.n_shared = self.inner.n_tokens
        if number == self.turn and self.said is not None:
            now: Spoken | None = self.inner.say(self.said, "teacher", PERSON)
        else:
            now = await self.inner.speak(max_tokens, seed, heard)
        if now is None:
            return None
        if number == self.turn < len(self.record.turns) and _equal(now.context, self.record.turns[number].context):
            twins.learn(now.context, self.record.turns[number].context)
        return replace(now, context=twins.of(now.context))

    async def fork(self, session: str) -> Retelling:
        return Retelling(
            self.record, self.turn, await self.inner.fork(session), self.said, self.n_shared, self._number, self._twins
        )

    async def close(self) -> None:
        await self.inner.close()

    def _same(self, number: int, spoken: Spoken, turn: Turn) -> None:
        if not _equal(spoken.context, turn.context) or [s.ids.tolist() for s in spoken.output] != [
            s.ids.tolist() for s in turn.output
        ]:
            raise UsageError(
                f"the prompt of turn {number} comes out in other tokens than those recorded: the tokenizer, its chat "
                "template or the environment's words are not those of the run; name its own policy, or an --endpoint"
            )


def _equal(mine: Context, recorded: Context) -> bool:
    return np.array_equal(ids_of(mine), ids_of(recorded))
