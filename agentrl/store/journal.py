"""The journal: turns of episodes in flight, written ahead so that a killed run can replay them.

An append-only file beside the segments, seg/<writer>-<n>.turns, never synced: it outlives the
process, not the machine. Each episode's turns are self-contained from its first frame on: token ids
whose text the store does not have yet bring it along. Once an episode is finished and stored, its
frames are dead; when most of the file is dead, what lives is copied to the next file and the old
one goes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from agentrl.store.codec import SpanTable, spans_of, turn_in, turn_out
from agentrl.store.frames import Encoder, Frame, Kind, frames_of, parse, unpack
from agentrl.store.key import EpisodeKey
from agentrl.store.segments import Segment, number_of, series
from agentrl.trajectory import Context, Ids, Span, Turn

SUFFIX = "turns"
Words = Callable[[Ids], Sequence[tuple[int, str]]]  # ids -> (id, text) of those that the store has no text of yet
_SLACK = 8 << 20  # bytes of dead frames that are not worth a copy


class Flight(NamedTuple):
    """An episode in flight: its turns from turn 0 on, and the text of ids that the store may not have yet."""

    key: EpisodeKey
    turns: list[Turn]
    pieces: dict[int, str]


@dataclass(slots=True)
class _Open:
    """An episode in flight: what the next frame needs to know, and where its frames stand."""

    table: SpanTable = field(default_factory=SpanTable)
    context: Context = ()
    next: int = -1
    places: list[tuple[int, int]] = field(default_factory=list)
    size: int = 0


class Journal:
    """Writes turns. Opening it takes over what earlier processes of the same writer left in flight."""

    def __init__(self, folder: Path, writer: str, finished: Callable[[str], int]) -> None:
        """`finished(id)` is the latest attempt of that trajectory in the store, -1 where there is none."""
        self._folder, self._writer = folder, writer
        self._encoder = Encoder()
        self._open: dict[EpisodeKey, _Open] = {}
        self._by_id: dict[str, list[EpisodeKey]] = {}
        old = series(folder, writer, SUFFIX)
        self._file = Segment(folder / f"{writer}-{number_of(old[-1]) + 1 if old else 0}.{SUFFIX}")
        blobs = [path.read_bytes() for path in old]
        for key, frames in _alive(blobs).items():
            if finished(key.id) < key.attempt:
                for data, frame in frames:
                    self._place(key, data[frame.offset : frame.offset + frame.length])
        self._file.flush()
        for path in old:
            path.unlink()

    def append(self, key: EpisodeKey, index: int, turn: Turn, words: Words | None = None) -> None:
        """Append turn `index` of an episode; `flush` writes it. Where it was there, later turns go, too."""
        episode = self._open.get(key)
        fresh = episode is None or episode.next != index
        if episode is None:
            episode = self._open[key] = _Open()
            self._by_id.setdefault(key.id, []).append(key)
        elif fresh:
            episode.table, episode.context = SpanTable(), ()
        episode.next = -1  # where this fails, the next turn begins anew
        table = episode.table
        what, read = turn_out(turn, episode.context, table)
        arrays, sizes = table.arrays()
        fresh_words = words(np.frombuffer(arrays, "<i4", sizes[0] // 4)) if words is not None and sizes[0] else ()
        body = self._encoder.pack((what, read, table.rows, sizes, arrays, fresh_words))
        table.clear()
        meta = (*_meta(key), index, fresh)
        episode.context, episode.next = turn.context, index + 1
        self._place(key, self._encoder.frame(Kind.TURN, meta, body, raw=True))

    def flush(self) -> None:
        """What was appended survives the process from now on."""
        self._file.flush()

    def _place(self, key: EpisodeKey, frame: bytes) -> None:
        episode = self._open.get(key)
        if episode is None:
            episode = self._open[key] = _Open()
            self._by_id.setdefault(key.id, []).append(key)
        episode.places.append((self._file.append(frame), len(frame)))
        episode.size += len(frame)

    def drop(self, key: EpisodeKey) -> None:
        """The episode will never finish: say so in the file, too."""
        self._file.append(self._encoder.frame(Kind.FORGOTTEN, _meta(key), b"", raw=True))
        self._file.flush()
        self.forget(key.id, key.attempt)

    def forget(self, id: str, attempt: int) -> None:
        """The episode is stored: it and its earlier attempts are no longer in flight."""
        for key in self._by_id.pop(id, ()):
            if key.attempt <= attempt:
                del self._open[key]
            else:
                self._by_id.setdefault(id, []).append(key)

    def tidy(self) -> None:
        """Start a new file with what lives, where most of this one is dead."""
        alive = sum([episode.size for episode in self._open.values()])
        if self._file.end < max(_SLACK, 2 * alive):
            return
        old = self._file
        self._file = Segment(self._folder / f"{self._writer}-{number_of(old.path) + 1}.{SUFFIX}")
        with old.path.open("rb") as file:
            for episode in self._open.values():
                episode.places = [(self._file.append(_read(file.fileno(), at, n)), n) for at, n in episode.places]
        self._file.flush()
        old.close()
        old.path.unlink()

    def close(self) -> None:
        """Close the file; it is removed where nothing is in flight."""
        self._file.close()
        if not self._open:
            self._file.path.unlink(missing_ok=True)


def _read(fd: int, at: int, n: int) -> bytes:
    return os.pread(fd, n, at)


def _meta(key: EpisodeKey) -> tuple[Any, ...]:
    return key.stage, key.step, key.split, key.task_id, key.sample, key.branch, key.attempt


def _key(meta: list[Any]) -> EpisodeKey:
    stage, step, split, task, sample, branch, attempt, *_ = meta
    return EpisodeKey(stage, step, split, task, sample, tuple(branch), attempt)


def _alive(
    blobs: Iterable[bytes], *, body: bool = False, only: str | None = None
) -> dict[EpisodeKey, list[tuple[bytes, Frame]]]:
    """The TURN frames of episodes (or of the one with id `only`) that nobody gave up, each in the order of writing."""
    found: dict[str, dict[EpisodeKey, list[tuple[bytes, Frame]]]] = {}
    for data in blobs:
        for frame in frames_of(data, body=body and only is None):
            key = _key(frame.meta)
            if only is not None:
                whole = parse(data, frame.offset, body=body) if key.id == only else None
                if whole is None:
                    continue
                frame = whole
            attempts = found.setdefault(key.id, {})
            if frame.kind == Kind.TURN:
                attempts.setdefault(key, []).append((data, frame))
            else:
                found[key.id] = {other: frames for other, frames in attempts.items() if other.attempt > key.attempt}
    return {key: frames for attempts in found.values() for key, frames in attempts.items()}


def read_journals(folder: Path) -> dict[EpisodeKey, list[Turn]]:
    """The turns in flight, per episode in order from turn 0; stored episodes may be among them."""
    found = _alive(_blobs(folder), body=True)
    return {key: turns for key, frames in found.items() if (turns := _turns([frame for _, frame in frames])[0])}


def read_flight(folder: Path, id: str) -> Flight | None:
    """The latest attempt of one episode in flight; it may be stored already. None where there is none."""
    found = _alive(_blobs(folder), body=True, only=id)
    latest = max(found, key=lambda key: key.attempt, default=None)
    if latest is None:
        return None
    turns, pieces = _turns([frame for _, frame in found[latest]])
    return Flight(latest, turns, pieces) if turns else None


def _blobs(folder: Path) -> list[bytes]:
    while True:
        paths = sorted(folder.glob(f"*.{SUFFIX}"), key=number_of)
        try:
            return [path.read_bytes() for path in paths]
        except FileNotFoundError:  # tidied away meanwhile: what lived stands in the next file
            continue


def _turns(frames: Iterable[Frame]) -> tuple[list[Turn], dict[int, str]]:
    turns: dict[int, Turn] = {}
    pieces: dict[int, str] = {}
    spans: list[Span | None] = []
    before: Context = ()
    for frame in frames:
        *_, index, fresh = frame.meta
        what, read, rows, sizes, arrays, *words = unpack(frame.body)
        pieces.update((token, piece) for part in words for token, piece in part)
        if fresh:
            spans, before = [], ()
            turns = {i: turn for i, turn in turns.items() if i < index}
        spans += spans_of(rows, arrays, sizes, lambda owner, attempt: ())
        turns[index] = turn_in(what, read, before, spans)
        before = turns[index].context
    return [turns[i] for i in range(len(turns)) if i in turns], pieces
