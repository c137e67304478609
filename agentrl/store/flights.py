"""Who is in flight, followed: a look costs what was appended since the last one, not what the journals hold.

A journal keeps the turns of finished episodes until most of it is dead. Whoever looks at a busy run every second must
not read and decode them all again, so this remembers where it stopped. Turns come without their tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from agentrl.store.codec import turn_in
from agentrl.store.frames import Frame, Kind, frames_of, unpack
from agentrl.store.journal import SUFFIX
from agentrl.store.key import EpisodeKey
from agentrl.store.segments import number_of
from agentrl.trajectory import Turn


class Flights:
    """The episodes in flight of the store in `folder` (its seg/). `stored(id)` is the latest attempt that the index
    has, -1 where there is none. Belongs to one thread at a time.
    """

    def __init__(self, folder: Path, stored: Callable[[str], int]) -> None:
        self._folder, self._stored = folder, stored
        self._ends: dict[Path, int] = {}
        self._turns: dict[EpisodeKey, dict[int, Turn]] = {}

    def look(self) -> dict[EpisodeKey, list[Turn]]:
        """The turns of each, from turn 0 on, as `StoreReader.inflight` has them, sorted by id."""
        fresh: dict[EpisodeKey, list[Frame]] = {}
        for frame in self._appended():
            stage, step, split, task, sample, branch, attempt, *_ = frame.meta
            key = EpisodeKey(stage, step, split, task, sample, tuple(branch), attempt)
            if frame.kind == Kind.TURN:
                fresh.setdefault(key, []).append(frame)
            else:  # nobody will finish this attempt, nor those before it
                for known in (fresh, self._turns):
                    for other in [k for k in known if k.id == key.id and k.attempt <= attempt]:
                        del known[other]
        done: dict[str, int] = {}
        for key in {**self._turns, **fresh}:
            done.setdefault(key.id, self._stored(key.id))
        self._turns = {key: turns for key, turns in self._turns.items() if key.attempt > done[key.id]}
        for key, frames in fresh.items():
            if key.attempt > done[key.id]:
                self._turns[key] = _after(self._turns.get(key, {}), frames)
        latest: dict[str, int] = {}
        for key in self._turns:
            latest[key.id] = max(latest.get(key.id, -1), key.attempt)
        return {
            key: [turns[i] for i in range(len(turns)) if i in turns]
            for key, turns in sorted(self._turns.items(), key=lambda item: item[0].id)
            if key.attempt == latest[key.id]
        }

    def _appended(self) -> Iterator[Frame]:
        """Frames that came since the last call. Where a journal was tidied away, what lives stands in the next one."""
        while True:
            paths = sorted(self._folder.glob(f"*.{SUFFIX}"), key=number_of)
            try:
                if any(path not in paths or path.stat().st_size < end for path, end in self._ends.items()):
                    self._ends.clear()
                    self._turns.clear()
                tails = []
                for path in paths:
                    with path.open("rb") as file:
                        file.seek(self._ends.get(path, 0))
                        tails.append((path, file.read()))
            except FileNotFoundError:
                continue
            break
        for path, data in tails:
            start = end = self._ends.get(path, 0)
            for frame in frames_of(data, body=True):
                end = start + frame.offset + frame.length
                yield frame
            self._ends[path] = end


def _after(turns: dict[int, Turn], frames: list[Frame]) -> dict[int, Turn]:
    """`turns` and what the frames add; a turn that is written again drops those after it."""
    for frame in frames:
        *_, index, again = frame.meta
        if again:
            turns = {i: turn for i, turn in turns.items() if i < index}
        what, read, *_ = unpack(frame.body)
        turns[index] = turn_in(what, read, (), None)
    return turns
