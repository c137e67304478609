"""What a run does now, as server-sent events: new metric lines, new trajectories, episodes in flight, its status.

The files are looked at twice a second, once for all pages that show the run; nothing is asked of the run itself,
which never knows that somebody watches. Of the metrics and of a journal only what was appended is read. Each event's
id says up to which line of which metrics.jsonl it came, so that a page that lost its connection misses none of them.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from agentrl.errors import AgentRLError
from agentrl.metrics import NAME as METRICS
from agentrl.store import Cursor, EpisodeKey, Flight
from agentrl.store.flights import Flights
from agentrl.trajectory import Turn
from agentrl.viewer.pages import entry_json
from agentrl.viewer.runs import Run
from agentrl.viewer.tail import Tail

PERIOD = 0.5  # seconds between looks
HEARTBEAT = 10.0  # seconds
NOW = 10**9  # as the number of a metric line: what comes from now on
STREAMS = 256  # that are open at once
_MANY = 200  # entries of one event, the newest; `missed` counts the others
_FLIGHTS = 500  # episodes of one event
_WAITING = 256  # events that a page may fall behind
Event = tuple[str, dict[str, Any]]


class Watch:
    """One run: what was told of it, and what is new since. Belongs to one thread at a time."""

    def __init__(self, run: Run, since: int) -> None:
        self._run, self._since = run, since
        self._tail: Tail | None = None
        self._after: Cursor | None = None
        self._generation = 0
        self._status: str | None = None
        self._flights: tuple[Any, list[dict[str, Any]]] = (None, [])
        self._following: Flights | None = None

    @property
    def line(self) -> int:
        """The number of the next metric line."""
        return 0 if self._tail is None else self._tail.line

    @property
    def file(self) -> str:
        """Which file `line` counts in."""
        return "0" if self._tail is None else self._tail.file

    def look(self) -> list[Event]:
        """The events since the last look. Reads files: call it in a thread."""
        events: list[Event] = []
        if self._tail is None:  # who asks from beyond the end wants what comes from now on
            self._tail = Tail(self._run.folder / METRICS, self._since)
        lines, anew = self._tail.read()
        if lines or anew:
            events.append(("metrics", metrics_of(lines, self._tail.line, anew)))
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

    def _entries(self) -> list[Event]:
        reader = self._run.reader
        if reader is None:
            return []
        if self._generation != self._run.generation:  # what is there already is the list's business
            newest = reader.trajectories(sort="added", descending=True, limit=1)
            self._after, self._generation = newest.last, self._run.generation
            self._flights, self._following = (None, []), None
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

    def _inflight(self) -> list[Event]:
        stamp, known = self._flights
        fresh = (_journals(self._run), self._after)  # an episode ends as it is stored, whatever its journal says
        if fresh == stamp or self._run.reader is None:
            return []
        if self._following is None:
            self._following = Flights(self._run.folder / "seg", self._stored)
        episodes = [flight_json(key, turns) for key, turns in self._following.look().items()][:_FLIGHTS]
        self._flights = (fresh, episodes)
        return [("inflight", {"episodes": episodes})] if episodes != known or stamp is None else []

    def _stored(self, id: str) -> int:
        reader = self._run.reader  # not one that is kept here: it may be another one by now
        return -1 if reader is None else reader.attempt(id)


def metrics_of(lines: list[dict[str, Any]], next: int, anew: bool) -> dict[str, Any]:
    """The body of a metrics event. `reset`: the file was made anew or cut (a resume), and these are its first lines."""
    return {"lines": lines, "next": next, **({"reset": True} if anew else {})}


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


# -- streams ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Place:
    """From where a page wants metric lines: line number `line`, of `file` where it knows that."""

    line: int = 0
    file: str | None = None


def place_of(id: str) -> Place | None:
    """The place after the event of that id, None where it is none of ours."""
    match = re.fullmatch("([0-9a-f]{1,16})-([0-9]{1,15})", id)
    return None if match is None else Place(int(match[2]), match[1])


@dataclass(slots=True, eq=False)
class _Room:
    """The pages that show one run. `known`: what whoever comes is told first."""

    watch: Watch
    pages: list[asyncio.Queue[bytes | None]] = field(default_factory=list)
    known: dict[str, dict[str, Any]] = field(default_factory=dict)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    task: asyncio.Task[None] | None = None


class Live:
    """All streams of a server. But for `stop`, belongs to its event loop."""

    def __init__(self) -> None:
        self._rooms: dict[str, _Room] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopped = False

    @property
    def full(self) -> bool:
        """Whether no more streams can be opened."""
        return sum(len(room.pages) for room in self._rooms.values()) >= STREAMS

    def stop(self) -> None:
        """End all streams. May be called from any thread, and from a signal's handler."""
        self._stopped = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._end)

    async def events(self, run: Run, place: Place) -> AsyncIterator[bytes]:
        """The stream of one page, until it goes away or the server stops."""
        yield b"retry: 2000\n\n"
        self._loop = asyncio.get_running_loop()
        if self._stopped:
            return
        room = self._rooms.get(run.key)
        if room is None:
            room = self._rooms[run.key] = _Room(Watch(run, NOW))
            room.task = asyncio.create_task(self._follow(run.key, room))
        page: asyncio.Queue[bytes | None] = asyncio.Queue(_WAITING)
        room.pages.append(page)
        try:
            async with room.lock:  # between two looks, so that nothing is told twice, and nothing missed
                self._tell(room, await asyncio.to_thread(room.watch.look))
                _clear(page)
                first = await asyncio.to_thread(_missed, run, room.watch, place)
                first += [(name, body) for name, body in room.known.items()]
            if self._stopped:
                return
            for event in first:
                yield _sent(room.watch, event)
            while True:
                try:
                    data = await asyncio.wait_for(page.get(), HEARTBEAT)
                except TimeoutError:
                    data = b": still here\n\n"
                if data is None:
                    return
                yield data
        finally:
            room.pages.remove(page)

    async def _follow(self, key: str, room: _Room) -> None:
        """Look as long as there are pages."""
        try:
            while room.pages and not self._stopped:
                await asyncio.sleep(PERIOD)
                async with room.lock:
                    self._tell(room, await asyncio.to_thread(room.watch.look))
        finally:
            del self._rooms[key]
            for page in room.pages:  # the browser comes again
                _clear(page)
                page.put_nowait(None)

    def _tell(self, room: _Room, events: list[Event]) -> None:
        for event in events:
            if event[0] in ("status", "inflight"):
                room.known[event[0]] = event[1]
            data = _sent(room.watch, event)
            for page in room.pages:
                if page.full():  # it does not read: what it asks for when it comes again is less than what waits
                    _clear(page)
                    page.put_nowait(None)
                else:
                    page.put_nowait(data)

    def _end(self) -> None:
        for room in self._rooms.values():
            for page in room.pages:
                _clear(page)
                page.put_nowait(None)


def _missed(run: Run, watch: Watch, place: Place) -> list[Event]:
    """The lines that a page lacks, up to where the watch is."""
    anew = place.file not in (None, watch.file) or watch.line < place.line < NOW
    first = 0 if anew else min(place.line, watch.line)
    if first == watch.line and not anew:
        return []
    lines, _ = run.metrics(first, watch.line)
    return [("metrics", metrics_of(lines, watch.line, anew))]


def _sent(watch: Watch, event: Event) -> bytes:
    return f"id: {watch.file}-{watch.line}\nevent: {event[0]}\ndata: {json.dumps(event[1])}\n\n".encode()


def _clear(page: asyncio.Queue[bytes | None]) -> None:
    while not page.empty():
        page.get_nowait()
