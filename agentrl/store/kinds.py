"""Kinds: which trajectories are alike in all that has few values (stage, split, outcome, success, …), and how many.

A run has some dozens of kinds. Each row of the index names its kind, and each order of a list has an index within
the kinds. So a filter on such facts is a choice of kinds, found in a table of dozens: how many rows it has is a sum,
and its list in any order is the kinds' lists merged. Nothing is scanned, however rare or empty the combination is.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

FACTS = ("stage", "split", "env", "source", "outcome", "why", "success", "errors", "latest")
SCHEMA = f"CREATE TABLE kinds (kind INTEGER PRIMARY KEY, {', '.join(FACTS)}, n INTEGER NOT NULL DEFAULT 0);"
_KNOWN = f"SELECT kind FROM kinds WHERE {' AND '.join(f'{name} IS ?' for name in FACTS)}"
_NEW = f"INSERT INTO kinds ({', '.join(FACTS)}) VALUES ({', '.join('?' * len(FACTS))})"
_COUNT = "UPDATE kinds SET n = n + ? WHERE kind = ?"
_OUTDATED = """
SELECT rowid, kind FROM trajectories
WHERE id = ?1 AND latest AND attempt < (SELECT MAX(attempt) FROM trajectories WHERE id = ?1)
"""
Fetch = Callable[..., list[Any]]


def kinds_of(connection: sqlite3.Connection, rows: Sequence[Sequence[Any]], facts: Sequence[str]) -> list[int]:
    """The kinds of new rows, whose values are `facts`, counted; within the caller's transaction."""
    at = [facts.index(name) for name in FACTS[:-2]]
    errors = facts.index("n_errors")
    keys = [(*(row[i] for i in at), int(row[errors] > 0), 1) for row in rows]
    known = {key: _kind(connection, key) for key in dict.fromkeys(keys)}
    connection.executemany(_COUNT, [(n, known[key]) for key, n in Counter(keys).items()])
    return [known[key] for key in keys]


def supersede(connection: sqlite3.Connection, ids: Iterable[str]) -> None:
    """Earlier attempts of these trajectories are the latest no more; within the caller's transaction."""
    for id in ids:
        for rowid, kind in connection.execute(_OUTDATED, (id,)).fetchall():
            (key,) = connection.execute(f"SELECT {', '.join(FACTS)} FROM kinds WHERE kind = ?", (kind,)).fetchall()
            other = _kind(connection, (*key[:-1], 0))
            connection.execute("UPDATE trajectories SET latest = 0, kind = ? WHERE rowid = ?", (other, rowid))
            connection.executemany(_COUNT, [(-1, kind), (1, other)])


def _kind(connection: sqlite3.Connection, key: Sequence[Any]) -> int:
    found = connection.execute(_KNOWN, key).fetchone()
    if found is None:
        return int(connection.execute(_NEW, key).lastrowid or 0)
    return int(found[0])


def chosen(fetch: Fetch, asked: dict[str, object]) -> list[tuple[int, int]]:
    """(kind, rows) of every kind that has rows and for which all of `asked` holds."""
    where = " AND ".join(["n > 0", *(f"{name} = ?" for name in asked)])
    return [(int(kind), int(n)) for kind, n in fetch(f"SELECT kind, n FROM kinds WHERE {where}", *asked.values())]
