"""Arithmetic with a calculator that does one operation a call: the quickstart's environment.

`kind="chain"`: "Compute (53 * 40) - 76." takes two dependent calls and the words "The answer is 2044.";
the reward is exact match. Most scripted demonstrators are lazy: they stop after the first call and answer with
its result, which is wrong. So a policy that imitates them fails when decoded greedily, succeeds now and
then when sampled, and reinforcement learning has a behaviour to change, not just noise to remove.

`kind="mixed"`: half the questions are one-digit sums that need no tool, half two-digit products that
do. Its demonstrators answer some questions of either half directly (sums rightly, products with a
guess), call once on most, and sometimes call twice; a cost per call then teaches which questions deserve one.

Held-out questions are left out of training by their text. The 81 one-digit sums are too few for
that: they are the tables a policy is to know by heart, and stand in both splits.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, Field

from agentrl import Env, Episode, Obs, Say, Task, ToolCall, ToolError, tool
from agentrl.content import text_of

HELD_OUT = 2048
LARGEST = 10_000  # intermediates and answers stay below it
_BLOCK = 512
_HELD_OUT_SEED = 20_480
_OPS = ("+", "+", "-", "*")  # plus is twice as likely
_TWICE = 0.1  # of the demonstrators of "mixed" repeat their call


class Question(NamedTuple):
    """`(a op b) then c`, or `a op b` where there is no second operation."""

    a: int
    op: str
    b: int
    then: str = ""
    c: int = 0

    @property
    def text(self) -> str:
        first = f"{self.a} {self.op} {self.b}"
        return f"({first}) {self.then} {self.c}" if self.then else first

    @property
    def answer(self) -> int:
        first = apply(self.a, self.op, self.b)
        return apply(first, self.then, self.c) if self.then else first

    @property
    def easy(self) -> bool:
        return not self.then and self.a < 10 and self.b < 10

    @property
    def fits(self) -> bool:
        return abs(apply(self.a, self.op, self.b)) < LARGEST and abs(self.answer) < LARGEST


def apply(a: int, op: str, b: int) -> int:
    """`a op b` for op + - *."""
    return a + b if op == "+" else a - b if op == "-" else a * b


class Calculator(Env):
    """Compute a small expression with a calculator that does one operation a call."""

    max_turns = 7

    class Options(BaseModel, extra="forbid", frozen=True):
        """`lazy`: the share of demonstrators that make too few calls (default .6 for chain, .3 for mixed, where
        it holds for sums, and a third of it for products). `corruption`: how often a careful one gets an
        operand or operation wrong. `held_out`: how many questions the test split holds."""

        kind: Literal["chain", "mixed"] = "chain"
        lazy: float | None = Field(None, ge=0, le=1)
        corruption: float = Field(0.03, ge=0, le=1)
        held_out: int = Field(HELD_OUT, ge=1, le=HELD_OUT)

    def __init__(self, options: Any = None, **keys: Any) -> None:
        super().__init__(options, **keys)
        self.chain = self.options.kind == "chain"
        self.lazy = self.options.lazy if self.options.lazy is not None else 0.6 if self.chain else 0.3
        if not self.chain:
            self.max_turns = 4

    def tasks(self, split: str, seed: int) -> Iterable[Task]:
        """An endless stream of training questions by `seed`; the same `held_out` test questions for every seed."""
        if split == "test":
            return iter(self._test[: self.options.held_out])
        held_out = {task.prompt for task in self._test if not task.data["question"].easy}
        return (task for question in self._questions(seed) if (task := _task(question)).prompt not in held_out)

    @tool(cost=1.0)
    def calc(self, a: int, op: Literal["+", "-", "*"], b: int) -> str:
        """Do one operation on two integers.

        Args:
            a: the left operand.
            op: the operation.
            b: the right operand.
        """
        if max(abs(a), abs(b)) > 10**9:
            raise ToolError("operands must be at most 1000000000")
        return str(apply(a, op, b))

    def score(self, episode: Episode) -> float:
        return float(episode.final_text.strip() == f"The answer is {episode.task.answer}.")

    def demonstrate(self, task: Task, rng: np.random.Generator) -> Generator[Say, Obs, None]:
        question: Question = task.data["question"]
        if self.chain:
            lazy = rng.random() < self.lazy
            value = yield from self._call(question.a, question.op, question.b, rng, 0.0 if lazy else None)
            if not lazy:
                value = yield from self._call(value, question.then, question.c, rng)
        else:
            mood = rng.random()
            direct = self.lazy if question.easy else self.lazy / 3
            if mood < direct:
                value = question.answer if question.easy else _guess(question.answer, rng)
            else:
                value = yield from self._call(question.a, question.op, question.b, rng)
                if mood > 1 - _TWICE:
                    value = yield from self._call(question.a, question.op, question.b, rng)
        yield Say(f"The answer is {value}.")

    def _call(
        self, a: int, op: str, b: int, rng: np.random.Generator, corruption: float | None = None
    ) -> Generator[Say, Obs, int]:
        """Call the tool, with each part wrong at the rate of `corruption` (default: the option's); its result."""
        rate = self.options.corruption if corruption is None else corruption
        wrong = rng.random(3) < rate
        if wrong.any():
            a = int(rng.integers(2, 100)) if wrong[0] else a
            b = int(rng.integers(2, 100)) if wrong[2] else b
            op = [other for other in "+-*" if other != op][int(rng.integers(2))] if wrong[1] else op
        heard = yield Say(calls=(ToolCall("calc", {"a": a, "op": op, "b": b}),))
        return int(text_of(heard.content))

    def _questions(self, seed: int) -> Iterator[Question]:
        rng = np.random.default_rng(seed)
        while True:
            ops = rng.integers(len(_OPS), size=(_BLOCK, 2)).tolist()
            if self.chain:
                operands = rng.integers(2, 100, size=(_BLOCK, 3)).tolist()
                made = (Question(a, _OPS[i], b, _OPS[j], c) for (a, b, c), (i, j) in zip(operands, ops, strict=True))
                yield from (question for question in made if question.fits)
            else:
                sums = rng.integers(1, 10, size=(_BLOCK, 2)).tolist()
                products = rng.integers(10, 100, size=(_BLOCK, 2)).tolist()
                for (i, _), small, large in zip(ops, sums, products, strict=True):
                    yield Question(small[0], "+", small[1]) if i < 2 else Question(large[0], "*", large[1])

    @cached_property
    def _test(self) -> list[Task]:
        """The held-out tasks. Only one-digit sums may repeat, under ids of their own."""
        times: dict[str, int] = {}
        tasks: list[Task] = []
        for question in self._questions(_HELD_OUT_SEED):
            seen = times[question.text] = times.get(question.text, 0) + 1
            if seen == 1 or question.easy:
                tasks.append(_task(question, "" if seen == 1 else f"#{seen}"))
            if len(tasks) == HELD_OUT:
                return tasks
        raise AssertionError("the stream of questions is endless")


def _task(question: Question, suffix: str = "") -> Task:
    text = question.text
    return Task(
        id=text.replace(" ", "") + suffix,
        prompt=f"Compute {text}.",
        answer=question.answer,
        data={"question": question},
    )


def _guess(answer: int, rng: np.random.Generator) -> int:
    """A number as long as the answer, as somebody guesses who does not compute."""
    low = 10 ** (len(str(answer)) - 1)
    return int(rng.integers(low, 10 * low))
