"""The record: spans, turns, trajectories and groups. It is the only truth about a rollout.

* A `Span` is an immutable run of token ids with its role, origin and actor. Sampled ids come only
  from an engine's reply and carry one log-prob each.
* A `Turn` is one policy call and what came of it. Its context is a tuple of span *slices*: exactly
  the ids that the engine saw, by reference, so that forks, carried text and dropped thinking share
  tokens and nothing is stored or counted twice.
* A `Trajectory` is a list of turns with its identity and outcome.
* Training `Row`s are derived by one rule (`rows_of`), never stored as truth.
* A `Group` holds members: a trajectory with its reward and its credit.

This module imports nothing of the project. Arrays are read-only: int32 ids, float32 log-probs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

Ids: TypeAlias = NDArray[np.int32]
Floats: TypeAlias = NDArray[np.float32]

Role = Literal["system", "user", "assistant", "tool"]
Origin = Literal[
    "template",  # rendered by the chat layer: prompts, headers, role markers
    "sampled",  # drawn by an engine from a policy; the only origin that policy gradients train
    "forced",  # put into the policy's mouth: a missing end token, a forced mode tag
    "tool",  # what a tool or the environment answered
    "hint",
    "probe",
    "carry",
    "demo",  # a scripted expert's words; trained by the supervised stage
    "teacher",
]
Entropy = Literal["exact", "topk", "none"]
FinishReason = Literal["stop", "length", "abort"]
OutcomeKind = Literal["completed", "terminated", "truncated", "failed"]
OutcomeWhy = Literal["turns", "tokens", "context", "deadline", "infra", "env", "policy"]
ErrorKind = Literal["parse", "unknown_tool", "arguments", "tool", "timeout", "oversize", "type", "bug"]
Source = Literal["policy", "demo", "replay", "teacher", "clone", "refined", "hinted", "endpoint"]

_WHY: dict[str, tuple[str, ...]] = {
    "completed": (),
    "terminated": (),
    "truncated": ("turns", "tokens", "context", "deadline"),
    "failed": ("infra", "env", "policy"),
}


class RecordError(ValueError):
    """A record that would break an invariant. It is a bug in the caller, never a user's mistake."""


def as_ids(ids: Sequence[int] | NDArray[Any]) -> Ids:
    """A read-only int32 copy of `ids` ([n], each >= 0)."""
    array = np.array(ids, dtype=np.int32)
    if array.ndim != 1:
        raise RecordError(f"token ids must be one-dimensional, got shape {array.shape}")
    if array.size and int(array.min()) < 0:
        raise RecordError(f"token ids must not be negative, got {int(array.min())}")
    array.flags.writeable = False
    return array


def as_floats(values: Sequence[float] | NDArray[Any]) -> Floats:
    """A read-only float32 copy of `values` ([n])."""
    array = np.array(values, dtype=np.float32)
    array.flags.writeable = False
    return array


@dataclass(frozen=True, slots=True)
class VersionRun:
    """Output tokens [start, stop) of a span were sampled under weight `version`."""

    version: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True, eq=False)
class Span:
    """An immutable run of token ids. Compared by identity: a span *is* its place in the record.

    Raises `RecordError` when sampled ids lack log-probs (one finite number <= 0 each), when other
    ids carry them, or when the weight versions do not tile the sampled ids.
    """

    ids: Ids
    role: Role
    origin: Origin
    actor: str = "policy"
    logprobs: Floats | None = None
    entropies: Floats | None = None
    entropy: Entropy = "none"
    versions: tuple[VersionRun, ...] = ()
    images: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        n = self.ids.size
        if self.ids.dtype != np.int32 or self.ids.ndim != 1 or self.ids.flags.writeable:
            raise RecordError("span ids must be a read-only int32 vector; build them with as_ids()")
        if self.role not in _ROLES or self.origin not in _ORIGINS:
            raise RecordError(f"unknown role or origin: {self.role!r}, {self.origin!r}")
        if self.origin == "sampled":
            if self.role != "assistant":
                raise RecordError(f"sampled ids stand in assistant spans only, not in {self.role!r}")
            if self.logprobs is None or self.logprobs.shape != (n,):
                raise RecordError(f"a sampled span of {n} ids needs {n} log-probs")
            if n and not (np.isfinite(self.logprobs).all() and float(self.logprobs.max()) <= 1e-6):
                raise RecordError("log-probs of sampled ids must be finite and at most 0")
            edge = 0
            for run in self.versions:
                if run.start != edge or run.stop <= run.start:
                    raise RecordError(f"weight versions must tile the span without gaps: {self.versions}")
                edge = run.stop
            if edge != n:
                raise RecordError(f"weight versions cover {edge} of {n} sampled ids")
        elif self.logprobs is not None or self.entropies is not None or self.versions:
            raise RecordError(f"only sampled ids carry log-probs, entropies and versions, not {self.origin!r}")
        if (self.entropies is None) != (self.entropy == "none"):
            raise RecordError("a span's entropies must say what they are: exact, topk, or none where absent")
        if self.entropies is not None and self.entropies.shape != (n,):
            raise RecordError(f"a span of {n} ids needs {n} entropies")

    def __len__(self) -> int:
        return int(self.ids.size)

    def __getitem__(self, key: slice) -> SpanSlice:
        start, stop, step = key.indices(len(self))
        if step != 1:
            raise RecordError("a span is sliced in steps of one")
        return SpanSlice(self, start, max(start, stop))


_ROLES = frozenset(get_args(Role))
_ORIGINS = frozenset(get_args(Origin))


@dataclass(frozen=True, slots=True)
class SpanSlice:
    """Tokens [start, stop) of a span, by reference."""

    span: Span
    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop <= len(self.span):
            raise RecordError(f"slice [{self.start}, {self.stop}) leaves its span of {len(self.span)} ids")

    @property
    def ids(self) -> Ids:
        return self.span.ids[self.start : self.stop]

    def __len__(self) -> int:
        return self.stop - self.start


Context: TypeAlias = tuple[SpanSlice, ...]


def ids_of(slices: Sequence[SpanSlice]) -> Ids:
    """The ids of `slices`, joined: exactly what an engine is given. Shape [sum of lengths]."""
    if not slices:
        return as_ids([])
    joined = np.concatenate([piece.ids for piece in slices])
    joined.flags.writeable = False
    return joined


@dataclass(frozen=True, slots=True)
class Place:
    """Where a picture stands in a context: its placeholders are ids [start, stop); `sha256` names it."""

    start: int
    stop: int
    sha256: str


def places_of(slices: Sequence[SpanSlice]) -> tuple[Place, ...]:
    """The pictures of a context in order. Raises `RecordError` where a slice holds a part of one."""
    places: list[Place] = []
    at = 0
    for piece in slices:
        if piece.span.images and len(piece):
            if len(piece.span.images) > 1 or len(piece) != len(piece.span):
                raise RecordError("a picture stands in a context whole, in a span of its own, or not at all")
            places.append(Place(at, at + len(piece), piece.span.images[0]))
        at += len(piece)
    return tuple(places)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one turn was sampled. `temperature` 0 is greedy; log-probs are then of temperature 1."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 256
    stop_ids: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0 or self.max_tokens < 1:
            raise ValueError(f"impossible sampling parameters: {self}")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call as the policy wrote it: validated later, by the tool."""

    name: str
    arguments: Mapping[str, Any]
    id: str = ""


Hint = Literal["text", "table", "board", "diff", "markdown", "json", "image"]
HINTS: frozenset[str] = frozenset(get_args(Hint))


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What a call came to. `error` is None where `ok`; `images` are sha256 hashes into media/.

    `seconds` is wall-clock time and so the one field that two equal runs do not share. `hint` says as what
    a viewer may show the text (one of `HINTS`); the policy never sees it.
    """

    text: str
    images: tuple[str, ...] = ()
    ok: bool = True
    error: ErrorKind | None = None
    seconds: float = 0.0
    cost: float = 0.0
    hint: Hint | None = None

    def __post_init__(self) -> None:
        if self.ok != (self.error is None):
            raise RecordError(f"a result is ok or has an error kind, not both or neither: {self}")


@dataclass(frozen=True, slots=True)
class ToolUse:
    """A call and its result, in the order in which the policy wrote the calls."""

    call: ToolCall
    result: ToolResult


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """One policy call (or one scripted expert's line) and what came of it.

    `text` is the decoded output, `final_text` what remains of it without thinking and tool calls.
    `observation` is what the policy reads next. An actor without token ids leaves `output` empty.
    """

    context: Context
    output: tuple[Span, ...]
    text: str
    final_text: str
    sampling: Sampling
    finish: FinishReason
    actor: str = "policy"
    tools: tuple[ToolUse, ...] = ()
    observation: str = ""
    error: ErrorKind | None = None
    reward: float | None = None
    anchor: str | None = None
    cost: float = 0.0
    seconds: float = 0.0
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if any(span.role != "assistant" for span in self.output):
            raise RecordError("a turn's output is the assistant's; tool results belong to the next context")

    @property
    def sampled(self) -> tuple[Span, ...]:
        """The spans of `output` that the policy chose itself."""
        return tuple(span for span in self.output if span.origin == "sampled")

    @property
    def n_sampled(self) -> int:
        return sum([span.ids.size for span in self.output if span.origin == "sampled"])

    @property
    def logprobs(self) -> Floats:
        """The engine's log-probs of the sampled tokens. Shape [n_sampled]."""
        arrays = [span.logprobs for span in self.sampled if span.logprobs is not None]
        return np.concatenate(arrays) if arrays else as_floats([])

    @property
    def entropies(self) -> Floats | None:
        """The engine's entropies of the sampled tokens [n_sampled], or None where one is absent."""
        arrays = [span.entropies for span in self.sampled]
        if not arrays or any(array is None for array in arrays):
            return None
        return np.concatenate([array for array in arrays if array is not None])


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an episode ended. Outcomes are not floats: a broken sandbox is a missing reward, never 0."""

    kind: OutcomeKind
    why: OutcomeWhy | None = None
    detail: str = ""

    def __post_init__(self) -> None:
        allowed = _WHY[self.kind]
        if (self.why is None) != (not allowed) or (self.why is not None and self.why not in allowed):
            raise RecordError(f"outcome {self.kind!r} takes one of {allowed or 'no'} reasons, not {self.why!r}")

    @property
    def missing(self) -> bool:
        """True where the episode has no reward at all and stays out of its group's statistics."""
        return self.kind == "failed" and self.why != "policy"

    def __str__(self) -> str:
        return f"{self.kind}({self.why})" if self.why else self.kind


@dataclass(frozen=True, slots=True)
class Fork:
    """Where a branch left its parent: after `turn` turns and `tokens` tokens of context and output."""

    parent: str
    turn: int
    tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class Trajectory:
    """One episode as it happened. `score` holds the named parts as the environment gave them;
    `reward` is their weighted total, None where missing. Shaped rewards live in the group's member.
    """

    id: str
    group_id: str
    task_id: str
    turns: tuple[Turn, ...]
    outcome: Outcome
    seed: int
    env: str = ""
    fork: Fork | None = None
    attempt: int = 0
    source: Source = "policy"
    score: Mapping[str, float | None] = field(default_factory=dict)
    reward: float | None = None
    success: bool | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.outcome.missing and self.reward is not None:
            raise RecordError(f"{self.id}: {self.outcome} has no reward; {self.reward} would enter the statistics")

    @property
    def n_tool_calls(self) -> int:
        return sum(len(turn.tools) for turn in self.turns)

    @property
    def tool_cost(self) -> float:
        return float(sum(use.result.cost for turn in self.turns for use in turn.tools))

    @property
    def n_sampled(self) -> int:
        return sum(turn.n_sampled for turn in self.turns)

    @property
    def final_text(self) -> str:
        return self.turns[-1].final_text if self.turns else ""

    def spans(self) -> tuple[Span, ...]:
        """Every span once, in order of first use."""
        seen: dict[int, Span] = {}
        for turn in self.turns:
            for span in (*(piece.span for piece in turn.context), *turn.output):
                seen.setdefault(id(span), span)
        return tuple(seen.values())


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """A training row: ids to forward, and which of them are trained.

    `targets` [m] are positions in `ids` (each >= 1: the logits at position p-1 predict it);
    `turns` [m] and `offsets` [m] say which turn's which sampled token stands there. `pictures` are those of the
    context, in order: its ids alone do not tell what the model saw.
    """

    ids: Ids
    targets: NDArray[np.int64]
    turns: NDArray[np.int64]
    offsets: NDArray[np.int64]
    pictures: tuple[Place, ...] = ()

    def __len__(self) -> int:
        return int(self.ids.size)


def rows_of(
    trajectory: Trajectory, trained: frozenset[Origin] = frozenset({"sampled"}), actor: str = "policy"
) -> list[Row]:
    """Derive training rows by the one rule.

    Consecutive turns of `actor` whose context begins with the previous turn's context + output (and its
    pictures) merge into one row; otherwise the turn is its own row. So append-only episodes give one row, an evolving
    memory one row a turn, dropped thinking a row per break. Only output tokens of an origin in
    `trained` are targets, each exactly once.
    """
    rows: list[Row] = []
    ids: Ids = as_ids([])
    pictures: tuple[Place, ...] = ()
    targets: list[NDArray[np.int64]] = []
    turns: list[NDArray[np.int64]] = []
    offsets: list[NDArray[np.int64]] = []

    def close() -> None:
        if any(part.size for part in targets):
            made = (np.concatenate(targets), np.concatenate(turns), np.concatenate(offsets))
            rows.append(Row(ids, *made, pictures))
        targets.clear()
        turns.clear()
        offsets.clear()

    for index, turn in enumerate(trajectory.turns):
        if turn.actor != actor or not turn.output:
            continue
        context, seen = ids_of(turn.context), places_of(turn.context)
        goes_on = context.size >= ids.size and np.array_equal(context[: ids.size], ids)
        if not (targets and goes_on and seen[: len(pictures)] == pictures):
            close()
        pictures = seen
        position, offset = int(context.size), 0
        for span in turn.output:
            if span.origin in trained:
                where = np.arange(position, position + len(span), dtype=np.int64)
                targets.append(where)
                turns.append(np.full(len(span), index, dtype=np.int64))
                offsets.append(np.arange(offset, offset + len(span), dtype=np.int64))
                offset += len(span)
            position += len(span)
        ids = np.concatenate([context, *(span.ids for span in turn.output)])
    close()
    return rows


@dataclass(slots=True, eq=False)
class Member:
    """A trajectory's membership in a group, with its own reward and credit.

    `reward` is the shaped total (None = missing), `parts` what each shaper added to it, `notes` the numbers that
    shapers had looked at ("shaper/number"), `advantages` and
    `weights` one float32 array per turn, each [n_sampled of that turn]. `arrays` holds what
    annotators append (old, ref, value, …), in the same layout.
    """

    trajectory: Trajectory
    source: Source = "policy"
    reward: float | None = None
    parts: dict[str, float] = field(default_factory=dict)
    notes: dict[str, float] = field(default_factory=dict)
    turn_rewards: list[float] | None = None
    advantages: list[Floats] | None = None
    weights: list[Floats] | None = None
    arrays: dict[str, list[Floats]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.reward is None:
            self.reward = self.trajectory.reward

    def spread(self, values: Sequence[float]) -> list[Floats]:
        """One value per turn, broadcast to that turn's sampled tokens."""
        return [
            np.full(turn.n_sampled, v, dtype=np.float32) for turn, v in zip(self.trajectory.turns, values, strict=True)
        ]


@dataclass(slots=True, eq=False)
class Group:
    """The members that share a task and whose rewards are compared. `draw` says how it was drawn."""

    id: str
    task_id: str
    members: list[Member]
    step: int = 0
    draw: dict[str, Any] = field(default_factory=dict)

    @property
    def scored(self) -> list[Member]:
        """The members that have a reward: only these enter statistics."""
        return [member for member in self.members if member.reward is not None]
