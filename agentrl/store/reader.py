"""Reading: lists come from the index, records from the segments; any number of threads, while a run writes."""

from __future__ import annotations

import os
import re
import sqlite3
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from agentrl.errors import UsageError
from agentrl.store import index
from agentrl.store.codec import TokensNotKept, spans_of, trajectory_in
from agentrl.store.credit import Credit, credit_in
from agentrl.store.frames import DamagedFrame, Frame, parse, unpack
from agentrl.store.journal import Flight, read_flight, read_journals
from agentrl.store.key import EpisodeKey
from agentrl.store.query import Filter, Sort, select
from agentrl.trajectory import Span, Trajectory, Turn


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


_COLUMNS = ", ".join(f"t.{name}" for name in Entry.__dataclass_fields__)
_ALL = Filter()
_FLAGS = [list(Entry.__dataclass_fields__).index(name) for name in ("success", "latest")]
_PLACES = "segment, offset, length, tokens_segment, tokens_offset, tokens_length, read_offset, read_length"


class StoreReader:
    """Reads the store of one run; every thread has its own connection.

    Lists and look-ups see the latest attempt of each trajectory unless asked otherwise. Raises
    `UsageError` where the folder holds no store.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir, self._folder = run_dir, run_dir / "seg"
        self._local = threading.local()
        self._lock = threading.Lock()
        self._connections: list[sqlite3.Connection] = []
        self._files: dict[str, int] = {}
        self._known_indices: frozenset[str] | None = None
        self._db()

    def trajectories(
        self,
        *,
        after: Cursor | None = None,
        limit: int = 100,
        sort: Sort = "added",
        descending: bool = False,
        step: int | None = None,
        stage: str | None = None,
        split: str | None = None,
        group: str | None = None,
        task: str | None = None,
        env: str | None = None,
        reward: tuple[float | None, float | None] = (None, None),
        all_attempts: bool = False,
    ) -> Page:
        """A page of the list; missing rewards sort last. `reward` is a closed range, None = no bound.

        With sort "added", `after` the `last` cursor seen gives what was added since.
        """
        low, high = reward
        asked = Filter(
            stage=stage, step=step, split=split, group=group, task=task, env=env,
            reward_min=low, reward_max=high, all_attempts=all_attempts,
        )  # fmt: skip
        return self.query(asked, sort=sort, descending=descending, after=after, limit=limit)

    def query(
        self,
        asked: Filter = _ALL,
        *,
        sort: Sort = "added",
        descending: bool = False,
        after: Cursor | None = None,
        limit: int = 100,
    ) -> Page:
        """A page of the list of what passes `asked`; missing rewards sort last."""
        if asked.text and self.format < 2:
            raise UsageError(f"this store has no search yet; run: agentrl index {self._run_dir} --rebuild")
        rows = select(_COLUMNS, asked, sort, descending, after, limit + 1, self._rows, self._indices())
        entries = tuple(_entry(row) for row in rows[:limit])
        by = "rowid" if sort == "added" else sort
        last = Cursor(getattr(entries[-1], by), entries[-1].rowid) if entries else after
        return Page(entries, last if len(rows) > limit else None, last)

    def entry(self, id: str, attempt: int | None = None) -> Entry:
        """One line of the list. Raises `KeyError` where there is none."""
        clause, values = _which(id, attempt)
        rows = self._rows(f"SELECT {_COLUMNS} FROM trajectories AS t WHERE {clause}", *values)
        if not rows:
            raise KeyError(_absent(id, attempt))
        return _entry(rows[0])

    def get(self, id: str, attempt: int | None = None, *, tokens: bool = True) -> Trajectory:
        """A whole trajectory, equal to what was written; without `tokens`, contexts and outputs stay empty.

        Raises `KeyError` where it is not stored, `TokensNotKept` where `store.tokens` dropped its arrays.
        """
        clause, values = _which(id, attempt)
        rows = self._rows(f"SELECT {_PLACES} FROM trajectories WHERE {clause}", *values)
        if not rows:
            raise KeyError(_absent(id, attempt))
        segment, offset, length, tokens_segment, tokens_offset, tokens_length, read_offset, read_length = rows[0]
        head = self._frame(segment, offset, length).body
        read = self._frame(segment, read_offset, read_length).body
        if not tokens:
            return trajectory_in(head, read, None)
        spans = self._spans(tokens_segment or segment, tokens_offset, tokens_length, {})
        return trajectory_in(head, read, spans)

    def credit(self, id: str, step: int, attempt: int | None = None) -> Credit | None:
        """What a trajectory was worth at a step (its first membership there), or None."""
        found = self.credits(id=id, step=step, attempt=attempt)
        return found[0] if found else None

    def credits(
        self,
        *,
        id: str | None = None,
        group: str | None = None,
        step: int | None = None,
        stage: str | None = None,
        attempt: int | None = None,
    ) -> list[Credit]:
        """The credit of every membership asked for, by (stage, step, group, member)."""
        given = {"id": id, "group_id": group, "step": step, "stage": stage, "attempt": attempt}
        asked = {column: value for column, value in given.items() if value is not None}
        where = " AND ".join([f"{column} = ?" for column in asked] or ["1"])
        rows = self._rows(
            f"SELECT segment, offset, length FROM credit WHERE {where} ORDER BY stage, step, group_id, member",
            *asked.values(),
        )
        frames = [self._frame(*row) for row in rows]
        return [credit_in(frame.meta, frame.body) for frame in frames]

    def credited(self) -> list[tuple[str, int]]:
        """Every (stage, step) that gave credit, in order."""
        return [(stage, step) for stage, step in self._rows("SELECT DISTINCT stage, step FROM credit ORDER BY 1, 2")]

    def inflight(self, step: int | None = None, stage: str | None = None) -> dict[EpisodeKey, list[Turn]]:
        """The turns, from turn 0 on, of episodes whose latest attempt has turns but no stored trajectory."""
        found = {
            key: turns
            for key, turns in read_journals(self._folder).items()
            if (step is None or key.step == step) and (stage is None or key.stage == stage)
        }
        latest: dict[str, int] = {}
        for key in found:
            latest[key.id] = max(latest.get(key.id, -1), key.attempt)
        stored = {id: self.attempt(id) for id in latest}
        return {
            key: turns
            for key, turns in sorted(found.items(), key=lambda item: item[0].id)
            if key.attempt == latest[key.id] > stored[key.id]
        }

    def flight(self, id: str) -> Flight | None:
        """One episode of `inflight`, with the text of tokens that were never stored yet; None where it is not among
        them."""
        found = read_flight(self._folder, id)
        return found if found is not None and found.key.attempt > self.attempt(id) else None

    def finished(self, step: int, stage: str, split: str | None = None) -> list[str]:
        """The ids of a step's stored trajectories that can be loaded whole (`store.tokens` kept them), sorted."""
        rows = self._rows(
            "SELECT id, tokens_segment, tokens_offset FROM trajectories "
            "WHERE step = ?1 AND stage = ?2 AND latest AND ifnull(split = ?3, 1) ORDER BY id",
            step,
            stage,
            split,
        )
        return [id for id, kept, at in rows if at >= 0 and (not kept or (self._folder / kept).exists())]

    def attempts(self, id: str) -> list[int]:
        """Every stored attempt of a trajectory, in order."""
        return [n for (n,) in self._rows("SELECT attempt FROM trajectories WHERE id = ? ORDER BY attempt", id)]

    def attempt(self, id: str) -> int:
        """The latest stored attempt of a trajectory, -1 where none is stored."""
        ((attempt,),) = self._rows("SELECT MAX(attempt) FROM trajectories WHERE id = ?", id)
        return -1 if attempt is None else int(attempt)

    @property
    def format(self) -> int:
        """The format of the index; one before `index.FORMAT` lacks what was added since."""
        ((version,),) = self._rows("PRAGMA user_version")
        return int(version)

    def count(self) -> int:
        """How many trajectories are stored, without attempts that were superseded."""
        ((n,),) = self._rows("SELECT COUNT(*) FROM trajectories WHERE latest")
        return int(n)

    def lacking(self) -> list[str]:
        """The segments that are gone, or shorter than what was indexed of them: their trajectories cannot be loaded."""
        out = []
        for name, indexed in self._rows("SELECT name, indexed FROM segments ORDER BY name"):
            try:
                whole = (self._folder / name).stat().st_size >= indexed
            except OSError:
                whole = False
            if not whole:
                out.append(str(name))
        return out

    def facets(self) -> dict[str, Any]:
        """What lists can be filtered by: {stages, splits, outcomes: {text: count}, steps: {stage: [min, max]},
        sources, envs}. Superseded attempts count, too.
        """
        outcomes = self._rows("SELECT outcome, why, COUNT(*) FROM trajectories GROUP BY outcome, why")
        stages = self._distinct("stage")
        steps = {}
        for stage in stages:
            ends = [
                self._rows(f"SELECT {end}(step) FROM trajectories WHERE stage = ?", stage)[0][0]
                for end in ("MIN", "MAX")
            ]
            steps[stage] = ends
        return {
            "stages": stages,
            "splits": self._distinct("split"),
            "outcomes": {f"{kind}({why})" if why else str(kind): count for kind, why, count in outcomes},
            "steps": steps,
            "sources": self._distinct("source"),
            "envs": self._distinct("env"),
        }

    def _distinct(self, column: str) -> list[str]:
        """The different values of an indexed column, each found by one step down the index."""
        found: list[str] = []
        while True:
            clause = f"WHERE {column} > ?" if found else ""
            rows = self._rows(f"SELECT {column} FROM trajectories {clause} ORDER BY {column} LIMIT 1", *found[-1:])
            if not rows:
                return found
            found.append(rows[0][0])

    def ids(self) -> list[tuple[str, int]]:
        """Every (id, latest attempt), sorted."""
        return [
            (id, attempt) for id, attempt in self._rows("SELECT id, attempt FROM trajectories WHERE latest ORDER BY id")
        ]

    def pieces(self, tokens: Iterable[int]) -> dict[int, str]:
        """The text of each token id, as far as it was stored."""
        wanted = sorted({int(token) for token in tokens})
        found: dict[int, str] = {}
        for i in range(0, len(wanted), 500):
            part = wanted[i : i + 500]
            found.update(
                self._rows(f"SELECT token, piece FROM pieces WHERE token IN ({','.join('?' * len(part))})", *part)
            )
        return found

    def image(self, sha256: str) -> Path:
        """The file of a stored picture. Raises `KeyError` where there is none."""
        media = self._run_dir / "media"
        if re.fullmatch("[0-9a-f]{64}", sha256):
            for suffix in (".png", ".jpg", ".webp", ".bin"):
                if (path := media / f"{sha256}{suffix}").is_file():
                    return path
        raise KeyError(f"no picture {sha256!r} in {self._run_dir / 'media'}")

    def close(self) -> None:
        """Close connections and files, of every thread. Idempotent."""
        with self._lock:
            for connection in self._connections:
                connection.close()
            for fd in self._files.values():
                os.close(fd)
            self._connections.clear()
            self._files.clear()
        self._local = threading.local()

    def __enter__(self) -> StoreReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- inside -----------------------------------------------------------------------------------

    def _db(self) -> sqlite3.Connection:
        if not hasattr(self._local, "connection"):
            self._local.connection = index.connect_reader(self._run_dir)
            with self._lock:
                self._connections.append(self._local.connection)
        connection: sqlite3.Connection = self._local.connection
        return connection

    def _indices(self) -> frozenset[str]:
        """The indices of this store; one of an earlier format lacks some, and its lists take longer."""
        if self._known_indices is None:
            self._known_indices = frozenset(
                name for (name,) in self._rows("SELECT name FROM sqlite_master WHERE type = 'index'")
            )
        return self._known_indices

    def _rows(self, query: str, *values: object) -> list[Any]:
        try:
            return self._db().execute(query, values).fetchall()
        except sqlite3.DatabaseError as error:
            raise index.index_failed(self._run_dir / index.NAME, error) from error

    def _frame(self, segment: str, offset: int, length: int) -> Frame:
        with self._lock:
            fd = self._files.get(segment)
            if fd is None:
                fd = self._files[segment] = os.open(self._folder / segment, os.O_RDONLY)
        frame = parse(os.pread(fd, length, offset))
        if frame is None:
            raise DamagedFrame(f"{self._folder / segment} is damaged at byte {offset}; restore it from a copy")
        return frame

    def _spans(
        self, segment: str, offset: int, length: int, known: dict[tuple[str, int], Sequence[Span | None]]
    ) -> list[Span | None]:
        """The numbered spans of a TOKENS frame, references resolved; `known` spares what was read already."""
        if offset < 0:
            return []
        try:
            frame = self._frame(segment, offset, length)
        except FileNotFoundError:
            return []
        sizes = frame.meta[2]
        table = unpack(frame.body[sum(sizes) :])

        def resolve(owner: str, attempt: int) -> Sequence[Span | None]:
            if (owner, attempt) not in known:
                places = "segment, tokens_segment, tokens_offset, tokens_length"
                rows = self._rows(f"SELECT {places} FROM trajectories WHERE id = ? AND attempt = ?", owner, attempt)
                found = [self._spans(kept or main, at, n, known) for main, kept, at, n in rows]
                known[owner, attempt] = found[0] if found else []
            return known[owner, attempt]

        return spans_of(table, frame.body, sizes, resolve)


def _entry(row: Sequence[Any]) -> Entry:
    values = list(row)
    for at in _FLAGS:
        values[at] = None if values[at] is None else bool(values[at])
    return Entry(*values)


def _which(id: str, attempt: int | None) -> tuple[str, tuple[object, ...]]:
    return ("id = ? AND latest", (id,)) if attempt is None else ("id = ? AND attempt = ?", (id, attempt))


def _absent(id: str, attempt: int | None) -> str:
    return (
        f"no trajectory {id!r} is stored" if attempt is None else f"no attempt {attempt} of trajectory {id!r} is stored"
    )


__all__ = ["Cursor", "Entry", "Filter", "Page", "Sort", "StoreReader", "TokensNotKept"]
