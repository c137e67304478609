"""Places for episodes: how many may be at play at once, whoever asks.

A forking strategy holds a whole group of episodes, so it asks for all their places at once: asking one
by one could leave every group waiting for the last places of the others.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Places:
    """`total` places, given in the order in which they are asked for."""

    def __init__(self, total: int) -> None:
        self.total = self.free = total
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def take(self, n: int = 1) -> AsyncIterator[None]:
        """Hold `n` places (all there are, where `n` is more); waits until they are free together."""
        n = min(n, self.total)
        if self._waiting or n > self.free:
            await self._wait(n)
        else:
            self.free -= n
        try:
            yield
        finally:
            self.free += n
            self._admit()

    async def _wait(self, n: int) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((n, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # admitted and cancelled at once
                self.free += n
            elif (n, turn) in self._waiting:  # whoever left a place meanwhile may have passed it over
                self._waiting.remove((n, turn))
            self._admit()
            raise

    def _admit(self) -> None:
        while self._waiting and self._waiting[0][0] <= self.free:
            n, turn = self._waiting.popleft()
            if not turn.done():
                self.free -= n
                turn.set_result(None)
