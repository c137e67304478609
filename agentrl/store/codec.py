"""Records to plain values and back: spans, turns, trajectories.

Spans are numbered in order of first use. A span that is stored already (a fork's prefix, a prompt that
siblings share) is a reference (trajectory id, attempt, number) to where it stands. A context is
what it adds to the context before, so that a record is linear in its tokens. The arrays of a
trajectory's own spans stand one after the other, raw and little-endian, each kind in one run: ids
(int32), log-probs (float32), entropies (float32); the span table follows them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agentrl.store.frames import unpack
from agentrl.trajectory import (
    Context,
    Fork,
    Outcome,
    Sampling,
    Span,
    SpanSlice,
    ToolCall,
    ToolResult,
    ToolUse,
    Trajectory,
    Turn,
    VersionRun,
)

Resolve = Callable[[str, int], Sequence[Span | None]]  # (trajectory id, attempt) -> its numbered spans

_SWAP = sys.byteorder == "big"


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a span is stored. Holds the span, so that its identity cannot be taken by another."""

    span: Span
    owner: str
    attempt: int
    number: int


def raw(array: NDArray[Any]) -> bytes:
    """The little-endian bytes of an array."""
    return array.byteswap().tobytes() if _SWAP else array.tobytes()


def unraw(data: bytes, dtype: str, count: int, offset: int) -> NDArray[Any]:
    """A read-only view of `count` little-endian values at byte `offset`."""
    array = np.frombuffer(data, dtype, count, offset)
    if _SWAP:
        array = array.astype(array.dtype.newbyteorder("="))
        array.flags.writeable = False
    return array


class SpanTable:
    """Numbers the spans of one record as it is written, and collects what is not stored yet.

    `rows` and `ids`, `logprobs`, `entropies` (bytes) are those of the spans since `take`.
    """

    __slots__ = ("_numbers", "_stored", "entropies", "ids", "logprobs", "rows")

    def __init__(self, stored: Mapping[int, Stored] | None = None) -> None:
        self._stored = stored or {}
        self._numbers: dict[int, tuple[int, Span]] = {}
        self.clear()

    def clear(self) -> None:
        """Forget the rows and arrays collected so far, not the numbers."""
        self.rows: list[tuple[Any, ...]] = []
        self.ids: list[bytes] = []
        self.logprobs: list[bytes] = []
        self.entropies: list[bytes] = []

    def number(self, span: Span) -> int:
        """The span's number in this record; a span not seen before gets the next."""
        name = id(span)
        known = self._numbers.get(name)
        if known is not None:
            return known[0]
        number = len(self._numbers)
        self._numbers[name] = (number, span)
        place = self._stored.get(name)
        if place is not None:
            self.rows.append((place.owner, place.attempt, place.number))
            return number
        ids, versions = span.ids, span.versions
        runs = [value for run in versions for value in (run.version, run.start, run.stop)] if versions else ()
        self.rows.append((ids.size, span.role, span.origin, span.actor, span.entropy, runs, span.images))
        self.ids.append(raw(ids))
        if span.logprobs is not None:
            self.logprobs.append(raw(span.logprobs))
            if span.entropies is not None:
                self.entropies.append(raw(span.entropies))
        return number

    def own(self) -> list[tuple[int, Span]]:
        """(number, span) of every span that this record stores itself."""
        return [(number, span) for number, span in self._numbers.values() if id(span) not in self._stored]

    def arrays(self) -> tuple[bytes, list[int]]:
        """The collected arrays, joined, and the byte lengths of ids, log-probs and entropies."""
        ids, logprobs, entropies = b"".join(self.ids), b"".join(self.logprobs), b"".join(self.entropies)
        return ids + logprobs + entropies, [len(ids), len(logprobs), len(entropies)]


def spans_of(rows: Sequence[Sequence[Any]], data: bytes, sizes: Sequence[int], resolve: Resolve) -> list[Span | None]:
    """The spans of a table's `rows`, in their numbers' order; `data` and `sizes` as `SpanTable.arrays` gave them.

    A reference that `resolve` cannot serve (its arrays were not kept) comes back as None.
    """
    spans: list[Span | None] = []
    at_ids, at_logprobs, at_entropies = 0, sizes[0], sizes[0] + sizes[1]
    for row in rows:
        if len(row) == 3:
            owner, attempt, number = row
            there = resolve(owner, attempt)
            spans.append(there[number] if number < len(there) else None)
            continue
        n, role, origin, actor, entropy, versions, images = row
        ids = unraw(data, "<i4", n, at_ids)
        at_ids += 4 * n
        logprobs = entropies = None
        if origin == "sampled":
            logprobs = unraw(data, "<f4", n, at_logprobs)
            at_logprobs += 4 * n
            if entropy != "none":
                entropies = unraw(data, "<f4", n, at_entropies)
                at_entropies += 4 * n
        runs = tuple(VersionRun(*versions[i : i + 3]) for i in range(0, len(versions), 3))
        spans.append(Span(ids, role, origin, actor, logprobs, entropies, entropy, runs, tuple(images)))
    return spans


def _shared(before: Context, now: Context) -> int:
    """How many leading slices `now` has in common with `before`."""
    if now[: len(before)] == before:
        return len(before)
    return next(i for i, piece in enumerate(before) if i >= len(now) or now[i] != piece)


def turn_out(turn: Turn, before: Context, table: SpanTable) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """A turn as (what it was, what the policy reads next); `before` is the context of the turn before."""
    keep = _shared(before, turn.context)
    added: list[int] = []
    for piece in turn.context[keep:]:
        added += (table.number(piece.span), piece.start, piece.stop)
    s = turn.sampling
    uses = [
        (u.call.name, u.call.arguments, u.call.id, u.result.images, u.result.error, u.result.seconds, u.result.cost)
        + (() if u.result.hint is None else (u.result.hint,))
        for u in turn.tools
    ]
    what = (
        keep,
        added,
        [table.number(span) for span in turn.output],
        turn.text,
        turn.final_text,
        (s.temperature, s.top_p, s.top_k, s.max_tokens, s.stop_ids, s.seed),
        turn.finish,
        turn.actor,
        uses,
        turn.error,
        turn.reward,
        turn.anchor,
        turn.cost,
        turn.seconds,
        turn.extra,
    )
    return what, (turn.observation, *[use.result.text for use in turn.tools])


def turn_in(what: Sequence[Any], read: Sequence[str], before: Context, spans: Sequence[Span | None] | None) -> Turn:
    """Undo `turn_out`. Without `spans` the turn comes back without context and output."""
    keep, added, output, text, final_text, s, finish, actor, uses, error, reward, anchor, cost, seconds, extra = what
    context: Context = ()
    out: tuple[Span, ...] = ()
    if spans is not None:
        pieces = [SpanSlice(_here(spans, added[i]), added[i + 1], added[i + 2]) for i in range(0, len(added), 3)]
        context = (*before[:keep], *pieces)
        out = tuple(_here(spans, number) for number in output)
    tools = tuple(
        ToolUse(
            ToolCall(name, arguments, call),
            ToolResult(result, tuple(images), failed is None, failed, took, price, *hint),
        )
        for (name, arguments, call, images, failed, took, price, *hint), result in zip(uses, read[1:], strict=True)
    )
    sampling = Sampling(s[0], s[1], s[2], s[3], tuple(s[4]), s[5])
    return Turn(
        context, out, text, final_text, sampling, finish, actor, tools, read[0], error, reward, anchor, cost,
        seconds, extra,
    )  # fmt: skip


class TokensNotKept(LookupError):
    """The token arrays asked for were not kept (`store.tokens`)."""


def _here(spans: Sequence[Span | None], number: int) -> Span:
    span = spans[number] if number < len(spans) else None
    if span is None:
        raise TokensNotKept("token arrays of this trajectory were not kept")
    return span


def trajectory_out(trajectory: Trajectory, table: SpanTable) -> tuple[list[Any], list[Any]]:
    """A trajectory as (all but what index and observations hold, observations)."""
    turns, observations = [], []
    before: Context = ()
    for turn in trajectory.turns:
        what, read = turn_out(turn, before, table)
        turns.append(what)
        observations.append(read)
        before = turn.context
    t, fork = trajectory, trajectory.fork
    head = [
        t.id, t.group_id, t.task_id, (t.outcome.kind, t.outcome.why, t.outcome.detail), t.seed, t.env,
        fork and (fork.parent, fork.turn, fork.tokens), t.attempt, t.source, t.score, t.reward, t.success, t.extra,
        turns,
    ]  # fmt: skip
    return head, observations


def trajectory_in(head: bytes, observations: bytes, spans: Sequence[Span | None] | None) -> Trajectory:
    """Undo `trajectory_out` from packed bytes. Without `spans`, contexts and outputs stay empty."""
    id_, group, task, outcome, seed, env, fork, attempt, source, score, reward, success, extra, whats = unpack(head)
    turns: list[Turn] = []
    before: Context = ()
    for what, read in zip(whats, unpack(observations), strict=True):
        turn = turn_in(what, read, before, spans)
        turns.append(turn)
        before = turn.context
    return Trajectory(
        id_, group, task, tuple(turns), Outcome(*outcome), seed, env, Fork(*fork) if fork else None,
        attempt, source, score, reward, success, extra,
    )  # fmt: skip
