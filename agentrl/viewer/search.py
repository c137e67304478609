"""Where the words of a search stand in a trajectory: the line that a list shows beneath a hit."""

from __future__ import annotations

import re
from collections.abc import Iterator

from agentrl.store import Entry, StoreReader
from agentrl.store.query import words_of

AROUND = 60  # characters on either side of the first hit


def snippet(reader: StoreReader, entry: Entry, query: str) -> list[tuple[str, bool]]:
    """The text around the first hit, in pieces (text, whether it is a hit); empty where only the prompt has it."""
    words = words_of(query)
    if not words:
        return []
    pattern = re.compile("|".join(rf"\b{re.escape(word)}" for word in words), re.IGNORECASE)
    trajectory = reader.get(entry.id, entry.attempt, tokens=False)

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
