"""The local engine: transformers models in process, on a CPU or one GPU, by the same code.

One thread owns the model, the cache and the rows, and runs step after step while there is work. Coroutines only put
things into its inbox (requests, and small jobs such as `fork` or `update_weights` that run between two steps) and await
a future. So the event loop stays free during a forward, and a row that waits for a tool holds nobody up.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from agentrl.engines import Capabilities, EngineStats, Generation, Request
from agentrl.engines.model import EngineModel
from agentrl.engines.scheduler import Job, Scheduler
from agentrl.errors import AgentRLError, InfraError, UsageError
from agentrl.trajectory import Floats, Ids

T = TypeVar("T")


class LocalEngine:
    """The `Engine` protocol over a transformers causal LM.

    Args:
        model: copied, so that training it does not change what is sampled until `update_weights`.
        rows: requests that run at once; more wait in the order of their priority, then in that in which they came.
        max_context: longest context + output in tokens; by default the model's own limit. Output is cut there.
        deterministic: a request's ids, log-probs and entropies follow from the request alone, to the bit, whatever
            runs beside it. Costs some padding.
        device: where to run; by default where `model` is.
        own_weights: False to share the tensors of `model` instead of copying them; call `update_weights` with nothing
            after each change, so that the version rises and old keys and values go.

    Raises `UsageError` for a model whose attention it cannot serve.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        rows: int = 256,
        max_context: int | None = None,
        deterministic: bool = False,
        device: torch.device | str | None = None,
        own_weights: bool = True,
    ) -> None:
        if rows < 1:
            raise UsageError(f"the local engine needs at least one row, not {rows}; set engine.rows")
        where = torch.device(model.device if device is None else device)
        if not own_weights and where != model.device:
            raise UsageError(
                f"shared weights stay where they are ({model.device}); drop device={where} or own_weights=False"
            )
        self._model = EngineModel(model, where, own_weights)
        if max_context is not None and not 2 <= max_context <= self._model.max_context:
            raise UsageError(
                f"max_context is {max_context}, but the model serves 2 to {self._model.max_context} tokens"
            )
        self.max_context = max_context or self._model.max_context
        self.capabilities = Capabilities(entropy="exact", deterministic=deterministic, max_context=self.max_context)
        self.stats = EngineStats()
        with torch.inference_mode():
            self._scheduler = Scheduler(self._model, rows, self.max_context, deterministic, self.stats)
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake_up = threading.Condition()
        self._replies: list[tuple[asyncio.AbstractEventLoop, Callable[[], None]]] = []
        self._paused = self._asleep = self._closed = False
        self._threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._work, name="agentrl-engine", daemon=True)
        self._thread.start()

    async def generate(self, request: Request) -> Generation:
        self._check(request.ids, "the request")
        if request.forced is not None:
            self._check(request.forced, "the forced output", empty=True)
        if request.images:
            raise UsageError("the local engine serves text only; use the sglang engine for images")
        if request.ids.size >= self.max_context:
            raise UsageError(
                f"the context of {request.ids.size} tokens leaves no room for output in {self.max_context}; "
                "shorten it or raise engine.max_context"
            )
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Generation] = loop.create_future()
        job = Job(request, done=lambda reply: self._replies.append((loop, lambda: _settle(future, reply))))
        self._post(lambda: self._scheduler.submit(job))
        try:
            return await future
        except asyncio.CancelledError:
            if not self._closed:
                self._post(lambda: self._scheduler.abort(job))
            raise

    async def score(self, ids: Ids, start: int, temperature: float = 1.0) -> Floats:
        self._check(ids, "the ids to score")
        if not 1 <= start <= ids.size:
            raise UsageError(f"score starts between 1 and {ids.size}, not at {start}")
        if ids.size > self.max_context:
            raise UsageError(f"{ids.size} tokens to score do not fit in a context of {self.max_context}")
        return await self._call(lambda: self._scheduler.score(ids, start, temperature))

    async def scores(self, ids: Ids, start: int) -> Mapping[str, Floats]:
        return {"the local engine": await self.score(ids, start)}

    async def fork(self, parent: str, child: str) -> None:
        await self._call(lambda: self._scheduler.fork(parent, child))

    async def release(self, session: str) -> None:
        await self._call(lambda: self._scheduler.release(session))

    async def abort(self, session: str | None = None) -> None:
        def work() -> None:
            for job in self._scheduler.jobs():
                if session is None or job.request.session == session:
                    self._scheduler.abort(job)

        await self._call(work)

    async def pause(self) -> None:
        await self._call(lambda: setattr(self, "_paused", True))

    async def resume(self) -> None:
        await self._call(lambda: setattr(self, "_paused", False))

    async def update_weights(
        self, weights: Iterable[tuple[str, torch.Tensor]] | Mapping[str, torch.Tensor] | str, version: int
    ) -> None:
        def work() -> None:
            self._model.load(weights)
            self._scheduler.version = version
            self._scheduler.forget()

        await self._call(work)

    async def sleep(self) -> None:
        def work() -> None:
            self._asleep = True
            self._scheduler.forget()
            self._scheduler.cache.clear()
            self._model.move(torch.device("cpu"))

        await self._call(work)

    async def wake(self) -> None:
        def work() -> None:
            self._model.move(self._model.device)
            self._scheduler.forget()
            self._asleep = False

        await self._call(work)

    async def health(self) -> dict[str, Any]:
        def work() -> dict[str, Any]:
            scheduler = self._scheduler
            return {
                "version": scheduler.version,
                "running": len(scheduler.filling) + scheduler.rows.count,
                "waiting": len(scheduler.waiting),
                "sessions": len(scheduler.sessions),
                "cache_bytes": scheduler.cache.bytes(),
                "paused": self._paused,
                "asleep": self._asleep,
            }

        return await self._call(work)

    def crash(self, why: str) -> None:
        """Lose every request and everything cached, as when a forward breaks (`agentrl.chaos`)."""
        self._post(lambda: self._scheduler.fail(InfraError(why)))

    def where(self, session: str) -> str:
        return "the local engine"

    @property
    def trouble(self) -> str | None:
        return "it is closed" if self._closed else None

    async def close(self) -> None:
        if self._closed:
            return
        self._post(lambda: setattr(self, "_closed", True))
        await asyncio.get_running_loop().run_in_executor(None, self._thread.join)

    def _check(self, ids: Ids, what: str, empty: bool = False) -> None:
        if not ids.size and not empty:
            raise UsageError(f"{what} has no token ids; give at least one")
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < self._model.vocab:
            bad = ids[(ids < 0) | (ids >= self._model.vocab)][0]
            raise UsageError(
                f"{what} holds id {bad}, outside the vocabulary of {self._model.vocab}; check the tokenizer"
            )

    def _post(self, work: Callable[[], None]) -> None:
        with self._wake_up:
            if self._closed:
                raise InfraError("the local engine is closed; make a new one")
            self._inbox.append(work)
            self._wake_up.notify()

    async def _call(self, work: Callable[[], T]) -> T:
        """Run `work` in the engine's thread between two steps."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def run() -> None:
            try:
                result: T | Exception = work()
            except AgentRLError as error:
                result = error
            except Exception as error:  # as in `_guarded`: whoever waits must hear of it
                result = _broke(error)
            self._replies.append((loop, lambda: _settle(future, result)))

        self._post(run)
        return await future

    # The engine's thread

    def _work(self) -> None:
        torch.set_num_threads(self._threads)
        with torch.inference_mode():
            while not self._closed:
                with self._wake_up:
                    while not self._inbox and (self._paused or self._asleep or not self._scheduler.busy):
                        self._wake_up.wait()
                    inbox, self._inbox = self._inbox, deque()
                for work in inbox:
                    self._guarded(work)
                if not (self._paused or self._asleep or self._closed):
                    started = time.perf_counter()
                    self._guarded(self._scheduler.step)
                    self.stats.busy_seconds += time.perf_counter() - started
                self._answer()
            self._scheduler.fail(InfraError("the local engine was closed while requests were running"))
            self._answer()

    def _guarded(self, work: Callable[[], object]) -> None:
        """The one broad boundary of the engine: whatever breaks a step fails its requests instead of hanging them."""
        try:
            work()
        except Exception as error:
            self._scheduler.fail(_broke(error))

    def _answer(self) -> None:
        """Hand replies to their event loops, one wake-up a loop."""
        replies, self._replies = self._replies, []
        by_loop: dict[asyncio.AbstractEventLoop, list[Callable[[], None]]] = {}
        for loop, settle in replies:
            by_loop.setdefault(loop, []).append(settle)
        for loop, settles in by_loop.items():
            if not loop.is_closed():
                loop.call_soon_threadsafe(lambda settles=settles: [settle() for settle in settles])  # type: ignore[misc]


def _broke(error: Exception) -> InfraError:
    failure = InfraError(f"the local engine broke: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure


def _settle(future: asyncio.Future[T], reply: T | Exception) -> None:
    if future.done():
        return
    if isinstance(reply, Exception):
        future.set_exception(reply)
    else:
        future.set_result(reply)
