"""What full-text search reads of a trajectory: its prompt, what was said, and what came back.

The writer makes this text as a trajectory is stored; a rebuild makes the same text from the segments. A text is
read up to `LONGEST` characters. Prompts are known where their token arrays stand in the segment itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from agentrl.store.frames import unpack
from agentrl.trajectory import Ids, Turn

LONGEST = 100_000  # characters
Known = dict[tuple[str, int, int], Ids]  # (trajectory, attempt, span number) -> the span's ids


def text_of(prompt: str, turns: Sequence[Turn]) -> str:
    """The text of a trajectory's record."""
    return _joined(
        prompt,
        (
            (turn.text, turn.observation, [(use.call.name, use.call.arguments, use.result.text) for use in turn.tools])
            for turn in turns
        ),
    )


def text_in(prompt: str, head: bytes, observations: bytes) -> str:
    """The same text from the packed bytes of a TRAJECTORY and an OBSERVATIONS frame."""
    whats, reads = unpack(head)[13], unpack(observations)
    if len(reads) != len(whats):  # their frame is damaged
        reads = [["", *[""] * len(what[8])] for what in whats]
    return _joined(
        prompt,
        (
            (what[3], read[0], [(use[0], use[1], text) for use, text in zip(what[8], read[1:], strict=True)])
            for what, read in zip(whats, reads, strict=True)
        ),
    )


def _joined(prompt: str, turns: Iterable[tuple[str, str, list[tuple[str, Mapping[str, Any], str]]]]) -> str:
    parts = [prompt[:LONGEST]]
    room = LONGEST - len(parts[0])
    for text, observation, calls in turns:
        # A policy's calls stand in its text, and results in the observation, nearly always; what does not is added.
        more = [result for _, _, result in calls if result not in observation]
        more += [f"{name} {_values(arguments)}" for name, arguments, _ in calls if name not in text]
        for part in (text, observation, *more):
            if room > 0:
                parts.append(part[:room])
                room -= len(part)
    whole = "\n".join(parts)
    if whole.isascii():
        return whole
    return whole.encode("utf-8", "replace").decode()  # SQLite takes no lone surrogates


def _values(arguments: Mapping[str, Any]) -> str:
    return " ".join(f"{name} {value}" for name, value in arguments.items() if isinstance(value, str | int | float))


def learn(table: Sequence[Sequence[Any]], data: bytes, name: tuple[str, int], known: Known) -> None:
    """Put all of a trajectory's own spans into `known`; `table` and `data` as in `prompt_ids`."""
    at = 0
    for number, row in enumerate(table):
        if len(row) > 3:
            known[(*name, number)] = np.frombuffer(data, "<i4", row[0], at)
            at += 4 * row[0]


def prompt_ids(head: bytes, table: Sequence[Sequence[Any]], data: bytes, name: tuple[str, int], known: Known) -> Ids:
    """The ids of the first turn's context, from packed bytes: the head, the span table and the arrays of its frames.

    `known` holds what earlier trajectories kept of their prompts, for references to them, and gets this one's.
    """
    turns = unpack(head)[13]
    added = turns[0][1] if turns else []
    wanted = set(added[0::3])
    at = 0
    spans: dict[int, Ids] = {}
    for number, row in enumerate(table):
        if len(row) == 3:
            place = (row[0], row[1], row[2])
            if number in wanted and place in known:
                spans[number] = known[place]
            continue
        if number in wanted:
            spans[number] = known[(*name, number)] = np.frombuffer(data, "<i4", row[0], at)
        at += 4 * row[0]
    pieces = [spans[added[i]][added[i + 1] : added[i + 2]] for i in range(0, len(added), 3) if added[i] in spans]
    return np.concatenate(pieces) if pieces else np.zeros(0, np.int32)
