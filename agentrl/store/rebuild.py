"""The index from the segments: what a crash left unindexed, or all of it."""

from __future__ import annotations

import os
import sqlite3
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentrl.errors import UsageError
from agentrl.store import index, kinds, text
from agentrl.store.frames import Frame, Kind, holds, parse, scan, unpack
from agentrl.store.segments import number_of, open_locked, take_over

_BATCH = 1000
# Of the frames of one segment; a token segment's arrays are not searched.
_PLACES = """
stage, step, segment, offset, length, read_offset, read_length,
CASE WHEN tokens_segment = '' THEN tokens_offset ELSE -1 END, tokens_length
"""
_NOTHING = b"\x90"  # an empty list: the observations of a trajectory without turns


class Indexer:
    """Puts the frames of segments into an index, within the caller's transaction.

    What is indexed already stays as it is. A prompt's words may stand in the segment of another writer, which may come
    `later`: such texts wait until `finish` and are read again then, so that memory does not grow with them. What a
    prompt shares with a trajectory that was indexed before is looked up in `folder`.
    """

    def __init__(self, connection: sqlite3.Connection, folder: Path, *, later: bool = False) -> None:
        self._db, self._folder, self._later = connection, folder, later
        self._rows: list[tuple[Any, ...]] = []
        self._texts: list[_Text] = []
        self._credit: list[tuple[Any, ...]] = []
        self._pieces: list[tuple[int, str]] = []
        self._known = dict(connection.execute("SELECT token, piece FROM pieces"))
        self._waiting = array("q")  # row ids

    def segment(self, segment: Path, start: int = 0, frames: Iterable[Frame] | None = None) -> int:
        """Index the frames of `segment` from byte `start` on; return where its last sound frame ends.

        `frames` are those of them that were read already, where somebody else may cut the file meanwhile.
        """
        end = start
        prompts: text.Known = {}
        moment: Any = None
        tokens = read = None
        for frame in scan(segment, start, body=True) if frames is None else frames:
            place = (segment.name, frame.offset, frame.length)
            if frame.kind == Kind.TOKENS:
                tokens = frame
            elif frame.kind == Kind.OBSERVATIONS:
                read = frame
            elif frame.kind == Kind.TRAJECTORY:
                if moment != frame.meta[2:4]:
                    moment = frame.meta[2:4]
                    prompts.clear()
                self._rows.append((*frame.meta, *place))
                self._texts.append(self._text(frame, read, tokens, prompts))
                tokens = read = None
            elif frame.kind == Kind.CREDIT:
                self._credit.append((*frame.meta[: len(index.CREDIT_FACTS)], *place))
            elif frame.kind == Kind.REWIND:
                self._flush()
                index.rewind(self._db, *frame.meta)
            elif frame.kind == Kind.PIECES:
                self._pieces += zip(*unpack(frame.body), strict=True)
            if len(self._rows) + len(self._credit) >= _BATCH:
                self._flush()
            end = frame.offset + frame.length
        self._flush()
        index.insert(self._db, extents=[(segment.name, end)])
        return end

    def _flush(self) -> None:
        self._known.update(self._pieces)
        fresh = [
            (row, said)
            for row, said in zip(self._rows, self._texts, strict=True)
            if not self._db.execute("SELECT 1 FROM trajectories WHERE id = ? AND attempt = ?", row[:2]).fetchone()
        ]
        first = index.insert(self._db, trajectories=[row for row, _ in fresh], credit=self._credit, pieces=self._pieces)
        kinds.supersede(self._db, [row[0] for row, _ in fresh])  # by a later attempt that was indexed first
        ready = []
        for rowid, (_, said) in enumerate(fresh, first):
            if self._later and not said.prompt <= self._known.keys():
                self._waiting.append(rowid)
            else:
                ready.append((rowid, said))
        self._search(ready)
        for rows in (self._rows, self._texts, self._credit, self._pieces):
            rows.clear()

    def finish(self) -> None:
        """Nothing comes any more: the texts that waited for words get those that came."""
        prompts: text.Known = {}
        moment: Any = None
        for rowid in self._waiting:
            row = self._db.execute(f"SELECT {_PLACES} FROM trajectories WHERE rowid = ?", (rowid,)).fetchone()
            stage, step, segment, *places = row
            if moment != (segment, stage, step):
                moment = (segment, stage, step)
                prompts.clear()
            head, read, tokens = (
                self._frame(segment, *places[i : i + 2]) if places[i] >= 0 else None for i in (0, 2, 4)
            )
            if head is not None:
                self._search([(rowid, self._text(head, read, tokens, prompts))])
        del self._waiting[:]

    def _frame(self, segment: str, offset: int, length: int) -> Frame | None:
        with (self._folder / segment).open("rb") as file:
            return parse(os.pread(file.fileno(), length, offset))

    def _search(self, texts: list[tuple[int, _Text]]) -> None:
        missing = {token for _, said in texts for token in said.ids if token not in self._known}
        if missing and self._db.execute("SELECT 1 FROM pieces LIMIT 1").fetchone():
            for token in missing:
                for (piece,) in self._db.execute("SELECT piece FROM pieces WHERE token = ?", (token,)):
                    self._known[token] = piece  # another writer's, since this was made
        self._db.executemany(index.INSERT_TEXT, [(rowid, said.text(self._known)) for rowid, said in texts])

    def _text(self, frame: Frame, read: Frame | None, tokens: Frame | None, prompts: text.Known) -> _Text:
        """The text of a trajectory whose frames these are; frames that do not belong to it are none."""
        name = (frame.meta[0], frame.meta[1])
        observations = read.body if read is not None and tuple(read.meta[:2]) == name else _NOTHING
        ids: list[int] = []
        if tokens is not None and tuple(tokens.meta[:2]) == name:
            table = _table(tokens)
            for owner in {(row[0], row[1]) for row in table if len(row) == 3 and tuple(row) not in prompts}:
                self._learn(owner, prompts)
            ids = text.prompt_ids(frame.body, table, tokens.body, name, prompts).tolist()
        return _Text(ids, frame.body, observations)

    def _learn(self, owner: tuple[str, int], prompts: text.Known) -> None:
        """The spans of a trajectory that was indexed before this scan began, as far as they stand in its segment."""
        places = "segment, tokens_segment, tokens_offset, tokens_length"
        for name, elsewhere, offset, length in self._db.execute(
            f"SELECT {places} FROM trajectories WHERE id = ? AND attempt = ?", owner
        ):
            if elsewhere or offset < 0 or not (self._folder / name).is_file():
                continue
            frame = self._frame(name, offset, length)
            if frame is not None:
                text.learn(_table(frame), frame.body, owner, prompts)


def _table(tokens: Frame) -> list[Any]:
    """The span table of a TOKENS frame."""
    rows: list[Any] = unpack(tokens.body[sum(tokens.meta[2]) :])
    return rows


@dataclass(frozen=True, slots=True)
class _Text:
    """What search reads of a trajectory, its prompt still in ids."""

    ids: list[int]
    head: bytes
    read: bytes

    @property
    def prompt(self) -> set[int]:
        return set(self.ids)

    def text(self, pieces: dict[int, str]) -> str:
        # A run whose pieces were not stored has prompts without words, and the writer had none, either.
        prompt = "".join([pieces.get(token, "") for token in self.ids])
        return text.text_in(prompt, self.head, self.read)


def catch_up(connection: sqlite3.Connection, segment: Path, start: int = 0) -> int:
    """Index the frames of `segment` from byte `start` on; return where its last sound frame ends.

    Runs within the caller's transaction. What is indexed already stays as it is.
    """
    indexer = Indexer(connection, segment.parent)
    end = indexer.segment(segment, start)
    indexer.finish()
    return end


def rebuild(run_dir: Path) -> int:
    """Make the index of a run from its segments; return the number of trajectories in it.

    The old index is replaced once the new one is whole. Raises `UsageError` where the folder has no
    segments, where one of them is being written, or where a collector is at work.
    """
    segments = sorted((run_dir / "seg").glob("*.bin"), key=lambda path: (path.name.rpartition("-")[0], number_of(path)))
    if not segments:
        raise UsageError(f"{run_dir} holds no segments (seg/*.bin) to make an index from; name the folder of a run")
    if (run_dir / index.NAME).is_dir():
        raise UsageError(f"{run_dir / index.NAME} is a folder; remove it, the index is made in its place")
    locks = [take_over(run_dir)]
    try:
        locks += [open_locked(path) for path in segments]
        fresh = run_dir / f"{index.NAME}.new"
        _remove(fresh)
        connection = index.connect(run_dir, name=fresh.name)
        connection.execute("BEGIN IMMEDIATE")
        later = any(holds(segment, Kind.PIECES) for segment in segments)  # else there are no words to wait for
        indexer = Indexer(connection, run_dir / "seg", later=later)
        for segment in segments:
            indexer.segment(segment)
        indexer.finish()
        connection.execute("COMMIT")
        (count,) = connection.execute("SELECT COUNT(*) FROM trajectories").fetchone()
        connection.execute("PRAGMA journal_mode = DELETE")  # one file, so that one rename replaces it
        connection.close()
        _remove(run_dir / index.NAME)
        fresh.replace(run_dir / index.NAME)
    finally:
        for lock in locks:
            os.close(lock)
    return int(count)


def _remove(database: Path) -> None:
    for suffix in ("-wal", "-shm", "-journal", ""):
        database.with_name(database.name + suffix).unlink(missing_ok=True)
