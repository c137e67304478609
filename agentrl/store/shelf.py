"""The shelf: finished episodes are stored in the background, as many at once as came within a moment."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from itertools import groupby

from agentrl.store.writer import StoreWriter
from agentrl.trajectory import Trajectory

PAUSE = 0.5  # seconds that a trajectory may wait for others: each call of the writer waits for the disk


class Shelf:
    """Stores the trajectories of one (stage, split) through a writer. Used from one event loop."""

    def __init__(self, writer: StoreWriter, *, stage: str, split: str = "train") -> None:
        self._writer, self._stage, self._split = writer, stage, split
        self._waiting: list[tuple[int, Trajectory]] = []
        self._work: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()

    def put(self, step: int, trajectory: Trajectory) -> None:
        """Store a trajectory drawn for `step`, soon."""
        self._waiting.append((step, trajectory))
        if self._work is None:
            self._work = asyncio.create_task(self._store(), name="shelf")

    async def settle(self) -> None:
        """Return once all that was put is on disk. Raises what the writer raises."""
        while self._work is not None:
            self._hurry.set()
            await asyncio.shield(self._work)

    async def close(self) -> None:
        """Let what is under way come to its end; a failure was for `settle` to raise."""
        if self._work is not None:
            self._hurry.set()
            await asyncio.gather(self._work, return_exceptions=True)

    async def _store(self) -> None:
        while self._waiting:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._hurry.wait(), PAUSE)
            batch, self._waiting = sorted(self._waiting, key=lambda item: item[0]), []
            for step, items in groupby(batch, key=lambda item: item[0]):
                found = [trajectory for _, trajectory in items]
                await asyncio.to_thread(self._writer.add, found, step=step, stage=self._stage, split=self._split)
        self._work = None
        self._hurry.clear()
