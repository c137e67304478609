"""Jobs: commands that a page starts and then follows. Each is a process of its own, and few run at once."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from agentrl.viewer.params import BadRequest

AT_ONCE = 2
REMEMBERED = 50
_EVENTS = 200
_LINES, _LONGEST = 2000, 4000  # of what a job said: lines kept, characters of a line


@dataclass(slots=True)
class Job:
    """A command and what it has said so far. A line that is a JSON object is an event; the last is the result."""

    process: subprocess.Popen[str]
    said: list[str] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)
    thread: threading.Thread | None = None

    @property
    def state(self) -> str:
        if self.thread is not None and self.thread.is_alive():
            return "running"
        code = self.process.poll()
        return "done" if code == 0 or (code == 1 and self.events) else "failed"

    @property
    def result(self) -> dict[str, Any] | None:
        """The last event; for a replay what it found, with a row for each turn up to where the two part."""
        if not self.events:
            return None
        replayed = next((event for event in self.events if event.get("event") == "replayed"), None)
        if replayed is None:
            return self.events[-1]
        return {**replayed, "turns": table_of(replayed), "summary": self.events[-1]}

    def json(self) -> dict[str, Any]:
        told = {"state": self.state, "said": list(self.said), "result": self.result}
        return {**told, "code": self.process.poll(), **self.about}


def table_of(replayed: Mapping[str, Any]) -> list[dict[str, Any]]:
    """{turn, same, field, recorded, replayed} for each turn that was compared, from `agentrl replay --json`.

    `turn` is null where all turns came out the same and what followed them did not (the outcome, the score).
    """
    difference = replayed.get("difference")
    turns = replayed.get("turns")
    count = turns if isinstance(turns, int) else 0
    if not isinstance(difference, Mapping):
        return [{"turn": i, "same": True, "field": None, "recorded": None, "replayed": None} for i in range(count)]
    at = difference.get("turn")
    until = at if isinstance(at, int) else (0 if difference.get("what") == "environment" else count)
    rows: list[dict[str, Any]] = [
        {"turn": i, "same": True, "field": None, "recorded": None, "replayed": None} for i in range(until)
    ]
    return [
        *rows,
        {
            "turn": None if at is None and difference.get("what") != "environment" else until,
            "same": False,
            "field": difference.get("what"),
            "recorded": difference.get("recorded"),
            "replayed": difference.get("now"),
        },
    ]


class Jobs:
    """Starts jobs and remembers the latest."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs: dict[str, Job] = {}

    def start(self, command: Sequence[str], **about: Any) -> str:
        """Run a command and return the job's name; `about` is told with it.

        Raises `BadRequest` where too many run already.
        """
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
            job = Job(process, about=dict(about))
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
                    job.events = [*job.events, found][-_EVENTS:]
            if len(job.said) < _LINES:
                job.said.append(text[:_LONGEST])
    job.process.wait()
