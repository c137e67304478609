"""Which server a session goes to, where there are several."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from agentrl.engines import Capabilities, Generation, Request
from agentrl.engines.remote import LEAST_LOADED_BY, RemoteEngine
from agentrl.engines.servers import ServerInfo
from agentrl.trajectory import Floats, Ids, Sampling, VersionRun, as_floats, as_ids


class Scripted:
    """A server that answers when it is told to, and notes what it is asked."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.served: list[str] = []
        self.calls: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()

    @property
    def url(self) -> str:
        return f"http://{self.name}"

    async def info(self) -> ServerInfo:
        return ServerInfo("sglang", "0.5.23", "model", 512)

    async def generate(self, request: Request, rid: str, max_tokens: int) -> Generation:
        self.served.append(request.session)
        await self.gate.wait()
        return Generation(as_ids([1]), as_floats([-1.0]), "stop", (VersionRun(0, 0, 1),))

    async def score(self, ids: Ids, start: int) -> Floats:
        self.calls.append("score")
        return as_floats([-1.0] * (ids.size - start))

    async def abort(self, rid: str) -> None:
        self.calls.append("abort")

    async def pause(self) -> None:
        self.calls.append("pause")

    async def resume(self) -> None:
        self.calls.append("resume")

    async def load(self, folder: Path, version: int) -> None:
        self.calls.append(f"load {version}")

    async def sleep(self) -> None:
        self.calls.append("sleep")

    async def wake(self) -> None:
        self.calls.append("wake")

    async def health(self) -> dict[str, Any]:
        return {"running": 0, "waiting": 0}

    async def close(self) -> None:
        self.calls.append("close")


def turn(engine: RemoteEngine, session: str, group: str = "") -> asyncio.Task[Generation]:
    return asyncio.create_task(engine.generate(Request(as_ids([1, 2, 3]), Sampling(max_tokens=4), session, group)))


async def settled() -> None:
    """Let requests get as far as they can."""
    for _ in range(20):
        await asyncio.sleep(0)


def pair(tmp_path: Path) -> tuple[Scripted, Scripted, RemoteEngine]:
    first, second = Scripted("first"), Scripted("second")
    return first, second, RemoteEngine([first, second], Capabilities(max_context=512), vocab=97, sync_folder=tmp_path)


def test_a_session_stays_with_its_server(tmp_path: Path) -> None:
    async def main() -> None:
        first, second, engine = pair(tmp_path)
        await turn(engine, "a")
        first.gate.clear()
        held = turn(engine, "other")
        await settled()
        # the first server is the busier one now: new sessions go elsewhere, "a" does not
        await turn(engine, "b")
        again = turn(engine, "a")
        await settled()
        assert first.served == ["a", "other", "a"] and second.served == ["b"]
        first.gate.set()
        await asyncio.gather(held, again)

    asyncio.run(main())


def test_siblings_go_where_their_prompt_is_until_that_server_has_too_much_to_do(tmp_path: Path) -> None:
    async def main() -> None:
        first, second, engine = pair(tmp_path)
        first.gate.clear()
        running = [turn(engine, f"s{n}", "g") for n in range(LEAST_LOADED_BY + 2)]
        await settled()
        # one request more than the margin allows spills over; the group's home stays where it is
        assert first.served == [f"s{n}" for n in range(LEAST_LOADED_BY + 1)]
        assert second.served == [f"s{LEAST_LOADED_BY + 1}"]
        first.gate.set()
        await asyncio.gather(*running)
        await turn(engine, "late", "g")
        assert first.served[-1] == "late"

    asyncio.run(main())


def test_groups_spread_over_the_servers(tmp_path: Path) -> None:
    async def main() -> None:
        first, second, engine = pair(tmp_path)
        first.gate.clear()
        second.gate.clear()
        running = [turn(engine, f"{group}-{n}", group) for group in "abcd" for n in range(4)]
        await settled()
        homes = [{name.partition("-")[0] for name in server.served} for server in (first, second)]
        assert not homes[0] & homes[1], "a group's siblings are together"
        assert len(first.served) == len(second.served) == 8
        first.gate.set()
        second.gate.set()
        await asyncio.gather(*running)

    asyncio.run(main())


def test_a_branch_goes_where_its_trunk_is_cached(tmp_path: Path) -> None:
    async def main() -> None:
        first, second, engine = pair(tmp_path)
        first.gate.clear()
        trunk = [turn(engine, f"s{n}", "g") for n in range(LEAST_LOADED_BY + 2)]
        await settled()
        spilled = f"s{LEAST_LOADED_BY + 1}"
        await engine.fork(spilled, "branch")
        await engine.fork("unknown", "nobody")  # a hint about nothing changes nothing
        await turn(engine, "branch", "g")
        assert second.served == [spilled, "branch"]
        first.gate.set()
        await asyncio.gather(*trunk)

    asyncio.run(main())


def test_nothing_is_kept_of_sessions_that_are_over(tmp_path: Path) -> None:
    async def main() -> None:
        _, _, engine = pair(tmp_path)
        for step in range(50):
            group = f"group-{step}"
            names = [f"{step}-{n}" for n in range(4)]
            await asyncio.gather(*(turn(engine, name, group) for name in names))
            await engine.fork(names[0], f"{step}-branch")
            await turn(engine, f"{step}-branch", group)
            await turn(engine, f"{step}-alone")
            for name in (*names, f"{step}-branch", f"{step}-alone", "never seen"):
                await engine.release(name)
                await engine.release(name)
        kept = (engine._homes, engine._groups, engine._of, engine._rids, engine._aborted)
        assert not any(kept), kept
        assert set(engine._running.values()) == {0}

    asyncio.run(main())


def test_control_calls_go_to_every_server_and_aborts_to_the_one_that_runs_it(tmp_path: Path) -> None:
    async def main() -> None:
        first, second, engine = pair(tmp_path)
        first.gate.clear()
        second.gate.clear()
        running = [turn(engine, "a"), turn(engine, "b")]
        await settled()
        assert (first.served, second.served) == (["a"], ["b"])
        await engine.abort("b")
        assert (first.calls, second.calls) == ([], ["abort"])
        await engine.update_weights(str(tmp_path), 3)
        await engine.sleep()
        await engine.wake()
        await engine.close()
        rest = ["pause", "load 3", "resume", "sleep", "wake", "close"]
        assert (first.calls, second.calls) == (rest, ["abort", *rest])
        first.gate.set()
        second.gate.set()
        await asyncio.gather(*running)

    asyncio.run(main())
