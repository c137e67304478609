"""Places for episodes: how many may be at play at once, whoever asks, and who is next.

A forking strategy holds a whole group of episodes, so it asks for all their places at once: asking one
by one could leave every group waiting for the last places of the others.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Places:
    """`total` places, given to those of larger priority first, and in the order in which they are asked for."""

    def __init__(self, total: int) -> None:
        self.total = self.free = total
        self._waiting: deque[tuple[int, int, asyncio.Future[None]]] = deque()  # priority, places

    @asynccontextmanager
    async def take(self, n: int = 1, priority: int = 0) -> AsyncIterator[None]:
        """Hold `n` places (all there are, where `n` is more); waits until they are free together."""
        n = min(n, self.total)
        before = sum(other >= priority for other, _, _ in self._waiting)
        if before or n > self.free:
            await self._wait(n, priority, before)
        else:
            self.free -= n
        try:
            yield
        finally:
            self.free += n
            self._admit()

    async def _wait(self, n: int, priority: int, before: int) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        mine = (priority, n, turn)
        self._waiting.insert(before, mine)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # admitted and cancelled at once
                self.free += n
            elif mine in self._waiting:  # whoever left a place meanwhile may have passed it over
                self._waiting.remove(mine)
            self._admit()
            raise

    def _admit(self) -> None:
        while self._waiting and self._waiting[0][1] <= self.free:
            _, n, turn = self._waiting.popleft()
            if not turn.done():
                self.free -= n
                turn.set_result(None)
