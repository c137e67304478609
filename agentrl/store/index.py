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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentrl.errors import RunFailed, UsageError
from agentrl.store import kinds
from agentrl.trajectory import Trajectory

NAME = "index.sqlite"
FORMAT = 3
READABLE = (1, 2, FORMAT)  # one before 3 has no kinds, and its lists take longer; one before 2 has no search, either
# What several machines mount, or a machine and its host: no memory is shared there. FUSE counts, but for these.
_NETWORK = re.compile(
    r"nfs\d?|cifs|smb\d?|smbfs|9p|afs|ceph|lustre|beegfs|glusterfs|gpfs|gfs2|ocfs2|pvfs2|wekafs|virtiofs|vboxsf|prl_fs|"
    r"fuse\.(?!fuse-overlayfs|ntfs|mergerfs|bindfs|gocryptfs|encfs).+"
)
_CACHE = "PRAGMA cache_size = -65536"  # KiB: a long list's indices grow beyond SQLite's 2 MiB
_NO_MEMORY = ("SQLITE_CANTOPEN", "SQLITE_READONLY_CANTINIT", "SQLITE_READONLY_RECOVERY", "SQLITE_READONLY_DIRECTORY")
_log = logging.getLogger(__name__)

# What a TRAJECTORY frame's meta holds, in this order; `tokens_*` and `read_*` are the places of its other frames.
FACTS = (
    "id", "attempt", "stage", "step", "split", "group_id", "task_id", "env", "source", "parent", "outcome", "why",
    "reward", "success", "n_turns", "n_calls", "n_tokens", "n_errors", "tool_cost", "turn_cost", "seconds",
    "tokens_segment", "tokens_offset", "tokens_length", "read_offset", "read_length",
)  # fmt: skip
CREDIT_FACTS = ("stage", "step", "group_id", "member", "id", "attempt", "source", "reward")
PLACE = ("segment", "offset", "length")

# An order of lists: its index, and the column. Within each kind, rows stand in this order; ranges of steps and rewards
# are looked at in the index itself.
ORDERS = {
    "added": ("by_kind", "rowid"), "reward": ("by_reward", "reward"), "step": ("by_step", "step"),
    "n_calls": ("by_calls", "n_calls"), "n_tokens": ("by_tokens", "n_tokens"), "n_turns": ("by_turns", "n_turns"),
    "seconds": ("by_seconds", "seconds"), "tool_cost": ("by_cost", "tool_cost"),
}  # fmt: skip


def _order(name: str, column: str) -> str:
    columns = dict.fromkeys(("kind", column, "rowid", "step", "reward"))
    return f"CREATE INDEX {name} ON trajectories ({', '.join(columns)});"


_ORDERS = "\n".join([_order(*order) for order in ORDERS.values()])
_SCHEMA = f"""
CREATE TABLE trajectories (
    rowid INTEGER PRIMARY KEY, {", ".join(FACTS)}, {", ".join(PLACE)}, latest INTEGER NOT NULL DEFAULT 1,
    kind INTEGER NOT NULL, UNIQUE (id, attempt)
);
CREATE INDEX by_group ON trajectories (group_id);
CREATE INDEX by_task ON trajectories (task_id);
{_ORDERS}
{kinds.SCHEMA}
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


INSERT_TRAJECTORY = f"INSERT INTO trajectories {_slots(('rowid', *FACTS, *PLACE, 'kind'))}"
INSERT_TEXT = "INSERT INTO search (rowid, text) VALUES (?, ?)"
INSERT_CREDIT = f"INSERT OR REPLACE INTO credit {_slots((*CREDIT_FACTS, *PLACE))}"
INSERT_PIECE = "INSERT OR IGNORE INTO pieces VALUES (?, ?)"
INSERT_EXTENT = "INSERT OR REPLACE INTO segments VALUES (?, ?)"


def file_system(path: Path, mounts: str = "/proc/mounts") -> str:
    """The type of the file system that holds `path` ("" where the system does not tell)."""
    try:
        lines = Path(mounts).read_text(errors="replace").splitlines()
    except OSError:
        return ""
    where = str(path.resolve())
    best, kind = "", ""
    for fields in (fields for line in lines if len(fields := line.split()) > 2):
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


@dataclass(frozen=True, slots=True)
class Opened:
    """An index opened for reading. `alone`: it shares nothing with a writer, and so never sees what is written later.
    `lacks` says what may be missing in it, "" where nothing is."""

    connection: sqlite3.Connection
    alone: bool = False
    lacks: str = ""


def connect_reader(folder: Path) -> Opened:
    """Open the index of a run for reading. Raises `UsageError` where there is none."""
    path = folder / NAME
    if not path.is_file():
        raise UsageError(f"no trajectories are stored in {folder} ({NAME} is missing); {_or_rebuild(path)}")
    try:
        opened = _opened(path, _left_in_wal(path, file_system(folder)))
        version = _version(opened.connection)
    except sqlite3.DatabaseError as error:
        raise index_failed(path, error) from error
    if version == 0:
        raise UsageError(f"no trajectories are in {path} yet; {_or_rebuild(path, 'wait for its first step')}")
    if version not in READABLE:
        raise UsageError(f"{path} has format {version}, this version reads {FORMAT}; run: {_remedy(path)}")
    opened.connection.execute(_CACHE)
    return opened


def _opened(path: Path, alone: bool) -> Opened:
    writable = os.access(path.parent, os.W_OK) and os.access(path, os.W_OK)
    if not alone:
        try:
            return Opened(_reading(path, "mode=rw" if writable else "mode=ro"))
        except sqlite3.OperationalError as error:
            if writable or getattr(error, "sqlite_errorname", "") not in _NO_MEMORY:
                raise
    # The writer's shared memory is not there, and none can be made. The log, where there is one, is read through an
    # index of it in this connection's own memory, which SQLite makes for who locks nothing out and nobody else.
    left = log_of(path).exists() and log_of(path).stat().st_size > 0
    if not left:
        return Opened(_reading(path, "mode=ro&immutable=1"), alone=True)
    try:
        return Opened(_reading(path, "mode=ro&vfs=unix-none", "PRAGMA locking_mode = EXCLUSIVE"), alone=True)
    except sqlite3.OperationalError:
        lacks = (
            f"{log_of(path)} cannot be read, so that the latest trajectories may be missing here; "
            f"ask the run's owner to read it, or to run: {_remedy(path)}"
        )
        return Opened(_reading(path, "mode=ro&immutable=1"), alone=True, lacks=lacks)


def _reading(path: Path, access: str, first: str = "") -> sqlite3.Connection:
    """A connection that was read with once: what cannot be read is known only then."""
    connection = sqlite3.connect(
        f"{path.resolve().as_uri()}?{access}", uri=True, timeout=60, isolation_level=None, check_same_thread=False
    )
    try:
        if first:
            connection.execute(first)
        connection.execute("PRAGMA query_only = ON")
        connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def log_of(path: Path) -> Path:
    """The log of an index in WAL mode: what was committed and does not yet stand in the file itself."""
    return path.with_name(path.name + "-wal")


def _or_rebuild(path: Path, otherwise: str = "name the folder of a run") -> str:
    """What to do about an index that lists nothing."""
    there = any(segment.stat().st_size for segment in (path.parent / "seg").glob("*.bin"))
    return f"its segments are there; run: {_remedy(path)}" if there else otherwise


def _left_in_wal(path: Path, kind: str) -> bool:
    """Whether an index in WAL mode came from a local disk onto a network file system, where it cannot be shared.

    It can be read as it stands. Raises `UsageError` where some of it is still in the log beside it.
    """
    if not _NETWORK.fullmatch(kind):
        return False
    with path.open("rb") as file:
        in_wal = file.read(20)[18:20] == b"\x02\x02"  # the file's write and read version
    log = log_of(path)
    if in_wal and log.exists() and log.stat().st_size:
        raise UsageError(
            f"{path} was written on a local disk and not closed, and lies on {kind} now, where its log cannot be read; "
            f"run: {_remedy(path)}"
        )
    return in_wal


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
        of = kinds.kinds_of(connection, rows, FACTS)
        connection.executemany(INSERT_TRAJECTORY, [(first + i, *row, of[i]) for i, row in enumerate(rows)])
        kinds.supersede(connection, dict.fromkeys([row[0] for row in rows if row[1] > 0]))
        connection.executemany(INSERT_TEXT, [(first + i, text) for i, text in enumerate(texts)])
    connection.executemany(INSERT_CREDIT, credit)
    connection.executemany(INSERT_PIECE, pieces)
    connection.executemany(INSERT_EXTENT, extents)
    return first


def extent(connection: sqlite3.Connection, segment: str) -> int:
    """Up to which byte of a segment, by name, the index knows its frames."""
    row = connection.execute("SELECT indexed FROM segments WHERE name = ?", (segment,)).fetchone()
    return int(row[0]) if row else 0


def rewind(connection: sqlite3.Connection, stage: str, step: int) -> None:
    """Forget the credit of `step` of `stage` and of what came after it, within the caller's transaction."""
    connection.execute("DELETE FROM credit WHERE stage = ? AND step >= ?", (stage, step))


def _remedy(path: Path) -> str:
    return f"agentrl index {path.parent} --rebuild"
