"""The session server as a plain process of this machine: **not a sandbox**.

Programs run with your rights, see your files and the network, and share your memory. It is for trusted code and for
tests of everything above it, is never chosen by itself, and says of each limit whether it holds.
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

from agentrl.errors import UsageError
from agentrl.sandbox import Enforcement, LimitName, Limits
from agentrl.sandboxes.names import fresh_name, reap_folders
from agentrl.sandboxes.session import Session

SERVER = Path(__file__).with_name("server.py")
_OPEN = "a plain process has the rights of whoever started it"
MISSING: dict[LimitName, str] = {
    "memory": "a plain process shares this machine's memory",
    "processes": "a plain process may start as many as its user may",
    "disk": "a plain process writes to this machine's disk",
    "inodes": "a plain process writes to this machine's disk",
    "network": "a plain process has this machine's network",
    "cpu": "a plain process takes the cores that it finds",
    "syscalls": _OPEN,
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
        folder = Path(tempfile.mkdtemp(prefix=f"{fresh_name()}-"))
        for part in ("workspace", "tmp"):
            (folder / part).mkdir()
        options = {
            "workspace": str(folder / "workspace"),
            "tmp": str(folder / "tmp"),
            "seconds": limits.seconds,
            "output_bytes": limits.output_bytes,
            "read_mb": limits.read_mb,
            "preload": self.preload,
            "path": site.getsitepackages(),
            "rlimits": {"RLIMIT_NOFILE": limits.open_files},
        }
        with theirs:
            process = subprocess.Popen(  # noqa: ASYNC220  it takes a few milliseconds
                [sys.executable, "-S", "-s", str(SERVER), "--fd", str(theirs.fileno()), json.dumps(options)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={"PATH": "/usr/local/bin:/usr/bin:/bin", "PYTHONHASHSEED": "0"},
                start_new_session=True,
            )
        session = await Session.start(ours, _Process(folder, process), limits)
        self._open.add(session)
        return session

    async def reap(self) -> int:
        return reap_folders(Path(tempfile.gettempdir()))

    async def close(self) -> None:
        await asyncio.gather(*(session.close() for session in self._open))
        self._open.clear()


class _Process:
    enforcement = Enforcement(MappingProxyType(MISSING))

    def __init__(self, folder: Path, process: subprocess.Popen[bytes]) -> None:
        self.name = folder.name
        self._folder = folder
        self._process = process

    def hit(self) -> tuple[LimitName, ...]:
        return ()

    async def destroy(self) -> None:
        """The server ends with its channel, and ends what it started; the folder goes when it has."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(self._process.wait, 2.0)
        if self._process.poll() is None:
            os.kill(self._process.pid, signal.SIGKILL)
            await asyncio.to_thread(self._process.wait)
        await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)
