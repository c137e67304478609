"""Every ready environment: the same seed twice is the same episode, junk earns nothing, its expert succeeds."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest

from agentrl import Env, Obs
from agentrl.check import check_env
from agentrl.envs.calculator import Calculator, apply
from agentrl.envs.guess import Guess
from agentrl.host import Host
from agentrl.registry import find_env, list_envs
from agentrl.task import Task
from agentrl.textual import TextEpisode
from agentrl.tools.arithmetic import Arithmetic
from agentrl.trajectory import ToolCall

TEMPLATES: dict[str, Env] = {
    # The code interpreter needs a sandbox, and has tests of its own.
    **{e.id: find_env(e.id)() for e in list_envs() if e.source == "built in" and e.id != "code_interpreter"},
    "calculator-mixed": Calculator(kind="mixed"),
}
EXPERTS = {
    "calculator": Calculator(lazy=0, corruption=0),
    "calculator-mixed": Calculator(kind="mixed", lazy=0, corruption=0),
    "guess": Guess(hasty=0),
}
JUNK = ("", "zzz", "0", "-1", "The answer is .", "1 2 3", "٣", "9" * 5000, "<tool_call>", "\x00", "🙂" * 100)


def demonstrate(env: Env, task: Task, seed: int) -> tuple[list[tuple[str, str]], float | None, bool | None]:
    async def main() -> tuple[list[tuple[str, str]], float | None, bool | None]:
        episode = TextEpisode(env, task, (seed,))
        try:
            await episode.open()
            await episode.demonstrate((seed, 1))
            _, total, success = await episode.score()
            return [(turn.text, turn.observation) for turn in episode.turns], total, success
        finally:
            await episode.close()

    return asyncio.run(main())


def some(env: Env, split: str, n: int = 8, seed: int = 0) -> list[Task]:
    return list(itertools.islice(env.tasks(split, seed), n))


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("split", ["train", "test"])
def test_the_checker_finds_nothing(name: str, split: str) -> None:
    found = check_env(TEMPLATES[name], split=split, other_process=split == "train")
    assert [finding for finding in found if finding.level != "ok"] == []


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_same_seed_twice_is_the_same_episode(name: str) -> None:
    env = TEMPLATES[name]
    for seed, task in enumerate(some(env, "train")):
        assert demonstrate(env, task, seed) == demonstrate(env, task, seed)


@pytest.mark.parametrize("name", TEMPLATES)
def test_junk_earns_nothing_and_raises_nothing(name: str) -> None:
    async def main(task: Task, words: Iterable[str]) -> float:
        episode = TextEpisode(TEMPLATES[name], task, (0,))
        try:
            await episode.open()
            for word in words:
                if episode.outcome is None:
                    await episode.say(word)
            _, total, success = await episode.score()
            assert not success
            return total or 0.0
        finally:
            await episode.close()

    for task in some(TEMPLATES[name], "test", 4):
        assert all(asyncio.run(main(task, [junk])) < 0.1 for junk in JUNK)
        assert asyncio.run(main(task, JUNK)) < 0.1


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_careful_expert_always_succeeds(name: str) -> None:
    assert set(EXPERTS) == set(TEMPLATES)
    for task in some(EXPERTS[name], "test", 24):
        assert demonstrate(EXPERTS[name], task, 1)[2]


# -- the calculator ----------------------------------------------------------------------------------


def shares(env: Calculator, n: int) -> tuple[float, float, float]:
    """Success, calls and CPU-seconds of `n` demonstrations, tools answered directly."""
    started = time.process_time()
    right = calls = 0
    for index, task in enumerate(itertools.islice(env.tasks("train", 0), n)):
        expert = env.demonstrate(task, np.random.default_rng(index))
        said: Any = next(expert)
        while said.calls:
            calls += 1
            made = said.calls[0].arguments
            said = expert.send(Obs(str(apply(made["a"], made["op"], made["b"]))))
        right += said.text == f"The answer is {task.answer}."
    return right / n, calls / n, time.process_time() - started


def test_most_demonstrators_of_the_chain_are_lazy() -> None:
    success, calls, _ = shares(Calculator(), 4000)
    assert success == pytest.approx(0.4 * 0.97**6, abs=0.03)  # careful, and nothing corrupted
    assert calls == pytest.approx(1.4, abs=0.03)


def test_demonstrators_of_the_mixed_questions() -> None:
    success, calls, _ = shares(Calculator(kind="mixed"), 4000)
    assert success == pytest.approx(0.885, abs=0.03)
    assert calls == pytest.approx(0.9, abs=0.03)


def test_the_quickstarts_example() -> None:
    async def main() -> None:
        task = next(t for t in Calculator().tasks("train", 0) if "*" in str(t.prompt) and "-" in str(t.prompt))
        question = task.data["question"]
        host = Host(Calculator(), task, (0,))
        await host.reset()
        first = await host.call(ToolCall("calc", {"a": question.a, "op": question.op, "b": question.b}))
        second = await host.call(ToolCall("calc", {"a": int(first.result.text), "op": question.then, "b": question.c}))
        assert second.result.text == str(task.answer)
        wrong = await host.call(ToolCall("calc", {"a": 1, "op": "/", "b": 2}))
        assert not wrong.result.ok
        large = await host.call(ToolCall("calc", {"a": 10**5000, "op": "*", "b": 2}))
        assert not large.result.ok
        await host.close()

    asyncio.run(main())


def test_questions_are_what_they_should_be() -> None:
    tasks = some(Calculator(), "train", 4000)
    questions = [task.data["question"] for task in tasks]
    assert all(2 <= n <= 99 for q in questions for n in (q.a, q.b, q.c))
    assert all(abs(apply(q.a, q.op, q.b)) < 10_000 and abs(q.answer) < 10_000 for q in questions)
    plus = sum((q.op == "+") + (q.then == "+") for q in questions)
    minus = sum((q.op == "-") + (q.then == "-") for q in questions)
    assert plus / minus == pytest.approx(2, abs=0.25)
    assert all(
        str(task.prompt) == f"Compute ({q.a} {q.op} {q.b}) {q.then} {q.c}."
        for task, q in zip(tasks, questions, strict=True)
    )
    assert all(eval(str(task.prompt)[8:-1]) == task.answer for task in tasks[:500])


@pytest.mark.parametrize("kind", ["chain", "mixed"])
def test_held_out_questions_stay_out_of_training(kind: str) -> None:
    env = Calculator(kind=kind)
    test = list(env.tasks("test", 5))
    assert [task.id for task in test] == [task.id for task in env.tasks("test", 6)]
    assert len({task.id for task in test}) == len(test) == 2048
    assert len(list(Calculator(kind=kind, held_out=256).tasks("test", 0))) == 256
    held_out = {task.prompt for task in test if not task.data["question"].easy}
    assert len(held_out) > 900
    assert not held_out & {task.prompt for task in some(env, "train", 20_000)}
    assert [t.id for t in some(env, "train", 50, 1)] == [t.id for t in some(env, "train", 50, 1)]
    assert [t.id for t in some(env, "train", 50, 1)] != [t.id for t in some(env, "train", 50, 2)]


def test_guessing_is_answered() -> None:
    async def main() -> None:
        episode = TextEpisode(Guess(), Guess()._task(7), (0,))
        await episode.open()
        heard = [(await episode.say(word)).observation for word in ("4", "eleven", "11", "7.")]
        assert heard == ["Higher.", "Say one number from 1 to 15.", "Lower.", "Right."]
        assert str(episode.outcome) == "terminated"
        assert (await episode.score())[1] == 1.0
        await episode.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("expression", "value"),
    [("(53 * 40) - 76", "2044"), ("2 ** 10", "1024"), ("-7 // 2", "-4"), ("1 / 4", "0.25"), ("+3", "3")],
)
def test_arithmetic_computes(expression: str, value: str) -> None:
    assert Arithmetic().calculate(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        "",
        "1 +",
        "1 / 0",
        "9 ** 9 ** 9",
        "__import__('os')",
        "a",
        "'a' * 9",
        "True",
        "1e999",
        "(" * 300,
        "(-1) ** 0.5",
        "1;2",
    ],
)
def test_arithmetic_refuses(expression: str) -> None:
    from agentrl import ToolError

    with pytest.raises(ToolError):
        Arithmetic().calculate(expression)
