"""Open stores: few at a time, and always of the file that is there now.

A viewer of hundreds of runs must not hold the files of all of them, and one that is open for days sees folders made
again and indices rebuilt. So a reader is let go of when others were used later or when its file is another one; it
closes when the last request that still reads with it has ended.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from agentrl.store import StoreReader, index

MOST = 32  # stores that are open though nobody reads them


class Slot:
    """The reader of one run, while it is open. `generation` counts the files that it was opened on."""

    def __init__(self, folder: Path, open: Open) -> None:
        self._folder, self._open = folder, open
        self._lock = threading.Lock()
        self._reader: StoreReader | None = None
        self._file: tuple[int, int] | None = None
        self.generation = 0

    def get(self) -> StoreReader:
        """The reader of what is there now, kept open. Raises `UsageError`, `RunFailed` or `OSError`."""
        with self._lock:
            found = self._reader if self._current() else None
            if found is None:
                self._close()
                file = _file(self._folder)
                found = self._reader = StoreReader(self._folder)
                if file != self._file:
                    self._file, self.generation = file, self.generation + 1
        self._open.used(self)
        return found

    @contextmanager
    def glance(self) -> Iterator[StoreReader]:
        """A reader for one look: the one that is open, else one that is closed afterwards. Raises as `get`."""
        with self._lock:
            if not self._current():
                self._close()
            known = self._reader
        if known is not None:
            yield known
        else:
            with StoreReader(self._folder) as reader:
                yield reader

    def drop(self) -> None:
        """Let go of the reader."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._reader is not None:
            self._reader.close()  # what is read with it at this moment comes to its end
            self._reader = None

    def _current(self) -> bool:
        # While a connection is open its file keeps its number, so that an equal number is the same file.
        return self._file is not None and _file(self._folder) == self._file


class Open:
    """Which slots hold a reader, the latest used last."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._slots: dict[Slot, None] = {}

    def used(self, slot: Slot) -> None:
        with self._lock:
            self._slots.pop(slot, None)
            self._slots[slot] = None
            old = list(self._slots)[: -self._most]
            for each in old:
                del self._slots[each]
        for each in old:
            each.drop()


def _file(folder: Path) -> tuple[int, int] | None:
    try:
        found = (folder / index.NAME).stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
