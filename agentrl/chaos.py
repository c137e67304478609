"""Faults on purpose, at given rates: `--chaos kill_every=200,tools=0.05`. What a run survives is tried, not hoped.

Tools' services fail, engines answer late, with errors, garbage or half a reply, hang, and are killed. Everything else
is as ever: what is struck is found, retried and reported by the code that would meet the real thing. Which request is
struck follows from `seed` and the order of requests, so a run under chaos with timing is not repeatable; its record is.
"""

from __future__ import annotations

import asyncio
import collections
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from agentrl.errors import InfraError

if TYPE_CHECKING:
    import httpx

    from agentrl.engines import Engine, Generation, Request

Rate = Field(default=0.0, ge=0, le=1)
GENERATING = ("/generate", "/inference/v1/generate")


class ChaosOptions(BaseModel):
    """Shares are of tool calls (`tools`) and of engine requests (the others); `slow` ones wait `seconds`. The engine is
    killed with -9, or stopped without a word, after every so many requests. What only servers can suffer (`errors`,
    `garbage`, `halves`, `hang_every`) needs one."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    seed: int = 0
    tools: float = Rate
    slow: float = Rate
    seconds: float = Field(default=1.0, gt=0)
    errors: float = Rate
    garbage: float = Rate
    halves: float = Rate
    kill_every: int | None = Field(default=None, ge=1)
    hang_every: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _used(self) -> ChaosOptions:
        if self.seconds != type(self).model_fields["seconds"].default and not self.slow:
            raise ValueError("seconds does nothing without slow, the share of requests that wait so long; set it too")
        return self

    @model_validator(mode="after")
    def _at_most_one(self) -> ChaosOptions:
        if self.slow + self.errors + self.garbage + self.halves > 1:
            raise ValueError(
                "slow, errors, garbage and halves are shares of the same requests: lower them to at most 1"
            )
        return self

    @property
    def needs_servers(self) -> str | None:
        """The first option that the local engine cannot suffer."""
        return next((name for name in ("errors", "garbage", "halves", "hang_every") if getattr(self, name)), None)


class Chaos:
    """Strikes. `counts` says how often, by kind; `kill` and `hang` are what ends an engine, set by who has one."""

    def __init__(self, options: ChaosOptions) -> None:
        self.options = options
        self.counts: collections.Counter[str] = collections.Counter()
        self.kill: Callable[[np.random.Generator], None] | None = None
        self.hang: Callable[[np.random.Generator], None] | None = None
        self._rng = np.random.Generator(np.random.Philox(options.seed))
        self._requests = 0

    def tool(self, name: str) -> None:
        """Raises `InfraError` where this call of the tool is struck."""
        if self._rng.random() < self.options.tools:
            self.counts["tools"] += 1
            raise InfraError(f"chaos: the service behind {name} is away")

    async def request(self) -> str | None:
        """A request goes to the engine: be late, or return what else becomes of it (errors, garbage, halves)."""
        self._requests += 1
        for name, every, strike in (
            ("kills", self.options.kill_every, self.kill),
            ("hangs", self.options.hang_every, self.hang),
        ):
            if every is not None and strike is not None and self._requests % every == 0:
                self.counts[name] += 1
                strike(self._rng)
        luck = self._rng.random()
        for kind in ("slow", "errors", "garbage", "halves"):
            luck -= getattr(self.options, kind)
            if luck < 0:
                self.counts[kind] += 1
                if kind != "slow":
                    return kind
                await asyncio.sleep(self.options.seconds)
                break
        return None

    def report(self) -> str:
        """What was done, in words."""
        return "chaos: " + (", ".join(f"{n} {kind}" for kind, n in sorted(self.counts.items())) or "nothing struck")


class Unreliable:
    """An engine in this process that is struck on the way to it. Everything else is the engine's own."""

    def __init__(self, engine: Engine, chaos: Chaos) -> None:
        self._engine = engine
        self._chaos = chaos

    async def generate(self, request: Request) -> Generation:
        await self._chaos.request()
        return await self._engine.generate(request)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    @classmethod
    def over(cls, engine: Engine, chaos: Chaos) -> Engine:
        """`engine`, struck."""
        return cast("Engine", cls(engine, chaos))


def transport(chaos: Chaos, inner: httpx.AsyncBaseTransport) -> httpx.AsyncBaseTransport:
    """An HTTP transport whose replies to generation are struck."""
    import httpx

    class Half(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            yield b'{"text": "hal'
            raise httpx.ReadError("chaos: the connection broke half-way")

    class Struck(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            fate = await chaos.request() if request.url.path in GENERATING else None
            if fate == "errors":
                return httpx.Response(500, text="chaos", request=request)
            reply = await inner.handle_async_request(request)
            if fate is None:
                return reply
            await reply.aread()
            await reply.aclose()
            if fate == "garbage":
                return httpx.Response(200, text="<html>It works!</html>", request=request)
            return httpx.Response(200, stream=Half(), request=request)

        async def aclose(self) -> None:
            await inner.aclose()

    return Struck()
