"""The engine protocol over model servers elsewhere: what they may be sent, what runs there, and what becomes of it.

Which server a session goes to is `routes`' business. Sessions are only hints here: servers cache by prefix. A request
whose caller goes away is aborted by its id, for a server would go on with it. A turn follows from its ids alone, so one
whose server broke is simply asked of another, or of the same one once it is back (`keeper`): no episode notices.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from agentrl.engines import Capabilities, EngineStats, Generation, InFlight, Request
from agentrl.engines.http import Refused
from agentrl.engines.options import Sync
from agentrl.engines.routes import Routes
from agentrl.engines.servers import ModelServer
from agentrl.engines.sync import sync_of
from agentrl.engines.weights import Weights
from agentrl.errors import AgentRLError, InfraError, RunFailed, UsageError
from agentrl.trajectory import Floats, Ids

Answer = TypeVar("Answer")
TRIES = 6  # of one request, before its episode is told
CONTROL_TRIES = 3  # of what all servers are asked
BUSY = (408, 429)  # of the 4xx, those that say: later
PAUSE_SECONDS = 0.2  # before the second try; each further one waits twice as long
CONTROL_SECONDS = 10.0  # for a sign of life
ABORT_SECONDS = 1.0  # that one who goes away waits for the server to hear of it
DRAIN_SECONDS = 5.0  # that requests have to end when the engine is closed
OUTAGE_SECONDS = 900.0  # without any server, after which the run fails


class RemoteEngine:
    """The `Engine` protocol over one or more servers of one model. Made by `RemoteEngine.connect`.

    Args:
        vocab: ids below this are the model's; no other is ever sent.
        sync: how weights reach the servers (`agentrl.engines.sync`).
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
        self._asleep = self._dozed = False
        self._sleeping: dict[ModelServer, int] = {}  # told to sleep with this version, and not yet to wake
        self._routes = Routes(self.servers)
        self._rids: dict[str, dict[str, ModelServer]] = {}  # session -> its running requests
        self._calls: dict[ModelServer, set[asyncio.Future[Any]]] = {server: set() for server in self.servers}
        self._aborted: set[str] = set()
        self._farewells: set[asyncio.Future[None]] = set()
        self._up = asyncio.Event()
        self._up.set()
        self._lost_all: AgentRLError | None = None
        self.front: ModelServer | None = None  # a router that requests go through
        self.fronted = False  # it is there now
        self.on_close: Callable[[], Coroutine[Any, Any, None]] | None = None  # what ends with the engine
        self._suspicions = {server: asyncio.Event() for server in self.servers}
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
            priorities=all(info.priorities for info in found),
            in_flight="finish" if sync == "adapter" else in_flight or "retract",
            max_context=max_context or shortest.max_context,
            images=all(info.images for info in found),
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
        if request.images and not self.capabilities.images:
            raise UsageError(
                f"{self.servers[0].name} serves a model of text, which would ignore the request's pictures; serve a "
                "vision model, such as a Qwen3-VL"
            )
        n = min(request.sampling.max_tokens, room)
        reply = await self._asked(request.session, request.group, lambda server, rid: server.generate(request, rid, n))
        self.stats.requests += 1
        self.stats.prompt_tokens += request.ids.size
        self.stats.cached_tokens += reply.cached_tokens
        self.stats.output_tokens += reply.ids.size
        if reply.ids.size and not 0 <= int(reply.ids.min()) <= int(reply.ids.max()) < self.vocab:
            raise UsageError(f"a server sampled ids outside the vocabulary of {self.vocab}: it serves another model")
        return reply

    async def score(self, ids: Ids, start: int, temperature: float = 1.0) -> Floats:
        self._check(ids, "the ids to score")
        if not 1 <= start <= ids.size:
            raise UsageError(f"score starts between 1 and {ids.size}, not at {start}")
        if ids.size > self.max_context:
            raise UsageError(f"{ids.size} tokens to score do not fit in a context of {self.max_context}")
        if temperature != 1.0:
            raise UsageError(f"servers score at temperature 1 only, not at {temperature:g}")
        session = f"score-{next(self._numbers)}"
        try:
            return await self._asked(session, "", lambda server, _: server.score(ids, start))
        finally:
            self._routes.release(session)

    async def scores(self, ids: Ids, start: int) -> Mapping[str, Floats]:
        self._check(ids, "the ids to score")
        found = await self._all(lambda server: server.score(ids, start))
        return {server.name: values for server, values in found.items()}

    async def fork(self, parent: str, child: str) -> None:
        self._routes.fork(parent, child)

    async def release(self, session: str) -> None:
        self._routes.release(session)

    async def abort(self, session: str | None = None) -> None:
        sessions = [session] if session is not None else list(self._rids)
        wanted = [(server, rid) for name in sessions for rid, server in self._rids.get(name, {}).items()]
        self._aborted |= {rid for _, rid in wanted}
        await asyncio.gather(*(server.abort(rid) for server, rid in wanted))

    def where(self, session: str) -> str:
        """Where a session's requests go, for people."""
        if self.front is not None and self.fronted:
            return self.front.name
        server = self._routes.server_of(session)
        return server.name if server is not None else "any server"

    @property
    def trouble(self) -> str | None:
        """Why no request can be served now; None where one can."""
        if self._routes.up:
            return None
        return "; ".join(f"{server.url}: {why}" for server, why in self._routes.down.items())

    async def _asked(
        self, session: str, group: str, ask: Callable[[ModelServer, str], Coroutine[Any, Any, Answer]]
    ) -> Answer:
        """What a server answers; asked again, past a router and perhaps of another one, where it breaks."""
        for tries_left in range(TRIES - 1, -1, -1):
            try:
                async with self._request(session, group, first=tries_left == TRIES - 1) as (server, rid):
                    answer = await self._call(server, ask(server, rid))
                    if not _given_up(answer) or rid in self._aborted:
                        return answer
                    raise InfraError(f"{server.url} aborted a request that nobody gave up")
            except Refused as refused:
                if not (refused.status >= 500 or refused.status in BUSY) or not tries_left:
                    raise InfraError(str(refused)) from refused
            except InfraError:
                if not tries_left:
                    raise
            self.suspect(server)
            await asyncio.sleep(PAUSE_SECONDS * 2 ** (TRIES - 1 - tries_left))
        raise AssertionError("unreachable: the last try returns or raises")

    @contextlib.asynccontextmanager
    async def _request(self, session: str, group: str, *, first: bool) -> AsyncIterator[tuple[ModelServer, str]]:
        """A running request: counted, and aborted where its caller is cancelled, or where it broke on its way through a
        router: a server may go on with it."""
        await self._admitted()
        through = first and self.fronted
        server = self.front if through and self.front is not None else self._routes.find(session, group)
        rid = f"{self._prefix}-{next(self._numbers)}"
        self._rids.setdefault(session, {})[rid] = server
        self._routes.running[server] = self._routes.running.get(server, 0) + 1
        try:
            yield server, rid
        except asyncio.CancelledError:
            if rid not in self._aborted and server not in self._routes.down:
                await self._tell_off(server, rid)
            raise
        except InfraError:
            if server is self.front:
                await self._tell_off(server, rid)
            raise
        finally:
            self._routes.running[server] -= 1
            self._aborted.discard(rid)
            del self._rids[session][rid]
            if not self._rids[session]:
                del self._rids[session]

    async def _tell_off(self, server: ModelServer, rid: str) -> None:
        """Abort a request whose caller went away. One that hangs hears of it late, and holds nobody up."""
        telling = asyncio.ensure_future(server.abort(rid))
        self._farewells.add(telling)
        telling.add_done_callback(self._farewells.discard)
        telling.add_done_callback(lambda task: task.cancelled() or task.exception())  # it may be what is gone
        await asyncio.wait({telling}, timeout=ABORT_SECONDS)

    # -- servers that break ----------------------------------------------------------------------------------------

    def lose(self, server: ModelServer, why: str) -> None:
        """Send nothing more to a server, and give up what runs there: it is asked again elsewhere."""
        self._routes.down[server] = why
        if not self._routes.up and self._lost_all is None:
            self._up.clear()
        for call in self._calls[server]:
            call.cancel()
        self.lose_front(gone=False)

    def attach(self, front: ModelServer) -> None:
        """Let requests go through a router. It has the servers that are up."""
        self._calls[front], self._suspicions[front] = set(), asyncio.Event()
        self.front, self.fronted = front, True

    def lose_front(self, *, gone: bool = True) -> None:
        """The router is `gone`, or a server behind it: nobody knows which requests it had, and all are asked again."""
        if self.front is not None:
            self.fronted = self.fronted and not gone
            for call in self._calls[self.front]:
                call.cancel()
            self.suspect(self.front)

    @property
    def up(self) -> list[ModelServer]:
        """The servers that serve now."""
        return self._routes.up

    async def regain(self, server: ModelServer) -> None:
        """A server answers again: bring it to the present weights, and send requests there again."""
        async with self._updating:
            await self._catch_up(server)
            self._routes.down.pop(server, None)
            self._up.set()
            if self.front is not None:
                self.suspect(self.front)  # it may send requests there again

    @property
    def updating(self) -> bool:
        """Whether servers are taking weights or sleep, which may keep them from answering anything else."""
        return self._updating.locked()

    def has_lost(self, server: ModelServer) -> bool:
        """Whether nothing is sent there now."""
        return server in self._routes.down

    def suspect(self, server: ModelServer) -> None:
        """A request broke there: whoever keeps the servers may want to look at once."""
        self._suspicions[server].set()

    async def suspected(self, server: ModelServer) -> None:
        """Wait until a request breaks there."""
        await self._suspicions[server].wait()
        self._suspicions[server].clear()

    def give_up(self, error: AgentRLError) -> None:
        """No server will come back: every request, also those that wait for one, ends with `error`."""
        self._lost_all = error
        self._up.set()

    async def _admitted(self) -> None:
        """Wait until requests may go, and a server is there for them: at once, for each may change while one waits for
        the other."""
        await self._any_up()
        while not (self._open.is_set() and self._routes.up):
            await self._open.wait()
            await self._any_up()

    async def _any_up(self) -> None:
        """Wait for a server. Raises `RunFailed` where none came for `OUTAGE_SECONDS`, or none ever will."""
        try:
            async with asyncio.timeout(OUTAGE_SECONDS):
                await self._up.wait()
        except TimeoutError:
            raise RunFailed(f"no server for {OUTAGE_SECONDS:g} s ({self.trouble})") from None
        if self._lost_all is not None:
            raise self._lost_all

    async def _call(self, server: ModelServer, asked: Coroutine[Any, Any, Answer]) -> Answer:
        """What `server` answers. Raises `InfraError` where it is lost on the way."""
        call = asyncio.ensure_future(asked)
        self._calls[server].add(call)
        try:
            await asyncio.wait({call})
        finally:
            self._calls[server].discard(call)
            call.cancel()
        if call.cancelled():
            raise InfraError(f"{server.url} was lost on the way: {self._routes.down.get(server, 'it was closed')}")
        return call.result()

    async def _all(self, ask: Callable[[ModelServer], Coroutine[Any, Any, Answer]]) -> dict[ModelServer, Answer]:
        """Ask every server that is up; one that breaks is lost, and catches up when it is back."""

        async def one(server: ModelServer) -> tuple[ModelServer, Answer] | None:
            for tries_left in range(CONTROL_TRIES - 1, -1, -1):
                try:
                    return server, await self._call(server, ask(server))
                except (InfraError, Refused) as error:
                    if server in self._routes.down:
                        return None
                    if not tries_left:
                        self.lose(server, str(error))
                        self.suspect(server)
                        return None
                await asyncio.sleep(PAUSE_SECONDS)
            raise AssertionError("unreachable: the last try returns")

        return dict(pair for pair in await asyncio.gather(*map(one, self._routes.up)) if pair is not None)

    # -- weights ---------------------------------------------------------------------------------------------------

    async def pause(self) -> None:
        self._open.clear()
        await self._all(lambda server: server.pause(self._in_flight))

    async def resume(self) -> None:
        await self._all(lambda server: server.resume())
        self._open.set()

    async def update_weights(self, weights: Weights, version: int) -> None:
        """Pause, send, go on: in this order, or a server would mix keys and values of two versions.

        Adapters need no pause: running requests end under theirs. A server that dies of it is lost, and takes the
        version when it is back. Raises `UsageError` for weights that do not fit and `InfraError` where a server lives
        and did not take them. The engine then stays paused, for its servers may hold two versions: the next update that
        ends well sets it going again.
        """
        async with self._updating:
            goes_on = self.capabilities.in_flight != "finish" and (self._open.is_set() or self._owing)
            if goes_on:
                await self.pause()
            self._owing = goes_on
            await self._send(weights if isinstance(weights, str | Mapping) else dict(weights), version)
            self._owing = False
            self.version = version
            if goes_on:
                await self.resume()

    async def _send(self, weights: Weights, version: int) -> None:
        """To all that are up; sent once more to the others where one died of it."""
        for tries_left in range(len(self.servers) + CONTROL_TRIES - 1, -1, -1):
            try:
                return await self._sync.send(self._routes.up, weights, version)
            except InfraError:
                if not (await self._lose_the_dead() or tries_left):
                    raise
            await asyncio.sleep(PAUSE_SECONDS)

    async def _lose_the_dead(self) -> bool:
        """Whether any server that is up shows no sign of life; then it is lost."""
        before = len(self._routes.up)
        await self._all(lambda server: server.alive(CONTROL_SECONDS))
        return len(self._routes.up) < before

    async def catch_up(self, server: ModelServer) -> None:
        """Bring a server that was started again, and so has its first weights, to the present version."""
        async with self._updating:
            await self._catch_up(server)

    async def _catch_up(self, server: ModelServer) -> None:
        if server in self._sleeping:  # it was out of reach when the others were woken
            if (await server.health())["version"] == str(self._sleeping[server]):  # else it was started anew
                await server.wake()
            del self._sleeping[server]
        await server.pause(self._in_flight)
        await self._sync.catch_up(server)
        if self._open.is_set():
            await server.resume()

    async def sleep(self) -> None:
        """Running requests wait. With weights, a sleep may lose them: only an update after `wake` sets the engine going
        again, if it was; with adapters `wake` does. A server that comes back meanwhile stays out until then: it would
        take the trainer's memory, and SGLang ends where it is woken and was not asleep."""
        if self._asleep:
            return
        await self._updating.acquire()
        self._asleep, self._dozed = True, self._open.is_set()
        try:
            self._open.clear()
            self._sleeping |= dict.fromkeys(self._routes.up, self.version)
            await self._all(lambda server: server.sleep())
        except BaseException:
            self._get_up()
            raise

    async def wake(self) -> None:
        if not self._asleep:
            return
        try:
            for server in await self._all(lambda server: server.wake()):
                del self._sleeping[server]
        finally:
            self._get_up()
        if self._dozed and self.capabilities.in_flight == "finish":
            await self.resume()
        elif self._dozed:
            self._owing = True

    def _get_up(self) -> None:
        self._asleep = False
        self._updating.release()

    async def health(self) -> dict[str, Any]:
        reports = await self._all(lambda server: server.health())
        return {
            "version": self.version,
            "running": sum(int(report["running"]) for report in reports.values()),
            "waiting": sum(int(report["waiting"]) for report in reports.values()),
            "sessions": self._routes.sessions,
            "servers": {server.url: report for server, report in reports.items()},
            "down": {server.url: why for server, why in self._routes.down.items()},
        }

    async def drain(self, seconds: float) -> bool:
        """Send nothing more, and let what runs come to its end; False where that takes longer than `seconds`."""
        self._open.clear()
        running = [call for calls in self._calls.values() for call in calls]
        return not (running and (await asyncio.wait(running, timeout=seconds))[1])

    async def close(self) -> None:
        """Servers that were started for the engine end when nothing runs there any more, or after `DRAIN_SECONDS`."""
        await self.drain(DRAIN_SECONDS)
        await self._sync.close()
        if self.on_close is not None:
            await self.on_close()
            self.on_close = None
        for telling in self._farewells:
            telling.cancel()
        await asyncio.gather(*(server.close() for server in (*self.servers, *([self.front] if self.front else []))))
        if self._own_folder:
            await asyncio.to_thread(shutil.rmtree, self._folder, True)

    def _check(self, ids: Ids, what: str) -> None:
        if not ids.size:
            raise UsageError(f"{what} has no token ids; give at least one")
        if not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab:
            bad = ids[(ids < 0) | (ids >= self.vocab)][0]
            raise UsageError(f"{what} holds id {bad}, outside the vocabulary of {self.vocab}; check the tokenizer")


def _given_up(answer: object) -> bool:
    """Whether a server ended a request of its own accord."""
    return isinstance(answer, Generation) and answer.finish == "abort"
