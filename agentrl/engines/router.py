"""`sglang-router` before several SGLang servers: what generates goes through it, all else straight to the servers.

It chooses a server for each request; of pausing, aborting and new weights it knows nothing. So it is told which servers
serve now (`match`), for one that was started again answers before it has the present weights, and a request is aborted
at all of them, for nobody but the router knows where it is. What breaks on the way through it is asked again past it,
by the client's own routes.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from agentrl.chaos import Chaos
from agentrl.engines import Request
from agentrl.engines.http import Http, Refused
from agentrl.engines.launch import LOOPBACK, SHIMS, Device
from agentrl.engines.servers import ModelServer
from agentrl.engines.sglang import SGLangServer
from agentrl.errors import InfraError, UsageError

Policy: TypeAlias = Literal["cache_aware", "manual"]
"""By the longest common beginning with what each server was sent before; or by the group that a request names."""
KEY = "x-smg-routing-key"
MATCH_SECONDS = 30.0  # for the router to take servers in


@dataclass(frozen=True, slots=True)
class RouterLaunch:
    """How a router is started: with no servers yet. It neither retries nor counts failures, for the client does.
    `metrics`: a second port, which it wants for itself."""

    python: Path
    port: int
    metrics: int
    policy: Policy = "cache_aware"
    device: Device = "cpu"
    ready: str = "/liveness"
    kind: Literal["sglang"] = "sglang"  # in whose environment it is

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.port}"

    @property
    def name(self) -> str:
        return "sglang-router"

    def words(self) -> list[str]:
        """The command line."""
        words = [str(self.python), "-m", "sglang_router.launch_router", "--host", LOOPBACK, "--port", str(self.port)]
        words += ["--policy", self.policy, "--prometheus-host", LOOPBACK, "--prometheus-port", str(self.metrics)]
        words += ["--log-level", "warn", *(["--assignment-mode", "min_load"] if self.policy == "manual" else [])]
        return [*words, "--disable-retries", "--disable-circuit-breaker", "--disable-health-check"]

    def environment(self) -> dict[str, str]:
        """What is added to the environment: it imports what a server does."""
        shims = [str(SHIMS / "torchvision_cpu"), str(SHIMS / "sglang_cpu")]
        return {"PYTHONPATH": os.pathsep.join(shims)} if self.device == "cpu" else {}


def check_installed(python: Path) -> None:
    """Raises `UsageError` where the router is not in the environment of `python`."""
    if not any(python.parent.parent.glob("lib/python*/site-packages/sglang_router/__init__.py")):
        raise UsageError(
            f"sglang-router is not in the environment of {python}; run: agentrl engine install sglang --force, or set "
            "engine.router to client",
            where="engine.router",
        )


class Router(SGLangServer):
    """What a router can be asked: `generate` and `score` as if it were a server.

    Args:
        servers: those behind it, already asked for their `info`.
        up: which of them serve now.
    """

    def __init__(
        self,
        url: str,
        servers: Sequence[SGLangServer],
        up: Callable[[], Sequence[ModelServer]],
        *,
        top_logprobs: int = 0,
        chaos: Chaos | None = None,
    ) -> None:
        super().__init__(url, top_logprobs=top_logprobs, chaos=chaos)
        self._up = up
        self._control = Http(url, "sglang-router")
        signs = {server.sooner for server in servers}
        self.sooner = signs.pop() if len(signs) == 1 else 0

    @property
    def name(self) -> str:
        return f"sglang-router at {self.url}"

    async def alive(self, seconds: float) -> None:
        await self._control.text("/liveness", seconds=seconds)

    async def abort(self, rid: str) -> None:
        """At all servers; one that is gone has nothing to abort."""
        await asyncio.gather(*(server.abort(rid) for server in self._up()), return_exceptions=True)

    async def match(self, urls: Collection[str], seconds: float = MATCH_SECONDS) -> None:
        """Let the router send requests to the servers at `urls`, and to no others. Raises `InfraError`, `Refused`."""
        deadline = time.monotonic() + seconds
        asked: set[str] = set()
        while True:
            found = {worker["url"]: worker for worker in (await self._control.get("/workers", seconds=10))["workers"]}
            for url in found.keys() - set(urls):
                await self._accepted("DELETE", f"/workers/{found[url]['id']}", None)
            for url in set(urls) - found.keys() - asked:
                await self._accepted("POST", "/workers", {"url": url})
                asked.add(url)
            if found.keys() == set(urls) and all(worker["is_healthy"] for worker in found.values()):
                return
            if time.monotonic() > deadline:
                raise InfraError(f"{self.name} does not take the servers in: it has {sorted(found)}")
            await asyncio.sleep(0.05)

    async def close(self) -> None:
        await self._control.close()
        await super().close()

    async def _accepted(self, method: str, path: str, body: dict[str, str] | None) -> None:
        try:
            await self._control.ask(method, path, body)
        except Refused as refused:
            if refused.status != 202:  # it was queued
                raise

    def _headers(self, request: Request) -> dict[str, str] | None:
        return {KEY: request.group or request.session}
