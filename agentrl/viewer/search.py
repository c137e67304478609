"""Where the words of a search stand in a trajectory: the line that a list shows beneath a hit."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence

from agentrl.store import Entry, StoreReader
from agentrl.store.query import words_of
from agentrl.trajectory import Trajectory

AROUND = 60  # characters on either side of the first hit
BUDGET = 0.25  # seconds for the snippets of a list


def snippets(
    reader: StoreReader, entries: Sequence[Entry], query: str, *, budget: float = BUDGET
) -> list[list[tuple[str, bool]] | None]:
    """The text around the first hit of each, in pieces (text, whether it is a hit); empty where only the prompt has it.

    None from where the time was over: a record may be of any size, and is read whole.
    """
    words = words_of(query)
    if not words:
        return [[] for _ in entries]
    pattern = re.compile("|".join(rf"\b{re.escape(word)}" for word in words), re.IGNORECASE)
    end = time.perf_counter() + budget
    out: list[list[tuple[str, bool]] | None] = []
    for entry in entries:
        late = time.perf_counter() >= end
        out.append(None if late else _around(reader.get(entry.id, entry.attempt, tokens=False), pattern))
    return out


def _around(trajectory: Trajectory, pattern: re.Pattern[str]) -> list[tuple[str, bool]]:
    def texts() -> Iterator[str]:
        for turn in trajectory.turns:
            yield turn.text
            yield turn.observation
            for use in turn.tools:
                yield f"{use.call.name} {use.call.arguments}"
                yield use.result.text

    for text in texts():
        first = pattern.search(text)
        if first is not None:
            start = max(0, first.start() - AROUND)
            return _marked(text[start : first.end() + AROUND], pattern)
    return []


def _marked(text: str, pattern: re.Pattern[str]) -> list[tuple[str, bool]]:
    pieces: list[tuple[str, bool]] = []
    end = 0
    for match in pattern.finditer(text):
        if match.start() > end:
            pieces.append((text[end : match.start()], False))
        pieces.append((match[0], True))
        end = match.end()
    if end < len(text):
        pieces.append((text[end:], False))
    return pieces
