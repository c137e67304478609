"""Jobs: commands that a page starts and then follows. Each is a process of its own, and few run at once."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from agentrl.viewer.params import BadRequest

AT_ONCE = 2
REMEMBERED = 50
_LINES, _LONGEST = 2000, 4000  # of what a job said: lines kept, characters of a line


@dataclass(slots=True)
class Job:
    """A command and what it has said so far. A line that is a JSON object is an event; the last is the result."""

    process: subprocess.Popen[str]
    said: list[str] = field(default_factory=list)
    result: dict[str, Any] | None = None
    thread: threading.Thread | None = None

    @property
    def state(self) -> str:
        if self.thread is not None and self.thread.is_alive():
            return "running"
        return (
            "done"
            if (self.process.poll() in (0, 1) and self.result is not None) or self.process.poll() == 0
            else "failed"
        )

    def json(self) -> dict[str, Any]:
        return {"state": self.state, "said": list(self.said), "result": self.result, "code": self.process.poll()}


class Jobs:
    """Starts jobs and remembers the latest."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs: dict[str, Job] = {}

    def start(self, command: Sequence[str]) -> str:
        """Run a command; returns the job's name. Raises `BadRequest` where too many run already."""
        with self._lock:
            if sum(job.state == "running" for job in self._jobs.values()) >= AT_ONCE:
                raise BadRequest(f"{AT_ONCE} jobs run already; wait for one of them", 429)
            process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,
                env={**os.environ, "NO_COLOR": "1", "PYTHONUNBUFFERED": "1"},
            )
            job = Job(process)
            name = secrets.token_hex(8)
            self._jobs[name] = job
            for old in list(self._jobs)[:-REMEMBERED]:
                if self._jobs[old].state != "running":
                    del self._jobs[old]
            job.thread = threading.Thread(target=_listen, args=(job,), name=f"job {name}", daemon=True)
            job.thread.start()
            return name

    def get(self, name: str) -> Job | None:
        with self._lock:
            return self._jobs.get(name)

    def close(self) -> None:
        """End what still runs."""
        with self._lock:
            for job in self._jobs.values():
                if job.process.poll() is None:
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.killpg(job.process.pid, signal.SIGTERM)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        job.process.wait(5)


def _listen(job: Job) -> None:
    assert job.process.stdout is not None
    with job.process.stdout as lines:
        for line in lines:
            text = line.rstrip("\n")
            with contextlib.suppress(ValueError, RecursionError):
                found = json.loads(text)
                if isinstance(found, dict):
                    job.result = found
            if len(job.said) < _LINES:
                job.said.append(text[:_LONGEST])
    job.process.wait()
