"""Segments: append-only files of frames, one series per writer: seg/<writer>-<n>.bin.

Appending never overwrites. A writer cuts the torn tail of its last segment when it opens it, holds
a lock on the segment that it appends to, and starts a new one once a segment is full. Whatever the
disk refuses becomes one sentence, and what was appended since the last `sync` is taken back.
"""

from __future__ import annotations

import fcntl
import os
import re
from contextlib import suppress
from pathlib import Path

from agentrl.errors import RunFailed, UsageError

COLLECTOR = "collector.lock"
_FLUSH = 4 << 20
_NAME = re.compile(r"[A-Za-z0-9_]+")


def check_writer(name: str) -> str:
    """`name`, or `UsageError` where it cannot be part of a file name."""
    if not _NAME.fullmatch(name):
        raise UsageError(f"a store writer's name takes letters, digits and underscores only, not {name!r}")
    return name


def series(folder: Path, writer: str, suffix: str = "bin") -> list[Path]:
    """The files <writer>-<n>.<suffix> in the order of n."""
    found = [path for path in folder.glob(f"{writer}-*.{suffix}") if number_of(path) >= 0]
    return sorted(found, key=number_of)


def number_of(path: Path) -> int:
    """n of <writer>-<n>.bin, -1 for any other name."""
    tail = path.stem.rpartition("-")[2]
    return int(tail) if tail.isdigit() else -1


def write_all(fd: int, data: bytes) -> None:
    """Write every byte of `data`; `os.write` may stop short. Raises OSError."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def disk_failed(path: Path, error: OSError) -> RunFailed:
    """The one sentence for a disk that refuses to write."""
    reason = error.strerror or str(error)
    return RunFailed(
        f"cannot write {path}: {reason}; make room and go on with --resume (what was acknowledged is safe)"
    )


def sync_path(path: Path) -> None:
    """Wait until the disk holds a file's bytes, or a folder's names. Raises `RunFailed`."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        raise disk_failed(path, error) from error
    finally:
        os.close(fd)


def open_locked(path: Path) -> int:
    """A descriptor for appending to `path`, locked against other writers. Raises `UsageError` where it is taken."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise UsageError(f"{path} is being written by another process; wait for it, or stop it first") from error
    return fd


def take_over(run_dir: Path) -> int:
    """A lock that makes this process the one that collects for a run's index, until it is closed.

    Raises `UsageError` where another process has it.
    """
    path = run_dir / COLLECTOR
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise disk_failed(path, error) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        raise UsageError(
            f"{run_dir} has a collector already, process {owner}: let it work, or stop it first (a run has one)"
        ) from error
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def held(path: Path, locks: str = "/proc/locks") -> bool:
    """Whether some process holds the lock on `path`, found out without touching it.

    Where the system does not list its locks (it is not Linux), the process that the file names is looked for.
    """
    try:
        found = path.stat()
        listed = Path(locks).read_text() if Path(locks).exists() else None
        if listed is not None:
            device = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
            return any(device in line.split() for line in listed.splitlines())
        owner = path.read_text().strip()
        os.kill(int(owner), 0)
    except PermissionError:
        return True
    except (OSError, ValueError):
        return False
    return True


class Segment:
    """One file that frames are appended to. `end` counts appended bytes, synced or not."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = open_locked(path)
            self.end = os.fstat(self._fd).st_size
        except OSError as error:
            raise disk_failed(path, error) from error
        if self.end == 0:
            sync_path(path.parent)
        self._written = self.end
        self._buffer: list[bytes] = []

    @property
    def name(self) -> str:
        return self.path.name

    def cut(self, end: int) -> None:
        """Drop everything from byte `end` on."""
        self._buffer.clear()
        os.ftruncate(self._fd, end)
        self._written = self.end = end

    def append(self, frame: bytes) -> int:
        """Append a frame and return its offset. It may wait in memory until `flush`."""
        at = self.end
        self._buffer.append(frame)
        self.end += len(frame)
        if self.end - self._written > _FLUSH:
            self.flush()
        return at

    def flush(self) -> None:
        """Hand everything to the operating system: it then survives the death of this process."""
        if self._buffer:
            data = b"".join(self._buffer)
            self._buffer.clear()
            try:
                write_all(self._fd, data)
            except OSError as error:
                with suppress(OSError):  # where this fails, too, the next open cuts the torn tail
                    os.ftruncate(self._fd, self._written)
                raise disk_failed(self.path, error) from error
            self._written += len(data)

    def sync(self) -> None:
        """Flush, and wait until the disk holds it."""
        self.flush()
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            raise disk_failed(self.path, error) from error

    def close(self) -> None:
        """Close the file and release its lock; what is still buffered is lost. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
