"""A model server that does what the test says, to see what becomes of requests when servers break."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from agentrl.engines import Generation, Request
from agentrl.engines.servers import ServerInfo
from agentrl.errors import InfraError
from agentrl.trajectory import Floats, Ids, VersionRun, as_floats, as_ids

VOCAB = 100


class Shaky:
    """Answers each request with one token, its port. `breaks`: called before each; it may raise or wait."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.breaks: Callable[[], Any] = lambda: None
        self.dead = False
        self.unlucky: Callable[[], int] = lambda: 0  # whether the next load breaks
        self.breaks_pause: Callable[[], int] = lambda: 0
        self.version = -1
        self.served: list[str] = []
        self.aborted: list[str] = []
        self.steps: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def name(self) -> str:
        return f"Shaky at {self.url}"

    async def alive(self, seconds: float) -> None:
        if self.dead:
            raise InfraError(f"{self.name} does not answer: refused")

    async def info(self) -> ServerInfo:
        return ServerInfo("shaky", "1", "m", 1024)

    async def generate(self, request: Request, rid: str, max_tokens: int) -> Generation:
        waits = self.breaks()
        if asyncio.iscoroutine(waits):
            waits = await waits
        await self.alive(1)
        self.served.append(request.session)
        if isinstance(waits, Generation):
            return waits
        return Generation(as_ids([self.port]), as_floats([-1.0]), "stop", (VersionRun(self.version, 0, 1),))

    async def score(self, ids: Ids, start: int) -> Floats:
        await self.alive(1)
        return as_floats(np.full(ids.size - start, -1.0))

    async def abort(self, rid: str) -> None:
        self.aborted.append(rid)

    async def pause(self, in_flight: str = "retract") -> None:
        if self.breaks_pause():
            raise InfraError("it was busy")
        self.steps.append("pause")

    async def resume(self) -> None:
        self.steps.append("resume")

    async def load(self, folder: Path, version: int) -> None:
        await self.alive(1)
        if self.unlucky():
            raise InfraError("the disk was busy")
        assert (folder / "model.safetensors").is_file()
        self.version = version
        self.steps.append(f"load {version}")

    async def sleep(self) -> None:
        self.steps.append("sleep")

    async def wake(self) -> None:
        self.steps.append("wake")

    async def health(self) -> dict[str, Any]:
        return {"running": 0, "waiting": 0, "version": str(self.version)}

    async def close(self) -> None:
        self.steps.append("close")
