"""Writing: append to the segment, wait for the disk, commit the index row; then it is acknowledged.

Where many processes write to one run, each appends to segments of its own and leaves the index to the run's one
collector (`indexed=False`; `collector.py`); what is on disk is then acknowledged. Trajectories that share spans in
memory (a fork and its parent, siblings and their prompt) share them on disk as long as they are of one step.
Every method may be called from any thread.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from agentrl.content import Image
from agentrl.errors import RunFailed
from agentrl.store import index, media
from agentrl.store.codec import SpanTable, Stored, trajectory_out
from agentrl.store.credit import credit_out
from agentrl.store.frames import Encoder, Kind, scan
from agentrl.store.journal import Journal
from agentrl.store.key import EpisodeKey
from agentrl.store.pending import Pending, Waiting
from agentrl.store.rebuild import catch_up
from agentrl.store.segments import Segment, check_writer, number_of, series, sync_path
from agentrl.store.text import text_of
from agentrl.trajectory import Group, Ids, Span, Trajectory, Turn, as_ids

Keep = Literal["all", "every_n", "last_k"]
_TOGETHER = 4  # trajectories that are made plain before they are packed: few enough to stay in a core's caches
_MOMENTS = 1024  # (stage, step) pairs that are remembered; so many steps never overlap
Pieces = Callable[[Ids], list[str]]
_Plain = tuple[SpanTable | None, list[Any], list[Any]]


class StoreWriter:
    """Appends to the store of one run. One process may hold a writer's name at a time.

    `pieces` gives the text of each id, stored once per run, so that a reader needs no tokenizer.
    `tokens` says which token arrays to keep: "all", those of every `n`-th step, or of the last `n`
    steps; messages, observations and credit are always kept. A segment is full at `segment_bytes`.
    With `indexed` False it touches no index: readers see what it wrote once a `Collector` has been there, and of
    an (id, attempt) that is written twice the first counts. `ahead` is how long a turn of an episode in flight may wait
    before it is written, in seconds; one whose episode is stored by then is not written on its own.

    Once the disk has refused to write, every method raises `RunFailed`: reopen the run to go on.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        writer: str = "main",
        pieces: Pieces | None = None,
        tokens: Keep = "all",
        n: int = 1,
        indexed: bool = True,
        segment_bytes: int = 256 << 20,
        ahead: float = 0.0,
    ) -> None:
        if n < 1:
            raise ValueError(f"n must be at least 1, not {n}")
        if ahead < 0:
            raise ValueError(f"ahead must be at least 0 seconds, not {ahead}")
        self._media, self._folder = run_dir / media.FOLDER, run_dir / "seg"
        self._writer, self._full = check_writer(writer), segment_bytes
        self._keep, self._n = tokens, n
        self._pieces_of, self._seen = pieces, np.zeros(1, dtype=bool)
        self._words: dict[int, str] = {}  # the pieces known so far; those of `_seen` are on disk
        self._lock = threading.RLock()
        self._failed: Exception | None = None
        self._pending = Pending(ahead, self._write_due) if ahead else None
        self._closed = False
        self._encoder = Encoder()
        self._stored: dict[int, Stored] = {}  # spans of the present step, by identity
        self._prompts: dict[int, tuple[Span, str]] = {}  # their text, by identity, of the present step
        self._moment: tuple[str, int] | None = None
        self._moments: list[tuple[str, int]] = []
        self._credit: list[tuple[Any, ...]] = []
        self._unsynced: list[Path] = []
        self._token_segment: Segment | None = None
        for folder in (self._folder, self._media):
            folder.mkdir(parents=True, exist_ok=True)
        own = series(self._folder, writer)
        self._index_path = run_dir / index.NAME
        with ExitStack() as undo:
            self._segment = Segment(own[-1] if own else self._folder / f"{writer}-0.bin")
            undo.callback(self._segment.close)
            self._db = index.connect(run_dir) if indexed else None
            if self._db is not None:
                undo.callback(self._db.close)
            with self._guard():
                latest = self._recover(self._db, own) if self._db is not None else self._cut(own)
                self._journal = Journal(self._folder, writer, latest)
                if pieces is not None and self._db is not None:
                    self._words = dict(self._db.execute("SELECT token, piece FROM pieces"))
                    self._grow(max(self._words, default=-1) + 1)
                    self._seen[list(self._words)] = True
            undo.pop_all()

    def _recover(self, db: sqlite3.Connection, own: Sequence[Path]) -> Callable[[str], int]:
        """Index what was appended but not committed before a crash, and cut the torn tail.

        Returns what tells the latest stored attempt of an id, -1 where there is none.
        """
        with db:
            db.execute("BEGIN IMMEDIATE")
            for path in own:
                start = index.extent(db, path.name)
                if path.stat().st_size > start:
                    end = catch_up(db, path, start)
                    if path == self._segment.path and end < self._segment.end:
                        self._segment.cut(end)

        def latest(id: str) -> int:
            (attempt,) = db.execute("SELECT MAX(attempt) FROM trajectories WHERE id = ?", (id,)).fetchone()
            return -1 if attempt is None else int(attempt)

        return latest

    def _cut(self, own: Sequence[Path]) -> Callable[[str], int]:
        """The same without an index: cut the torn tail, and learn from its own segments what is stored."""
        attempts: dict[str, int] = {}
        for path in own:
            end = 0
            for frame in scan(path):
                end = frame.offset + frame.length
                if frame.kind == Kind.TRAJECTORY:
                    id, attempt = frame.meta[:2]
                    attempts[id] = max(attempt, attempts.get(id, -1))
            if path == self._segment.path and end < self._segment.end:
                self._segment.cut(end)
        return lambda id: attempts.get(id, -1)

    # -- what the rollout manager and the trainer call ------------------------------------------

    def turn(self, key: EpisodeKey, index: int, turn: Turn) -> None:
        """Write turn `index` of an episode in flight ahead of its trajectory. Survives the process, unsynced.

        `key.id` must be the id of the trajectory to come. A branch writes the turns it inherits, too. Where turns may
        wait, this returns at once, and a failure to write is raised by the next call.
        """
        if self._pending is None:
            with self._lock, self._guard():
                self._append_turn(key, index, turn)
                self._journal.flush()
        else:
            self._check()
            self._pending.put(key, index, turn)

    def forget(self, key: EpisodeKey) -> None:
        """The episode will never finish (cancelled, superseded): it is no longer in flight."""
        with self._lock, self._guard():
            if self._pending is not None:
                self._pending.drop(key.id, key.attempt)
            self._journal.drop(key)

    def add(self, trajectories: Sequence[Trajectory], *, step: int, stage: str, split: str = "train") -> None:
        """Store finished trajectories: when this returns, they survive a crash of the machine.

        Raises `ValueError` where an (id, attempt) is in the index already, and `TypeError` where one holds a
        value that no record can hold; it then stores none of them.
        """
        with self._lock, self._guard():
            if self._moment != (stage, step):
                self._stored.clear()
                self._prompts.clear()
                self._moment = (stage, step)
                if self._moment not in self._moments:  # where steps overlap, an earlier one's last episodes come late
                    self._moments = [*self._moments, self._moment][-_MOMENTS:]
                    self._roll_tokens()
            self._roll()
            batch = _Batch(self._segment.end, self._token_segment.end if self._token_segment else -1)
            try:
                for start in range(0, len(trajectories), _TOGETHER):
                    some = trajectories[start : start + _TOGETHER]
                    plain = [self._number(batch, trajectory, step) for trajectory in some]
                    self._encode_pieces(batch)  # first, so that whoever reads on knows the words of what follows
                    for trajectory, parts in zip(some, plain, strict=True):
                        self._encode(batch, trajectory, parts, step, stage, split)
                self._commit(batch)
            except (TypeError, ValueError):
                self._stored.clear()  # what was to be shared is not there
                raise
            for trajectory in trajectories:
                if self._pending is not None:
                    self._pending.drop(trajectory.id, trajectory.attempt)
                self._journal.forget(trajectory.id, trajectory.attempt)
            self._journal.tidy()

    def credit(self, group: Group, *, step: int, stage: str = "rl") -> None:
        """Append what each member of a group was worth at `step`. Readers see it after the next `add` or `flush`.

        Credit of the same (stage, step, group, member) written again supersedes what was there.
        """
        with self._lock, self._guard():
            for number, member in enumerate(group.members):
                meta, body = credit_out(group, number, member, step=step, stage=stage)
                frame = self._encoder.frame(Kind.CREDIT, meta, body)
                facts = meta[: len(index.CREDIT_FACTS)]
                self._credit.append((*facts, self._segment.name, self._segment.append(frame), len(frame)))
            self._segment.flush()

    def image(self, image: Image) -> None:
        """Keep a picture as media/<sha256>.<ext>; a picture that is there already costs nothing."""
        with self._lock, self._guard():
            path = media.keep(self._media, image, self._writer)
            if path is not None:
                self._unsynced.append(path)

    def picture(self, sha256: str) -> Image:
        """A picture that was kept. Raises `KeyError` where none was, `DamagedFrame` where its bytes are other ones."""
        return media.find(self._media, sha256)[1]

    def rewind(self, stage: str, step: int) -> None:
        """The run goes on at `step` of `stage`: what it had credited there and later is credited anew."""
        with self._lock, self._guard():
            db = self._db
            if db is not None:
                found = db.execute("SELECT 1 FROM credit WHERE stage = ? AND step >= ? LIMIT 1", (stage, step))
                if found.fetchone() is None:
                    return
            self._segment.append(self._encoder.frame(Kind.REWIND, (stage, step), b""))
            self._segment.sync()
            if db is not None:
                with db:
                    db.execute("BEGIN IMMEDIATE")
                    index.rewind(db, stage, step)
                    index.insert(db, extents=[(self._segment.name, self._segment.end)])

    def flush(self) -> None:
        """Acknowledge credit appended so far, and write the turns that wait."""
        with self._lock, self._guard():
            if self._pending is not None:
                self._write_ahead(self._pending.take(everything=True))
            self._commit(_Batch(self._segment.end, -1))

    def close(self) -> None:
        """Acknowledge everything and let go of the files. Idempotent."""
        if self._pending is not None:
            self._pending.close()  # its thread may be waiting for the lock
        with self._lock:
            if self._closed:
                return
            try:
                if self._pending is not None:  # also where the index has failed: the journal does without
                    with suppress(RunFailed) if self._failed is not None else nullcontext():
                        self._write_ahead(self._pending.take(everything=True))
                if self._failed is None and (self._credit or self._unsynced):
                    self.flush()
            finally:
                self._closed = True
                self._journal.close()
                self._segment.close()
                if self._token_segment is not None:
                    self._token_segment.close()
                if self._db is not None:
                    self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- inside -----------------------------------------------------------------------------------

    @contextmanager
    def _guard(self) -> Iterator[None]:
        """Refuse to go on after a failure of the disk, and turn SQLite's failures into sentences."""
        self._check()
        try:
            yield
        except RunFailed as error:
            self._failed = error
            raise
        except sqlite3.DatabaseError as error:
            self._failed = index.index_failed(self._index_path, error)
            raise self._failed from error

    def _check(self) -> None:
        if self._closed:
            raise RuntimeError("this StoreWriter is closed")
        if self._failed is not None:
            raise self._failed

    def _write_due(self) -> None:
        """Write the turns that have waited long enough. Nobody hears of a failure here: the next call raises it."""
        assert self._pending is not None
        with self._lock:
            due = self._pending.take()
            if self._failed is None:
                try:
                    self._write_ahead(due)
                except Exception as error:
                    self._failed = error

    def _write_ahead(self, turns: Sequence[Waiting]) -> None:
        """Write turns that waited; one that holds what no record can hold is passed over, for `add` will refuse it."""
        for waiting in turns:
            with suppress(TypeError, ValueError):
                self._append_turn(*waiting)
        self._journal.flush()

    def _append_turn(self, key: EpisodeKey, index: int, turn: Turn) -> None:
        self._journal.append(key, index, turn, self._unknown if self._pieces_of is not None else None)

    def _roll(self) -> None:
        """Start a new segment where the present one is full."""
        if self._segment.end >= self._full:
            self._commit(_Batch(self._segment.end, -1))
            self._segment.close()
            number = number_of(self._segment.path) + 1
            self._segment = Segment(self._folder / f"{self._writer}-{number}.bin")

    def _roll_tokens(self) -> None:
        """With tokens="last_k", arrays stand in a file per step, and only the last `n` files are kept."""
        if self._keep == "last_k":
            old = series(self._folder, self._writer, "tokens")
            if self._token_segment is not None:
                self._token_segment.close()
            number = number_of(old[-1]) + 1 if old else 0
            self._token_segment = Segment(self._folder / f"{self._writer}-{number}.tokens")
            for path in [*old, self._token_segment.path][: -self._n]:
                path.unlink()

    def _number(self, batch: _Batch, trajectory: Trajectory, step: int) -> _Plain:
        """A trajectory as plain values: its spans (None where their arrays are not kept), head and observations."""
        table = SpanTable(self._stored)
        head, observations = trajectory_out(trajectory, table)
        if self._keep == "every_n" and step % self._n:
            return None, head, observations
        for number, span in table.own():
            self._stored[id(span)] = Stored(span, trajectory.id, trajectory.attempt, number)
        if self._pieces_of is not None:
            batch.ids += table.ids
        return table, head, observations

    def _encode(
        self,
        batch: _Batch,
        trajectory: Trajectory,
        parts: _Plain,
        step: int,
        stage: str,
        split: str,
    ) -> None:
        """Add a trajectory's frames and its index row to the batch."""
        frame = self._encoder.frame
        table, head, observations = parts
        name = (trajectory.id, trajectory.attempt)
        tokens = ("", -1, 0)
        if table is not None:
            arrays, sizes = table.arrays()
            block = frame(Kind.TOKENS, (*name, sizes), arrays + self._encoder.pack(table.rows))
            if self._token_segment is None:
                tokens = ("", batch.put(block), len(block))
            else:
                tokens = (self._token_segment.name, batch.put_tokens(block), len(block))
        block = frame(Kind.OBSERVATIONS, name, self._encoder.pack(observations))
        read = (batch.put(block), len(block))
        facts = index.facts_of(trajectory, step=step, stage=stage, split=split, tokens=tokens, read=read)
        block = frame(Kind.TRAJECTORY, facts, self._encoder.pack(head))
        batch.rows.append((*facts, self._segment.name, batch.put(block), len(block)))
        if self._db is not None:
            here = tokens[0] == "" and tokens[1] >= 0  # else a rebuild could not read the prompt
            batch.texts.append(text_of(self._prompt(trajectory) if here else "", trajectory.turns))

    def _prompt(self, trajectory: Trajectory) -> str:
        """The text of the first turn's context; spans that siblings share are put into words once."""
        if self._pieces_of is None or not trajectory.turns:
            return ""
        parts = []
        for piece in trajectory.turns[0].context:
            if id(piece.span) not in self._prompts:
                self._prompts[id(piece.span)] = (piece.span, "".join(self._texts_of(piece.span.ids)))
            whole = len(piece) == len(piece.span)
            parts.append(self._prompts[id(piece.span)][1] if whole else "".join(self._texts_of(piece.ids)))
        return "".join(parts)

    def _encode_pieces(self, batch: _Batch) -> None:
        """Add the text of ids that the run has not seen before."""
        if self._pieces_of is None or not batch.ids:
            return
        unknown = self._unknown(np.frombuffer(b"".join(batch.ids), "<i4"))
        batch.ids.clear()
        if unknown:
            here = {token for token, _ in batch.pieces}
            unknown = [(token, piece) for token, piece in unknown if token not in here]
        if unknown:
            batch.put(self._encoder.frame(Kind.PIECES, (), self._encoder.pack(list(zip(*unknown, strict=True)))))
            batch.pieces += unknown

    def _unknown(self, ids: Ids) -> list[tuple[int, str]]:
        """The text of those ids that are not stored yet."""
        if self._seen.take(ids, mode="clip").all():  # nearly always, and the rest is dear
            return []
        self._grow(int(ids.max()) + 1)
        fresh = np.unique(ids[~self._seen[ids]]).astype(np.int32)
        return list(zip(fresh.tolist(), self._texts_of(fresh), strict=True))

    def _texts_of(self, ids: Ids) -> list[str]:
        """The pieces of `ids`; each id is asked for once in a run."""
        new = sorted({token for token in ids.tolist() if token not in self._words})
        if new and self._pieces_of is not None:
            self._words.update(zip(new, self._pieces_of(as_ids(new)), strict=True))
        return [self._words[token] for token in ids.tolist()]

    def _grow(self, size: int) -> None:
        """Make room for ids below `size`, and for one that is never seen: ids beyond the end are taken for it."""
        if size >= self._seen.size:
            self._seen = np.pad(self._seen, (0, size + 1 - self._seen.size))

    def _commit(self, batch: _Batch) -> None:
        """Rows into an open transaction, frames onto the disk, and only then the commit."""
        if self._db is None:
            self._append(batch)
        else:
            with self._db:
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    index.insert(
                        self._db, trajectories=batch.rows, credit=self._credit, pieces=batch.pieces, texts=batch.texts
                    )
                except sqlite3.IntegrityError as error:
                    raise ValueError(f"an (id, attempt) is stored already; write the next attempt ({error})") from error
                self._append(batch)
                index.insert(self._db, extents=[(self._segment.name, self._segment.end)])
        self._seen[[token for token, _ in batch.pieces]] = True
        self._credit.clear()
        self._unsynced.clear()

    def _append(self, batch: _Batch) -> None:
        """Return once the disk holds the batch, and the pictures that came before it."""
        for path in self._unsynced:
            sync_path(path)
        if self._unsynced:
            sync_path(self._media)
        if self._token_segment is not None:
            self._token_segment.append(b"".join(batch.token_frames))
            self._token_segment.sync()
        for block in batch.frames:
            self._segment.append(block)
        self._segment.sync()


class _Batch:
    """Frames to be appended together, with the offsets that they will have."""

    def __init__(self, end: int, tokens_end: int) -> None:
        self._end, self._tokens_end = end, tokens_end
        self.frames: list[bytes] = []
        self.token_frames: list[bytes] = []
        self.rows: list[tuple[Any, ...]] = []
        self.texts: list[str] = []
        self.ids: list[bytes] = []
        self.pieces: list[tuple[int, str]] = []

    def put(self, frame: bytes) -> int:
        at = self._end
        self.frames.append(frame)
        self._end += len(frame)
        return at

    def put_tokens(self, frame: bytes) -> int:
        at = self._tokens_end
        self.token_frames.append(frame)
        self._tokens_end += len(frame)
        return at
