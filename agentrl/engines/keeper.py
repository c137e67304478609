"""Servers are kept: looked at every few seconds, given up where they hang, started again where they are ours.

A server that dies or hangs is lost to the engine at once, which asks others meanwhile. One that was started here is
started again, with a pause that doubles each time; one that was only named is waited for. Either way it gets the
present weights before it is asked anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from agentrl.engines.http import Refused
from agentrl.engines.launch import Launch, ServerProcess
from agentrl.engines.remote import RemoteEngine
from agentrl.engines.router import Router
from agentrl.engines.servers import ModelServer
from agentrl.errors import AgentRLError, InfraError, RunFailed, UsageError

LOOK_SECONDS = 5.0
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds before a server is started again
Tell = Callable[[str], None]


@dataclass(slots=True, eq=False)
class Gate:
    """A router's place, before all servers, and its process."""

    router: Router
    process: ServerProcess
    restarts: int = 0


@dataclass(slots=True, eq=False)
class Post:
    """One server's place: who answers there, and its process where it was started here."""

    server: ModelServer
    process: ServerProcess | None = None
    restarts: int = 0

    def ended(self) -> str | None:
        """Why its process is no more; None where it runs, or is not ours."""
        if self.process is None or self.process.running:
            return None
        return self.process.ending()


async def start(launches: Sequence[Launch], logs: Path) -> list[ServerProcess]:
    """Start servers and wait until all answer. Raises `UsageError`, `InfraError`; then none is left running."""
    processes: list[ServerProcess] = []
    try:
        for number, launch in enumerate(launches):
            processes.append(ServerProcess.start(launch, logs / f"{launch.kind}-{number}.log"))
        await asyncio.gather(*(process.ready() for process in processes))
    except BaseException:
        await asyncio.shield(asyncio.gather(*(process.stop() for process in processes)))
        raise
    return processes


def _again(process: ServerProcess) -> ServerProcess:
    """Started once more. Raises `InfraError` where that cannot be now, such as for a port that somebody took."""
    try:
        return process.again()
    except (UsageError, OSError) as error:
        raise InfraError(str(error)) from error


class Keeper:
    """Keeps an engine's servers. `tell` hears of every loss and return.

    Args:
        patience: seconds without a sign of life after which a server counts as hung.
        restarts: how often each server is started again before it is given up.
        gate: the router that the engine's requests go through. While it is gone they go past it.
    """

    def __init__(
        self,
        engine: RemoteEngine,
        posts: Sequence[Post],
        tell: Tell,
        *,
        patience: float,
        restarts: int,
        gate: Gate | None = None,
    ) -> None:
        self.engine = engine
        self.posts = tuple(posts)
        self._tell = tell
        self._patience = patience
        self._restarts = restarts
        self._gone: set[ModelServer] = set()
        self.gate = gate
        self._tasks = [asyncio.create_task(self._keep(post), name=f"keeper of {post.server.url}") for post in posts]
        if gate is not None:
            self._tasks.append(asyncio.create_task(self._keep_gate(gate), name="keeper of the router"))

    async def close(self) -> None:
        """Stop keeping, and end the servers that were started here."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        processes = [post.process for post in self.posts] + ([self.gate.process] if self.gate is not None else [])
        await asyncio.gather(*(process.stop() for process in processes if process is not None))

    async def _keep(self, post: Post) -> None:
        try:
            await self._kept(post)
        except UsageError as error:  # another server stands there now, or it does not take the weights
            self._gives_up(post, f"{post.server.name} is given up: {error}", error)
        except AgentRLError as error:
            self.engine.give_up(error)

    async def _kept(self, post: Post) -> None:
        while True:
            await self._rest(post.server)
            why = await self._examine(post)
            if why is None:
                if self.engine.has_lost(post.server):  # it broke in something that all servers were asked
                    await self._regain(post)
                continue
            self.engine.lose(post.server, why)
            self._tell(f"{post.server.name} is lost: {why}")
            lost = time.monotonic()
            if not await self._bring_back(post):
                return
            self._tell(f"{post.server.name} is back after {time.monotonic() - lost:.0f} s")

    async def _regain(self, post: Post) -> None:
        """A server that lives, but did not do what it was asked, is asked once more; else it is looked at again."""
        try:
            await self.engine.regain(post.server)
            self._tell(f"{post.server.name} broke off, and goes on")
        except (InfraError, Refused):
            await asyncio.sleep(FIRST_PAUSE)
            self.engine.suspect(post.server)

    async def _rest(self, server: ModelServer) -> None:
        """Until it is time to look, or a request broke there."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LOOK_SECONDS):
                await self.engine.suspected(server)

    async def _examine(self, post: Post) -> str | None:
        """Why the server is lost; None where it lives."""
        silent = time.monotonic()
        while True:
            if (why := post.ended()) is not None:
                return why
            try:
                await post.server.alive(max(self._patience - (time.monotonic() - silent), 1.0))
                return None
            except (InfraError, Refused) as error:
                if isinstance(error, Refused) and error.status < 500:
                    return None  # it speaks; a 5xx may be the word of what stands before it
                if self.engine.updating:
                    silent = time.monotonic()
                seconds = time.monotonic() - silent
                if seconds >= self._patience:
                    return f"no sign of life for {seconds:.0f} s ({error})"
                if post.process is None and isinstance(error.__cause__, httpx.ConnectError):
                    return str(error)
            await asyncio.sleep(min(0.5, self._patience / 10))

    async def _bring_back(self, post: Post) -> bool:
        """Until the server serves again with the present weights; False where it is given up."""
        pause = FIRST_PAUSE
        while True:
            try:
                if post.process is not None:
                    if post.restarts >= self._restarts:
                        times = f"{post.server.name} died {post.restarts + 1} times and is given up"
                        self._gives_up(post, f"{times}: {post.process.ending()}")
                        return False
                    post.restarts += 1
                    await post.process.stop(gently=False)
                    await self._shut_out()  # it will answer before it has the present weights
                    post.process = _again(post.process)
                    await post.process.ready()
                await post.server.alive(self._patience)
                await post.server.info()
                await self.engine.regain(post.server)
                return True
            except (InfraError, Refused) as error:
                if post.process is not None:
                    self._tell(f"{post.server.name} does not come back: {error}")
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _shut_out(self) -> None:
        """Let the router know which servers serve now; one that does not listen is not used until it does."""
        if self.gate is None or not self.engine.fronted:
            return
        try:
            await self.gate.router.match([server.url for server in self.engine.up])
        except (InfraError, Refused):
            self.engine.lose_front()

    async def _keep_gate(self, gate: Gate) -> None:
        pause = FIRST_PAUSE
        silent = time.monotonic()
        while True:
            await self._rest(gate.router)
            try:
                if not gate.process.running:
                    raise InfraError(gate.process.ending())
                await gate.router.alive(self._patience)
                await gate.router.match([server.url for server in self.engine.up])
                if not self.engine.fronted:
                    self.engine.fronted = True
                    self._tell(f"{gate.router.name} is back")
                pause, silent = FIRST_PAUSE, time.monotonic()
                continue
            except (InfraError, Refused) as error:
                why = str(error)
            if self.engine.fronted:
                self._tell(f"{gate.router.name} is lost, and requests go past it: {why}")
            self.engine.lose_front()
            if gate.process.running and time.monotonic() - silent < self._patience:
                await asyncio.sleep(FIRST_PAUSE)
                continue
            if gate.restarts >= self._restarts:
                return self._tell(f"{gate.router.name} died {gate.restarts + 1} times and is given up")
            gate.restarts += 1
            await gate.process.stop(gently=False)
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
            with contextlib.suppress(InfraError):
                gate.process = _again(gate.process)
                await gate.process.ready()
                silent = time.monotonic()
            self.engine.suspect(gate.router)

    def _gives_up(self, post: Post, sentence: str, error: UsageError | None = None) -> None:
        """Go on without a server; with the last of them every request ends with `error`."""
        self._gone.add(post.server)
        self._tell(sentence)
        if len(self._gone) == len(self.posts):
            self.engine.give_up(error or RunFailed(sentence))
