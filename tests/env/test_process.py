"""`isolation = "process"`: a worker that loops or crashes is killed, and the episode goes on in a new one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from agentrl import Env, Episode, InfraError, Task
from agentrl.errors import EnvError, UsageError
from agentrl.host import Answer, Host
from agentrl.process import nursery_of
from agentrl.registry import load_file
from agentrl.trajectory import ToolCall

Hostile = load_file(Path(__file__).with_name("hostile.py")).Hostile
TASK = Task("only", "Count.")
T = TypeVar("T")


@pytest.fixture(scope="module")
def template() -> Iterator[Env]:
    env = Hostile()
    env.isolation = "process"
    yield env


def play(env: Env, body: Callable[[Host], Awaitable[T]]) -> T:
    async def main() -> T:
        host = Host(env, TASK, (1, 2))
        await host.reset()
        try:
            return await body(host)
        finally:
            await host.close()

    return asyncio.run(main())


def workers_of(env: Env) -> list[int]:
    """The live children of the template's nursery."""
    nursery = nursery_of(env)._process.pid
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[1]) == nursery and fields[0] != "Z":
                found.append(int(folder.name))
    return found


@pytest.mark.parametrize(
    ("name", "kind", "says"),
    [
        ("loop", "timeout", "Error: loop timed out (no answer within 0.3 s)."),
        ("die", "bug", "Error: die took its process down (the worker process ended)."),
        ("leave", "bug", "Error: SystemExit: 3"),
        ("recurse", "bug", "Error: RecursionError"),
        ("flood", "oversize", "x" * 50),
        ("number", "type", "Error: number returned int"),
        ("win", None, "you win [image"),
    ],
)
def test_the_episode_outlives_its_worker(template: Env, name: str, kind: str | None, says: str) -> None:
    async def body(host: Host) -> tuple[str, Answer, str]:
        await host.call(ToolCall("add", {"x": 1}))
        before = (await host.call(ToolCall("draw", {}))).result.text
        answer = await host.call(ToolCall(name, {}))
        after = (await host.call(ToolCall("add", {"x": 2}))).result.text
        return before, answer, after

    _, answer, after = play(template, body)
    assert answer.result.error == kind
    assert answer.result.text.startswith(says)
    if not answer.done:
        assert after == "3"


def test_the_same_seed_gives_the_same_episode_as_in_a_thread(template: Env) -> None:
    async def body(host: Host) -> list[str]:
        calls = [ToolCall("draw", {}), ToolCall("later", {"x": 4}), ToolCall("draw", {})]
        return [answer.result.text for answer in await host.call_all(calls)] + [str(await host.score(Episode(TASK)))]

    assert play(template, body) == play(Hostile(), body)


def test_forks_are_made_by_replay_in_a_worker_of_their_own(template: Env) -> None:
    async def body(host: Host) -> tuple[str, str]:
        await host.call(ToolCall("add", {"x": 1}))
        child = await host.fork()
        theirs = (await child.call(ToolCall("add", {"x": 10}))).result.text
        mine = (await host.call(ToolCall("add", {"x": 2}))).result.text
        await child.close()
        return theirs, mine

    assert play(template, body) == ("11", "3")


def test_infra_and_environment_errors_keep_their_kind(template: Env) -> None:
    async def body(host: Host) -> None:
        with pytest.raises(InfraError, match="the index is gone"):
            await host.call(ToolCall("broken_service", {}))
        with pytest.raises(EnvError, match="KeyError"):
            await host.reply("break")

    play(template, body)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="lists processes through /proc")
def test_no_worker_is_left_behind(template: Env) -> None:
    async def body(host: Host) -> list[int]:
        await host.call(ToolCall("loop", {}))
        await host.call(ToolCall("add", {"x": 1}))
        return workers_of(template)

    assert len(play(template, body)) >= 1
    deadline = time.monotonic() + 10
    while workers_of(template) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not workers_of(template)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="kills a process that it finds through /proc")
def test_a_worker_that_dies_idle_is_the_machinerys_failure(template: Env) -> None:
    async def body(host: Host) -> None:
        (worker,) = workers_of(template)
        os.kill(worker, 9)
        with pytest.raises(InfraError, match="ended while nothing was asked of it"):
            while True:
                await asyncio.sleep(0.02)
                await host.anchor()

    test_no_worker_is_left_behind(template)
    play(template, body)


def test_a_class_inside_a_function_is_refused_with_a_reason() -> None:
    class Inner(Env):
        isolation = "process"

    with pytest.raises(UsageError, match="top-level class"):
        play(Inner(), lambda host: host.anchor())
