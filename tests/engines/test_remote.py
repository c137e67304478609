"""What becomes of requests and weights when servers break, hang, lie, and come back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import torch
from shaky import VOCAB, Shaky

from agentrl.engines import Generation, Request, remote
from agentrl.engines.http import Refused
from agentrl.engines.keeper import Keeper, Post
from agentrl.engines.remote import RemoteEngine
from agentrl.engines.sglang import SGLangServer
from agentrl.engines.vllm import VLLMServer
from agentrl.errors import InfraError, RunFailed, UsageError
from agentrl.trajectory import Sampling, as_floats, as_ids

WEIGHTS = {"w": torch.zeros(2)}


def run(n: int, work: Callable[[RemoteEngine, list[Shaky]], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        servers = [Shaky(port) for port in range(1, n + 1)]
        engine = await RemoteEngine.connect(servers, vocab=VOCAB)
        try:
            await work(engine, servers)
        finally:
            await engine.close()

    asyncio.run(asyncio.wait_for(main(), 30))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSE_SECONDS", 0.01)


def request(session: str = "g/0", group: str = "g") -> Request:
    return Request(as_ids([1, 2, 3]), Sampling(), session, group)


def raises(error: Exception) -> Callable[[], None]:
    def broken() -> None:
        raise error

    return broken


@pytest.mark.parametrize(
    "error",
    [InfraError("broke off"), Refused("http://x", "/generate", 500, "oops"), Refused("http://x", "/generate", 429, "")],
)
def test_a_request_that_breaks_is_asked_again(error: Exception) -> None:
    async def work(engine: RemoteEngine, servers: list[Shaky]) -> None:
        (server,) = servers
        left = [error, error]

        def twice() -> None:
            if left:
                raise left.pop()

        server.breaks = twice
        reply = await engine.generate(request())
        assert reply.ids.tolist() == [1] and not left
        assert engine.stats.requests == 1, "asked three times, counted once"
        server.breaks = raises(error)
        with pytest.raises(InfraError):
            await engine.generate(request())
        assert not engine._rids and engine._routes.running[server] == 0

    run(1, work)


def test_what_a_server_refuses_for_good_is_not_asked_again() -> None:
    async def work(engine: RemoteEngine, servers: list[Shaky]) -> None:
        calls = []

        def no() -> None:
            calls.append(1)
            raise Refused("http://x", "/generate", 400, "too long")

        servers[0].breaks = no
        with pytest.raises(InfraError, match="too long"):
            await engine.generate(request())
        assert len(calls) == 1

    run(1, work)


def test_an_abort_that_nobody_asked_for_is_no_answer() -> None:
    async def work(engine: RemoteEngine, servers: list[Shaky]) -> None:
        first = [Generation(as_ids([]), as_floats([]), "abort", ())]

        async def aborts() -> Generation | None:
            return first.pop() if first else None

        servers[0].breaks = aborts
        assert (await engine.generate(request())).finish == "stop"

    run(1, work)


def test_a_lost_server_gives_its_requests_to_another() -> None:
    async def work(engine: RemoteEngine, servers: list[Shaky]) -> None:
        async def hangs() -> None:
            await asyncio.sleep(60)

        for server in servers:
            server.breaks = hangs
        asked = asyncio.ensure_future(engine.generate(request()))
        await asyncio.sleep(0.01)
        home = next(server for server in servers if engine._routes.running[server])
        (other,) = (server for server in servers if server is not home)
        other.breaks = lambda: None
        assert engine.where("g/0") == home.name
        engine.lose(home, "it hangs")
        assert (await asked).ids.tolist() == [other.port]
        assert (await engine.health())["down"] == {home.url: "it hangs"}

    run(2, work)


def test_without_a_server_requests_wait_and_the_returned_one_has_the_newest_weights() -> None:
    async def work(engine: RemoteEngine, servers: list[Shaky]) -> None:
        (server,) = servers
        await engine.update_weights(WEIGHTS, 1)
        engine.lose(server, "killed")
        assert engine.trouble == "http://127.0.0.1:1: killed"
        asked = asyncio.ensure_future(engine.generate(request()))
        await engine.update_weights(WEIGHTS, 2)
        assert server.version == 1 and not asked.done()
        server.version = -1  # as started again
        await engine.regain(server)
        reply = await asked
        assert [run.version for run in reply.versions] == [2] and engine.trouble is None
        assert server.steps[-3:] == ["pause", "load 2", "resume"]

    run(1, work)


def test_a_server_that_breaks_in_an_update_is_lost_and_the_others_have_it() -> None:
    async def work(engine: RemoteEngine, servers: list[Shaky]) -> None:
        servers[0].dead = True
        await engine.update_weights(WEIGHTS, 5)
        assert servers[1].version == 5 and engine._routes.up == [servers[1]]
        assert (await engine.generate(request())).ids.tolist() == [2]

    run(2, work)


def test_a_server_that_was_only_unlucky_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentrl.engines.keeper.LOOK_SECONDS", 0.02)

    async def work(engine: RemoteEngine, servers: list[Shaky]) -> None:
        (server,) = servers
        keeper = Keeper(engine, [Post(server)], lambda _: None, patience=5, restarts=0)
        left = [1] * 3
        server.unlucky = lambda: left.pop() if left else 0
        await engine.update_weights(WEIGHTS, 1)
        assert not left and server.version == 1 and engine.trouble is None, "asked until it took them"
        left += [1] * 50
        with pytest.raises(InfraError, match="the disk was busy"):
            await engine.update_weights(WEIGHTS, 2)
        left.clear()
        asked = asyncio.ensure_future(engine.generate(request()))
        await asyncio.sleep(0.02)
        assert not asked.done(), "it may hold parts of two versions"
        await engine.update_weights(WEIGHTS, 2)
        assert [run.version for run in (await asked).versions] == [2]
        left += [1] * 3
        server.breaks_pause = lambda: left.pop() if left else 0
        await engine.update_weights(WEIGHTS, 3)
        assert engine.trouble is not None, "it did not even pause: it was lost"
        assert [run.version for run in (await engine.generate(request())).versions] == [3], "and brought back"
        await keeper.close()

    run(1, work)


def test_control_calls_go_to_every_server_and_aborts_to_the_one_that_runs_it() -> None:
    async def work(engine: RemoteEngine, servers: list[Shaky]) -> None:
        gate = asyncio.Event()
        for server in servers:
            server.breaks = gate.wait
        running = [asyncio.ensure_future(engine.generate(request(name, ""))) for name in ("a", "b")]
        await asyncio.sleep(0.01)
        await engine.abort("b")
        assert [len(server.aborted) for server in servers] == [0, 1]
        await engine.update_weights(WEIGHTS, 3)
        await engine.sleep()
        await engine.wake()
        assert all(server.steps == ["pause", "load 3", "resume", "sleep", "wake"] for server in servers)
        await engine.update_weights(WEIGHTS, 4)  # only this sets it going again
        gate.set()
        await asyncio.gather(*running)

    run(2, work)


def test_a_cancelled_caller_aborts_its_request_by_id() -> None:
    async def work(engine: RemoteEngine, servers: list[Shaky]) -> None:
        async def hangs() -> None:
            await asyncio.sleep(60)

        servers[0].breaks = hangs
        asked = asyncio.ensure_future(engine.generate(request()))
        await asyncio.sleep(0.01)
        (rid,) = engine._rids["g/0"]
        asked.cancel()
        await asyncio.wait({asked})
        assert asked.cancelled() and servers[0].aborted == [rid]
        assert not engine._calls[servers[0]] and not engine._rids

    run(1, work)


def test_a_server_that_hangs_holds_up_no_caller_that_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "ABORT_SECONDS", 0.01)

    async def work(engine: RemoteEngine, servers: list[Shaky]) -> None:
        async def hangs(*_: object) -> None:
            await asyncio.sleep(60)

        servers[0].breaks, servers[0].abort = hangs, hangs  # type: ignore[method-assign]
        asked = asyncio.ensure_future(engine.generate(request()))
        await asyncio.sleep(0.01)
        asked.cancel()
        await asyncio.wait({asked})
        assert asked.cancelled() and len(engine._farewells) == 1
        await engine.close()
        await asyncio.sleep(0)
        assert not engine._farewells

    run(1, work)


def test_a_server_that_is_lost_as_soon_as_it_is_back_breaks_no_request() -> None:
    async def work(engine: RemoteEngine, servers: list[Shaky]) -> None:
        (server,) = servers
        engine.lose(server, "killed")
        asked = asyncio.ensure_future(engine.generate(request()))
        await asyncio.sleep(0.01)
        await engine.regain(server)
        engine.lose(server, "killed again")
        await asyncio.sleep(0.01)
        assert not asked.done()
        await engine.regain(server)
        assert (await asked).finish == "stop"

    run(1, work)


def test_a_request_that_waited_for_a_server_waits_for_an_update_too() -> None:
    async def work(engine: RemoteEngine, servers: list[Shaky]) -> None:
        (server,) = servers
        engine.lose(server, "killed")
        asked = asyncio.ensure_future(engine.generate(request()))
        await asyncio.sleep(0.01)
        await engine.regain(server)
        await engine.pause()  # before the request has noticed
        await asyncio.sleep(0.01)
        assert not server.served
        await engine.resume()
        assert (await asked).finish == "stop"

    run(1, work)


def test_once_given_up_nobody_waits_for_what_is_lost_later() -> None:
    async def work(engine: RemoteEngine, servers: list[Shaky]) -> None:
        engine.lose(servers[0], "killed")
        engine.give_up(RunFailed("it does not take the weights"))
        engine.lose(servers[1], "killed")
        with pytest.raises(RunFailed, match="does not take the weights"):
            await engine.generate(request())

    run(2, work)


def test_a_server_that_comes_back_while_the_others_sleep_waits_until_they_wake() -> None:
    async def work(engine: RemoteEngine, servers: list[Shaky]) -> None:
        await engine.update_weights(WEIGHTS, 1)
        engine.lose(servers[0], "killed")
        await engine.sleep()
        await engine.sleep()
        back = asyncio.ensure_future(engine.regain(servers[0]))
        await asyncio.sleep(0.01)
        assert not back.done() and servers[0].steps[-1] == "resume"
        await engine.wake()
        await engine.wake()
        await engine.update_weights(WEIGHTS, 2)
        await back
        assert "wake" not in servers[0].steps and servers[1].steps.count("wake") == 1
        assert [server.version for server in servers] == [2, 2] and engine.trouble is None
        assert (await engine.generate(request())).finish == "stop"

    run(2, work)


@pytest.mark.parametrize("anew", [False, True])
def test_a_server_that_was_out_of_reach_when_the_others_woke_is_woken(anew: bool) -> None:
    async def work(engine: RemoteEngine, servers: list[Shaky]) -> None:
        await engine.update_weights(WEIGHTS, 1)
        await engine.sleep()
        engine.lose(servers[0], "the network")
        await engine.wake()
        await engine.update_weights(WEIGHTS, 2)
        assert "wake" not in servers[0].steps
        if anew:  # somebody started it again meanwhile: SGLang ends where it is woken and was not asleep
            servers[0].version = -1
        await engine.regain(servers[0])
        woken = [] if anew else ["wake"]
        assert servers[0].steps[-3 - len(woken) :] == [*woken, "pause", "load 2", "resume"]
        await engine.sleep()
        await engine.wake()
        assert servers[0].steps[-1] == "wake"

    run(2, work)


def test_one_that_does_not_take_the_weights_is_given_up_alone() -> None:
    told: list[str] = []

    async def work(engine: RemoteEngine, servers: list[Shaky]) -> None:
        async def refuses(folder: Path, version: int) -> None:
            raise UsageError(f"{servers[0].name} did not take the weights: another architecture")

        await engine.update_weights(WEIGHTS, 1)
        keeper = Keeper(engine, [Post(server) for server in servers], told.append, patience=0.05, restarts=0)
        try:
            servers[0].load = refuses  # type: ignore[method-assign]
            engine.lose(servers[0], "killed")
            engine.suspect(servers[0])
            while len(told) < 1:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            assert (await engine.generate(request("h/0"))).ids.tolist() == [servers[1].port]
            servers[1].load = refuses  # type: ignore[method-assign]
            engine.lose(servers[1], "killed")
            engine.suspect(servers[1])
            with pytest.raises(UsageError, match="another architecture"):
                await engine.generate(request("h/1"))
        finally:
            await keeper.close()

    run(2, work)
    assert len(told) == 2 and all("is given up" in one and "another architecture" in one for one in told)


class Front(Shaky):
    """Stands before other servers, as a router does."""

    @property
    def name(self) -> str:
        return "the router"


def test_requests_go_through_a_router_and_past_it_where_it_breaks() -> None:
    async def work(engine: RemoteEngine, servers: list[Shaky]) -> None:
        front = Front(9)
        engine.attach(front)
        assert engine.where("g/0") == "the router"
        assert (await engine.generate(request())).ids.tolist() == [9]
        front.breaks = raises(InfraError("it broke off"))
        assert (await engine.generate(request())).ids.tolist() == [1]
        assert len(front.aborted) == 1, "a server may go on with what it was sent"
        front.breaks = raises(Refused("http://x", "/generate", 502, "a server is gone"))
        assert (await engine.generate(request("g/1"))).ids.tolist() == [1]
        front.breaks = lambda: None
        engine.lose_front()
        assert (await engine.generate(request())).ids.tolist() == [1] and engine.where("g/0") == servers[0].name

    run(2, work)


def test_what_a_router_had_is_asked_again_where_a_server_behind_it_is_lost() -> None:
    async def work(engine: RemoteEngine, servers: list[Shaky]) -> None:
        async def hangs() -> None:
            await asyncio.sleep(60)

        front = Front(9)
        engine.attach(front)
        front.breaks = hangs
        asked = asyncio.ensure_future(engine.generate(request()))
        await asyncio.sleep(0.01)
        engine.lose(servers[0], "it hangs")
        assert (await asked).ids.tolist() == [2] and len(front.aborted) == 1
        assert engine.fronted, "the router itself is well"
        await asyncio.wait_for(engine.suspected(front), 1)  # and is told at once

    run(2, work)


def test_closing_lets_what_runs_come_to_its_end() -> None:
    async def work(engine: RemoteEngine, servers: list[Shaky]) -> None:
        gate = asyncio.Event()
        servers[0].breaks = gate.wait
        asked = asyncio.ensure_future(engine.generate(request()))
        await asyncio.sleep(0.01)
        assert not await engine.drain(0.01), "it still runs"
        late = asyncio.ensure_future(engine.generate(request()))
        closing = asyncio.ensure_future(engine.close())
        await asyncio.sleep(0.01)
        assert "close" not in servers[0].steps and not late.done()
        gate.set()
        await closing
        assert (await asked).finish == "stop" and servers[0].steps[-1] == "close"
        late.cancel()

    run(1, work)


def test_nothing_comes_back_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "OUTAGE_SECONDS", 0.05)

    async def work(engine: RemoteEngine, servers: list[Shaky]) -> None:
        engine.lose(servers[0], "gone")
        with pytest.raises(RunFailed, match="gone"):
            await engine.generate(request())

    run(1, work)


def test_ids_that_the_model_lacks_are_never_sent() -> None:
    async def work(engine: RemoteEngine, servers: list[Shaky]) -> None:
        for bad in (VOCAB, 2_000_000_000):
            with pytest.raises(UsageError, match="outside the vocabulary"):
                await engine.generate(Request(as_ids([1, bad]), Sampling(), "s"))
        assert not servers[0].served

    run(1, work)


def test_a_server_that_does_not_come_back_is_not_asked_without_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentrl.engines.keeper.LOOK_SECONDS", 0.01)
    monkeypatch.setattr("agentrl.engines.keeper.FIRST_PAUSE", 60)

    async def work(engine: RemoteEngine, servers: list[Shaky]) -> None:
        (server,) = servers
        asked = []

        def breaks() -> int:
            asked.append(1)
            return 1

        server.breaks_pause = breaks
        engine.lose(server, "it did not pause")
        keeper = Keeper(engine, [Post(server)], lambda _: None, patience=5, restarts=0)
        while not asked:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        for _ in range(100):
            await asyncio.sleep(0)
        assert len(asked) == 1
        await keeper.close()

    run(1, work)


def test_a_server_that_has_nothing_but_errors_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentrl.engines.keeper.LOOK_SECONDS", 0.01)

    async def work(engine: RemoteEngine, servers: list[Shaky]) -> None:
        heard: asyncio.Queue[str] = asyncio.Queue()
        (server,) = servers

        async def alive(seconds: float) -> None:
            raise Refused(server.url, "/server_info", 502, "bad gateway")

        server.alive = alive  # type: ignore[method-assign]
        keeper = Keeper(engine, [Post(server)], heard.put_nowait, patience=0.05, restarts=0)
        assert "bad gateway" in await heard.get() and engine.has_lost(server)
        await keeper.close()

    run(1, work)


def test_a_keeper_finds_what_died_and_brings_it_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("agentrl.engines.keeper.LOOK_SECONDS", 0.02)
    monkeypatch.setattr("agentrl.engines.keeper.FIRST_PAUSE", 0.01)

    async def work(engine: RemoteEngine, servers: list[Shaky]) -> None:
        told: list[str] = []
        heard = asyncio.Event()
        (server,) = servers

        def tell(text: str) -> None:
            told.append(text)
            heard.set()

        await engine.update_weights(WEIGHTS, 3)
        keeper = Keeper(engine, [Post(server)], tell, patience=0.05, restarts=0)
        server.dead, server.version = True, -1
        asked = asyncio.ensure_future(engine.generate(request()))
        await heard.wait()
        assert engine.trouble is not None and not asked.done()
        server.dead = False
        assert [run.version for run in (await asked).versions] == [3]
        await keeper.close()
        assert "is lost: no sign of life" in told[0] and "is back after" in told[1]

    run(1, work)


@pytest.mark.parametrize("kind", [SGLangServer, VLLMServer])
@pytest.mark.parametrize(
    ("status", "kind_of_error", "sentence"),
    [(401, UsageError, "engine.api_key"), (404, UsageError, "is no .* server"), (502, InfraError, "HTTP 502")],
)
def test_a_server_that_says_no_is_understood(
    kind: type[Any], status: int, kind_of_error: type[Exception], sentence: str
) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 {status} No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
        await writer.drain()
        writer.close()

    async def main() -> None:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as listening:
            server = kind(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}")
            with pytest.raises(kind_of_error, match=sentence):
                await server.info()
            await server.close()

    asyncio.run(asyncio.wait_for(main(), 30))


def test_log_probs_that_are_no_numbers_are_no_reply() -> None:
    sglang, vllm = SGLangServer("http://127.0.0.1:1"), VLLMServer("http://127.0.0.1:1")
    for value in (float("nan"), float("-inf"), None):
        about = {"finish_reason": {"type": "stop"}, "output_token_logprobs": [[value, 5, None]]}
        with pytest.raises(InfraError, match="something else"):
            sglang._generation({"meta_info": about, "output_ids": [5]})
        choice = {"token_ids": [5], "logprobs": {"content": [{"logprob": value}]}, "finish_reason": "stop"}
        with pytest.raises(InfraError, match="something else"):
            vllm._generation({"choices": [choice]})
