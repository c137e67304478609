"""A pattern compiled for one tokenizer: ids that never change, and holes that are encoded each time.

Control tokens split a text for the tokenizer: what stands between two of them is encoded the same
whatever stands outside. So of a gap only the stretches around contents, from the control token
before to the control token after, need encoding; the rest is looked up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from agentrl.chat.codec import Codec
from agentrl.chat.layout import Pattern


class Run(NamedTuple):
    """Ids of markup (`line` None) or of the content of a line."""

    ids: list[int]
    line: int | None


@dataclass(frozen=True, slots=True)
class _Hole:
    """The stretch around slots [first, first + n): literals between two anchors, which are encoded too."""

    left: str
    n_left: int
    literals: tuple[str, ...]
    first: int
    right: str
    n_right: int


@dataclass(frozen=True, slots=True)
class Stencil:
    """`parts`: fixed ids and holes in turns. Made by `compile_stencil`, which proves it on samples."""

    pattern: Pattern
    parts: tuple[list[int] | _Hole, ...]
    codec: Codec

    def runs(self, values: Sequence[str]) -> list[Run] | None:
        """The gap's ids for slot `values`; None where they need the careful way (control strings inside)."""
        runs: list[Run] = []
        markup: list[int] = []
        slots = self.pattern.slots
        for part in self.parts:
            if isinstance(part, list):
                markup += part
                continue
            pieces = [part.left, part.literals[0]]
            contents: list[tuple[int, int, int]] = []
            length = len(part.left) + len(part.literals[0])
            for offset, literal in enumerate(part.literals[1:]):
                line, field, _ = slots[part.first + offset]
                value = values[part.first + offset]
                if value and field == "text":
                    contents.append((length, length + len(value) - 1, line))
                pieces += (value, literal)
                length += len(value) + len(literal)
            pieces.append(part.right)
            found = self.codec.between("".join(pieces), part.n_left, part.n_right, contents)
            if found is None:
                return None
            ids, places = found
            edge = 0
            for start, stop, line in places:
                markup += ids[edge:start]
                if markup:
                    runs.append(Run(markup, None))
                runs.append(Run(ids[start:stop], line))
                markup, edge = [], stop
            markup += ids[edge:]
        if markup:
            runs.append(Run(markup, None))
        return runs


def compile_stencil(pattern: Pattern, codec: Codec, lead: str) -> Stencil | None:
    """Compile `pattern` as it stands behind `lead` (the end of a turn, or nothing), or None.

    None where splitting at control tokens does not give the ids of the whole (seen on sample contents).
    """
    literals = list(pattern.literals)
    literals[0] = lead + literals[0]
    parts: list[list[int] | _Hole] = []
    left, open_literals, first = "", [], 0
    for index, literal in enumerate(literals):
        spans = codec.control_spans(literal)
        last = index == len(literals) - 1
        if not spans and not last:
            open_literals.append(literal)
            continue
        start = spans[0][0] - len(codec.string_of(spans[0][1])) if spans else len(literal)
        right = codec.string_of(spans[0][1]) if spans else ""
        open_literals.append(literal[:start])
        if len(open_literals) > 1:
            hole = _Hole(left, _size(codec, left), tuple(open_literals), first, right, _size(codec, right))
            parts.append(hole)
            first += len(open_literals) - 1
        elif left or open_literals[0]:
            head = codec.listed(left + open_literals[0] + right)
            parts.append(head[_size(codec, left) : len(head) - _size(codec, right)])
        if spans:
            stop = spans[-1][0]
            # Behind the last slot all the rest is fixed; before it, up to the next hole's left anchor.
            parts.append(codec.listed(literal[start:] if last else literal[start:stop]))
            left = codec.string_of(spans[-1][1])
            open_literals = [literal[stop:]]
    skip = _size(codec, lead)
    while skip and parts and isinstance(parts[0], list):
        taken = min(skip, len(parts[0]))
        parts[0] = parts[0][taken:]
        skip -= taken
        if not parts[0]:
            parts.pop(0)
    stencil = Stencil(pattern, tuple(parts), codec)
    return stencil if skip == 0 and _holds(stencil, codec, lead) else None


def _size(codec: Codec, text: str) -> int:
    return len(codec.listed(text)) if text else 0


def _holds(stencil: Stencil, codec: Codec, lead: str) -> bool:
    """True where the stencil's ids are those of the whole text, on contents that touch their edges differently."""
    n = _size(codec, lead)
    for value in ("5", " x\n", "\n\n y ", "", "Hello, world.", '{"a": "b"}', "é\u4e2d"):
        values = [value] * len(stencil.pattern.slots)
        whole = codec.listed(lead + stencil.pattern.join(values))
        runs = stencil.runs(values)
        if runs is None or whole[n:] != [index for run in runs for index in run.ids]:
            return False
    return True
