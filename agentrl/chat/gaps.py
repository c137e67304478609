"""The tokens between turns: prompts, what follows a turn, and what a template changes afterwards.

Texts of gaps come from patterns learnt by shape (`agentrl.chat.layout`), their ids from one call of
the encoder each. A gap is encoded behind the end of the turn before it, so that its ids are those
of the whole conversation.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from agentrl.chat.calls import Schemas
from agentrl.chat.codec import Codec
from agentrl.chat.layout import Cut, Layout, Layouts, Pattern, learn, sentinels
from agentrl.chat.template import Item, Line, Refused, Voice
from agentrl.errors import UsageError
from agentrl.trajectory import Context, Ids, Origin, Role, Span, SpanSlice, ids_of

_CACHED_OPENINGS = 1024


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


@dataclass(frozen=True, slots=True)
class Rule:
    """What the template does when given messages follow a turn of a given shape.

    `pattern` gives the new gap's text (None: only a rendering of the whole tells it) and `controls`
    the control ids in it. `appends`: all that stood before stays as it was. `stop` is the id that
    announces the messages where no end text closes the turn before them.
    """

    pattern: Pattern | None
    controls: list[int]
    appends: bool
    stop: int | None


class Gaps:
    """Makes gaps for one chat format; remembers prompts and rules."""

    def __init__(self, layouts: Layouts, codec: Codec) -> None:
        self._layouts = layouts
        self._codec = codec
        self.end_ids, _ = codec.encode(layouts.end)
        self._end_controls = codec.expected(layouts.end)
        self._toolsets: list[Toolset] = []
        self._rules: dict[tuple[Any, ...], Rule] = {}
        self._prompts: dict[tuple[Any, ...], tuple[Pattern, list[int]] | None] = {}
        self._openings: dict[tuple[Any, ...], Gap] = {}

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
                text, cuts, controls = self._opening_text(lines, tools)
            except Refused as error:
                raise UsageError(f"the chat template does not render this prompt: {error}") from error
            gap = self.encode(text, cuts, lines, controls, opening=True)
            if len(self._openings) >= _CACHED_OPENINGS:
                self._openings.pop(next(iter(self._openings)))
            self._openings[key] = gap
        return gap

    def _opening_text(self, lines: Sequence[Line], tools: Toolset) -> tuple[str, list[Cut], list[int] | None]:
        shape = (tools.key, *((line.role, not line.text) for line in lines))
        mode = self._layouts.mode(lines, tools.schemas, tools.key)
        if shape not in self._prompts:
            gap, probed = (
                self._layouts.lay_out(each, tools.schemas, mode, None).gaps[-1]
                for each in (sentinels(lines), sentinels(lines, probe=True))
            )
            pattern = learn(gap, probed, 0)
            self._prompts[shape] = (pattern, self._controls(pattern)) if pattern else None
        known = self._prompts[shape]
        if known is not None and plain(lines):
            return *known[0].fill(lines), known[1]
        return self._layouts.lay_out(lines, tools.schemas, mode, None).gaps[-1], [], None

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
        return Rule(pattern, self._controls(pattern) if pattern else [], appends, stop)

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

    def encode(
        self,
        text: str,
        cuts: Sequence[Cut] = (),
        lines: Sequence[Line] = (),
        controls: list[int] | None = None,
        opening: bool = False,
    ) -> Gap:
        """The gap of `text`, as it stands behind the end of a turn (or, `opening`, at the very start)."""
        lead, n = ("", 0) if opening else (self._layouts.end, self.end_ids.size)
        if controls is not None and n:
            controls = self._end_controls + controls
        at = len(lead)
        wanted = [position for cut in cuts for position in (at + cut.start, at + cut.stop - 1)]
        ids, where = self._codec.encode(lead + text, controls, wanted)
        if n and not (ids.size >= n and (ids[:n] == self.end_ids).all()):
            ids, where = self._codec.encode(text)
            where, n = None, 0
        content: Origin = "template" if opening else "tool"
        if where is None:
            cuts = ()
        pieces = _pieces(ids[n:], [token - n for token in where or ()], cuts, lines, content)
        return Gap(text, pieces, ids.size - n)

    def changed(self, old: Gap, text: str, opening: bool) -> Gap:
        """`old` with another text: slices of its spans as far as the ids agree, new spans for the rest."""
        if old.text == text:
            return old
        new = self.encode(text, opening=opening)
        one, two = ids_of(old.pieces), ids_of(new.pieces)
        n = min(one.size, two.size)
        differ = (one[:n] != two[:n]).nonzero()[0]
        common = int(differ[0]) if differ.size else n
        return Gap(text, (*upto(old.pieces, common), *beyond(new.pieces, common)), new.n_tokens)

    def _controls(self, pattern: Pattern) -> list[int]:
        return [index for literal in pattern.literals for index in self._codec.expected(literal)]


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


def _pieces(ids: Ids, where: Sequence[int], cuts: Sequence[Cut], lines: Sequence[Line], content: Origin) -> Context:
    """Spans for the ids of a gap: each line's markup and content in its own role, the header the assistant's.

    `where` holds the first and last token of each content; a token that straddles is the content's.
    """
    parts: list[tuple[int, Role, Origin]] = []  # (stop, role, origin)
    edge = 0
    for cut, first, last in zip(cuts, where[::2], where[1::2], strict=True):
        role = lines[cut.line].role
        parts += ((max(first, edge), role, "template"), (max(last + 1, edge), role, content))
        edge = max(last + 1, edge)
    parts.append((ids.size, "assistant" if parts or not lines else lines[-1].role, "template" if parts else content))
    pieces: list[SpanSlice] = []
    start = 0
    for index, (stop, role, origin) in enumerate(parts):
        joins = index + 1 < len(parts) and parts[index + 1][1:] == (role, origin)
        if stop > start and not joins:
            pieces.append(SpanSlice(Span(ids[start:stop], role, origin, actor=role), 0, stop - start))
            start = stop
    return tuple(pieces)
