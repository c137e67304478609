"""Turns that wait to be written ahead, each for a moment, so that those of brief episodes never are.

A turn is written ahead so that a killed run need not play it again. Of an episode that is over and stored within the
moment there is nothing to save, and where episodes take milliseconds, writing each twice would cost more than playing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from agentrl.store.key import EpisodeKey
from agentrl.trajectory import Turn


class Waiting(NamedTuple):
    """Turn `number` of an episode in flight, not yet written."""

    key: EpisodeKey
    number: int
    turn: Turn


@dataclass(slots=True)
class _Queue:
    since: float
    turns: list[Waiting] = field(default_factory=list)


class Pending:
    """Keeps turns until they are due, some after half of `seconds`, all after `seconds`.

    `write` is called when one is, from a thread of its own, and `take`s what is due. Whoever puts a turn here does not
    wait for the disk. Every method may be called from any thread.
    """

    def __init__(self, seconds: float, write: Callable[[], None]) -> None:
        self._seconds, self._write = seconds, write
        self._queues: dict[str, _Queue] = {}  # by the episode's id, the longest waiting first
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    def put(self, key: EpisodeKey, number: int, turn: Turn) -> None:
        """Keep a turn. An episode's turns are taken in the order in which they came."""
        with self._changed:
            if self._closed:
                raise RuntimeError("this StoreWriter is closed")
            queue = self._queues.get(key.id)
            if queue is None:
                queue = self._queues[key.id] = _Queue(time.monotonic())
                if self._thread is None:
                    self._thread = threading.Thread(target=self._follow, name="turns ahead", daemon=True)
                    self._thread.start()
                elif len(self._queues) == 1:
                    self._changed.notify()
            queue.turns.append(Waiting(key, number, turn))

    def drop(self, id: str, attempt: int) -> None:
        """The episode is stored or given up: its turns up to that attempt need not be written."""
        with self._changed:
            queue = self._queues.get(id)
            if queue is not None:
                queue.turns = [waiting for waiting in queue.turns if waiting.key.attempt > attempt]
                if not queue.turns:
                    del self._queues[id]

    def take(self, *, everything: bool = False) -> list[Waiting]:
        """Hand over what has waited for half of the time: nothing is due then for the other half."""
        with self._changed:
            until = time.monotonic() - self._seconds / 2
            due = [id for id, queue in self._queues.items() if everything or queue.since <= until]
            return [waiting for id in due for waiting in self._queues.pop(id).turns]

    def close(self) -> None:
        """Wait for the thread to end. What still waits can be taken. Idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _follow(self) -> None:
        while self._due():
            self._write()

    def _due(self) -> bool:
        """Sleep until something is due; False once this is closed."""
        with self._changed:
            while not self._closed:
                first = next(iter(self._queues.values()), None)
                left = None if first is None else first.since + self._seconds - time.monotonic()
                if left is not None and left <= 0:
                    return True
                self._changed.wait(left)
        return False
