"""Daemon threads for blocking code: as many as there are calls under way, reused, and abandoned when stuck.

`concurrent.futures` keeps a fixed number of threads and joins them at exit, so that one endless loop in a
user's tool would take a place for ever and keep the process from ending. Here a thread that does not
come back is simply forgotten: it takes nobody's place and dies with the process.

Most tools answer within microseconds, where a trip through the event loop costs more than the call. So a
call is first waited for in place, for `PATIENCE` seconds, and only then through the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

from agentrl.errors import InfraError

PATIENCE = 1e-4  # seconds


class Job:
    """A blocking call under way, and what it came to: `value`, or the exception of any kind that it raised."""

    __slots__ = ("_future", "_loop", "_over", "error", "function", "seconds", "value")

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function: Callable[[], Any] | None = function
        self.value: Any = None
        self.error: BaseException | None = None
        self.seconds = 0.0
        self._over = threading.Lock()
        self._over.acquire()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._future: asyncio.Future[None] | None = None

    async def wait(self, limit: float | None, patience: float) -> None:
        """Return when the call is over. Raises `TimeoutError` after `limit` seconds."""
        if self._over.acquire(timeout=patience if limit is None else min(patience, limit)):
            return
        self._loop = asyncio.get_running_loop()
        self._future = self._loop.create_future()
        if self._over.acquire(blocking=False):  # it ended before it could see the future
            return
        async with asyncio.timeout(limit):
            await self._future

    def run(self) -> None:
        """Make the call, in the thread."""
        assert self.function is not None
        started = time.perf_counter()
        try:
            self.value = self.function()
        except BaseException as error:
            self.error = error
        self.seconds = time.perf_counter() - started
        self.function = None

    def finish(self) -> None:
        """Tell whoever waits, from the thread. The lock first: `wait` looks at it after it has set the future."""
        self._over.release()
        if self._future is not None and self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop was closed while a stuck call went on
                self._loop.call_soon_threadsafe(_wake, self._future)


class Workers:
    """A pool that grows on demand; at most `keep` idle threads are held for the next call."""

    def __init__(self, keep: int = 64) -> None:
        self._keep = keep
        self._idle: list[SimpleQueue[Job]] = []
        os.register_at_fork(after_in_child=self._idle.clear)

    async def run(self, function: Callable[[], Any], limit: float | None, patience: float = PATIENCE) -> Job:
        """Run `function` in a thread. Raises `TimeoutError` after `limit` seconds, and `InfraError` when the
        machine has no thread left; what `function` raises is in the job."""
        job = Job(function)
        try:
            inbox = self._idle.pop()
        except IndexError:
            inbox = SimpleQueue()
            try:
                threading.Thread(target=self._work, args=(inbox,), name="agentrl-tool", daemon=True).start()
            except RuntimeError as error:
                raise InfraError(f"no thread left for a blocking tool ({error}); lower the episode limit") from error
        inbox.put(job)
        await job.wait(limit, patience)
        return job

    def _work(self, inbox: SimpleQueue[Job]) -> None:
        stay = True
        while stay:
            job = inbox.get()
            job.run()
            stay = len(self._idle) < self._keep
            if stay:
                self._idle.append(inbox)
            job.finish()
            del job  # an idle thread must not keep an episode alive


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


WORKERS = Workers()
