"""The task of the training-step benchmark: a chain of three operations, one calculator call each.

Plain Python without a framework, because every peer imports it: the questions, the tool, the reward and the scripted
demonstrations are one and the same on every side. "Compute ((53 * 40) - 76) + 12." takes three dependent calls and an
answer. The reward is graded, so that a group's rewards are never all equal: a system that skips constant groups must
not win by having less to do.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

SYSTEM = (
    "You solve arithmetic with a calculator, from the innermost brackets outwards. Make one call a message, after a "
    "sentence on what you compute, and use its result in the next call. When nothing is left, give the answer."
)
TOOL_TURNS = 3
OPERATIONS = ("+", "-", "*")


def calc(a: int, op: str, b: int) -> str:
    """
    Do one binary operation on two whole numbers and return the result.

    Args:
        a: The number on the left of the operator.
        op: The operator, one of + - *.
        b: The number on the right of the operator.

    Returns:
        The result in decimal digits, or a sentence on what was wrong.
    """
    if op not in OPERATIONS:
        return f"unknown operator, use one of {' '.join(OPERATIONS)}"
    if not (is_number(a) and is_number(b)):
        return "both sides must be whole numbers of at most nine digits"
    return str(a + b if op == "+" else a - b if op == "-" else a * b)


def is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**9


@dataclass(frozen=True, slots=True)
class Problem:
    """((n0 op0 n1) op1 n2) op2 n3 and its answer."""

    numbers: tuple[int, int, int, int]
    ops: tuple[str, str, str]

    @property
    def question(self) -> str:
        n, o = self.numbers, self.ops
        return f"Compute (({n[0]} {o[0]} {n[1]}) {o[1]} {n[2]}) {o[2]} {n[3]}."

    @property
    def steps(self) -> list[tuple[int, str, int, int]]:
        """The three calls: left, operator, right, result."""
        left, made = self.numbers[0], []
        for op, right in zip(self.ops, self.numbers[1:], strict=True):
            result = int(calc(left, op, right))
            made.append((left, op, right, result))
            left = result
        return made

    @property
    def answer(self) -> int:
        return self.steps[-1][3]


def problems(seed: int) -> Iterator[Problem]:
    """An endless stream of problems; one seed gives one stream."""
    rng = random.Random(seed)
    while True:
        numbers = (rng.randint(2, 99), rng.randint(2, 99), rng.randint(2, 99), rng.randint(2, 99))
        yield Problem(numbers, (rng.choice(OPERATIONS), rng.choice(OPERATIONS), rng.choice(OPERATIONS)))


def reward(text: str, answer: int) -> float:
    """Closeness of the last number in `text` to `answer`, on a log scale: 1 when exact, 0 without a number."""
    found = re.findall(r"-?\d+", text)
    if not found:
        return 0.0
    given = float(found[-1][:15])
    return 1.0 / (1.0 + abs(_signed_log(given) - _signed_log(answer)))


def _signed_log(value: float) -> float:
    return math.copysign(math.log1p(abs(value)), value)


_PART = {
    0: ("The innermost bracket comes first", "First I take the inner bracket", "I begin with the inner bracket"),
    1: ("Next comes the outer bracket", "Now I take the bracket around it", "The outer bracket is next"),
    2: ("Only the last step is left", "Now the last step remains", "The step outside comes last"),
}
_WHY = ("so I compute", "so the call is", "and I ask for", "giving")
_THEN = ("", " now", " first", " with it")
_DONE = (
    "All three steps are done and nothing is left to compute, so the answer is",
    "That was the last of the three calls. The answer is",
    "The brackets are gone and every number has been used. The final answer is",
)


def demonstration(problem: Problem, rng: random.Random) -> list[dict[str, Any]]:
    """A scripted expert's conversation, as chat messages: three calls, then the answer."""
    messages = opening(problem)
    for index, (left, op, right, result) in enumerate(problem.steps):
        said = (
            f"Call {index + 1}: {rng.choice(_PART[index])}, {rng.choice(_WHY)} {left} {op} {right}{rng.choice(_THEN)}."
        )
        call = {"name": "calc", "arguments": {"a": left, "op": op, "b": right}}
        messages.append({"role": "assistant", "content": said, "tool_calls": [{"type": "function", "function": call}]})
        messages.append({"role": "tool", "name": "calc", "content": str(result)})
    messages.append({"role": "assistant", "content": f"{rng.choice(_DONE)} {problem.answer}."})
    return messages


def opening(problem: Problem) -> list[dict[str, Any]]:
    """The prompt of one episode, as chat messages."""
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": problem.question}]


SCHEMA: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "calc",
        "description": "Do one binary operation on two whole numbers and return the result.",
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "integer", "description": "The number on the left of the operator."},
                "op": {"type": "string", "description": "The operator, one of + - *."},
                "b": {"type": "integer", "description": "The number on the right of the operator."},
            },
            "required": ["a", "op", "b"],
        },
    },
}
