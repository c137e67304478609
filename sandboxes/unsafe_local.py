"""The session server as a plain process of this machine: **not a sandbox**.

Programs run with your rights (root's, if you are root), see your files and the network, and share your memory. It is
for trusted code and for tests of everything above it, is never chosen by itself, and says of each limit whether it
holds. Your environment is not passed on.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import site
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from types import MappingProxyType

from agentrl.errors import InfraError, UsageError
from agentrl.sandbox import Enforcement, LimitName, Limits
from agentrl.sandboxes.launch import words
from agentrl.sandboxes.names import fresh_name, reap_folders
from agentrl.sandboxes.server import empty
from agentrl.sandboxes.session import Cause, Session

HERE = Path(__file__).resolve().parent
MARK = "AGENTRL_SANDBOX"  # in the environment of what runs in one
MISSING: dict[LimitName, str] = {
    "memory": "a plain process shares this machine's memory",
    "processes": "a plain process may start as many as its user may",
    "disk": "a plain process writes to this machine's disk",
    "inodes": "a plain process writes to this machine's disk",
    "network": "a plain process has this machine's network",
    "cpu": "a plain process takes the cores that it finds",
    "syscalls": "a plain process has the rights of whoever started it",
}


class UnsafeLocalBackend:
    """Runs programs on this machine without any wall. Only ever by its name, `unsafe_local`."""

    name = "unsafe_local"

    def __init__(self, preload: tuple[str, ...] = ()) -> None:
        self.preload = preload
        self._open: set[Session] = set()

    async def missing(self) -> str | None:
        return None

    async def enforcement(self, limits: Limits) -> Enforcement:
        return Enforcement(MappingProxyType(MISSING))

    async def open(self, limits: Limits) -> Session:
        if limits.strict:
            raise UsageError(
                "unsafe_local enforces neither memory nor processes, disk or network; choose docker or bubblewrap, "
                "or set strict: false"
            )
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = _Process.start(theirs, limits, self.preload)
            except OSError as error:
                ours.close()
                raise InfraError(f"the session server cannot be started: {error}") from error
        session = await Session.start(ours, process, limits)
        self._open = {other for other in self._open if other.alive} | {session}
        return session

    async def reap(self) -> int:
        return reap_folders(Path(tempfile.gettempdir()))

    async def close(self) -> None:
        await asyncio.gather(*(session.close() for session in self._open))
        self._open.clear()


class _Process:
    """A session server and its temporary folder."""

    enforcement = Enforcement(MappingProxyType(MISSING))

    def __init__(self, name: str, folder: Path, process: subprocess.Popen[bytes]) -> None:
        self.name = name
        self._folder = folder
        self._process = process

    @classmethod
    def start(cls, channel: socket.socket, limits: Limits, preload: tuple[str, ...]) -> _Process:
        """Raises `OSError`, with nothing left behind."""
        name = fresh_name()
        folder = Path(tempfile.mkdtemp(prefix=f"{name}-"))
        options = {
            "workspace": str(folder / "workspace"),
            "tmp": str(folder / "tmp"),
            "seconds": limits.seconds,
            "output_bytes": limits.output_bytes,
            "read_mb": limits.read_mb,
            "preload": preload,
            "path": site.getsitepackages(),
            "rlimits": {"RLIMIT_NOFILE": limits.open_files},
            "env": {MARK: name},
        }
        try:
            for part in ("workspace", "tmp"):
                (folder / part).mkdir()
            process = subprocess.Popen(
                [sys.executable, *words(str(HERE)), "--fd", str(channel.fileno()), json.dumps(options)],
                pass_fds=[channel.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={"PATH": "/usr/local/bin:/usr/bin:/bin", "PYTHONHASHSEED": "0", MARK: name},
                start_new_session=True,
            )
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return cls(name, folder, process)

    def hit(self) -> tuple[LimitName, ...]:
        return ()

    async def cause(self) -> Cause:
        return "unknown"

    async def destroy(self) -> None:
        await asyncio.to_thread(self._destroy)

    def _destroy(self) -> None:
        """The server ends with its channel, and ends what it started; the folder goes when it has."""
        try:
            code = self._process.wait(2.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        if code != 0:  # somebody killed it: what it had started still runs
            for pid in marked(self.name):
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
        for part in ("workspace", "tmp"):  # which may be deeper than what follows can go
            with contextlib.suppress(OSError):
                empty(str(self._folder / part))
        shutil.rmtree(self._folder, ignore_errors=True)


def marked(name: str) -> list[int]:
    """Processes that were started in the sandbox `name`, as far as they kept the environment that they got."""
    mark = f"{MARK}={name}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
    return found
