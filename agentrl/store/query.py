"""Questions to the index: which trajectories, in which order, from where on; answered a page at a time.

Pages are by key, never by OFFSET. What a filter asks of facts with few values chooses kinds (`kinds.py`); within a kind
every order has an index, and a page is the merge of the chosen kinds' first rows. Ranges of steps and rewards are
looked at in those indices. Where something else finds few rows (a group, a task, a range, a search), those are
fetched and sorted instead. A search's hits come as one list of row ids, which takes a tenth of what joining them takes.
"""

from __future__ import annotations

import heapq
import itertools
import math
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from agentrl.errors import UsageError
from agentrl.store import index, kinds
from agentrl.store.kinds import Fetch

Sort = Literal["added", "reward", "step", "n_calls", "n_tokens", "n_turns", "seconds", "tool_cost"]
SORTS: tuple[Sort, ...] = get_args(Sort)
MANY = 2_000  # rows that are fetched and sorted in milliseconds, whatever else could be done
_FOUND = 20_000  # hits that a search sorts; more are looked up as the order is walked
_CHUNK = 256  # rows of a kind that are asked for at a time, where not all of them may fit

Hits = NDArray[np.int64]  # row ids that a search found, in order
Row = tuple[object, ...]
Key = tuple[float | None, int]  # what a list is ordered by, and the row id


@dataclass(frozen=True, slots=True)
class Filter:
    """What a list shows; None asks nothing. Bounds are closed; `errors` keeps those with a failed call or turn.

    `text` is searched for in prompts, messages, tool calls and results: every word must be there, in any
    order and case; the last may be the beginning of a word. Only the latest attempts count, unless `all_attempts`.
    """

    stage: str | None = None
    step: int | None = None
    step_min: int | None = None
    step_max: int | None = None
    split: str | None = None
    group: str | None = None
    task: str | None = None
    env: str | None = None
    outcome: str | None = None
    why: str | None = None
    success: bool | None = None
    source: str | None = None
    reward_min: float | None = None
    reward_max: float | None = None
    errors: bool = False
    text: str | None = None
    all_attempts: bool = False


@dataclass(frozen=True, slots=True)
class Terms:
    """Conditions on rows, all of which hold: SQL for each, and the values of its marks."""

    clauses: tuple[str, ...] = ()
    values: tuple[object, ...] = ()

    def __add__(self, other: Terms) -> Terms:
        return Terms(self.clauses + other.clauses, self.values + other.values)

    def __bool__(self) -> bool:
        return bool(self.clauses)

    def __str__(self) -> str:
        return " AND ".join(self.clauses) or "1"


def _terms(*asked: tuple[str, str, object]) -> Terms:
    given = [(f"{name} {sign} ?", value) for name, sign, value in asked if value is not None]
    return Terms(tuple(clause for clause, _ in given), tuple(value for _, value in given))


def _facts(f: Filter) -> dict[str, object]:
    """What the filter asks of a row's kind."""
    asked = {
        "stage": f.stage, "split": f.split, "env": f.env, "source": f.source, "outcome": f.outcome, "why": f.why,
        "success": None if f.success is None else int(f.success), "errors": 1 if f.errors else None,
        "latest": None if f.all_attempts else 1,
    }  # fmt: skip
    return {name: value for name, value in asked.items() if value is not None}


def _ranges(f: Filter) -> dict[str, Terms]:
    """What it asks of what stands in every index of an order, by the index that finds it best."""
    steps = _terms(("step", "=", f.step), ("step", ">=", f.step_min), ("step", "<=", f.step_max))
    rewards = _terms(("reward", ">=", f.reward_min), ("reward", "<=", f.reward_max))
    return {name: terms for name, terms in (("by_step", steps), ("by_reward", rewards)) if terms}


def _names(f: Filter) -> dict[str, Terms]:
    """What it asks of the row itself, by the index that finds it."""
    found = {"by_group": _terms(("group_id", "=", f.group)), "by_task": _terms(("task_id", "=", f.task))}
    return {name: terms for name, terms in found.items() if terms}


def words_of(text: str) -> list[str]:
    """The words that a search looks for, split as the search index splits texts (FTS5's unicode61)."""
    split = "".join(c if unicodedata.category(c)[0] in "LN" or unicodedata.category(c) == "Co" else " " for c in text)
    return split.split()


def match_of(text: str) -> str:
    """`text` as an FTS5 query. Raises `UsageError` where it holds no word."""
    words = words_of(text)
    if not words:
        raise UsageError(f"{text!r} holds no word to search for; give a word or a number")
    last = "" if text[-1:].isspace() or len(words[-1]) < 3 else "*"  # short beginnings are too many words
    return " ".join([f'"{word}"' for word in words[:-1]] + [f'"{words[-1]}"{last}'])


def select(
    columns: str, filter: Filter, sort: Sort, descending: bool, after: Key | None, limit: int, fetch: Fetch
) -> list[Row]:
    """The rows of one page, at most `limit`. `fetch(sql, *values)` runs a query.

    Missing rewards come last in either order.
    """
    match = match_of(filter.text) if filter.text else None
    found = kinds.chosen(fetch, _facts(filter))
    if not found:
        return []
    ((last,),) = fetch("SELECT ifnull(MAX(rowid), 0) FROM trajectories")
    many = max(MANY, math.isqrt(limit * int(str(last))))
    look = _Look(filter, sort, descending, [kind for kind, _ in found], fetch)
    hits: Hits | None = None
    if match is None:
        driver = look.driver(many)
    else:
        many = min(many, _FOUND)
        few = look.driver(many, len(_facts(filter)) > 1 and sum(n for _, n in found) <= many)
        driver, hits = look.searched(match, few)
    rows: list[Row] = []
    for missing in (False, True) if sort == "reward" else (False,):
        begin = look.beginning(after, missing)
        if begin is None:
            continue
        if driver is not None:
            rows += look.sorted(columns, driver, begin, limit - len(rows))
        else:
            rows += look.walked(columns, hits, begin, limit - len(rows), missing)
        if len(rows) >= limit:
            break
    return rows


@dataclass(frozen=True, slots=True)
class _Driver:
    """What finds the rows of a list that is sorted then: the source of a SELECT, its values, whose row id counts."""

    source: str
    values: tuple[object, ...] = ()
    table: str = "t"


def _hit(ids: Hits, hits: Hits) -> Hits:
    """Those of `ids` that are hits."""
    at = np.searchsorted(hits, ids)
    inside = at < hits.size
    found: Hits = ids[inside][hits[at[inside]] == ids[inside]]
    return found


def _among(ids: Hits) -> _Driver:
    """The rows with these ids."""
    return _Driver(f"(SELECT * FROM trajectories WHERE rowid IN ({', '.join(map(str, ids.tolist()))})) AS t")


@dataclass(frozen=True, slots=True)
class _Look:
    """One page to be found: of `kinds`, those that the filter chose."""

    filter: Filter
    sort: Sort
    descending: bool
    kinds: Sequence[int]
    fetch: Fetch

    @property
    def _conditions(self) -> Terms:
        """All of the filter but its text."""
        return sum((*_ranges(self.filter).values(), *_names(self.filter).values()), self._of_kind)

    @property
    def _of_kind(self) -> Terms:
        return Terms((f"kind IN ({', '.join(map(str, self.kinds))})",))

    def driver(self, many: int, alike: bool = False) -> _Driver | None:
        """What finds at most `many` rows; None where the order is walked. `alike`: there are so few of these kinds."""
        found: dict[str, int] = {"by_kind": 0} if alike else {}
        for name, terms in _names(self.filter).items():
            found[name] = self._count(f"trajectories INDEXED BY {name} WHERE {terms}", terms.values, many)
        ranges = _ranges(self.filter)
        walks = self.filter.text is None and index.ORDERS[self.sort][0] in ranges  # to where the range begins
        if ranges and not walks and min(found.values(), default=many + 1) > many:
            within = sum(ranges.values(), self._of_kind)
            name = next(iter(ranges))  # both ranges are looked at in either
            found[name] = self._count(f"trajectories INDEXED BY {name} WHERE {within}", within.values, many)
        best = min(found, key=lambda name: found[name], default=None)
        return _Driver(f"trajectories AS t INDEXED BY {best}") if best is not None and found[best] <= many else None

    def searched(self, match: str, few: _Driver | None) -> tuple[_Driver | None, Hits | None]:
        """What finds a search's rows, or its hits where the order is walked. `few` finds the rest of the filter."""
        if few is not None:
            asked = self._conditions
            found = self.fetch(f"SELECT rowid FROM {few.source} WHERE {asked}", *asked.values)
            ids = np.array([id for (id,) in found], np.int64)
            return _among(_hit(ids, self._hits(match, int(ids.min(initial=2**62)), int(ids.max(initial=0))))), None
        if self.sort == "added":  # as the hits stand
            return _Driver("search CROSS JOIN trajectories AS t ON t.rowid = search.rowid", (match,), "search"), None
        hits = self._hits(match)
        return (_among(hits), None) if hits.size <= _FOUND else (None, hits)

    def _hits(self, match: str, low: int = 1, high: int = 2**62) -> Hits:
        """The row ids between two that a search finds, in order."""
        query = "SELECT group_concat(rowid) FROM search WHERE search MATCH ? AND rowid BETWEEN ? AND ?"
        ((found,),) = self.fetch(query, match, low, high)
        return np.fromstring(str(found), np.int64, sep=",") if found else np.zeros(0, np.int64)

    def _count(self, what: str, values: tuple[object, ...], many: int) -> int:
        """How many rows there are, no more than `many` + 1."""
        ((n,),) = self.fetch(f"SELECT COUNT(*) FROM (SELECT 1 FROM {what} LIMIT {many + 1})", *values)
        return int(str(n))

    def beginning(self, after: Key | None, missing: bool) -> Terms | None:
        """Where the page begins, in one of the two parts that an order by reward has. None: not in this part."""
        column, sign = index.ORDERS[self.sort][1], "<" if self.descending else ">"
        part = Terms((f"reward IS {'' if missing else 'NOT '}NULL",)) if self.sort == "reward" else Terms()
        if after is None:
            return part
        if missing:
            return part + (_terms(("t.rowid", sign, after[1])) if after[0] is None else Terms())
        if self.sort == "reward" and after[0] is None:  # the page before ended among the missing rewards
            return None
        if self.sort == "added":
            return part + _terms(("t.rowid", sign, after[1]))
        return part + Terms((f"({column}, t.rowid) {sign} (?, ?)",), after)

    def _order(self, table: str = "t") -> str:
        way, column = "DESC" if self.descending else "ASC", index.ORDERS[self.sort][1]
        return f"{table}.rowid {way}" if self.sort == "added" else f"{column} {way}, t.rowid {way}"

    def sorted(self, columns: str, driver: _Driver, begin: Terms, limit: int) -> list[Row]:
        """The rows that a driver finds."""
        asked = self._conditions + begin
        clauses = str(asked).replace("t.rowid", f"{driver.table}.rowid") if self.sort == "added" else str(asked)
        text = "search MATCH ? AND " if driver.values else ""
        return self.fetch(
            f"SELECT {columns} FROM {driver.source} WHERE {text}{clauses} ORDER BY {self._order(driver.table)} LIMIT ?",
            *driver.values,
            *asked.values,
            limit,
        )

    def walked(self, columns: str, hits: Hits | None, begin: Terms, limit: int, missing: bool) -> list[Row]:
        """The first rows of all kinds in their order, as far as they fit."""
        names = sum(_names(self.filter).values(), Terms())
        size = _CHUNK if hits is not None or names else limit
        ways = [self._kind(kind, begin, missing, size) for kind in self.kinds]
        merged = heapq.merge(*ways, reverse=self.descending)
        found: list[int] = []
        while len(found) < limit and (chunk := [rowid for _, rowid in itertools.islice(merged, size)]):
            if hits is not None:
                chunk = _hit(np.array(chunk, np.int64), hits).tolist()
            if names and chunk:
                marks = ", ".join("?" * len(chunk))
                rows = self.fetch(
                    f"SELECT rowid FROM trajectories WHERE rowid IN ({marks}) AND {names}", *chunk, *names.values
                )
                fit = {rowid for (rowid,) in rows}
                chunk = [rowid for rowid in chunk if rowid in fit]
            found += chunk
        return self._whole(columns, found[:limit])

    def _kind(self, kind: int, begin: Terms, missing: bool, size: int) -> Iterator[tuple[Any, int]]:
        """(value, row id) of one kind's rows in their order, by its index alone."""
        name, column = index.ORDERS[self.sort]
        value = "0" if missing else column
        asked = sum((*_ranges(self.filter).values(), begin), Terms(("kind = ?",), (kind,)))
        while True:
            rows = self.fetch(
                f"SELECT {value}, rowid FROM trajectories AS t INDEXED BY {name} WHERE {asked} "
                f"ORDER BY {'t.rowid ' + ('DESC' if self.descending else 'ASC') if missing else self._order()} LIMIT ?",
                *asked.values,
                size,
            )
            yield from rows
            if len(rows) < size:
                return
            key: Key = (None if missing else rows[-1][0], rows[-1][1])
            begin = self.beginning(key, missing) or Terms()
            asked = sum((*_ranges(self.filter).values(), begin), Terms(("kind = ?",), (kind,)))

    def _whole(self, columns: str, rowids: Sequence[int]) -> list[Row]:
        found: dict[object, Row] = {}
        for i in range(0, len(rowids), 500):
            part = rowids[i : i + 500]
            rows = self.fetch(
                f"SELECT t.rowid, {columns} FROM trajectories AS t WHERE t.rowid IN ({', '.join('?' * len(part))})",
                *part,
            )
            found |= {row[0]: row[1:] for row in rows}
        return [found[rowid] for rowid in rowids]


def plain(
    columns: str, filter: Filter, sort: Sort, descending: bool, after: Key | None, limit: int, fetch: Fetch
) -> list[Row]:
    """The same for an index without kinds, of an earlier format, by whatever way SQLite takes."""
    look = _Look(filter, sort, descending, (), fetch)
    facts = _facts(filter)
    asked = _terms(*((name, "=", value) for name, value in facts.items() if name != "errors"))
    asked = sum((*_ranges(filter).values(), *_names(filter).values()), asked)
    asked += Terms(("n_errors > 0",)) if filter.errors else Terms()
    if filter.text:
        found = "t.rowid IN (SELECT rowid FROM search WHERE search MATCH ?)"
        asked += Terms((found,), (match_of(filter.text),))
    rows: list[Row] = []
    for missing in (False, True) if sort == "reward" else (False,):
        begin = look.beginning(after, missing)
        if begin is not None and len(rows) < limit:
            there = asked + begin
            rows += fetch(
                f"SELECT {columns} FROM trajectories AS t WHERE {there} ORDER BY {look._order()} LIMIT ?",
                *there.values,
                limit - len(rows),
            )
    return rows
