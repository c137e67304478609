"""Whatever a tool does becomes an observation, `InfraError` or `EnvError`, and the episode's state stays right."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from agentrl import Env, Episode, InfraError, Obs, Score, Task, Toolkit, tool
from agentrl.errors import EnvError
from agentrl.host import Answer, Host
from agentrl.registry import load_file
from agentrl.trajectory import ToolCall

Hostile = load_file(Path(__file__).with_name("hostile.py")).Hostile
TASK = Task("only", "Count.")
T = TypeVar("T")


def play(body: Callable[[Host], Awaitable[T]], env: Env | None = None, **limits: Any) -> T:
    """Run `body` on an opened host, and close it."""

    async def main() -> T:
        host = Host(env or Hostile(), TASK, (1, 2), **limits)
        await host.reset()
        try:
            return await body(host)
        finally:
            await host.close()

    return asyncio.run(main())


async def add(host: Host, x: int) -> str:
    return (await host.call(ToolCall("add", {"x": x}))).result.text


@pytest.mark.parametrize(
    ("name", "kind", "says"),
    [
        ("leave", "bug", "Error: SystemExit: 3"),
        ("leave_async", "bug", "Error: SystemExit: 3"),
        ("interrupt", "bug", "Error: KeyboardInterrupt"),
        ("cancel", "bug", "Error: CancelledError"),
        ("stop", "bug", "Error: StopIteration: done"),
        ("unprintable", "bug", "Error: Unprintable"),
        ("secret", "bug", "Error: ValueError: first line"),
        ("recurse", "bug", "Error: RecursionError: maximum recursion depth exceeded"),
        ("huge", "bug", "Error: ValueError: Exceeds the limit (4300 digits) for integer string conversion"),
        ("nothing", "type", "Error: nothing returned NoneType, not text, an Image or an Obs"),
        ("number", "type", "Error: number returned int, not text, an Image or an Obs"),
        ("nested", "type", "Error: nested returned list, not text, an Image or an Obs"),
        ("endless", "type", "Error: endless returned generator, not text, an Image or an Obs"),
        ("not_a_reward", "type", "Error: not_a_reward returned an Obs whose reward is not a finite number"),
        ("refuse", "tool", "not today"),
        ("flood", "oversize", "x" * 50 + "\n[99999950 characters cut]"),
        ("hang", "timeout", "Error: hang timed out (no answer within 0.1 s)."),
        ("hang_async", "timeout", "Error: hang_async timed out (no answer within 0.1 s)."),
        ("stubborn", "timeout", "Error: stubborn timed out (no answer within 0.1 s)."),
    ],
)
def test_misbehaviour_is_an_observation_and_the_state_survives(name: str, kind: str, says: str) -> None:
    async def body(host: Host) -> tuple[str, Answer, str]:
        await add(host, 1)
        before = (await host.call(ToolCall("draw", {}))).result.text
        answer = await host.call(ToolCall(name, {}))
        assert await add(host, 2) == "3"  # what a lost call did to the state is gone with its instance
        return before, answer, (await host.call(ToolCall("draw", {}))).result.text

    before, answer, after = play(body)
    assert answer.result.error == kind
    assert not answer.result.ok
    assert answer.result.text.startswith(says)
    assert "hunter2" not in answer.result.text
    assert len(answer.result.text) < 300
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((1, 2))))
    assert [before, after] == [str(rng.integers(10**6)), str(rng.integers(10**6))]


def test_a_flood_of_parts_is_cut_and_odd_text_is_mended() -> None:
    async def body(host: Host) -> tuple[Answer, Answer]:
        return await host.call(ToolCall("flood_parts", {})), await host.call(ToolCall("surrogate", {}))

    flood, odd = play(body)
    assert flood.result.error == "oversize"
    assert flood.result.text == "abc" * 16 + "ab" + "\n[299950 characters or images cut]"
    assert odd.result.ok
    odd.result.text.encode()


def test_a_bad_call_names_its_mistake_and_costs_nothing() -> None:
    async def body(host: Host) -> list[Answer]:
        return await host.call_all(
            [ToolCall("ad", {"x": 1}), ToolCall("add", {"x": "many"}), ToolCall("add", {}), ToolCall("add", {"x": 1})]
        )

    unknown, typed, missing, fine = play(body)
    assert unknown.result.error == "unknown_tool"
    assert "did you mean add?" in unknown.result.text
    assert typed.result.error == missing.result.error == "arguments"
    assert "x: Input should be a valid integer" in typed.result.text
    assert "x: Field required" in missing.result.text
    assert [answer.result.cost for answer in (unknown, typed, missing, fine)] == [0.0, 0.0, 0.0, 0.5]


def test_costs_per_call_and_per_token() -> None:
    async def body(host: Host) -> float:
        return (await host.call(ToolCall("later", {"x": 1}))).result.cost

    assert play(body) == 1.0 + 0.25 * 2  # "later 1" is seven characters: two tokens at four a token
    assert play(body, count_tokens=lambda text: len(text.split()) * 10) == 1.0 + 0.25 * 20


def test_infra_errors_pass_through() -> None:
    async def body(host: Host) -> None:
        with pytest.raises(InfraError, match="the index is gone"):
            await host.call(ToolCall("broken_service", {}))

    play(body)


def test_done_ends_the_episode_and_later_calls_are_refused() -> None:
    async def body(host: Host) -> list[Answer]:
        return await host.call_all([ToolCall("add", {"x": 1}), ToolCall("win", {}), ToolCall("add", {"x": 1})])

    first, won, refused = play(body)
    assert first.result.ok
    assert won.done
    assert won.reward == 0.5
    assert len(won.result.images) == 1
    assert won.result.text.startswith("you win [image")
    assert refused.result.error == "tool"
    assert "has ended" in refused.result.text


def test_parallel_calls_run_together_and_keep_their_order() -> None:
    barrier = threading.Barrier(2, timeout=5)

    class Meeting(Env):
        def score(self, episode: Episode) -> float:
            return 0.0

        @tool(parallel=True)
        def meet(self, who: str) -> str:
            barrier.wait()  # passes only when both are in here at once
            time.sleep(0.02 if who == "a" else 0)
            return who

        @tool
        def alone(self) -> str:
            return "alone"

    async def body(host: Host) -> list[str]:
        calls = [ToolCall("meet", {"who": "a"}), ToolCall("meet", {"who": "b"}), ToolCall("alone", {})]
        return [answer.result.text for answer in await host.call_all(calls)]

    assert play(body, Meeting()) == ["a", "b", "alone"]


def test_the_tools_own_timeout_is_capped() -> None:
    async def body(host: Host) -> Answer:
        return await host.call(ToolCall("together", {"seconds": 0.5}))

    assert play(body, max_tool_seconds=0.05).result.error == "timeout"


def test_reply_may_answer_refuse_or_break() -> None:
    async def body(host: Host) -> None:
        assert await host.reply("hi there") == Obs("you said hi there")
        assert await host.reply("bye") is None
        assert await host.reply("refuse") == Obs("I did not get that")
        with pytest.raises(EnvError, match=r"Hostile.reply failed with KeyError"):
            await host.reply("break")

    play(body)


def test_a_hanging_reply_is_the_environments_failure() -> None:
    async def body(host: Host) -> None:
        with pytest.raises(EnvError, match="no answer within"):
            await host.reply("hang")

    play(body, max_env_seconds=0.1)


def test_rebuilding_checks_every_replayed_result() -> None:
    class Clock(Env):
        ticks = 0

        @tool
        def tick(self) -> str:
            Clock.ticks += 1  # state outside the instance: a replay cannot give it back
            return str(Clock.ticks)

        @tool(timeout=0.05)
        def hang(self) -> str:
            time.sleep(0.3)
            return ""

        def score(self, episode: Episode) -> float:
            return 0.0

    async def body(host: Host) -> None:
        await host.call(ToolCall("tick", {}))
        await host.call(ToolCall("hang", {}))
        with pytest.raises(
            EnvError, match="cannot be rebuilt, call tick, event 1 answered '2' where the record has '1'"
        ):
            await host.call(ToolCall("tick", {}))

    play(body, Clock())


def test_fork_copies_the_state_and_leaves_the_parent_alone() -> None:
    async def body(host: Host) -> None:
        await add(host, 1)
        child = await host.fork()
        assert await add(child, 10) == "11"
        assert await add(host, 2) == "3"
        draws = [(await each.call(ToolCall("draw", {}))).result.text for each in (host, child)]
        assert draws[0] == draws[1]  # the same generator in the same state
        await child.close()

    play(body)


def test_what_cannot_be_copied_is_forked_by_replay() -> None:
    class Locked(Hostile):  # type: ignore[misc, valid-type]
        def reset(self, task: Task, rng: Any) -> None:
            super().reset(task, rng)
            self.lock = threading.Lock()

    async def body(host: Host) -> None:
        await add(host, 1)
        child = await host.fork()
        assert await add(child, 10) == "11"
        assert await add(host, 2) == "3"
        await child.close()

    play(body, Locked())


def test_cancelling_a_call_drops_the_instance_and_scoring_rebuilds_it() -> None:
    async def body(host: Host) -> None:
        await add(host, 1)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await host.call(ToolCall("together", {"seconds": 0.3}))
        assert (await host.score(Episode(TASK)))[1] == 1.0

    play(body)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (1.5, r"score gave 1.5, outside its reward_range \(0, 1\)"),
        (-1, "outside its reward_range"),
        (float("nan"), "score = nan"),
        ("good", "must return a float, a Score or None"),
        (Score({"a": float("inf")}, True), "a = inf"),
    ],
)
def test_an_impossible_score_is_the_environments_failure(value: Any, message: str) -> None:
    class Judge(Env):
        def score(self, episode: Episode) -> Any:
            return value

    async def body(host: Host) -> None:
        with pytest.raises(EnvError, match=message):
            await host.score(Episode(TASK))

    play(body, Judge())


def test_scores_with_parts_missing_values_and_async() -> None:
    class Judge(Env):
        reward_weights = {"right": 0.8, "short": 0.2}  # noqa: RUF012
        given: Any = None

        async def score(self, episode: Episode) -> Any:
            return Judge.given

    async def body(host: Host) -> Any:
        return await host.score(Episode(TASK))

    Judge.given = Score({"right": 1.0, "short": 0.5}, True)
    assert play(body, Judge()) == ({"right": 1.0, "short": 0.5}, 0.9, True)
    Judge.given = Score({"right": 1.0, "short": None}, True)
    assert play(body, Judge()) == ({"right": 1.0, "short": None}, None, None)
    Judge.given = None
    assert play(body, Judge()) == ({}, None, None)


def test_a_failing_reset_is_the_environments_failure() -> None:
    class Broken(Env):
        def reset(self, task: Task, rng: Any) -> None:
            raise FileNotFoundError("data.json")

    with pytest.raises(EnvError, match=r"Broken.reset failed with FileNotFoundError: data.json"):
        play(lambda host: host.anchor(), Broken())


def test_state_that_hides_a_method_is_named() -> None:
    class Summing(Env):
        def reset(self, task: Task, rng: Any) -> None:
            self.total = 0  # type: ignore[assignment, method-assign]

    with pytest.raises(EnvError, match=r"Summing sets self.total, which hides the method Env.total"):
        play(lambda host: host.anchor(), Summing())


def test_close_is_idempotent_and_bounded_even_when_it_raises() -> None:
    closed: list[str] = []

    class Careless(Env):
        async def close(self) -> None:
            closed.append("env")
            raise OSError("already gone")

    async def body(host: Host) -> None:
        await host.close()
        await host.close()

    play(body, Careless())
    assert closed == ["env"]


def test_a_host_is_used_between_reset_and_close() -> None:
    async def body(host: Host) -> None:
        await host.close()
        with pytest.raises(RuntimeError, match="between reset"):
            await host.call(ToolCall("add", {"x": 1}))

    play(body)


def test_anchors_are_the_environments_or_the_last_observation() -> None:
    class Keyed(Env):
        def anchor(self) -> Any:
            return ("room", frozenset({"b", "a"}))

    async def key(host: Host) -> str:
        return await host.anchor()

    async def moves(host: Host) -> tuple[str, str, str]:
        start = await host.anchor()
        await add(host, 1)
        first = await host.anchor()
        await add(host, 0)
        return start, first, await host.anchor()

    assert play(key, Keyed()) == "('room',{'a','b'})"
    start, first, second = play(moves)
    assert start != first == second


def test_toolkits_live_with_the_episode() -> None:
    class Notes(Toolkit):
        def reset(self, rng: Any) -> None:
            self.pages: list[str] = []
            self.stamp = int(rng.integers(10**9))

        @tool
        async def note(self, text: str) -> str:
            self.pages.append(text)
            return f"{len(self.pages)} {self.stamp}"

    class Writer(Env):
        def __init__(self) -> None:
            super().__init__()
            self.notes = Notes()
            self.tools = (self.notes,)

        def score(self, episode: Episode) -> float:
            return len(self.notes.pages) / 10

    async def body(host: Host) -> tuple[str, Any, Any]:
        first = (await host.call(ToolCall("note", {"text": "a"}))).result.text
        child = await host.fork()
        await child.call(ToolCall("note", {"text": "b"}))
        scores = await host.score(Episode(TASK)), await child.score(Episode(TASK))
        await child.close()
        return first, scores[0][1], scores[1][1]

    env = Writer()
    once, again = play(body, env), play(body, env)
    assert once == again
    assert once[1:] == (0.1, 0.2)


def test_a_stuck_thread_takes_nobodys_place() -> None:
    async def body(host: Host) -> None:
        assert (await host.call(ToolCall("hang", {}))).result.error == "timeout"
        results = await asyncio.gather(*(add_on_own_host(x) for x in range(200)))
        assert results == [str(x) for x in range(200)]

    async def add_on_own_host(x: int) -> str:
        host = Host(Hostile(), TASK, (x,))
        await host.reset()
        try:
            return await add(host, x)
        finally:
            await host.close()

    play(body)
