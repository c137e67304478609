"""The engine protocol over model servers elsewhere: which server a session goes to, what it may be sent, what runs.

An episode stays with one server, and a group's episodes with the same one, so that what it has computed of their shared
beginning is used again. Sessions are only hints here: servers cache by prefix. A request whose caller goes away is
aborted by its id, for a server would go on with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
import shutil
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from agentrl.engines import Capabilities, EngineStats, Generation, InFlight, Request
from agentrl.engines.http import Refused
from agentrl.engines.servers import ModelServer
from agentrl.engines.weights import Sync, Weights, sync_of
from agentrl.errors import InfraError, UsageError
from agentrl.trajectory import Floats, Ids

LEAST_LOADED_BY = 8  # requests more than on another server, at which a new group goes there


class RemoteEngine:
    """The `Engine` protocol over one or more servers of one model. Made by `RemoteEngine.connect`.

    Args:
        vocab: ids below this are the model's; no other is ever sent.
        sync: how weights reach the servers (`agentrl.engines.weights`).
        sync_folder: where weights and adapters are written for servers to read, a folder that they see too.
    """

    def __init__(
        self,
        servers: Sequence[ModelServer],
        capabilities: Capabilities,
        *,
        vocab: int,
        sync: Sync = "disk",
        sync_folder: Path | None = None,
    ) -> None:
        if not servers:
            raise UsageError("an engine needs at least one server")
        self.servers = tuple(servers)
        self.capabilities = capabilities
        self.vocab = vocab
        self.max_context = capabilities.max_context
        self.stats = EngineStats()
        self.version = -1
        self._own_folder = sync_folder is None
        self._folder = Path(tempfile.mkdtemp(prefix="agentrl-weights-")) if sync_folder is None else sync_folder
        self._sync = sync_of(sync, self.servers, self._folder)
        self._in_flight: InFlight = "in_place" if capabilities.in_flight == "in_place" else "retract"
        self._updating = asyncio.Lock()
        self._owing = False  # the next update sets the engine going: one failed, or it was asleep
        self._dozed = False
        self._homes: dict[str, ModelServer] = {}  # group, and session -> its server
        self._groups: dict[str, int] = {}  # how many sessions a group has open
        self._of: dict[str, str] = {}  # session -> group
        self._running: dict[ModelServer, int] = dict.fromkeys(self.servers, 0)
        self._rids: dict[str, set[str]] = {}  # session -> its running requests
        self._aborted: set[str] = set()
        self._numbers = itertools.count()
        self._prefix = secrets.token_hex(4)
        self._open = asyncio.Event()
        self._open.set()

    @classmethod
    async def connect(
        cls,
        servers: Sequence[ModelServer],
        *,
        vocab: int,
        max_context: int | None = None,
        sync: Sync = "disk",
        in_flight: InFlight | None = None,
        sync_folder: Path | None = None,
        entropy: bool = False,
    ) -> RemoteEngine:
        """Ask every server what it is. Raises `UsageError` where they differ, serve shorter contexts than wanted or
        cannot take weights by `sync`. `in_flight`: what becomes of running requests at an update (None: retract; with
        adapters they end as they began)."""
        if sync == "adapter" and in_flight is not None:
            raise UsageError(
                f"engine.in_flight is {in_flight}, but with engine.sync=adapter running requests end under the adapter "
                "that they began with; remove engine.in_flight"
            )
        found = await asyncio.gather(*(server.info() for server in servers))
        shortest = min(found, key=lambda info: info.max_context)
        if max_context is not None and max_context > shortest.max_context:
            raise UsageError(
                f"engine.max_context is {max_context}, but {shortest.kind} serves {shortest.max_context} tokens; lower "
                "it, or start the server with a longer context"
            )
        capabilities = Capabilities(
            entropy="topk" if entropy else "none",
            seeds=False,
            forced=False,
            deterministic=False,
            score_temperature=False,
            truncation=all(info.truncation for info in found),
            cache_block=max(info.cache_block for info in found),
            in_flight="finish" if sync == "adapter" else in_flight or "retract",
            max_context=max_context or shortest.max_context,
        )
        return cls(servers, capabilities, vocab=vocab, sync=sync, sync_folder=sync_folder)

    # -- generating ------------------------------------------------------------------------------------------------

    async def generate(self, request: Request) -> Generation:
        self._check(request.ids, "the request")
        room = self.max_context - request.ids.size
        if room < 1:
            raise UsageError(
                f"the context of {request.ids.size} tokens leaves no room for output in {self.max_context}; shorten it "
                "or raise engine.max_context"
            )
        if request.forced is not None:
            raise UsageError("a server cannot be told what to sample; ask `capabilities.forced` first")
        async with self._request(request.session, request.group) as (server, rid):
            try:
                reply = await server.generate(request, rid, min(request.sampling.max_tokens, room))
            except Refused as refused:
                raise InfraError(str(refused)) from refused
        self.stats.requests += 1
        self.stats.prompt_tokens += request.ids.size
        self.stats.cached_tokens += reply.cached_tokens
        self.stats.output_tokens += reply.ids.size
        if reply.ids.size and not 0 <= int(reply.ids.min()) <= int(reply.ids.max()) < self.vocab:
            raise UsageError(
                f"{server.url} sampled ids outside the vocabulary of {self.vocab}: it serves another model"
            )
        return reply

    async def score(self, ids: Ids, start: int, temperature: float = 1.0) -> Floats:
        self._check(ids, "the ids to score")
        if not 1 <= start <= ids.size:
            raise UsageError(f"score starts between 1 and {ids.size}, not at {start}")
        if ids.size > self.max_context:
            raise UsageError(f"{ids.size} tokens to score do not fit in a context of {self.max_context}")
        if temperature != 1.0:
            raise UsageError(f"servers score at temperature 1 only, not at {temperature:g}")
        server = min(self.servers, key=lambda server: self._running[server])
        try:
            return await server.score(ids, start)
        except Refused as refused:
            raise InfraError(str(refused)) from refused

    async def fork(self, parent: str, child: str) -> None:
        """The branch goes where its trunk is cached."""
        if parent in self._homes:
            self._settle(child, self._of.get(parent, ""), self._homes[parent])

    async def release(self, session: str) -> None:
        self._homes.pop(session, None)
        group = self._of.pop(session, None)
        if group is not None:
            self._groups[group] -= 1
            if not self._groups[group]:
                del self._groups[group]
                self._homes.pop(f"group {group}", None)

    async def abort(self, session: str | None = None) -> None:
        sessions = [session] if session is not None else list(self._rids)
        wanted = [(self._homes[name], rid) for name in sessions for rid in self._rids.get(name, ())]
        self._aborted |= {rid for _, rid in wanted}
        await asyncio.gather(*(server.abort(rid) for server, rid in wanted))

    @contextlib.asynccontextmanager
    async def _request(self, session: str, group: str) -> AsyncIterator[tuple[ModelServer, str]]:
        """A running request: counted, and aborted where its caller is cancelled."""
        await self._open.wait()
        server = self._homes.get(session) or self._settle(session, group, None)
        rid = f"{self._prefix}-{next(self._numbers)}"
        self._rids.setdefault(session, set()).add(rid)
        self._running[server] += 1
        try:
            yield server, rid
        except asyncio.CancelledError:
            if rid not in self._aborted:
                with contextlib.suppress(Exception):  # the server may be what is gone
                    await asyncio.shield(asyncio.ensure_future(server.abort(rid)))
            raise
        finally:
            self._running[server] -= 1
            self._aborted.discard(rid)
            self._rids[session].discard(rid)
            if not self._rids[session]:
                del self._rids[session]

    def _settle(self, session: str, group: str, server: ModelServer | None) -> ModelServer:
        """Give a session its server: its group's, unless that one has much more to do than another."""
        least = min(self.servers, key=lambda server: self._running[server])
        home = server or self._homes.get(f"group {group}") or least
        if server is None and self._running[home] > self._running[least] + LEAST_LOADED_BY:
            home = least
        self._homes[session] = home
        if group and session not in self._of:
            self._of[session] = group
            self._groups[group] = self._groups.get(group, 0) + 1
            self._homes.setdefault(f"group {group}", home)
        return home

    # -- weights ---------------------------------------------------------------------------------------------------

    async def pause(self) -> None:
        self._open.clear()
        await asyncio.gather(*(server.pause(self._in_flight) for server in self.servers))

    async def resume(self) -> None:
        await asyncio.gather(*(server.resume() for server in self.servers))
        self._open.set()

    async def update_weights(self, weights: Weights, version: int) -> None:
        """Pause, send, go on: in this order, or a server would mix keys and values of two versions.

        Adapters need no pause: running requests end under theirs. Raises `UsageError` for weights that do not fit and
        `InfraError` where a server did not take them. The engine then stays paused, for its servers may hold two
        versions: the next update that ends well sets it going again.
        """
        async with self._updating:
            if self.capabilities.in_flight == "finish":
                await self._sync.send(self.servers, weights, version)
            else:
                goes_on = self._open.is_set() or self._owing
                if goes_on:
                    await self.pause()
                self._owing = goes_on
                await self._sync.send(self.servers, weights, version)
                self._owing = False
                if goes_on:
                    await self.resume()
            self.version = version

    async def catch_up(self, server: ModelServer) -> None:
        """Bring a server that was started again, and so has its first weights, to the present version."""
        async with self._updating:
            await server.pause(self._in_flight)
            await self._sync.catch_up(server)
            if self._open.is_set():
                await server.resume()

    async def sleep(self) -> None:
        """Running requests wait. With weights, a sleep may lose them: only an update after `wake` sets the engine going
        again, if it was; with adapters `wake` does."""
        self._dozed = self._open.is_set()
        self._open.clear()
        await asyncio.gather(*(server.sleep() for server in self.servers))

    async def wake(self) -> None:
        await asyncio.gather(*(server.wake() for server in self.servers))
        if self._dozed and self.capabilities.in_flight == "finish":
            await self.resume()
        elif self._dozed:
            self._owing = True

    async def health(self) -> dict[str, Any]:
        reports = await asyncio.gather(*(server.health() for server in self.servers))
        return {
            "version": self.version,
            "running": sum(int(report["running"]) for report in reports),
            "waiting": sum(int(report["waiting"]) for report in reports),
            "sessions": len(self._of),
            "servers": {server.url: report for server, report in zip(self.servers, reports, strict=True)},
        }

    async def close(self) -> None:
        await self._sync.close()
        await asyncio.gather(*(server.close() for server in self.servers))
        if self._own_folder:
            await asyncio.to_thread(shutil.rmtree, self._folder, True)

    def _check(self, ids: Ids, what: str) -> None:
        if not ids.size:
            raise UsageError(f"{what} has no token ids; give at least one")
        if not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab:
            bad = ids[(ids < 0) | (ids >= self.vocab)][0]
            raise UsageError(f"{what} holds id {bad}, outside the vocabulary of {self.vocab}; check the tokenizer")
