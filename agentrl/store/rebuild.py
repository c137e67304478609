"""The index from the segments: what a crash left unindexed, or all of it."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from typing import Any

from agentrl.errors import UsageError
from agentrl.store import index
from agentrl.store.frames import Frame, Kind, scan, unpack
from agentrl.store.segments import number_of, open_locked

_BATCH = 1000
_LATEST = """
UPDATE trajectories SET latest = attempt = (SELECT MAX(attempt) FROM trajectories AS t WHERE t.id = trajectories.id)
WHERE id IN (SELECT id FROM trajectories WHERE attempt > 0)
"""


def catch_up(connection: sqlite3.Connection, segment: Path, start: int = 0) -> int:
    """Index the frames of `segment` from byte `start` on; return where its last sound frame ends.

    Runs within the caller's transaction. What is indexed already stays as it is.
    """
    end = start
    trajectories: list[tuple[Any, ...]] = []
    credit: list[tuple[Any, ...]] = []
    pieces: list[tuple[int, str]] = []

    def flush() -> None:
        index.insert(connection, trajectories=trajectories, credit=credit, pieces=pieces, repeat="IGNORE")
        for rows in (trajectories, credit, pieces):
            rows.clear()

    for frame in scan(segment, start):
        place = (segment.name, frame.offset, frame.length)
        if frame.kind == Kind.TRAJECTORY:
            trajectories.append((*frame.meta, *place))
        elif frame.kind == Kind.CREDIT:
            credit.append((*frame.meta[: len(index.CREDIT_FACTS)], *place))
        elif frame.kind == Kind.REWIND:
            flush()
            index.rewind(connection, *frame.meta)
        elif frame.kind == Kind.PIECES:
            pieces += pieces_of(segment, frame)
        if len(trajectories) + len(credit) >= _BATCH:
            flush()
        end = frame.offset + frame.length
    flush()
    connection.execute(_LATEST)
    index.insert(connection, extents=[(segment.name, end)])
    return end


def pieces_of(segment: Path, frame: Frame) -> list[tuple[int, str]]:
    """The (token, text) pairs of a PIECES frame that was scanned without its body."""
    whole = next(scan(segment, frame.offset, body=True))
    tokens, texts = unpack(whole.body)
    return list(zip(tokens, texts, strict=True))


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
        for segment in segments:
            catch_up(connection, segment)
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
