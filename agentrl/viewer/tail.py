"""The lines of a file that grows, each read once: a look costs what came since the last one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def parsed(texts: Iterable[bytes]) -> tuple[list[dict[str, Any]], int]:
    """The objects among lines of JSON, and how many lines are none."""
    lines: list[dict[str, Any]] = []
    damaged = 0
    for text in texts:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if isinstance(line, dict):
            lines.append(line)
        else:
            damaged += 1
    return lines, damaged


class Tail:
    """Reads `path` from line `since` on, at most from its end. Belongs to one thread at a time.

    `line` is the number of the next line, `file` says which file it counts in: it changes where another one takes
    its place.
    """

    def __init__(self, path: Path, since: int) -> None:
        self._path = path
        self._stamp: tuple[int, int, int] | None = None
        self._end = 0  # of what was read
        self.line = 0
        self._begin(since)

    @property
    def file(self) -> str:
        return "0" if self._stamp is None else f"{self._stamp[0]:x}"

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """The lines that are new, and whether they are the first of a file that was made anew or cut."""
        try:
            with self._path.open("rb") as file:
                stamp = _stamp(file.fileno())
                if stamp == self._stamp:
                    return [], False
                anew = self._stamp is not None and (stamp[0] != self._stamp[0] or stamp[1] < self._end)
                if not anew and self._end:
                    file.seek(self._end - 1)
                    anew = file.read(1) != b"\n"  # another file with the number of the one before
                if anew:
                    self._end = self.line = 0
                file.seek(self._end)
                data = file.read()
        except OSError:
            anew, self._stamp, self._end, self.line = self.line > 0, None, 0, 0
            return [], anew
        self._stamp = stamp
        texts = data.split(b"\n")[:-1]
        self._end += sum(map(len, texts)) + len(texts)
        self.line += len(texts)
        return parsed(texts)[0], anew

    def _begin(self, since: int) -> None:
        try:
            with self._path.open("rb") as file:
                # Not the whole stamp: what is there beyond `since` is new.
                self._stamp = (_stamp(file.fileno())[0], -1, -1)
                for text in file:
                    if self.line >= since or not text.endswith(b"\n"):
                        break
                    self._end += len(text)
                    self.line += 1
        except OSError:
            self._stamp = None


def _stamp(file: int) -> tuple[int, int, int]:
    found = os.fstat(file)
    return found.st_ino, found.st_size, found.st_mtime_ns
