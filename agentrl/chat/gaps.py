"""The tokens between turns: prompts, what follows a turn, and what a template changes afterwards.

Texts of gaps come from patterns learnt by shape (`agentrl.chat.layout`), their ids from stencils
(`agentrl.chat.stencil`). A gap is encoded behind the end of the turn before it, so that its ids are
those of the whole conversation.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from agentrl.chat.calls import Schemas
from agentrl.chat.codec import Codec, frozen
from agentrl.chat.layout import Layout, Layouts, Pattern, learn, sentinels
from agentrl.chat.stencil import Stencil, compile_stencil
from agentrl.chat.template import Item, Line, Refused, Voice
from agentrl.errors import UsageError
from agentrl.trajectory import Context, Origin, Role, Span, SpanSlice, ids_of

_CACHED_OPENINGS, _CACHED_MARKUP = 1024, 8192


@dataclass(frozen=True, slots=True)
class Toolset:
    """Tools as the template gets them (control strings defused), and their parameters by tool."""

    key: int
    given: list[dict[str, Any]]
    schemas: tuple[dict[str, Any], ...]
    parameters: Schemas


@dataclass(frozen=True, slots=True, eq=False)
class Gap:
    """What stands between two turns: its (defused) text and the pieces that hold its ids."""

    text: str
    pieces: Context
    n_tokens: int


class Known(NamedTuple):
    """A gap's pattern, and its stencil where the tokenizer allows one."""

    pattern: Pattern
    stencil: Stencil | None


@dataclass(frozen=True, slots=True)
class Rule:
    """What the template does when given messages follow a turn of a given shape.

    `known` makes the new gap (None: only a rendering of the whole tells it). `appends`: all that stood
    before stays as it was. `stop` is the id that announces the messages where no end text closes the
    turn before them.
    """

    known: Known | None
    appends: bool
    stop: int | None


class Gaps:
    """Makes gaps for one chat format; remembers prompts, rules and the spans of markup."""

    def __init__(self, layouts: Layouts, codec: Codec) -> None:
        self._layouts = layouts
        self._codec = codec
        self.end_ids = codec.encode(layouts.end)
        self._end_list = self.end_ids.tolist()
        self._toolsets: list[Toolset] = []
        self._rules: dict[tuple[Any, ...], Rule] = {}
        self._prompts: dict[tuple[Any, ...], Known | None] = {}
        self._openings: dict[tuple[Any, ...], Gap] = {}
        self._markup: dict[tuple[Any, ...], SpanSlice] = {}

    def toolset(self, tools: Sequence[dict[str, Any]]) -> Toolset:
        """The interned form of `tools` (JSON schemas as chat templates take them)."""
        given = list(tools)
        for known in self._toolsets:
            if known.given == given:
                return known
        functions = [tool.get("function", tool) for tool in given]
        made = Toolset(
            len(self._toolsets),
            json.loads(json.dumps(given)),
            tuple(self._codec.defuse_all(given)),
            {f["name"]: dict((f.get("parameters") or {}).get("properties") or {}) for f in functions},
        )
        self._toolsets.append(made)
        return made

    # -- prompts -----------------------------------------------------------------------------------

    def opening(self, lines: tuple[Line, ...], tools: Toolset) -> Gap:
        """The prompt with its generation header; equal prompts give the same spans."""
        key = (tools.key, lines)
        gap = self._openings.get(key)
        if gap is None:
            try:
                gap = self._open(lines, tools)
            except Refused as error:
                raise UsageError(f"the chat template does not render this prompt: {error}") from error
            if len(self._openings) >= _CACHED_OPENINGS:
                self._openings.pop(next(iter(self._openings)))
            self._openings[key] = gap
        return gap

    def _open(self, lines: Sequence[Line], tools: Toolset) -> Gap:
        shape = (tools.key, *((line.role, not line.text) for line in lines))
        if shape not in self._prompts:
            mode = self._layouts.mode(lines, tools.schemas, tools.key)
            gap, probed = (
                self._layouts.lay_out(each, tools.schemas, mode, None).gaps[-1]
                for each in (sentinels(lines), sentinels(lines, probe=True))
            )
            self._prompts[shape] = self._know(learn(gap, probed, 0), "")
        known = self._prompts[shape]
        if known is not None and plain(lines):
            return self.fill(known, lines, opening=True)
        mode = self._layouts.mode(lines, tools.schemas, tools.key)
        text = self._layouts.lay_out(lines, tools.schemas, mode, None).gaps[-1]
        return self.encode(text, lines[-1].role, opening=True)

    def _know(self, pattern: Pattern | None, lead: str) -> Known | None:
        return None if pattern is None else Known(pattern, compile_stencil(pattern, self._codec, lead))

    # -- what follows a turn -----------------------------------------------------------------------

    def rule(self, tools: Toolset, has_system: bool, any_kept: bool, last: Voice, lines: Sequence[Line]) -> Rule:
        """What happens when `lines` follow a turn of shape `last`. `any_kept`: thinking of earlier turns is shown."""
        key = (tools.key, has_system, any_kept, last, *((line.role, not line.text) for line in lines))
        rule = self._rules.get(key)
        if rule is None:
            rule = self._rules[key] = self._learn(tools, has_system, any_kept, last, lines)
        return rule

    def _learn(self, tools: Toolset, has_system: bool, any_kept: bool, last: Voice, lines: Sequence[Line]) -> Rule:
        """Learn on a short history and two longer ones; where they disagree only the whole conversation tells."""
        start = [Line("system", "x"), Line("user", "x")] if has_system else [Line("user", "x")]
        histories: tuple[list[Item], ...] = (
            [],
            [Voice(any_kept, 1), Line("tool", "x")],
            [Voice(any_kept, 0), Line("user", "x")],
        )
        learnt: list[tuple[Pattern | None, bool]] = []
        appends = True
        after: Layout | None = None
        reason: Refused | None = None
        for earlier in histories:
            items: list[Item] = [*start, *earlier, last, *lines]
            try:
                chain = self._layouts.chain(sentinels(items), tools.schemas, tools.key)
                probed = self._layouts.chain(sentinels(items, probe=True), tools.schemas, tools.key)
            except Refused as error:
                reason = error
                continue
            before, after = chain[-2:]
            n = len(before.gaps)
            appends &= after.gaps[:n] == before.gaps and after.kept == (*before.kept, True)
            pattern = learn(after.gaps[-1], probed[-1].gaps[-1], len(items) - len(lines))
            learnt.append((pattern, after.ended))
        if after is None:
            raise UsageError(f"the chat template does not render what follows a turn: {reason}")
        pattern, ended = learnt[0]
        if any(other != learnt[0] for other in learnt):
            pattern = None
        stop = None if ended else self._leading_control(after.gaps[-1])
        return Rule(self._know(pattern, self._layouts.end), appends, stop)

    def _leading_control(self, text: str) -> int | None:
        spans = self._codec.control_spans(text)
        return spans[0][1] if spans and self._codec.starts_with_control(text.lstrip()) else None

    def relayout(self, items: Sequence[Item], tools: Toolset, before: Sequence[str]) -> Layout:
        """The whole conversation as the template shows it now."""
        try:
            mode = self._layouts.mode(items, tools.schemas, tools.key)
            return self._layouts.lay_out(items, tools.schemas, mode, before)
        except Refused as error:
            raise UsageError(f"the chat template does not render this conversation: {error}") from error

    # -- ids -----------------------------------------------------------------------------------------

    def fill(self, known: Known, lines: Sequence[Line], opening: bool = False) -> Gap:
        """The gap of a known pattern for `lines`: markup in shared spans, each content in one of its own."""
        values = known.pattern.values(lines)
        text = known.pattern.join(values)
        runs = known.stencil.runs(values) if known.stencil is not None else None
        if runs is None:
            return self.encode(text, lines[-1].role, opening)
        origin: Origin = "template" if opening else "tool"
        pieces: list[SpanSlice] = []
        n_tokens = 0
        last = len(runs) - 1
        for index, (ids, line) in enumerate(runs):
            n_tokens += len(ids)
            if line is not None:
                role = lines[line].role
                pieces.append(SpanSlice(Span(frozen(ids), role, origin, role), 0, len(ids)))
                continue
            following = runs[index + 1].line if index < last else None
            role = lines[following].role if following is not None else "assistant" if last else lines[-1].role
            pieces.append(self._shared(ids, role))
        return Gap(text, tuple(pieces), n_tokens)

    def _shared(self, ids: list[int], role: Role) -> SpanSlice:
        """Markup is the same in every episode: one span serves them all."""
        key = (role, *ids)
        piece = self._markup.get(key)
        if piece is None:
            if len(self._markup) >= _CACHED_MARKUP:
                self._markup.clear()
            piece = self._markup[key] = SpanSlice(Span(frozen(ids), role, "template", role), 0, len(ids))
        return piece

    def encode(self, text: str, role: Role, opening: bool = False) -> Gap:
        """The gap of any `text`, in one span, as it stands behind the end of a turn (or at the very start); the
        placeholders of each picture are a span of their own, which names it."""
        n = 0 if opening else len(self._end_list)
        ids, places = self._codec.shown(self._layouts.end + text if n else text)
        if n and ids[:n].tolist() != self._end_list:
            (ids, places), n = self._codec.shown(text), 0
        origin: Origin = "template" if opening or role == "assistant" else "tool"
        pieces: list[SpanSlice] = []
        edge = n
        for place in places:
            if place.start > edge:
                pieces.append(Span(ids[edge : place.start], role, origin, role)[:])
            pieces.append(Span(ids[place.start : place.stop], role, origin, role, images=(place.sha256,))[:])
            edge = place.stop
        pieces.append(Span(ids[edge:], role, origin, role)[:])
        return Gap(text, tuple(pieces), ids.size - n)

    def changed(self, old: Gap, text: str, opening: bool) -> Gap:
        """`old` with another text: slices of its spans as far as the ids agree, new spans for the rest."""
        if old.text == text:
            return old
        gone = old.text[len(text) :] if old.text.startswith(text) else ""
        if self._codec.starts_with_control(gone):  # a header's closed thinking block: no need to encode the rest anew
            ids, n = self._codec.encode(gone), old.n_tokens
            if np.array_equal(ids_of(old.pieces)[n - ids.size :], ids):
                return Gap(text, upto(old.pieces, n - ids.size), n - ids.size)
        new = self.encode(text, "assistant", opening)
        one, two = ids_of(old.pieces), ids_of(new.pieces)
        n = min(one.size, two.size)
        differ = (one[:n] != two[:n]).nonzero()[0]
        common = int(differ[0]) if differ.size else n
        return Gap(text, (*upto(old.pieces, common), *beyond(new.pieces, common)), new.n_tokens)


def plain(lines: Iterable[Line]) -> bool:
    """True where patterns hold: contents of nothing but blanks are treated in ways that no probe shows."""
    return all(not line.text or not line.text.isspace() for line in lines)


def upto(pieces: Context, n: int) -> Context:
    """The first `n` tokens of `pieces`."""
    taken: list[SpanSlice] = []
    for piece in pieces:
        if n <= 0:
            break
        taken.append(piece if len(piece) <= n else SpanSlice(piece.span, piece.start, piece.start + n))
        n -= len(piece)
    return tuple(taken)


def beyond(pieces: Context, n: int) -> Context:
    """`pieces` without their first `n` tokens."""
    left: list[SpanSlice] = []
    for piece in pieces:
        if n < len(piece):
            left.append(piece if n <= 0 else SpanSlice(piece.span, piece.start + n, piece.stop))
        n -= len(piece)
    return tuple(left)
