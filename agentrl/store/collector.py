"""The collector: one process that puts into a run's index what many writers append to their segments.

Rollout processes open their writers with `indexed=False`: they append to segments of their own and wait for the disk
alone. The collector reads on where the index ends, a piece of each segment a transaction. It can be killed at any
moment: what it had not committed is read again by the next one. Nothing but the index is lost with it, and that can
be made again (`rebuild.py`).
"""

from __future__ import annotations

import os
import sqlite3
import threading
from pathlib import Path
from typing import Self

from agentrl.store import index
from agentrl.store.frames import Frame, Kind, frames_of
from agentrl.store.rebuild import Indexer
from agentrl.store.segments import held, sync_path, take_over

_AHEAD = (Kind.TOKENS, Kind.OBSERVATIONS)
_PIECE = 16 << 20  # bytes of a segment that one transaction reads, so that other writers of the index get their turn


class Collector:
    """Keeps the index of a run up to date with its segments. A run has one collector at a time.

    Raises `UsageError` where another process collects, `RunFailed` where the index cannot be written.
    """

    def __init__(self, run_dir: Path) -> None:
        self._folder, self._index_path = run_dir / "seg", run_dir / index.NAME
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock = take_over(run_dir)
        try:
            self._db = index.connect(run_dir)
            self._indexer = Indexer(self._db, self._folder)
            self._torn: dict[str, int] = {}  # segments whose writer left a torn tail, and their size with it
        except BaseException:
            os.close(self._lock)
            raise

    def collect(self) -> int:
        """Index all that stands in the segments now; return how many bytes of frames that was."""
        done = 0
        try:
            for path in sorted(self._folder.glob("*.bin")):
                while got := self._piece(path):
                    done += got
        except sqlite3.DatabaseError as error:
            raise index.index_failed(self._index_path, error) from error
        return done

    def follow(self, stop: threading.Event, every: float = 0.2) -> None:
        """Collect every so many seconds, until `stop` is set; then once more."""
        while not stop.is_set():
            self.collect()
            stop.wait(every)
        self.collect()

    def close(self) -> None:
        """Let another process collect. Idempotent."""
        if self._lock >= 0:
            self._db.close()
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _piece(self, path: Path) -> int:
        """One transaction's worth of a segment; how many bytes that was."""
        start = index.extent(self._db, path.name)
        frames = self._read(path, start)
        if not frames:
            return 0
        sync_path(path)  # the index may not know what the disk does not have
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            if index.extent(self._db, path.name) != start:  # its writer indexes for itself, and was faster
                return frames[-1].offset + frames[-1].length - start
            end = self._indexer.segment(path, start, frames)
            self._indexer.finish()
        return end - start

    def _read(self, path: Path, start: int) -> list[Frame]:
        """The whole frames from byte `start` of a segment on, some megabytes of them.

        The file is read and not mapped: a writer that comes back cuts its torn tail. While a writer is there, nothing
        behind an unsound frame counts, for that one may be half written.
        """
        size, n = path.stat().st_size, _PIECE
        if size <= start or self._torn.get(path.name) == size:
            return []
        while True:
            alive = held(path)
            with path.open("rb") as file:
                data = os.pread(file.fileno(), n, start)
            alive = alive or held(path)
            frames, end = [], 0
            for frame in frames_of(data, body=True):
                if alive and frame.offset != end:
                    break
                end = frame.offset + frame.length
                frames.append(frame._replace(offset=start + frame.offset))
            while frames and frames[-1].kind in _AHEAD and (alive or len(data) == n):
                frames.pop()  # its trajectory is on its way
            if frames or len(data) < n:
                break
            n *= 2  # a frame, or damage, that is longer than what was read
        if not frames and not alive:
            self._torn[path.name] = size
        return frames
