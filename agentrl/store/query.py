"""Questions to the index: which trajectories, in which order, from where on; answered a page at a time.

Pages are by key, never by OFFSET. What makes a page fast is the index that drives it: a filter that few
rows pass is followed and its rows are sorted; otherwise the sort's own index is walked until the page
is full. Following costs a look-up for each of the filter's n rows, walking about limit * N / n of the table's N; which
is less is found out by counting, up to where the two are equal.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal, get_args

from agentrl.errors import UsageError

Sort = Literal["added", "reward", "step", "n_calls", "n_tokens", "n_turns", "seconds", "tool_cost"]
SORTS: tuple[Sort, ...] = get_args(Sort)
MANY = 2_000  # rows that are fetched and sorted in milliseconds, whatever else could be done
_FOUND = 20_000  # hits that a search sorts: walking another index would list them all as well

_INDEX_OF_SORT = {
    "added": "", "reward": "by_reward", "step": "by_step", "n_calls": "by_calls", "n_tokens": "by_tokens",
    "n_turns": "by_turns", "seconds": "by_seconds", "tool_cost": "by_cost",
}  # fmt: skip
Fetch = Callable[..., list[tuple[object, ...]]]


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
class Term:
    """A condition on a row, and the index (if any) that finds the rows for which it holds."""

    clause: str
    values: tuple[object, ...]
    index: str = ""
    ordered: bool = False  # within the index, such rows stand in the order of their row ids


def terms_of(filter: Filter) -> list[Term]:
    """The conditions of a filter, but for its text."""
    f = filter
    equal = (
        ("stage", f.stage, "by_stage"), ("split", f.split, "by_split"), ("step", f.step, "by_step"),
        ("group_id", f.group, "by_group"), ("task_id", f.task, "by_task"), ("source", f.source, "by_source"),
        ("success", None if f.success is None else int(f.success), "by_success"),
    )  # fmt: skip
    terms = [Term(f"{name} = ?", (value,), index, True) for name, value, index in equal if value is not None]
    if f.outcome is not None:
        values = (f.outcome,) if f.why is None else (f.outcome, f.why)
        terms.append(Term("outcome = ? AND why = ?" if len(values) > 1 else "outcome = ?", values, "by_outcome"))
    elif f.why is not None:
        terms.append(Term("why = ?", (f.why,)))
    for name, value, low, high, index in (
        ("env", f.env, None, None, "by_env"),
        ("step", None, f.step_min, f.step_max, "by_step"),
        ("reward", None, f.reward_min, f.reward_max, "by_reward"),
    ):
        asked = [("=", value), (">=", low), ("<=", high)]
        asked = [(sign, bound) for sign, bound in asked if bound is not None]
        if asked:
            clause = " AND ".join(f"{name} {sign} ?" for sign, _ in asked)
            terms.append(Term(clause, tuple(bound for _, bound in asked), index))
    if f.errors:
        terms.append(Term("n_errors > 0", (), "by_errors"))
    if not f.all_attempts:
        terms.append(Term("latest = 1", ()))
    return terms


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
    columns: str,
    filter: Filter,
    sort: Sort,
    descending: bool,
    after: tuple[float | None, int] | None,
    limit: int,
    fetch: Fetch,
    indices: Collection[str],
) -> list[tuple[object, ...]]:
    """The rows of one page, at most `limit`. `fetch(sql, *values)` runs a query; `indices` are those there are.

    Missing rewards come last in either order.
    """
    terms = terms_of(filter)
    match = match_of(filter.text) if filter.text else None
    column = "rowid" if sort == "added" else sort
    ((last,),) = fetch("SELECT ifnull(MAX(rowid), 0) FROM trajectories")
    many = max(MANY, math.isqrt(limit * int(str(last))))
    source, driver = _plan(terms, match, sort, fetch, indices, many)
    way, sign = ("DESC", "<") if descending else ("ASC", ">")
    rows: list[tuple[object, ...]] = []
    for missing in (False, True) if sort == "reward" else (False,):
        leg = list(terms)
        if sort == "reward":
            leg.append(Term(f"reward IS {'' if missing else 'NOT '}NULL", ()))
        if after is not None and missing and after[0] is None:
            leg.append(Term(f"t.rowid {sign} ?", (after[1],)))
        elif after is not None and not missing:
            if sort == "reward" and after[0] is None:  # the page before ended among the missing rewards
                continue
            if sort == "added":
                leg.append(Term(f"{driver}.rowid {sign} ?", (after[1],)))
            else:
                leg.append(Term(f"({column}, t.rowid) {sign} (?, ?)", after))
        values = [value for term in leg for value in term.values]
        order = f"{driver}.rowid {way}" if sort == "added" else f"{column} {way}, t.rowid {way}"
        where = " AND ".join(term.clause for term in leg) or "1"
        given = [match] if match is not None else []
        rows += fetch(
            f"SELECT {columns} FROM {source} {where} ORDER BY {order} LIMIT ?", *given, *values, limit - len(rows)
        )
        if len(rows) >= limit:
            break
    return rows


def _plan(
    terms: list[Term], match: str | None, sort: Sort, fetch: Fetch, indices: Collection[str], many: int
) -> tuple[str, str]:
    """(what stands between FROM and the conditions, the table whose rowid orders the list)."""
    table = "trajectories AS t"
    if match is not None:
        few = sort == "added" or _count(fetch, "search WHERE search MATCH ?", (match,), _FOUND) <= _FOUND
        if few:
            return f"search CROSS JOIN {table} ON t.rowid = search.rowid WHERE search MATCH ? AND", "search"
        walked = _hint(_INDEX_OF_SORT[sort], indices)
        return f"{table}{walked} WHERE t.rowid IN (SELECT rowid FROM search WHERE search MATCH ?) AND", "t"
    found = {
        term: _count(fetch, f"trajectories INDEXED BY {term.index} WHERE {term.clause}", term.values, many)
        for term in terms
        if term.index in indices
    }
    best = min(found, key=lambda term: found[term], default=None)
    if sort == "added":  # an index of equal values has its rows in this order already
        tidy = min((term for term in found if term.ordered), key=lambda term: found[term], default=None)
        best = best if best is None or tidy is None or found[best] <= many < found[tidy] else tidy
        if best is not None and (best.ordered or found[best] <= many):
            return f"{table} INDEXED BY {best.index} WHERE", "t"
        return f"{table} NOT INDEXED WHERE", "t"
    if best is not None and found[best] <= many:
        return f"{table} INDEXED BY {best.index} WHERE", "t"
    return f"{table}{_hint(_INDEX_OF_SORT[sort], indices)} WHERE", "t"


def _hint(name: str, indices: Collection[str]) -> str:
    return f" INDEXED BY {name}" if name in indices else ""


def _count(fetch: Fetch, what: str, values: tuple[object, ...], many: int) -> int:
    """How many rows there are, no more than `many` + 1."""
    ((n,),) = fetch(f"SELECT COUNT(*) FROM (SELECT 1 FROM {what} LIMIT {many + 1})", *values)
    return int(str(n))
