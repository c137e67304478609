"""Whether an episode still opens as it did: its task's prompt and the first observation, against the record.

A record has the hashes of both (`agentrl.rollout.opening`). An older one has neither, but the tokens that its policy
read first: the words of today have to be among those.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping

from agentrl.content import Content, parts_of, text_of
from agentrl.env import Obs
from agentrl.replay.difference import Difference
from agentrl.rollout.opening import KEY, opening_of
from agentrl.store import StoreReader
from agentrl.task import Task
from agentrl.trajectory import Trajectory, ids_of

UNKNOWN = "the prompt was not compared (the record has neither its hash nor its words)"


def first_words(reader: StoreReader, record: Trajectory) -> str | None:
    """What the policy read before its first turn, the chat template's marks included; None where that was not kept."""
    if not record.turns or not record.turns[0].context:
        return None
    ids = ids_of(record.turns[0].context).tolist()
    pieces = reader.pieces(ids)
    return "".join([pieces[token] for token in ids]) if pieces.keys() >= set(ids) else None


def differing_opening(
    record: Trajectory, task: Task, first: Obs | None, words: Callable[[], str | None]
) -> tuple[Difference | None, str]:
    """The first difference of the opening; and what could not be compared, "" where all was."""
    recorded = record.extra.get(KEY)
    if isinstance(recorded, Mapping):
        now = opening_of(task, first)
        shown = {"prompt": _prompt(task), "observation": "" if first is None else text_of(first.content)}
        for what, text in shown.items():
            if recorded.get(what) != now[what]:
                return _other(what, words() or f"(other words; their hash is {recorded.get(what)})", text), ""
        return None, ""
    read = words()
    if read is None:
        return None, UNKNOWN
    said: list[tuple[str, Content | None]] = [("prompt", task.system), ("prompt", task.prompt)]
    said.append(("observation", None if first is None else first.content))
    for what, content in said:
        for part in () if content is None else parts_of(content):
            if isinstance(part, str) and _plain(part) not in _plain(read):
                if "\ufffd" in read or "<|" in part:  # characters of several tokens; marks that are not let through
                    return None, UNKNOWN
                return _other(what, read, part), ""
    return None, ""


def _other(what: str, recorded: str, now: str) -> Difference:
    return Difference("prompt" if what == "prompt" else "observation", recorded, now)


def _prompt(task: Task) -> str:
    return "\n".join([text_of(content) for content in (task.system, task.prompt) if content is not None])


def _plain(text: str) -> str:
    """What a template may change: spaces at the edges, and what some tokenizers fold."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
