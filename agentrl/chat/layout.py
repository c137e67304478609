"""What a template writes around the assistant's turns, found by difference.

A conversation is rendered with sentinels in place of what the assistant said. What stands between
two turns is a *gap*: the end of one turn, the messages after it, the header of the next. Only gaps
are ever encoded. What was sampled stays as it was sampled; the rendering tells no more about it
than whether its thinking is still shown.

A gap's text is learnt once per shape as a `Pattern`: the template's own words with slots for the
contents. It is verified with a second set of contents, full of blanks, quotes and markup, before it
is trusted; a template that treats content in some other way is rendered anew each time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from agentrl.chat.calls.base import to_json
from agentrl.chat.codec import Codec
from agentrl.chat.template import Item, Line, Mode, Refused, Template, Voice, call_key, sentinel
from agentrl.trajectory import ToolCall

Transform = Callable[[str], str]
_SENTINEL = re.compile("\uf8f2([mni])(\\d{3})000\uf8f3")
_FIELDS = {"m": "text", "n": "name", "i": "call_id"}


def _json_body(text: str) -> str:
    return to_json(text)[1:-1]


def _same(text: str) -> str:
    return text


_TRANSFORMS: tuple[Transform, ...] = (
    _same,
    str.strip,
    str.lstrip,
    str.rstrip,
    _json_body,
    lambda text: _json_body(text.strip()),
)


@dataclass(frozen=True, slots=True)
class Layout:
    """`gaps` (one before each voice, and the last with the header of the next turn) without the end of
    the turn before them; `kept[i]`: voice i is shown whole, its thinking included; `ended`: the last
    voice's turn was closed by the end text (else only by what follows)."""

    gaps: tuple[str, ...]
    kept: tuple[bool, ...]
    ended: bool = True


@dataclass(frozen=True, slots=True)
class Pattern:
    """A gap's text with slots. `slots[k]` = (line, field, transform) stands between literals k and k + 1."""

    literals: tuple[str, ...]
    slots: tuple[tuple[int, str, Transform], ...]

    def values(self, lines: Sequence[Line]) -> list[str]:
        """What goes into the slots for these lines."""
        return [transform(getattr(lines[index], field)) for index, field, transform in self.slots]

    def join(self, values: Sequence[str]) -> str:
        """The gap's text with `values` in the slots."""
        parts = [self.literals[0]]
        for value, literal in zip(values, self.literals[1:], strict=True):
            parts += (value, literal)
        return "".join(parts)


class Layouts:
    """Lays conversations out by one template. `end` is the text that ends a turn whoever speaks next,
    up to its control token; "" where nothing does (GLM: the next role's token stops the turn)."""

    def __init__(self, template: Template, codec: Codec, eos: Collection[int]) -> None:
        self.template = template
        self._modes: dict[tuple[Any, ...], Mode] = {}
        self.end = ""
        common = self._after_words()
        controls = codec.control_spans(common)
        if controls:
            self.end = common[: next((stop for stop, index in controls if index in eos), controls[0][0])]

    def _after_words(self) -> str:
        """What stands after an assistant's words, whether the conversation ends there or the user goes on."""
        user = Line("user", sentinel("m", 0))
        mark = sentinel("c", 1)
        try:
            last = self.template.render(self.template.script([user, Voice()], (), Mode("plain")), (), False)
            followed = self.template.render(
                self.template.script([user, Voice(), Line("user", sentinel("m", 2))], (), Mode("plain")), (), True
            )
        except Refused:
            return ""
        if mark not in last or mark not in followed:
            return ""
        one, two = (text[text.index(mark) + len(mark) :] for text in (last, followed))
        length = 0
        while length < min(len(one), len(two)) and one[length] == two[length]:
            length += 1
        return one[:length]

    # -- one rendering -------------------------------------------------------------------------------

    def lay_out(
        self, items: Sequence[Item], tools: Sequence[dict[str, Any]], mode: Mode, before: Sequence[str] | None
    ) -> Layout:
        """Render `items` (the header of the next turn after them) and find the gaps.

        `before[i]` is the gap in front of voice i as it was when the voice spoke: where the template
        still begins with it, it stays; what the template adds behind it (`<think>`, a blank) was the
        voice's own to say. None takes gaps as they are. Raises `Refused` where the template refuses or loses a part.
        """
        text = self.template.render(self.template.script(items, tools, mode), tools, True)
        gaps: list[str] = []
        kept: list[bool] = []
        edge, ended = 0, True
        for index, item in enumerate(items):
            if not isinstance(item, Voice):
                continue
            way = mode.of(len(gaps))
            n = self.template.n_calls(index, item, items, way)
            thinking = text.find(sentinel("t", index), edge) if item.thinking else -1
            content = text.find(sentinel("c", index), edge)
            last = text.find(sentinel("z", index, n - 1), edge) if n else content
            told = thinking >= 0 or content >= 0 or (way == "bare" and self.template.thinking_field)
            if item.thinking and not told:
                raise Refused("the template shows nothing of the text in front of calls")
            if last < 0 or content > last:
                raise Refused("the template loses the assistant's words or moves them behind its calls")
            starts = [at for at in (thinking, content) if at >= 0]
            start = min(starts) if starts else self._before_calls(text, edge, index, items)
            gap = text[edge:start]
            whole = thinking >= 0 or not item.thinking
            old = before[len(gaps)] if before is not None and whole else None
            if old is not None and gap.startswith(old):
                gap = old
            elif thinking >= 0:
                gap = self._without_opening(gap)
            elif old is not None and gap.rstrip()[-6:] == old.rstrip()[-6:]:
                gap = gap.rstrip() + old[len(old.rstrip()) :]  # the same header: the blank behind it was the voice's
            gaps.append(gap)
            kept.append(whole)
            edge = self._after_calls(text, index, n, items) if n else content + len(sentinel("c", index))
            ended = bool(self.end) and text.startswith(self.end, edge)
            edge += len(self.end) * ended
        gaps.append(text[edge:])
        return Layout(tuple(gaps), tuple(kept), ended)

    def _without_opening(self, gap: str) -> str:
        """`gap` without the template's `<think>`, which the voice said itself (or its header did)."""
        opener = self.template.thinking[0]
        if gap.rstrip().endswith(opener) and not self.template.header.rstrip().endswith(opener):
            return gap[: gap.rindex(opener)]
        return gap

    def _written(self, index: int, n: int, items: Sequence[Item]) -> str:
        """The calls of the voice at `index` as the tool format writes them."""
        assert self.template.calls is not None
        keys = [call_key(index, j, items) for j in range(n)]
        return self.template.calls.write(
            [ToolCall(name, {"a": sentinel("z", index, j)}, identity) for j, (name, identity) in enumerate(keys)]
        )

    def _before_calls(self, text: str, edge: int, index: int, items: Sequence[Item]) -> int:
        """Where the first call of the voice at `index` begins, where no text stands before it."""
        opening, name, _ = self._written(index, 1, items).partition(call_key(index, 0, items)[0])
        start = text.find(opening + name, edge)
        if start < 0:
            raise Refused("the template opens calls in another way than the tool format")
        return start

    def _after_calls(self, text: str, index: int, n: int, items: Sequence[Item]) -> int:
        """Where the calls of the voice at `index` end."""
        mark = sentinel("z", index, n - 1)
        closing = self._written(index, n, items).rpartition(mark)[2]
        edge = text.index(mark) + len(mark)
        if not text.startswith(closing, edge):
            raise Refused("the template closes calls in another way than the tool format")
        return edge + len(closing)

    # -- finding a mode ------------------------------------------------------------------------------

    def mode(self, items: Sequence[Item], tools: Sequence[dict[str, Any]], tools_key: int) -> Mode:
        """The first mode in which nothing of `items` is lost; remembered by their shape. Raises `Refused`.

        Empty contents are tried as if they were none: that an empty one is lost would not be seen.
        """
        shape = (tools_key, *(item if isinstance(item, Voice) else item.role for item in items))
        found = self._modes.get(shape)
        if found is None:
            if len(self._modes) > 4096:
                self._modes.clear()
            filled = [item if isinstance(item, Voice) else Line(item.role, item.text or "x") for item in items]
            found = self._modes[shape] = self._find_mode(filled, tools, tools_key)
        return found

    def _find_mode(self, items: Sequence[Item], tools: Sequence[dict[str, Any]], tools_key: int) -> Mode:
        reason = "it renders no assistant turn"
        modes = list(self.template.modes(items))
        voices = [index for index, item in enumerate(items) if isinstance(item, Voice)]
        if len(voices) > 1:
            parts = [items[start:stop] for start, stop in zip(voices, [*voices[1:], len(items)], strict=True)]
            alone = [self.mode([Line("user", "x"), *part], tools, tools_key) for part in parts]
            modes.insert(0, Mode("", any(mode.merge for mode in alone), tuple(mode.calls for mode in alone)))
        items = sentinels(items)
        for mode in modes:
            try:
                layout = self.lay_out(items, tools, mode, None)
            except Refused as error:
                reason = str(error)
                continue
            if _complete(items, layout):
                return mode
            reason = "the template loses a message"
        raise Refused(reason)

    def chain(self, items: Sequence[Item], tools: Sequence[dict[str, Any]], tools_key: int) -> list[Layout]:
        """The layouts of the conversation as it was before each voice, and of the whole."""
        layouts: list[Layout] = []
        before: list[str] = []
        for stop in [*(i for i, item in enumerate(items) if isinstance(item, Voice)), len(items)]:
            part = items[:stop]
            layout = self.lay_out(part, tools, self.mode(part, tools, tools_key), before)
            layouts.append(layout)
            before = list(layout.gaps)
        return layouts


def sentinels(items: Sequence[Item], probe: bool = False) -> list[Item]:
    """`items` with stand-ins for every content, name and id (`probe`: contents that test how they are treated)."""
    stand_ins: list[Item] = []
    for index, item in enumerate(items):
        if isinstance(item, Voice):
            stand_ins.append(item)
            continue
        text = item.text and sentinel("m", index)
        if probe and text:
            text = _probe(text)
        tool = item.role == "tool"
        stand_ins.append(
            Line(item.role, text, sentinel("n", index) if tool else "", sentinel("i", index) if tool else "")
        )
    return stand_ins


def _probe(text: str) -> str:
    return f' \n\t"\'<b>\\né&amp;\u2028{text}</b>{{}} \\"\n \n'


def _complete(items: Sequence[Item], layout: Layout) -> bool:
    """True where each line's content stands in the gap where it belongs. A system's text may be gone once the
    assistant has spoken (Mistral shows it only in front of a last user message)."""
    gap = 0
    for item in items:
        if isinstance(item, Voice):
            gap += 1
        elif item.text not in layout.gaps[gap] and not (item.role == "system" and len(layout.gaps) > 1):
            return False
    return True


def learn(gap: str, probed: str, first: int) -> Pattern | None:
    """The pattern of a gap from its renderings with `sentinels` and with probes; None where contents are
    not put in as they are. Lines are numbered from `first`."""
    literals: list[str] = []
    slots: list[tuple[int, str, Transform]] = []
    edge = at = 0
    for match in _SENTINEL.finditer(gap):
        literals.append(gap[edge : match.start()])
        edge = match.end()
        if not probed.startswith(literals[-1], at):
            return None
        at += len(literals[-1])
        kind, index = match.group(1), int(match.group(2))
        if index < first:
            return None
        if kind != "m":
            if not probed.startswith(match.group(), at):
                return None
            slots.append((index - first, _FIELDS[kind], _same))
            at += len(match.group())
            continue
        following = _SENTINEL.search(gap, edge)
        literal = gap[edge : following.start() if following else len(gap)]
        for transform in _TRANSFORMS:
            value = transform(_probe(match.group()))
            if probed.startswith(value + literal, at):
                break
        else:
            return None
        slots.append((index - first, "text", transform))
        at += len(value)
    literals.append(gap[edge:])
    if probed[at:] != literals[-1]:
        return None
    return Pattern(tuple(literals), tuple(slots))
