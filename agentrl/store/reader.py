"""Reading: lists come from the index, records from the segments; any number of threads, while a run writes."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from agentrl.content import Image
from agentrl.errors import UsageError
from agentrl.store import index, media
from agentrl.store.codec import TokensNotKept, spans_of, trajectory_in
from agentrl.store.credit import Credit, credit_in
from agentrl.store.entries import COLUMNS, Cursor, Entry, Page, Sibling, entry_of
from agentrl.store.files import Files
from agentrl.store.frames import DamagedFrame, unpack
from agentrl.store.journal import Flight, read_flight, read_journals
from agentrl.store.key import EpisodeKey
from agentrl.store.kinds import Fetch
from agentrl.store.pool import Pool
from agentrl.store.query import Filter, Sort, plain, select
from agentrl.store.tokens import Tokens, tokens_of
from agentrl.trajectory import Span, Trajectory, Turn

_ALL = Filter()
_PLACES = "segment, offset, length, tokens_segment, tokens_offset, tokens_length, read_offset, read_length"


class StoreReader:
    """Reads the store of one run; any thread may.

    Lists and look-ups see the latest attempt of each trajectory unless asked otherwise. Raises
    `UsageError` where the folder holds no store.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir, self._folder = run_dir, run_dir / "seg"
        self._files = Files(self._folder)
        self._format: int | None = None
        self._pool = Pool(run_dir, self._forget)

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
        way = select if self._has_kinds() else plain
        with self._looking() as fetch:
            rows = way(COLUMNS, asked, sort, descending, after, limit + 1, fetch)
        entries = tuple(entry_of(row) for row in rows[:limit])
        by = "rowid" if sort == "added" else sort
        last = Cursor(getattr(entries[-1], by), entries[-1].rowid) if entries else after
        return Page(entries, last if len(rows) > limit else None, last)

    def entries(self, asked: Filter = _ALL) -> Iterator[Entry]:
        """All that passes `asked`, oldest first, read a page at a time."""
        after = None
        while True:
            page = self.query(asked, after=after, limit=1000)
            yield from page.entries
            after = page.next
            if after is None:
                return

    def entry(self, id: str, attempt: int | None = None) -> Entry:
        """One line of the list. Raises `KeyError` where there is none."""
        clause, values = _which(id, attempt)
        rows = self._rows(f"SELECT {COLUMNS} FROM trajectories AS t WHERE {clause}", *values)
        if not rows:
            raise KeyError(_absent(id, attempt))
        return entry_of(rows[0])

    def get(self, id: str, attempt: int | None = None, *, tokens: bool = True) -> Trajectory:
        """A whole trajectory, equal to what was written; without `tokens`, contexts and outputs stay empty.

        Raises `KeyError` where it is not stored, `TokensNotKept` where `store.tokens` dropped its arrays.
        """
        clause, values = _which(id, attempt)
        rows = self._rows(f"SELECT {_PLACES} FROM trajectories WHERE {clause}", *values)
        if not rows:
            raise KeyError(_absent(id, attempt))
        segment, offset, length, tokens_segment, tokens_offset, tokens_length, read_offset, read_length = rows[0]
        head = self._files.frame(segment, offset, length).body
        read = self._files.frame(segment, read_offset, read_length).body
        if not tokens:
            return trajectory_in(head, read, None)
        spans = self._spans(tokens_segment or segment, tokens_offset, tokens_length, {})
        try:
            return trajectory_in(head, read, spans)
        except TokensNotKept:
            raise TokensNotKept(
                f"the token arrays of {id} were not kept (store.tokens of the run's configuration); what was said, "
                "calls, results and rewards are there: read it without tokens"
            ) from None

    def group(self, id: str, *, step: int | None = None, tokens: bool = True) -> list[Sibling]:
        """The members of a group with their credit, by their place in it; then those that gave none.

        A member may be of another group (a replayed episode). `step` is that of the credit, the latest by default.
        Token arrays that were not kept are left out. Raises `KeyError` where there is no such group.
        """
        credits = self.credits(group=id)
        at = max((credit.step for credit in credits), default=None) if step is None else step
        members = [credit for credit in credits if credit.step == at]
        known = {(credit.id, credit.attempt) for credit in members}
        entries: list[tuple[Entry, Credit | None]] = [(self.entry(each.id, each.attempt), each) for each in members]
        others = (entry for entry in self.entries(Filter(group=id)) if (entry.id, entry.attempt) not in known)
        entries += [(entry, None) for entry in others]
        if not entries:
            raise KeyError(f"no group {id!r} is stored")
        return [Sibling(entry, self._any(entry, tokens), credit) for entry, credit in entries]

    def tokens(self, id: str, attempt: int | None = None, *, step: int | None = None) -> Tokens:
        """A trajectory token by token, with its credit of `step` (the latest by default).

        Raises `KeyError` where it is not stored, `TokensNotKept` where `store.tokens` dropped its arrays.
        """
        trajectory = self.get(id, attempt)
        found = self.credits(id=id, attempt=trajectory.attempt, step=step)
        return tokens_of(trajectory, max(found, key=lambda credit: credit.step, default=None), self.pieces)

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
        damaged: list[str] | None = None,
    ) -> list[Credit]:
        """The credit of every membership asked for, by (stage, step, group, member).

        What cannot be read raises `DamagedFrame`; where a list `damaged` is given, it takes the sentence instead.
        """
        given = {"id": id, "group_id": group, "step": step, "stage": stage, "attempt": attempt}
        asked = {column: value for column, value in given.items() if value is not None}
        where = " AND ".join([f"{column} = ?" for column in asked] or ["1"])
        rows = self._rows(
            f"SELECT segment, offset, length FROM credit WHERE {where} ORDER BY stage, step, group_id, member",
            *asked.values(),
        )
        found = []
        for row in rows:
            try:
                frame = self._files.frame(*row)
            except DamagedFrame as error:
                if damaged is None:
                    raise
                damaged.append(str(error))
            else:
                found.append(credit_in(frame.meta, frame.body))
        return found

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
        among = ""
        if self._has_kinds():  # step by step within each kind
            among = "kind IN (SELECT kind FROM kinds WHERE stage = ?2 AND latest AND ifnull(split = ?3, 1)) AND "
        rows = self._rows(
            "SELECT id, tokens_segment, tokens_offset FROM trajectories "
            f"WHERE {among}step = ?1 AND stage = ?2 AND latest AND ifnull(split = ?3, 1) ORDER BY id",
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

    def count(self, *, all_attempts: bool = False) -> int:
        """How many trajectories are stored, without attempts that were superseded unless asked."""
        if self._has_kinds():
            ((n,),) = self._rows(f"SELECT ifnull(SUM(n), 0) FROM kinds{'' if all_attempts else ' WHERE latest'}")
        else:
            ((n,),) = self._rows(f"SELECT COUNT(*) FROM trajectories{'' if all_attempts else ' WHERE latest'}")
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
        table = "kinds WHERE n > 0" if self._has_kinds() else "(SELECT *, 1 AS n FROM trajectories) WHERE 1"
        outcomes = self._rows(f"SELECT outcome, why, SUM(n) FROM {table} GROUP BY outcome, why")

        def values(column: str) -> list[str]:
            return [value for (value,) in self._rows(f"SELECT DISTINCT {column} FROM {table} ORDER BY {column}")]

        stages = values("stage")
        return {
            "stages": stages,
            "splits": values("split"),
            "outcomes": {f"{kind}({why})" if why else str(kind): count for kind, why, count in outcomes},
            "steps": {stage: self._steps(stage) for stage in stages},
            "sources": values("source"),
            "envs": values("env"),
        }

    def _steps(self, stage: str) -> list[int]:
        """The first and the last step of a stage."""
        if not self._has_kinds():
            return list(self._rows("SELECT MIN(step), MAX(step) FROM trajectories WHERE stage = ?", stage)[0])
        ends = [
            [step for (step,) in self._rows(
                f"SELECT (SELECT {end}(step) FROM trajectories AS t WHERE t.kind = kinds.kind) FROM kinds "
                "WHERE stage = ? AND n > 0", stage,
            )]
            for end in ("MIN", "MAX")
        ]  # fmt: skip
        return [min(ends[0]), max(ends[1])]

    def extents(self) -> dict[str, int]:
        """Up to which byte the index knows each segment."""
        return dict(self._rows("SELECT name, indexed FROM segments"))

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

    def picture(self, sha256: str) -> Image:
        """A stored picture. Raises `KeyError` where there is none, `DamagedFrame` where its bytes are other ones."""
        return media.find(self._run_dir / media.FOLDER, sha256)[1]

    def image(self, sha256: str) -> Path:
        """The file of a stored picture. Raises `KeyError` where there is none that has this hash."""
        try:
            return media.find(self._run_dir / media.FOLDER, sha256)[0]
        except DamagedFrame as error:
            raise KeyError(str(error)) from error

    @property
    def problems(self) -> tuple[str, ...]:
        """What this reader cannot see, in a sentence each."""
        return self._pool.problems

    def close(self) -> None:
        """Let go of connections and files; what another thread reads at this moment comes to its end. Idempotent."""
        self._pool.close()
        self._files.close()

    def __enter__(self) -> StoreReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- inside -----------------------------------------------------------------------------------

    def _forget(self) -> None:
        """Nothing that was read stands any more."""
        self._files.forget()
        self._format = None

    @contextmanager
    def _looking(self) -> Iterator[Fetch]:
        """Queries to the index as it stands at one moment."""
        try:
            with self._pool.borrowed() as connection:
                connection.execute("BEGIN")
                yield lambda query, *values: connection.execute(query, values).fetchall()
        except sqlite3.DatabaseError as error:
            raise index.index_failed(self._run_dir / index.NAME, error) from error

    def _has_kinds(self) -> bool:
        if self._format is None:
            self._format = self.format
        return self._format >= 3

    def _rows(self, query: str, *values: object) -> list[Any]:
        try:
            with self._pool.borrowed() as connection:
                return connection.execute(query, values).fetchall()
        except sqlite3.DatabaseError as error:
            raise index.index_failed(self._run_dir / index.NAME, error) from error

    def _any(self, entry: Entry, tokens: bool) -> Trajectory:
        """A trajectory with what is there of its tokens."""
        try:
            return self.get(entry.id, entry.attempt, tokens=tokens)
        except TokensNotKept:
            return self.get(entry.id, entry.attempt, tokens=False)

    def _spans(
        self, segment: str, offset: int, length: int, known: dict[tuple[str, int], Sequence[Span | None]]
    ) -> list[Span | None]:
        """The numbered spans of a TOKENS frame, references resolved; `known` spares what was read already."""
        if offset < 0:
            return []
        try:
            frame = self._files.frame(segment, offset, length)
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


def _which(id: str, attempt: int | None) -> tuple[str, tuple[object, ...]]:
    return ("id = ? AND latest", (id,)) if attempt is None else ("id = ? AND attempt = ?", (id, attempt))


def _absent(id: str, attempt: int | None) -> str:
    return (
        f"no trajectory {id!r} is stored" if attempt is None else f"no attempt {attempt} of trajectory {id!r} is stored"
    )
