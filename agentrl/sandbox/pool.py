"""The pool: sandboxes that are ready before somebody needs them, and never more than the machine can hold.

Starters keep `warm` sandboxes ready. A lease takes one; giving it back destroys it in the background, for what a
policy's program touched is never used again. A sandbox counts against `most` until nothing of it is left: memory that
is being freed is not free. A warm one that died idle is skipped; starts that fail are tried again, with growing pauses,
so that a daemon may restart; and whoever has waited longer than `patience` hears why (`InfraError`).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from agentrl.errors import InfraError, UsageError
from agentrl.sandbox import Backend, Limits, PoolStats, Sandbox

PAUSES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)  # seconds between starts that failed
CHECK_SECONDS = 5.0  # between looks at the idle ones


class Pool:
    """Leases sandboxes of one backend under one set of limits. Used within one event loop, between `start` and `close`.

    Args:
        warm: how many to keep ready.
        most: how many may exist at once, those being destroyed included; leases beyond wait in order.
        starters: how many start at the same time.
        patience: seconds that a lease waits before it raises `InfraError`.
    """

    def __init__(
        self,
        backend: Backend,
        limits: Limits | None = None,
        *,
        warm: int = 4,
        most: int = 64,
        starters: int = 8,
        patience: float = 60.0,
    ) -> None:
        if not (0 <= warm <= most and most >= 1 and starters >= 1 and patience > 0):
            raise UsageError(
                f"a pool needs 0 <= warm <= most, at least one starter and some patience, not warm={warm}, "
                f"most={most}, starters={starters}, patience={patience:g}"
            )
        self.backend = backend
        self.limits = limits or Limits.model_validate({})
        self.warm, self.most, self.starters, self.patience = warm, most, starters, patience
        self.stats = PoolStats()
        self._ready: deque[Sandbox] = deque()
        self._waiting: deque[asyncio.Future[Sandbox]] = deque()
        self._live = 0  # ready, leased, being started and being destroyed
        self._starting = 0
        self._failures = 0
        self._error: Exception | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._leased: set[Sandbox] = set()
        self._open = False

    async def __aenter__(self) -> Pool:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Remove what dead owners left, and begin to warm up. Raises `UsageError` where the backend cannot work."""
        if self._open:
            return
        if why := await self.backend.missing():
            raise UsageError(why)
        await self.backend.reap()
        self._open = True
        self._background(self._watch())
        self._fill()

    async def lease(self) -> Sandbox:
        """A fresh sandbox. Raises `InfraError` where none came in time, `UsageError` where none ever can."""
        if not self._open:
            raise InfraError("the sandbox pool is closed")
        begun = time.monotonic()
        try:
            while True:
                box = await self._next()
                if box.alive:
                    self.stats.leased += 1
                    self._leased.add(box)
                    return box
                self.stats.found_dead += 1
                self._destroy(box)
        finally:
            self.stats.waited_s += time.monotonic() - begun
            self._fill()

    def give_back(self, box: Sandbox) -> None:
        """Let go of a leased sandbox; it is destroyed behind. Does not wait."""
        if box in self._leased:
            self._leased.discard(box)
            self._destroy(box)

    @contextlib.asynccontextmanager
    async def leased(self) -> AsyncIterator[Sandbox]:
        """A sandbox for the length of a `with` block."""
        box = await self.lease()
        try:
            yield box
        finally:
            self.give_back(box)

    def metrics(self) -> dict[str, float]:
        """What metrics.jsonl may say of the pool."""
        stats = self.stats
        return {
            "ready": float(len(self._ready)),
            "live": float(self._live),
            "waiting": float(len(self._waiting)),
            "opened": float(stats.opened),
            "leased": float(stats.leased),
            "failed": float(stats.failed),
            "found_dead": float(stats.found_dead),
            "waited_s": stats.waited_s,
        }

    async def close(self) -> None:
        """Destroy every sandbox, leased ones too, and wait until that is done. Idempotent."""
        self._open = False
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_exception(InfraError("the sandbox pool is closed"))
        self._waiting.clear()
        starters = [task for task in self._tasks if task.get_name() != "destroy"]
        for task in starters:
            task.cancel()
        for box in (*self._ready, *self._leased):
            self._destroy(box)
        self._ready.clear()
        self._leased.clear()
        while self._tasks:
            await asyncio.wait(set(self._tasks))
        await self.backend.close()
        await self.backend.reap()

    # -- inside ------------------------------------------------------------------------------------

    async def _next(self) -> Sandbox:
        if self._ready:
            return self._ready.popleft()
        waiter: asyncio.Future[Sandbox] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        self._fill()
        try:
            return await asyncio.wait_for(asyncio.shield(waiter), self.patience)
        except TimeoutError:
            waiter.cancel()
            why = f": {self._error}" if self._error else f"; all {self.most} are in use (raise `most`)"
            raise InfraError(f"no sandbox could be had within {self.patience:g} s{why}") from self._error
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self._offer(waiter.result())  # it came just now: somebody else takes it
            waiter.cancel()
            raise

    def _fill(self) -> None:
        """Start as many as are wanted and allowed."""
        self.stats.ready, self.stats.live = len(self._ready), self._live
        waiting = sum(not waiter.done() for waiter in self._waiting)
        while (
            self._open
            and self._starting < self.starters
            and self._live < self.most
            and len(self._ready) + self._starting < self.warm + waiting
        ):
            self._starting += 1
            self._live += 1
            self._background(self._start_one())

    async def _start_one(self) -> None:
        box = None
        try:
            if self._failures:
                await asyncio.sleep(PAUSES[min(self._failures, len(PAUSES)) - 1])
            box = await self.backend.open(self.limits)
            self.stats.opened += 1
            self._failures, self._error = 0, None
        except UsageError as error:  # will not mend itself: whoever waits hears it now
            self._error = error
            self._failures = len(PAUSES)
            for waiter in self._waiting:
                if not waiter.done():
                    waiter.set_exception(error)
            self._waiting.clear()
        except InfraError as error:
            self.stats.failed += 1
            self._failures += 1
            self._error = error
        finally:
            self._starting -= 1
            if box is None:
                self._live -= 1
        if box is not None:
            self._offer(box)
        self._fill()

    def _offer(self, box: Sandbox) -> None:
        if not self._open:
            self._destroy(box)
            return
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(box)
                return
        self._ready.append(box)

    def _destroy(self, box: Sandbox) -> None:
        self._background(self._end(box), "destroy")

    async def _end(self, box: Sandbox) -> None:
        try:
            await box.close()
        finally:
            self._live -= 1
            self.stats.closed += 1
            self._fill()

    async def _watch(self) -> None:
        """Replace idle ones that died, so that nobody finds them first."""
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            for box in [box for box in self._ready if not box.alive]:
                self._ready.remove(box)
                self.stats.found_dead += 1
                self._destroy(box)
            self._fill()

    def _background(self, work: Coroutine[Any, Any, None], name: str = "start") -> None:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
