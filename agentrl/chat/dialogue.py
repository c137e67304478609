"""One conversation of one actor: the spans that were said, and only they, make the next context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agentrl.chat.codec import picture_mark
from agentrl.chat.format import ChatFormat
from agentrl.chat.gaps import Gap, beyond, plain
from agentrl.chat.messages import Message, Parsed
from agentrl.chat.template import Item, Line, Voice
from agentrl.content import Content, Image, parts_of, text_of
from agentrl.errors import PolicyError
from agentrl.trajectory import Context, Ids, RecordError, Span, SpanSlice, ToolCall, places_of


@dataclass(frozen=True, slots=True, eq=False)
class _Said:
    """An assistant's turn: its output, what was parsed of it, and how much of it is still shown."""

    output: tuple[Span, ...]
    voice: Voice
    calls: tuple[ToolCall, ...]
    kept: bool = True
    skip: int = 0  # tokens of the first output span that are not shown any more

    @property
    def pieces(self) -> Context:
        return beyond(tuple(SpanSlice(span, 0, len(span)) for span in self.output), self.skip)


class Dialogue:
    """A conversation of `actor` with `tools` (JSON schemas). `start`, then `heard` and `extend` in turns.

    `context` is what was said so far, as slices of spans: after `start` and `extend` exactly what the
    engine is given, after `heard` with the output too. `n_tokens` is its length. Where the template
    shows earlier turns otherwise than they were said (dropped thinking), the context is made of other
    slices of the same spans: the output from its first token behind the thinking block on (a token
    that straddles is kept), and the template's text as far as it still agrees.

    For a model that sees, pictures are placeholders in the context; `shown` gives those of the present one.
    """

    __slots__ = ("_gaps", "_items", "_said", "_seen", "_tools", "actor", "chat", "context", "n_tokens")

    def __init__(self, chat: ChatFormat, tools: Sequence[dict[str, Any]], actor: str = "policy") -> None:
        self.chat = chat
        self.actor = actor
        self._tools = chat.toolset(tools)
        self._items: tuple[Item, ...] = ()
        self._gaps: tuple[Gap, ...] = ()
        self._said: tuple[_Said, ...] = ()
        self._seen: Mapping[str, Image] = {}
        self.context: Context = ()
        self.n_tokens = 0

    def expect(self, what: str) -> None:
        """Raise `RecordError` where `what` ("start", "heard", "say" or "extend") is out of turn."""
        waits = "start" if not self._gaps else "extend" if len(self._said) == len(self._gaps) else "heard"
        if what != waits and not (what == "say" and waits == "heard"):
            raise RecordError(f"a dialogue that waits for {waits}() was given {what}()")

    def start(self, messages: Sequence[Message]) -> Context:
        """The prompt with its generation header. Equal prompts of one chat format share their spans."""
        self.expect("start")
        if not messages:
            raise RecordError("a dialogue starts with at least one message")
        lines = self._lines(messages)
        gap = self.chat.gaps.opening(lines, self._tools)
        self._items, self._gaps = lines, (gap,)
        self.context, self.n_tokens = gap.pieces, gap.n_tokens
        return self.context

    def heard(self, output: Span, parsed: Parsed) -> tuple[Span, ...]:
        """Append what the assistant said; returns the turn's output.

        A turn that a limit cut gets the template's end of turn as a span of its own, origin "forced".
        Templates without an end token need none: the next role's token follows.
        """
        self.expect("heard")
        spans: tuple[Span, ...] = (output,)
        if not self.chat.reader.ended(output.ids) and self.chat.end_ids.size:
            spans = (output, Span(self.chat.end_ids, "assistant", "forced", actor=self.actor))
        thinking = self.chat.template.knows_thinking and self.chat.reader.thinks(parsed.text)
        voice = Voice(thinking, len(parsed.calls))
        said = _Said(spans, voice, parsed.calls)
        self._said += (said,)
        self._items += (voice,)
        self.context += said.pieces
        self.n_tokens += sum(len(span) for span in spans)
        return spans

    def parse(self, ids: Ids) -> Parsed:
        """`ChatFormat.parse` with the arguments typed by this dialogue's tools."""
        return self.chat.parse(ids, self._tools.parameters)

    def extend(self, messages: Sequence[Message]) -> Context:
        """Append tool results or a user's words; returns the whole next context.

        Only what is new is rendered and encoded, unless the template shows earlier turns differently now.
        """
        self.expect("extend")
        if not messages:
            raise RecordError("a dialogue is extended by at least one message")
        gaps, lines, said = self.chat.gaps, self._lines(messages), self._said
        earlier = any(one.voice.thinking and one.kept for one in said[:-1])
        system = isinstance(self._items[0], Line) and self._items[0].role == "system"
        rule = gaps.rule(self._tools, system, earlier, said[-1].voice, lines)
        known = rule.known if plain(lines) else None
        items = self._items + lines
        if known is not None and rule.appends:
            gap = gaps.fill(known, lines)
        else:
            layout = gaps.relayout(items, self._tools, [gap.text for gap in self._gaps])
            if known is not None and layout.gaps[-1] == known.pattern.join(known.pattern.values(lines)):
                gap = gaps.fill(known, lines)
            else:
                gap = gaps.encode(layout.gaps[-1], lines[-1].role)
            self._revise(layout.gaps[:-1], layout.kept)
        self._items = items
        self._gaps += (gap,)
        pieces = self._joined(gap, self._said[-1])
        self.context += pieces
        self.n_tokens += sum(len(piece) for piece in pieces)
        return self.context

    def shown(self) -> tuple[tuple[Image, ...], tuple[tuple[int, int], ...]]:
        """The pictures of the context in order, and where in its ids the placeholders of each stand: [start, stop).

        Raises `PolicyError` where the policy wrote a placeholder itself: an engine would take it for a picture.
        """
        if self.chat.pictures is None:
            return (), ()
        if any(self.chat.reader.spoilt(span.ids) for said in self._said for span in said.output):
            raise PolicyError("the policy wrote a token that stands for a picture, and no engine can go on from there")
        places = places_of(self.context)
        return tuple(self._seen[place.sha256] for place in places), tuple((p.start, p.stop) for p in places)

    def fork(self) -> Dialogue:
        """A copy that goes its own way; spans are shared."""
        child = object.__new__(Dialogue)
        for name in Dialogue.__slots__:
            setattr(child, name, getattr(self, name))
        return child

    # -- inside ------------------------------------------------------------------------------------

    def _lines(self, messages: Sequence[Message]) -> tuple[Line, ...]:
        """Messages as lines; a tool's message without name or id takes those of the call it answers."""
        calls = self._said[-1].calls if self._said else ()
        defuse = self.chat.codec.defuse
        lines: list[Line] = []
        answered = 0
        for message in messages:
            text = self._text(message.content)
            if message.role != "tool":
                lines.append(Line(message.role, text))
                continue
            call = calls[answered] if answered < len(calls) else None
            name = message.name or (call.name if call else "") or "tool"
            identity = message.call_id or (call.id if call else "") or f"{len(self._said):04d}{answered:05d}"
            lines.append(Line("tool", text, defuse(name), defuse(identity)))
            answered += 1
        return tuple(lines)

    def _text(self, content: Content) -> str:
        """`content` as the template gets it: control strings defused, pictures as marks where the model sees."""
        codec, pictures = self.chat.codec, self.chat.pictures
        if pictures is None or isinstance(content, str):
            return codec.defuse(text_of(content))
        text, words = "", ""
        for part in parts_of(content):
            if isinstance(part, str):
                words += part
                continue
            text += codec.defuse(words) + picture_mark(part.sha256, pictures.tokens(part))
            words = ""
            self._seen = {**self._seen, part.sha256: part}
        return text + codec.defuse(words)

    def _revise(self, gaps: Sequence[str], kept: Sequence[bool]) -> None:
        """Show what was said before as the template shows it now."""
        self._gaps = tuple(
            self.chat.gaps.changed(old, text, opening=index == 0)
            for index, (old, text) in enumerate(zip(self._gaps, gaps, strict=True))
        )
        self._said = tuple(
            said if said.kept == whole else self._shown(said, whole)
            for said, whole in zip(self._said, kept, strict=True)
        )
        context: Context = ()
        previous: _Said | None = None
        for gap, said in zip(self._gaps, self._said, strict=True):
            context += self._joined(gap, previous) + said.pieces
            previous = said
        self.context = context
        self.n_tokens = sum(len(piece) for piece in context)

    def _shown(self, said: _Said, whole: bool) -> _Said:
        skip = 0 if whole else self.chat.reader.after_thinking(said.output[0].ids)
        return _Said(said.output, said.voice, said.calls, whole, skip)

    def _joined(self, gap: Gap, before: _Said | None) -> Context:
        """The gap's pieces behind `before`. A stop id that announces the next role (GLM) is not repeated."""
        last = before.output[-1].ids if before is not None else None
        if last is not None and gap.pieces and self.chat.reader.ended(last) and gap.pieces[0].ids[0] == last[-1]:
            return beyond(gap.pieces, 1)
        return gap.pieces
