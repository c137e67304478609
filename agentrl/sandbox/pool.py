"""The pool: sandboxes that are ready before somebody needs them, and never more than the machine can hold.

Starters keep `warm` sandboxes ready. A lease takes one at once; giving it back destroys it in the background, for what
a policy's program touched is never used again. A sandbox counts against `most` until nothing of it is left: memory that
is being freed is not free. One that died idle is skipped and replaced. After a start that failed, one at a time is
tried, with pauses that double, until one succeeds: so a daemon may restart. Whoever has waited for longer than
`patience` hears why (`InfraError`); what no second try can mend (`UsageError`, a bug) is heard at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from agentrl.errors import InfraError, UsageError
from agentrl.sandbox import Backend, Limits, PoolStats, Sandbox

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0  # seconds after a start that failed; doubled each time
CHECK_SECONDS = 1.0  # between looks at the idle ones; a look asks nothing of them
IDLE_SECONDS = 600.0  # for which one is kept ready at most
log = logging.getLogger(__name__)


class Pool:
    """Leases sandboxes of one backend under one set of limits, in one event loop, between `start` and `close`.

    The pool owns the backend: closing one closes the other. Where the event loop ends before `close` (`asyncio.run`
    that returns, fails or is interrupted), the pool closes itself.

    Args:
        limits: `life` is what a leased one has before it at least, however long it was kept ready.
        warm: how many to keep ready.
        most: how many may exist at once, those being started and destroyed included; leases beyond wait in order.
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
        self._opened_with = self.limits.model_copy(update={"life": self.limits.life + IDLE_SECONDS})
        self._ready: deque[tuple[Sandbox, float]] = deque()  # and since when
        self._leased: set[Sandbox] = set()
        self._waiting: deque[asyncio.Future[Sandbox]] = deque()
        self._starts: set[asyncio.Task[Sandbox]] = set()
        self._ends: set[asyncio.Task[None]] = set()
        self._watching: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._open = False
        self._error: BaseException | None = None  # of the last start, None where that went well
        self._failures = 0  # pauses since a start went well
        self._pause: asyncio.TimerHandle | None = None
        self._hopeless = False  # nothing is kept ready; whoever asks hears why

    async def __aenter__(self) -> Pool:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Remove what dead owners left, and begin to warm up. Raises `UsageError` where the backend cannot work."""
        self._at_home()
        if self._open:
            return
        if why := await self.backend.missing():
            raise UsageError(why)
        await self.backend.reap()
        if not self._open:  # nobody else was quicker
            self._open, self._loop = True, asyncio.get_running_loop()
            self._error, self._failures, self._hopeless = None, 0, False
            self._watching = self._loop.create_task(self._watch(), name="watch the sandbox pool")
            self._fill()

    async def lease(self) -> Sandbox:
        """A fresh sandbox. Raises `InfraError` where none came in time, `UsageError` where none ever can."""
        loop = self._at_home()
        if not self._open:
            raise InfraError("the sandbox pool is closed")
        box = self._first_alive()
        if box is None:
            begun = loop.time()
            self.stats.waited += 1
            try:
                box = await self._one_that_comes(loop)
            finally:
                self.stats.waited_s += loop.time() - begun
            if not self._open:
                raise InfraError("the sandbox pool is closed")
        self.stats.leased += 1
        self._fill()
        return box

    def give_back(self, box: Sandbox) -> None:
        """Let go of a leased sandbox; it is destroyed behind. Does not wait. Giving back twice does nothing."""
        self._at_home()
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
        """What metrics.jsonl may say of the pool: what is there now, and counts since it was made."""
        stats = self.stats
        return {
            "ready": float(len(self._ready)),
            "live": float(self._live),
            "waiting": float(len(self._waiting)),
            "opened": float(stats.opened),
            "leased": float(stats.leased),
            "closed": float(stats.closed),
            "failed": float(stats.failed),
            "found_dead": float(stats.found_dead),
            "waited": float(stats.waited),
            "waited_s": stats.waited_s,
        }

    async def close(self) -> None:
        """Destroy every sandbox, leased ones too, and wait until that is done. Idempotent; starts no more.

        Never raises for a backend that is gone by now: what is left, the next `start` on this machine removes.
        """
        loop = self._at_home()
        if self._open:
            self._open = False
            self._tell_all(InfraError("the sandbox pool is closed"))
            if self._pause is not None:
                self._pause.cancel()
                self._pause = None
            for task in (self._watching, *self._starts):
                if task is not None and task is not asyncio.current_task(loop):
                    task.cancel()
            for box in (*(box for box, _ in self._ready), *self._leased):
                self._destroy(box)
            self._ready.clear()
            self._leased.clear()
        while self._starts or self._ends:
            await asyncio.wait({*self._starts, *self._ends})
        try:
            await self.backend.reap()
            await self.backend.close()
        except InfraError as error:
            log.warning("the sandbox pool could not clear up: %s", error)

    # -- who comes and who waits -------------------------------------------------------------------

    def _first_alive(self) -> Sandbox | None:
        """The one that has been ready for longest, if any; dead ones are dropped on the way."""
        while self._ready:
            box, _ = self._ready.popleft()
            if box.alive:
                self._leased.add(box)
                return box
            self.stats.found_dead += 1
            self._destroy(box)
        return None

    async def _one_that_comes(self, loop: asyncio.AbstractEventLoop) -> Sandbox:
        """Wait in line. A timer ends the wait, so that it ends with a sandbox or an error and never with both."""
        waiter: asyncio.Future[Sandbox] = loop.create_future()
        self._waiting.append(waiter)
        timer = loop.call_later(self.patience, self._give_up, waiter)
        self._fill()
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                box = waiter.result()  # it came just now, untouched: somebody else takes it
                if box in self._leased:
                    self._leased.discard(box)
                    self._offer(box)
            raise
        finally:
            timer.cancel()
            if waiter in self._waiting:
                self._waiting.remove(waiter)

    def _give_up(self, waiter: asyncio.Future[Sandbox]) -> None:
        if self._error is not None:
            why = str(self._error)
        elif self._live >= self.most:
            why = f"all {self.most} are in use (raise `most`, or use fewer at once)"
        else:
            why = f"{len(self._starts)} are being started and not ready yet"
        error = InfraError(f"no sandbox could be had within {self.patience:g} s: {why}")
        error.__cause__ = self._error
        if not waiter.done():
            waiter.set_exception(error)

    def _tell_all(self, error: BaseException) -> None:
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_exception(error)
        self._waiting.clear()

    def _offer(self, box: Sandbox) -> None:
        """Give a fresh sandbox to the first in line, or keep it ready."""
        if not self._open:
            self._destroy(box)
            return
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(box)
                self._leased.add(box)
                return
        self._ready.append((box, asyncio.get_running_loop().time()))

    # -- starting ----------------------------------------------------------------------------------

    @property
    def _live(self) -> int:
        """Sandboxes that exist, being started and being destroyed included."""
        return len(self._ready) + len(self._leased) + len(self._starts) + len(self._ends)

    def _fill(self) -> None:
        """Start as many as are wanted and allowed."""
        self.stats.ready, self.stats.live = len(self._ready), self._live
        if not self._open or self._pause is not None:
            return
        wanted = len(self._waiting) + (0 if self._hopeless else self.warm) - len(self._ready) - len(self._starts)
        at_once = 1 if self._failures else self.starters
        room = min(wanted, at_once - len(self._starts), self.most - self._live)
        for _ in range(room):
            self._background(self._starts, self.backend.open(self._opened_with), self._started)
        self.stats.live = self._live

    def _started(self, task: asyncio.Task[Sandbox]) -> None:
        """A start has come to its end, whichever."""
        if not task.cancelled():
            error = task.exception()
            if error is None:
                self.stats.opened += 1
                self._error, self._failures, self._hopeless = None, 0, False
                self._offer(task.result())
            else:
                self._start_failed(error)
        self._fill()

    def _start_failed(self, error: BaseException) -> None:
        self.stats.failed += 1
        self._error = error
        self._hopeless = not isinstance(error, InfraError | OSError)
        if self._hopeless:
            if not isinstance(error, UsageError):
                log.error("the sandbox backend %s failed", self.backend.name, exc_info=error)
            self._failures = 0
            self._tell_all(error)
        elif self._open and self._pause is None:  # several that fail together are one failure
            pause = min(FIRST_PAUSE * 2**self._failures, LONGEST_PAUSE)
            self._failures += 1
            self._pause = asyncio.get_running_loop().call_later(pause, self._go_on)

    def _go_on(self) -> None:
        self._pause = None
        self._fill()

    # -- ending ------------------------------------------------------------------------------------

    def _destroy(self, box: Sandbox) -> None:
        self._background(self._ends, box.close(), self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self.stats.closed += 1
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("a sandbox could not be destroyed: %s", error)
        self._fill()

    async def _watch(self) -> None:
        """Replace idle ones that died or grew old, so that nobody finds them first."""
        try:
            while True:
                await asyncio.sleep(CHECK_SECONDS)
                self._look_after_idle(asyncio.get_running_loop().time())
        except asyncio.CancelledError:
            if self._open:  # it was not `close`: the event loop ends
                await self.close()
            raise

    def _look_after_idle(self, now: float) -> None:
        dead = [item for item in self._ready if not item[0].alive]
        old = [item for item in self._ready if item[0].alive and now - item[1] > IDLE_SECONDS]
        self.stats.found_dead += len(dead)
        for item in dead + old:
            self._ready.remove(item)
            self._destroy(item[0])
        self._fill()

    def _background(
        self, among: set[asyncio.Task[Any]], work: Coroutine[Any, Any, Any], then: Callable[[asyncio.Task[Any]], None]
    ) -> None:
        """Run `work`, kept `among` the others until it is done and `then` has been called."""
        task = asyncio.get_running_loop().create_task(work)
        among.add(task)

        def over(task: asyncio.Task[Any]) -> None:
            among.discard(task)
            then(task)

        task.add_done_callback(over)

    def _at_home(self) -> asyncio.AbstractEventLoop:
        """The event loop. Raises `UsageError` in another one than the pool's."""
        here = asyncio.get_running_loop()
        if self._open and self._loop is not here:
            raise UsageError("this sandbox pool belongs to another event loop; close it there, or make a pool for each")
        return here
