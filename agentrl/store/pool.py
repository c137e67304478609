"""Open connections to one index, for any number of threads: each query borrows one, and a few are kept for the next.

A reader that may not write into the run's folder shares the writer's log all the same, as long as the writer's shared
memory is there (`-shm`, which the last writer takes away). Where it is not, none can be made: what is read then is the
index as it stands on the disk, its log included, and it is opened again once one of the two has changed.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from agentrl.store import index

_MOST = 8  # at the same time; who comes then waits
_KEPT = 4  # in between: each may hold 64 MiB of the index in memory
_Stamp = tuple[object, ...]


@dataclass(slots=True)
class _Open:
    connection: sqlite3.Connection
    alone: bool  # it does not see what is written later
    stamp: _Stamp


class Pool:
    """Connections to the index in `folder`; the first one is made at once. `renewed` is called after another index
    has taken the place of the one that was opened (a rebuild, or a new run under the old name).

    Once it is closed, what is borrowed is closed on its return; a query that comes later gets a connection for itself.
    """

    def __init__(self, folder: Path, renewed: Callable[[], None]) -> None:
        self._folder, self._path, self._renewed = folder, folder / index.NAME, renewed
        self._lock, self._room = threading.Lock(), threading.Semaphore(_MOST)
        self._idle: list[_Open] = []
        self._closed = False
        self._file = _file(self._path)
        self.problems: tuple[str, ...] = ()  # what lists may lack, in a sentence each
        self._give(self._open())

    @contextmanager
    def borrowed(self) -> Iterator[sqlite3.Connection]:
        """A connection of one's own, for as long as the block lasts. A thread that has one asks for no second one."""
        with self._room:
            one = self._take()
            try:
                yield one.connection
            finally:
                if one.connection.in_transaction:
                    one.connection.execute("ROLLBACK")
                self._give(one)

    def close(self) -> None:
        """Close what nobody reads with at this moment; the rest is closed as it comes back. Idempotent."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for one in idle:
            one.connection.close()

    def _take(self) -> _Open:
        self._look()
        while True:
            with self._lock:
                one = self._idle.pop() if self._idle else None
            if one is None:
                return self._open()
            if one.stamp == self._stamp(one.alone):
                return one
            one.connection.close()

    def _give(self, one: _Open) -> None:
        with self._lock:
            keep = not self._closed and len(self._idle) < _KEPT
            if keep:
                self._idle.append(one)
        if not keep:
            one.connection.close()

    def _open(self) -> _Open:
        stamp, now = self._stamp(True), self._stamp(False)
        opened = index.connect_reader(self._folder)
        self.problems = (opened.lacks,) if opened.lacks else ()
        return _Open(opened.connection, opened.alone, stamp if opened.alone else now)

    def _look(self) -> None:
        now = _file(self._path)
        if now and now != self._file:
            with self._lock:
                known, self._file = self._file, now
            if known != now:
                self._renewed()

    def _stamp(self, alone: bool) -> _Stamp:
        """What tells whether a connection still reads what there is."""
        if not alone:
            return _file(self._path)
        return (*_file(self._path), *_state(self._path), *_state(index.log_of(self._path)))


def _file(path: Path) -> _Stamp:
    """Which file it is, () where there is none."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return (found.st_dev, found.st_ino)


def _state(path: Path) -> _Stamp:
    try:
        found = path.stat()
    except OSError:
        return (None, None)
    return (found.st_size, found.st_mtime_ns)
