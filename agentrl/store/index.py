"""The index: one SQLite file that says where every record stands and answers the questions of lists.

It holds nothing that the segments do not hold, so it can be made again from them (`rebuild.py`). It
runs in WAL mode, where readers and the writer do not wait for each other; WAL needs shared memory,
which network file systems lack, so there it falls back to a rollback journal and says so.
"""

from __future__ import annotations

import logging
import os
import re
import sqlite3
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from agentrl.errors import RunFailed, UsageError
from agentrl.trajectory import Trajectory

NAME = "index.sqlite"
FORMAT = 2
READABLE = (1, FORMAT)  # an index of format 1 has no search, and fewer indices
_NETWORK = re.compile(r"(nfs\d?|cifs|smb\d?|smbfs|9p|afs|ceph|lustre|beegfs|glusterfs|fuse\.(sshfs|glusterfs|s3fs).*)")
_CACHE = "PRAGMA cache_size = -65536"  # KiB: a long list's indices grow beyond SQLite's 2 MiB
_log = logging.getLogger(__name__)

# What a TRAJECTORY frame's meta holds, in this order; `tokens_*` and `read_*` are the places of its other frames.
FACTS = (
    "id", "attempt", "stage", "step", "split", "group_id", "task_id", "env", "source", "parent", "outcome", "why",
    "reward", "success", "n_turns", "n_calls", "n_tokens", "n_errors", "tool_cost", "turn_cost", "seconds",
    "tokens_segment", "tokens_offset", "tokens_length", "read_offset", "read_length",
)  # fmt: skip
CREDIT_FACTS = ("stage", "step", "group_id", "member", "id", "attempt", "source", "reward")
PLACE = ("segment", "offset", "length")

_SCHEMA = f"""
CREATE TABLE trajectories (
    rowid INTEGER PRIMARY KEY, {", ".join(FACTS)}, {", ".join(PLACE)}, latest INTEGER NOT NULL DEFAULT 1,
    UNIQUE (id, attempt)
);
CREATE INDEX by_step ON trajectories (step);
CREATE INDEX by_reward ON trajectories (reward);
CREATE INDEX by_group ON trajectories (group_id);
CREATE INDEX by_env ON trajectories (env, reward);
CREATE INDEX by_task ON trajectories (task_id);
CREATE INDEX by_stage ON trajectories (stage);
CREATE INDEX steps_of_stage ON trajectories (stage, step);
CREATE INDEX by_split ON trajectories (split);
CREATE INDEX by_source ON trajectories (source);
CREATE INDEX by_success ON trajectories (success);
CREATE INDEX by_outcome ON trajectories (outcome, why);
CREATE INDEX by_errors ON trajectories (n_errors) WHERE n_errors > 0;
CREATE INDEX superseded ON trajectories (latest) WHERE latest = 0;
CREATE INDEX by_calls ON trajectories (n_calls);
CREATE INDEX by_tokens ON trajectories (n_tokens);
CREATE INDEX by_turns ON trajectories (n_turns);
CREATE INDEX by_seconds ON trajectories (seconds);
CREATE INDEX by_cost ON trajectories (tool_cost);
CREATE VIRTUAL TABLE search USING fts5 (text, content = '', detail = none, columnsize = 0);
CREATE TABLE credit (
    rowid INTEGER PRIMARY KEY, {", ".join(CREDIT_FACTS)}, {", ".join(PLACE)},
    UNIQUE (stage, step, group_id, member)
);
CREATE INDEX credit_by_id ON credit (id, step);
CREATE TABLE pieces (token INTEGER PRIMARY KEY, piece TEXT NOT NULL);
CREATE TABLE segments (name TEXT PRIMARY KEY, indexed INTEGER NOT NULL) WITHOUT ROWID;
PRAGMA user_version = {FORMAT};
"""


def _slots(columns: Sequence[str]) -> str:
    return f"({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"


INSERT_TRAJECTORY = f"INSERT INTO trajectories {_slots(('rowid', *FACTS, *PLACE))}"
INSERT_TEXT = "INSERT INTO search (rowid, text) VALUES (?, ?)"
INSERT_CREDIT = f"INSERT OR REPLACE INTO credit {_slots((*CREDIT_FACTS, *PLACE))}"
INSERT_PIECE = "INSERT OR IGNORE INTO pieces VALUES (?, ?)"
INSERT_EXTENT = "INSERT OR REPLACE INTO segments VALUES (?, ?)"
SUPERSEDE = "UPDATE trajectories SET latest = 0 WHERE id = ? AND attempt < ?"


def file_system(path: Path, mounts: str = "/proc/mounts") -> str:
    """The type of the file system that holds `path` ("" where the system does not tell)."""
    try:
        lines = Path(mounts).read_text(errors="replace").splitlines()
    except OSError:
        return ""
    where = str(path.resolve())
    best, kind = "", ""
    for fields in (line.split() for line in lines):
        point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[1])
        inside = where == point or where.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, fields[2]
    return kind


def connect(folder: Path, *, name: str = NAME) -> sqlite3.Connection:
    """Open (or make) the index of a run for writing. One connection belongs to one thread at a time."""
    path = folder / name
    try:
        connection = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
        kind = file_system(folder)
        mode = "DELETE" if _NETWORK.fullmatch(kind) else "WAL"
        (got,) = connection.execute(f"PRAGMA journal_mode = {mode}").fetchone()
        if got.lower() != "wal":
            _log.warning(
                "%s lies on %s, where readers and the writer wait for each other; a local disk is faster",
                path,
                kind or "a file system without shared memory",
            )
        connection.execute(_CACHE)
        connection.execute("PRAGMA synchronous = NORMAL")  # the segments are synced; the index can be made again
        version = _version(connection)
        if version == 0:
            connection.executescript(f"BEGIN IMMEDIATE;{_SCHEMA}COMMIT;")
        elif version != FORMAT:
            raise UsageError(f"{path} has format {version}, this version reads {FORMAT}; run: {_remedy(path)}")
    except sqlite3.DatabaseError as error:
        raise index_failed(path, error) from error
    return connection


def connect_reader(folder: Path) -> sqlite3.Connection:
    """Open the index of a run for reading. Raises `UsageError` where there is none."""
    path = folder / NAME
    if not path.is_file():
        raise UsageError(f"no trajectories are stored in {folder} ({NAME} is missing); name the folder of a run")
    # Without write access there is no shared memory to make, and so no writer to wait for.
    access = "mode=rw" if os.access(folder, os.W_OK) else "mode=ro&immutable=1"
    try:
        connection = sqlite3.connect(
            f"{path.resolve().as_uri()}?{access}", uri=True, timeout=60, isolation_level=None, check_same_thread=False
        )
        connection.execute("PRAGMA query_only = ON")
        version = _version(connection)
    except sqlite3.DatabaseError as error:
        raise index_failed(path, error) from error
    if version == 0:
        raise UsageError(f"no trajectories are stored in {folder} yet; wait for its first step")
    if version not in READABLE:
        raise UsageError(f"{path} has format {version}, this version reads {FORMAT}; run: {_remedy(path)}")
    connection.execute(_CACHE)
    return connection


def _version(connection: sqlite3.Connection) -> int:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    return int(version)


def index_failed(path: Path, error: sqlite3.DatabaseError) -> RunFailed:
    """The one sentence for an index that cannot be read or written."""
    if getattr(error, "sqlite_errorname", "").startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return RunFailed(f"{path} is held by another process; wait for it, or stop it, and go on with --resume")
    if isinstance(error, sqlite3.OperationalError):
        return RunFailed(
            f"cannot use {path}: {error}; make room and go on with --resume (what was acknowledged is safe)"
        )
    return RunFailed(f"{path} is damaged ({error}); the segments are intact; run: {_remedy(path)}")


def facts_of(
    trajectory: Trajectory,
    *,
    step: int,
    stage: str,
    split: str,
    tokens: tuple[str, int, int],
    read: tuple[int, int],
) -> tuple[Any, ...]:
    """The values of FACTS. `tokens` (segment, "" for the head's own; offset; length) and `read` (offset, length)."""
    t = trajectory
    uses = [use.result for turn in t.turns for use in turn.tools]
    errors = sum([not result.ok for result in uses], sum([turn.error is not None for turn in t.turns]))
    tool_cost = float(sum([result.cost for result in uses]))
    turn_cost = float(sum([turn.cost for turn in t.turns]))
    seconds = float(sum([turn.seconds for turn in t.turns]))
    parent = t.fork.parent if t.fork else None
    return (
        t.id, t.attempt, stage, step, split, t.group_id, t.task_id, t.env, t.source, parent, t.outcome.kind,
        t.outcome.why, t.reward, t.success, len(t.turns), len(uses), t.n_sampled, errors, tool_cost, turn_cost, seconds,
        *tokens, *read,
    )  # fmt: skip


def insert(
    connection: sqlite3.Connection,
    *,
    trajectories: Iterable[Sequence[Any]] = (),
    credit: Iterable[Sequence[Any]] = (),
    pieces: Iterable[tuple[int, str]] = (),
    extents: Iterable[tuple[str, int]] = (),
    texts: Sequence[str] = (),
) -> int:
    """Insert rows (FACTS + PLACE, CREDIT_FACTS + PLACE) within the caller's transaction; return the first row id.

    `texts` are what search reads of each trajectory, if anything. A trajectory that is there already raises
    `sqlite3.IntegrityError`.
    """
    rows = list(trajectories)
    ((last,),) = connection.execute("SELECT ifnull(MAX(rowid), 0) FROM trajectories").fetchall()
    first = int(last) + 1
    if rows:
        connection.executemany(INSERT_TRAJECTORY, [(first + i, *row) for i, row in enumerate(rows)])
        connection.executemany(SUPERSEDE, [row[:2] for row in rows if row[1] > 0])
        connection.executemany(INSERT_TEXT, [(first + i, text) for i, text in enumerate(texts)])
    connection.executemany(INSERT_CREDIT, credit)
    connection.executemany(INSERT_PIECE, pieces)
    connection.executemany(INSERT_EXTENT, extents)
    return first


def rewind(connection: sqlite3.Connection, stage: str, step: int) -> None:
    """Forget the credit of `step` of `stage` and of what came after it, within the caller's transaction."""
    connection.execute("DELETE FROM credit WHERE stage = ? AND step >= ?", (stage, step))


def _remedy(path: Path) -> str:
    return f"agentrl index {path.parent} --rebuild"
