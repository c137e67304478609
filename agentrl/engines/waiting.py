"""Waiting: for a thread that may hang, for all of several calls, and for what should be tidied up."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, TypeVar, cast

from agentrl.errors import InfraError, UsageError

T = TypeVar("T")
SETTLE_SECONDS = 30.0  # for what should be tidied up after a failure


async def in_thread(work: Callable[[], T]) -> T:
    """`work` in a thread of its own, which nobody waits for when the program ends: it may hang as long as it likes."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def hand_over(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(cast(T, result))
        else:
            future.set_exception(error)

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except Exception as raised:  # whatever it is, whoever waits must hear of it
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop is over
            loop.call_soon_threadsafe(hand_over, result, error)

    threading.Thread(target=run, name="agentrl-weights", daemon=True).start()
    return await future


async def all_of(calls: Iterable[Awaitable[None]]) -> None:
    """All of them to their end, and only then the first error: a server must not be left in the middle."""
    for outcome in await asyncio.gather(*calls, return_exceptions=True):
        if isinstance(outcome, BaseException):
            raise outcome


async def settle(calls: Iterable[Coroutine[Any, Any, None]]) -> None:
    """All of them, for a while; servers that are gone, hang or refuse are no matter here."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    if tasks:
        done, late = await asyncio.wait(tasks, timeout=SETTLE_SECONDS)
        for task in late:
            task.cancel()
        for error in [task.exception() for task in done]:
            if error is not None and not isinstance(error, InfraError | UsageError):
                raise error
