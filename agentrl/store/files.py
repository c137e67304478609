"""Segments opened for reading: as many as are in use, and the last ones used."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from agentrl.store.frames import DamagedFrame, Frame, parse

_OPEN = 64  # segments that stay open


class Files:
    """The segments in `folder`. Any thread may read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._files: dict[str, _File] = {}
        self._closed = False

    def frame(self, segment: str, offset: int, length: int) -> Frame:
        """The frame at a place. Raises `DamagedFrame` where it is not whole, or its segment is gone, and
        `FileNotFoundError` where that held token arrays only, which `last_k` drops."""
        with self._lock:
            file = self._files.pop(segment, None)
            if file is None:
                try:
                    file = _File(self._folder / segment)
                except FileNotFoundError:
                    if not segment.endswith(".bin"):
                        raise
                    raise DamagedFrame(f"{self._folder / segment} is missing; restore it from a copy") from None
            if not self._closed:
                self._files[segment] = file  # the last one used stands last
                if len(self._files) > _OPEN:
                    del self._files[next(iter(self._files))]
        frame = parse(os.pread(file.fd, length, offset))
        if frame is None:
            raise DamagedFrame(f"{self._folder / segment} is damaged at byte {offset}; restore it from a copy")
        return frame

    def forget(self) -> None:
        """They may be other files by now."""
        with self._lock:
            self._files.clear()

    def close(self) -> None:
        """Let go of them; what another thread reads at this moment comes to its end. Idempotent."""
        with self._lock:
            self._closed = True
            self._files.clear()


class _File:
    """A segment opened for reading; it is closed when the last thread that reads it lets go of it."""

    def __init__(self, path: Path) -> None:
        self.fd = -1
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
