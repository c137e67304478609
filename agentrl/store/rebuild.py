"""The index from the segments: what a crash left unindexed, or all of it."""

from __future__ import annotations

import os
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentrl.errors import UsageError
from agentrl.store import index, text
from agentrl.store.frames import Frame, Kind, scan, unpack
from agentrl.store.segments import number_of, open_locked

_BATCH = 1000
_NOTHING = b"\x90"  # an empty list: the observations of a trajectory without turns
_LATEST = """
UPDATE trajectories SET latest = attempt = (SELECT MAX(attempt) FROM trajectories AS t WHERE t.id = trajectories.id)
WHERE id IN (SELECT id FROM trajectories WHERE attempt > 0)
"""


class Indexer:
    """Puts the frames of segments into an index, within the caller's transaction.

    What is indexed already stays as it is. A prompt's words stand behind it in the segment, or in that of
    another writer: such texts wait until `finish`.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._db = connection
        self._rows: list[tuple[Any, ...]] = []
        self._texts: list[_Text] = []
        self._credit: list[tuple[Any, ...]] = []
        self._pieces: list[tuple[int, str]] = []
        self._known = dict(connection.execute("SELECT token, piece FROM pieces"))
        self._waiting: list[tuple[int, _Text]] = []

    def segment(self, segment: Path, start: int = 0) -> int:
        """Index the frames of `segment` from byte `start` on; return where its last sound frame ends."""
        end = start
        prompts: text.Known = {}
        moment: Any = None
        tokens = read = None
        for frame in scan(segment, start, body=True):
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
                self._texts.append(_text(frame, read, tokens, prompts))
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
        self._waiting += [(first + i, said) for i, (_, said) in enumerate(fresh)]
        ready = [item for item in self._waiting if item[1].prompt <= self._known.keys()]
        self._waiting = [item for item in self._waiting if not item[1].prompt <= self._known.keys()]
        self._search(ready)
        for rows in (self._rows, self._texts, self._credit, self._pieces):
            rows.clear()

    def finish(self) -> None:
        """Nothing comes any more."""
        self._search(self._waiting)
        self._waiting = []
        self._db.execute(_LATEST)

    def _search(self, texts: list[tuple[int, _Text]]) -> None:
        self._db.executemany(index.INSERT_TEXT, [(rowid, said.text(self._known)) for rowid, said in texts])


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


def _text(frame: Frame, read: Frame | None, tokens: Frame | None, prompts: text.Known) -> _Text:
    """The text of a trajectory whose frames these are; frames that do not belong to it are none."""
    name = (frame.meta[0], frame.meta[1])
    observations = read.body if read is not None and tuple(read.meta[:2]) == name else _NOTHING
    ids: list[int] = []
    if tokens is not None and tuple(tokens.meta[:2]) == name:
        sizes = tokens.meta[2]
        table = unpack(tokens.body[sum(sizes) :])
        ids = text.prompt_ids(frame.body, table, tokens.body, name, prompts).tolist()
    return _Text(ids, frame.body, observations)


def catch_up(connection: sqlite3.Connection, segment: Path, start: int = 0) -> int:
    """Index the frames of `segment` from byte `start` on; return where its last sound frame ends.

    Runs within the caller's transaction. What is indexed already stays as it is.
    """
    indexer = Indexer(connection)
    end = indexer.segment(segment, start)
    indexer.finish()
    return end


def rebuild(run_dir: Path) -> int:
    """Make the index of a run from its segments; return the number of trajectories in it.

    The old index is replaced once the new one is whole. Raises `UsageError` where the folder has no
    segments, or where one of them is being written.
    """
    segments = sorted((run_dir / "seg").glob("*.bin"), key=lambda path: (path.name.rpartition("-")[0], number_of(path)))
    if not segments:
        raise UsageError(f"{run_dir} holds no segments (seg/*.bin) to make an index from; name the folder of a run")
    locks = [open_locked(path) for path in segments]
    try:
        fresh = run_dir / f"{index.NAME}.new"
        _remove(fresh)
        connection = index.connect(run_dir, name=fresh.name)
        connection.execute("BEGIN IMMEDIATE")
        indexer = Indexer(connection)
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
