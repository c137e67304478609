"""What lists are made of: a line for each trajectory, pages of them, and a group's members."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from agentrl.store.credit import Credit
from agentrl.trajectory import Trajectory


class Cursor(NamedTuple):
    """Where a page ended: the sort value and the row id of its last entry."""

    value: float | None
    rowid: int


@dataclass(frozen=True, slots=True)
class Entry:
    """A trajectory's line in a list. `n_tokens` counts sampled tokens; costs and `seconds` are sums over turns."""

    rowid: int
    id: str
    attempt: int
    stage: str
    step: int
    split: str
    group_id: str
    task_id: str
    env: str
    source: str
    parent: str | None
    outcome: str
    why: str | None
    reward: float | None
    success: bool | None
    n_turns: int
    n_calls: int
    n_tokens: int
    n_errors: int
    tool_cost: float
    turn_cost: float
    seconds: float
    latest: bool


@dataclass(frozen=True, slots=True)
class Page:
    """Entries in order. `next` is the cursor of the next page, None at the end; `last` is that of the
    last entry, with which a list of a run that still writes goes on later.
    """

    entries: tuple[Entry, ...]
    next: Cursor | None
    last: Cursor | None


@dataclass(frozen=True, slots=True)
class Sibling:
    """A member of a group. `credit` is what it was worth, None where it gave none (dropped, failed, not trained)."""

    entry: Entry
    trajectory: Trajectory
    credit: Credit | None


COLUMNS = ", ".join(f"t.{name}" for name in Entry.__dataclass_fields__)  # of the table `trajectories`, called t
_FLAGS = [list(Entry.__dataclass_fields__).index(name) for name in ("success", "latest")]


def entry_of(row: Sequence[Any]) -> Entry:
    """The line of a row of `COLUMNS`."""
    values = list(row)
    for at in _FLAGS:
        values[at] = None if values[at] is None else bool(values[at])
    return Entry(*values)
