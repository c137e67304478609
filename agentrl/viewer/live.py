"""What a run does now, as server-sent events: new metric lines, new trajectories, episodes in flight, its status.

The files are looked at twice a second; nothing is asked of the run itself, which never knows that somebody
watches. Of a journal only what was appended is read, and at most once a second.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from agentrl.errors import AgentRLError
from agentrl.store import Cursor, EpisodeKey, Flight
from agentrl.store.flights import Flights
from agentrl.trajectory import Turn
from agentrl.viewer.pages import entry_json
from agentrl.viewer.runs import Run

PERIOD = 0.5  # seconds between looks
HEARTBEAT = 10.0  # seconds
_MANY = 200  # entries of one event, the newest; `missed` counts the others
_FLIGHTS = 500  # episodes of one event


class Watch:
    """One page's view of one run: what it has been told, and what is new since."""

    def __init__(self, run: Run, since: int) -> None:
        self._run, self._line = run, since
        self._after: Cursor | None = None
        self._begun = False
        self._status: str | None = None
        self._flights: tuple[Any, float, list[dict[str, Any]]] = (None, 0.0, [])
        self._following: Flights | None = None

    def look(self) -> list[tuple[str, dict[str, Any]]]:
        """The events since the last look. Reads files: call it in a thread."""
        events: list[tuple[str, dict[str, Any]]] = []
        if self._status is None:
            self._line = min(self._line, self._run.lines())  # who asks from beyond the end wants what comes from now on
        lines, damaged = self._run.metrics(self._line)
        if len(lines) + damaged:
            self._line += len(lines) + damaged
            events.append(("metrics", {"lines": lines, "next": self._line}))
        try:
            events += self._entries()
            events += self._inflight()
        except (AgentRLError, OSError):  # the folder is being made anew: the next look finds it
            pass
        status = self._run.status(self._run.summary())
        if status != self._status:
            self._status = status
            events.append(("status", {"status": status}))
        return events

    def _entries(self) -> list[tuple[str, dict[str, Any]]]:
        reader = self._run.reader
        if reader is None:
            return []
        if not self._begun:  # what is there already is the list's business
            self._begun = True
            newest = reader.trajectories(sort="added", descending=True, limit=1)
            self._after = newest.last
            return []
        newest = reader.trajectories(sort="added", descending=True, limit=1)
        if newest.last is None or newest.last == self._after:
            return []
        first = 0 if self._after is None else self._after.rowid
        page = reader.trajectories(sort="added", descending=True, limit=_MANY)
        fresh = [entry for entry in page.entries if entry.rowid > first]
        self._after = newest.last if not fresh else Cursor(fresh[0].rowid, fresh[0].rowid)
        added = self._after.rowid - first
        body = {
            "entries": [entry_json(entry) for entry in reversed(fresh)],
            "last": f"added:{self._after.rowid}",
            "missed": max(0, added - len(fresh)),
        }
        return [("entries", body)]

    def _inflight(self) -> list[tuple[str, dict[str, Any]]]:
        stamp, looked, known = self._flights
        now = time.monotonic()
        fresh = _journals(self._run)
        if fresh == stamp or now - looked < 2 * PERIOD:
            return []
        reader = self._run.reader
        if reader is None:
            return []
        if self._following is None:
            self._following = Flights(self._run.folder / "seg", reader.attempt)
        episodes = [flight_json(key, turns) for key, turns in self._following.look().items()][:_FLIGHTS]
        self._flights = (fresh, now, episodes)
        return [("inflight", {"episodes": episodes})] if episodes != known or stamp is None else []


def flight_json(key: EpisodeKey, turns: list[Turn]) -> dict[str, Any]:
    """An episode in flight: `doing` is what comes after its last recorded turn, `seconds` what its turns took."""
    last = turns[-1] if turns else None
    return {
        "id": key.id,
        "attempt": key.attempt,
        "stage": key.stage,
        "step": key.step,
        "split": key.split,
        "task_id": key.task_id,
        "group_id": key.group_id,
        "turns": len(turns),
        "calls": sum(len(turn.tools) for turn in turns),
        "doing": f"turn {len(turns) + 1}",
        "said": "" if last is None else last.text[-200:],
        "seconds": sum(turn.seconds for turn in turns),
    }


def entry_of(flight: Flight) -> dict[str, Any]:
    """The list line of an episode in flight, with what its turns have come to so far."""
    turns = flight.turns
    calls = [use.result for turn in turns for use in turn.tools]
    return {
        **flight_json(flight.key, turns),
        "n_turns": len(turns),
        "n_calls": len(calls),
        "n_errors": sum(not result.ok for result in calls),
        "n_tokens": sum(turn.n_sampled for turn in turns),
        "tool_cost": sum(result.cost for result in calls),
        "turn_cost": sum(turn.cost for turn in turns),
        "source": "policy",
        "latest": True,
    }


def _journals(run: Run) -> tuple[tuple[str, int, int], ...]:
    out = []
    for path in sorted((run.folder / "seg").glob("*.turns")):
        try:
            found = path.stat()
        except FileNotFoundError:
            continue
        out.append((path.name, found.st_size, found.st_mtime_ns))
    return tuple(out)


async def events(run: Run, since: int, stopped: Callable[[], bool]) -> AsyncIterator[bytes]:
    """The stream of one page, until it goes away or the server stops."""
    watch = Watch(run, since)
    told = time.monotonic()
    yield b"retry: 2000\n\n"
    while not stopped():
        for name, body in await asyncio.to_thread(watch.look):
            told = time.monotonic()
            yield f"event: {name}\ndata: {json.dumps(body)}\n\n".encode()
        if time.monotonic() - told >= HEARTBEAT:
            told = time.monotonic()
            yield b": still here\n\n"
        await asyncio.sleep(PERIOD)
