"""Daemon threads for blocking code: as many as there are calls under way, reused, and abandoned when stuck.

`concurrent.futures` keeps a fixed number of threads and joins them at exit, so that one endless loop in a
user's tool would take a place for ever and keep the process from ending. Here a thread that does not
come back is simply forgotten: it takes nobody's place and dies with the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

from agentrl.errors import InfraError

_Job = tuple[Callable[[], Any], asyncio.AbstractEventLoop, "asyncio.Future[Returned]"]


class Returned:
    """What a blocking call came to: a value, or the exception that it raised (of any kind)."""

    __slots__ = ("error", "value")

    def __init__(self, value: Any = None, error: BaseException | None = None) -> None:
        self.value = value
        self.error = error


class Workers:
    """A pool that grows on demand; at most `keep` idle threads are held for the next call."""

    def __init__(self, keep: int = 64) -> None:
        self._keep = keep
        self._idle: list[SimpleQueue[_Job]] = []
        os.register_at_fork(after_in_child=self._idle.clear)

    def submit(self, function: Callable[[], Any]) -> asyncio.Future[Returned]:
        """Run `function` in a thread; the future gets a `Returned`. Raises `InfraError` when the
        machine has no thread left."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Returned] = loop.create_future()
        try:
            inbox = self._idle.pop()
        except IndexError:
            inbox = SimpleQueue()
            try:
                threading.Thread(target=self._work, args=(inbox,), name="agentrl-tool", daemon=True).start()
            except RuntimeError as error:
                raise InfraError(f"no thread left for a blocking tool ({error}); lower the episode limit") from error
        inbox.put((function, loop, future))
        return future

    def _work(self, inbox: SimpleQueue[_Job]) -> None:
        while True:
            function, loop, future = inbox.get()
            try:
                returned = Returned(function())
            except BaseException as error:
                returned = Returned(error=error)
            stay = len(self._idle) < self._keep
            if stay:
                self._idle.append(inbox)
            with contextlib.suppress(RuntimeError):  # the loop was closed while a stuck call went on
                loop.call_soon_threadsafe(_deliver, future, returned)
            del function, loop, future, returned  # an idle thread must not keep an episode alive
            if not stay:
                return


def _deliver(future: asyncio.Future[Returned], returned: Returned) -> None:
    if not future.done():
        future.set_result(returned)


WORKERS = Workers()
