"""A code interpreter: questions that a program answers, tables that a program reads, functions to write.

Everything is made from a seed, nothing is downloaded. The policy works in a sandbox with the tool `python` (and, by
option, `shell` and the file tools); variables and files stay from turn to turn.

`math` and `data` end with a message that holds the answer, which is compared here. `code` ends with a message that
holds a function: it is run in a second sandbox that the policy never touched, on inputs that are shown one by one, and
what it returns is compared here. The expected values never enter a sandbox: no program can print its way to a reward.

One question in eight, by its hash, is held out for the test split; of functions to write, one in eight of the texts.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import re
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, pairwise
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, Field

from agentrl import Env, Episode, Obs, Say, Score, Task, ToolCall
from agentrl.content import text_of
from agentrl.errors import InfraError
from agentrl.sandbox import Result
from agentrl.tools.box import Box, BoxOptions
from agentrl.tools.files import Files
from agentrl.tools.python import Python
from agentrl.tools.shell import Shell

HELD_OUT = 512
_HELD_OUT_SEED = 7_040
TEST_SECONDS = 2.0  # for one hidden test
JUDGE_SECONDS = 20.0  # for all of a function's
_NUMBER = re.compile(r"-?\d+")
Value = int | str | list[int]
Inputs = tuple[tuple[Any, ...], ...]


@dataclass(frozen=True, slots=True)
class Question:
    """`code` solves it (its last cell prints the answer; of a `code` task it is the function itself). `files` are put
    into the workspace. `inputs` and `outputs`: the hidden tests of a function called `name`."""

    text: str
    code: tuple[str, ...]
    answer: Value
    files: tuple[tuple[str, str], ...] = ()
    name: str = ""
    inputs: Inputs = ()
    outputs: tuple[Value, ...] = ()


Maker = Callable[[np.random.Generator, int], Question]


def _expression(rng: np.random.Generator, level: int) -> Question:
    a, b, c = (int(n) for n in rng.integers(2, 10 ** (level + 1), size=3))
    return Question(f"What is {a} * {b} + {c}?", (f"print({a} * {b} + {c})",), a * b + c)


def _remainder(rng: np.random.Generator, level: int) -> Question:
    a, b, m = int(rng.integers(2, 100)), int(rng.integers(10, 10 ** (level + 1))), int(rng.integers(10, 1000))
    return Question(f"What is the remainder of {a}^{b} divided by {m}?", (f"print(pow({a}, {b}, {m}))",), pow(a, b, m))


def _digits(rng: np.random.Generator, level: int) -> Question:
    a, b = int(rng.integers(2, 30)), int(rng.integers(5, 20 * level + 6))
    answer = sum(int(d) for d in str(a**b))
    return Question(
        f"What is the sum of the digits of {a}^{b}?", (f"n = {a} ** {b}", "print(sum(map(int, str(n))))"), answer
    )


def _divisors(rng: np.random.Generator, level: int) -> Question:
    n = int(rng.integers(12, 10 ** (level + 2)))
    answer = sum(n % d == 0 for d in range(1, n + 1))
    return Question(
        f"How many positive divisors does {n} have?",
        (f"n = {n}", "print(sum(n % d == 0 for d in range(1, n + 1)))"),
        answer,
    )


def _multiples(rng: np.random.Generator, level: int) -> Question:
    n, a, b = int(rng.integers(20, 10 ** (level + 2))), int(rng.integers(2, 9)), int(rng.integers(9, 20))
    answer = sum(k for k in range(1, n + 1) if k % a == 0 or k % b == 0)
    return Question(
        f"What is the sum of all numbers from 1 to {n} that are divisible by {a} or by {b}?",
        (f"print(sum(k for k in range(1, {n} + 1) if k % {a} == 0 or k % {b} == 0))",),
        answer,
    )


def _primes(rng: np.random.Generator, level: int) -> Question:
    n = int(rng.integers(20, 10 ** (level + 2)))
    answer = sum(all(k % d for d in range(2, math.isqrt(k) + 1)) for k in range(2, n))
    code = "def prime(k): return all(k % d for d in range(2, int(k ** .5) + 1))"
    return Question(f"How many primes are below {n}?", (code, f"print(sum(map(prime, range(2, {n}))))"), answer)


def _system(rng: np.random.Generator, level: int) -> Question:
    x, y = (int(n) for n in rng.integers(-(10**level), 10**level, size=2))
    a, b, c, d = (int(n) for n in rng.integers(1, 10, size=4))
    d += a * d == b * c
    text = f"{a}x + {b}y = {a * x + b * y} and {c}x + {d}y = {c * x + d * y}. What is x?"
    code = f"print(round(({a * x + b * y} * {d} - {b} * {c * x + d * y}) / ({a} * {d} - {b} * {c})))"
    return Question(text, (code,), x)


_CITIES = ("Bergen", "Lima", "Oslo", "Quito", "Riga", "Turin")


def _table(rng: np.random.Generator, level: int) -> Question:
    rows = [(str(rng.choice(_CITIES)), int(rng.integers(1, 100)), int(rng.integers(1, 20))) for _ in range(10 * level)]
    text = "city,price,count\n" + "".join(f"{city},{price},{count}\n" for city, price, count in rows)
    city = rows[int(rng.integers(len(rows)))][0]
    read = "import csv\nrows = list(csv.DictReader(open('sales.csv')))"
    what = int(rng.integers(3))
    chosen = [(price, count) for where, price, count in rows if where == city]
    of_city = f"for r in rows if r['city'] == '{city}'"
    texts = (
        f"What is the sum of the prices of {city}?",
        f"How much did {city} sell, price times count summed?",
        f"What is the highest price in {city}?",
    )
    codes = (
        f"print(sum(int(r['price']) {of_city}))",
        f"print(sum(int(r['price']) * int(r['count']) {of_city}))",
        f"print(max(int(r['price']) {of_city}))",
    )
    answers = (sum(p for p, _ in chosen), sum(p * c for p, c in chosen), max(p for p, _ in chosen))
    prompt = f"The file sales.csv has the columns city, price and count. {texts[what]}"
    return Question(prompt, (read, codes[what]), answers[what], files=(("sales.csv", text),))


def _words(rng: np.random.Generator, level: int) -> Question:
    letters = "".join(rng.choice(list("aeinrst"), size=60 * level))
    words = [letters[i : i + int(rng.integers(2, 6))] for i in range(0, len(letters) - 6, 4)]
    letter = str(rng.choice(list("aeinrst")))
    answer = sum(word.startswith(letter) for word in words)
    return Question(
        f"How many words in words.txt begin with the letter {letter}?",
        ("words = open('words.txt').read().split()", f"print(sum(w.startswith('{letter}') for w in words))"),
        answer,
        files=(("words.txt", " ".join(words) + "\n"),),
    )


def _function(rng: np.random.Generator, level: int) -> Question:
    k = int(rng.integers(2, 10))
    choices: tuple[tuple[str, str, str, Callable[..., Value]], ...] = (
        ("clamp_sum", "numbers", f"the sum of a list of numbers, each number counted as at most {k}",
         lambda numbers: sum(min(n, k) for n in numbers)),
        ("every", "numbers", f"every {k}th number of a list, beginning with the first", lambda numbers: numbers[::k]),
        ("digits_in", "n", f"the sum of the digits of n written in base {k}",
         lambda n: sum(n // k**i % k for i in range(64))),
        ("shift", "text", f"a lower-case text with each letter moved {k} places on in the alphabet, z followed by a",
         lambda text: "".join(chr((ord(c) - 97 + k) % 26 + 97) for c in text)),
        ("runs", "numbers", f"how many numbers of a list are followed by one that is larger by at least {k}",
         lambda numbers: sum(b - a >= k for a, b in pairwise(numbers))),
    )  # fmt: skip
    bodies = {
        "clamp_sum": f"return sum(min(n, {k}) for n in numbers)",
        "every": f"return numbers[::{k}]",
        "digits_in": f"total = 0\n    while n: n, d = divmod(n, {k}); total += d\n    return total",
        "shift": f"return ''.join(chr((ord(c) - 97 + {k}) % 26 + 97) for c in text)",
        "runs": f"return sum(b - a >= {k} for a, b in zip(numbers, numbers[1:]))",
    }
    name, argument, what, solve = choices[int(rng.integers(len(choices)))]
    inputs: list[tuple[Any, ...]] = []
    for size in (0, 1, 2, 5 * level, 10 * level):
        if argument == "numbers":
            inputs.append(([int(n) for n in rng.integers(0, 20, size=size)],))
        elif argument == "n":
            inputs.append((int(rng.integers(0, 10 ** (size + 1))) if size < 17 else 10**17,))
        else:
            inputs.append(("".join(rng.choice(list("abcxyz"), size=size)),))
    text = f"Write a Python function {name}({argument}) that returns {what}. Answer with the function in a code block."
    code = f"def {name}({argument}):\n    {bodies[name]}"
    return Question(text, (code,), 0, name=name, inputs=tuple(inputs), outputs=tuple(solve(*given) for given in inputs))


FAMILIES: dict[str, dict[str, Maker]] = {
    "math": {
        "expression": _expression,
        "remainder": _remainder,
        "digits": _digits,
        "divisors": _divisors,
        "multiples": _multiples,
        "primes": _primes,
        "system": _system,
    },
    "data": {"table": _table, "words": _words},
    "code": {"function": _function},
}


class CodeInterpreter(Env):
    """Answer questions, read data and write functions with a Python interpreter in a sandbox."""

    max_turns = 8
    reward_weights = {"checks": 1.0}  # noqa: RUF012

    class Options(BaseModel, extra="forbid", frozen=True):
        """`kind` and `families` say what is asked (all of a kind's families by default), `level` how hard it is.
        `lazy`: the share of demonstrators that guess instead of computing. `tools`: what the policy works with."""

        kind: Literal["math", "data", "code"] = "math"
        families: tuple[str, ...] = ()
        level: int = Field(default=1, ge=1, le=5)
        lazy: float = Field(default=0.0, ge=0, le=1)
        held_out: int = Field(default=HELD_OUT, ge=1, le=HELD_OUT)
        tools: tuple[Literal["python", "shell", "files"], ...] = ("python",)
        sandbox: BoxOptions = BoxOptions()

        def model_post_init(self, context: Any) -> None:
            unknown = sorted(set(self.families) - set(FAMILIES[self.kind]))
            if unknown:
                raise ValueError(
                    f"kind {self.kind} has no family {unknown[0]!r}; it has {', '.join(FAMILIES[self.kind])}"
                )
            if "python" not in self.tools and "shell" not in self.tools:
                raise ValueError("tools needs python or shell: nothing else runs a program")

    def __init__(self, options: Any = None, **keys: Any) -> None:
        super().__init__(options, **keys)
        self.box = Box(self.options.sandbox)
        kits = {"python": Python(self.box), "shell": Shell(self.box), "files": Files(self.box)}
        self.tools = tuple(kits[name] for name in dict.fromkeys(self.options.tools))

    def tasks(self, split: str, seed: int) -> Iterable[Task]:
        """An endless stream of training tasks by `seed`; the same `held_out` test tasks for every seed."""
        if split == "test":
            return iter(self._test[: self.options.held_out])
        return (task for task in self._stream(seed) if not _is_held_out(task))

    async def reset(self, task: Task, rng: np.random.Generator) -> None:  # type: ignore[override]
        self.box.begin_with({path: text.encode() for path, text in task.data["question"].files})

    async def score(self, episode: Episode) -> Score:  # type: ignore[override]
        """The share of checks that hold: one for an answer, one for each hidden test of a function."""
        question: Question = episode.task.data["question"]
        if not question.name:
            found = _NUMBER.findall(episode.final_text)
            right = bool(found) and found[-1] == str(question.answer)
            return Score({"checks": float(right)}, right)
        self.box.let_go()
        submission = _last_block(episode.final_text)
        passed = await self._judge(submission, question) if submission else 0
        return Score({"checks": passed / len(question.inputs)}, passed == len(question.inputs))

    async def _judge(self, submission: str, question: Question) -> int:
        """How many hidden tests the submitted function passes, in a sandbox that its author never saw.

        Each input is shown in a call of its own, and the values that are expected stay here. What is not done within
        `JUDGE_SECONDS`, or after the sandbox was taken down, counts as failed.
        """
        passed = 0
        async with self.box.fresh() as judge:
            try:
                async with asyncio.timeout(JUDGE_SECONDS):
                    told = await judge.exec(submission, TEST_SECONDS)
                    for given, expected in zip(question.inputs, question.outputs, strict=True):
                        if told.lost:  # a test killed the session: the others still get their chance
                            told = await judge.exec(submission, TEST_SECONDS)
                            if not told.ok:
                                break
                        call = f"{question.name}({', '.join(map(repr, given))})"
                        told = await judge.exec(call, TEST_SECONDS)
                        passed += _same(told, expected)
            except TimeoutError:
                return passed
            except InfraError:
                if not await judge.at_fault():
                    raise
        return passed

    def demonstrate(self, task: Task, rng: np.random.Generator) -> Generator[Say, Obs, None]:
        question: Question = task.data["question"]
        if rng.random() < self.options.lazy:
            yield Say(_wrong(question, rng))
            return
        if question.name:
            tried = f"{question.code[0]}\n{question.name}({', '.join(map(repr, question.inputs[1]))})"
            yield Say(calls=(self._call(tried),))
            yield Say(f"```python\n{question.code[0]}\n```")
            return
        heard: Obs | None = None
        for cell in question.code if "python" in self.options.tools else ("\n".join(question.code),):
            heard = yield Say(calls=(self._call(cell),))
        assert heard is not None
        yield Say(f"The answer is {text_of(heard.content).strip()}.")

    def _call(self, code: str) -> ToolCall:
        if "python" in self.options.tools:
            return ToolCall("python", {"code": code})
        return ToolCall("shell", {"command": f"python3 - <<'END'\n{code}\nEND"})

    def _stream(self, seed: int) -> Iterator[Task]:
        makers = FAMILIES[self.options.kind]
        names = self.options.families or tuple(makers)
        rng = np.random.default_rng(seed)
        while True:
            name = names[int(rng.integers(len(names)))]
            question = makers[name](rng, self.options.level)
            yield Task(
                id=f"{name}-{hash_of(question):012x}",
                prompt=question.text,
                answer=question.answer,
                data={"question": question},
            )

    @cached_property
    def _test(self) -> list[Task]:
        """The held-out tasks, each once (fewer where a family has not so many questions)."""
        stream = (task for task in self._stream(_HELD_OUT_SEED) if _is_held_out(task))
        return list({task.id: task for task in islice(stream, 2 * HELD_OUT)}.values())[:HELD_OUT]


def _is_held_out(task: Task) -> bool:
    question: Question = task.data["question"]
    return hash_of(question.text if question.name else question) % 8 == 0


def hash_of(value: object) -> int:
    """The same number in every process for values that are written alike."""
    return int(hashlib.sha256(repr(value).encode()).hexdigest()[:12], 16)


def _same(told: Result, expected: Value) -> bool:
    """Whether a call returned exactly `expected`, types included. What it says is never evaluated: it is written by
    whoever is judged."""
    return told.ok and not told.lost and told.value == repr(expected)


def _last_block(text: str) -> str:
    """The last fenced block of an answer, "" where there is none."""
    found = ""
    block: list[str] | None = None
    for line in text.splitlines():
        mark = line.strip()
        if block is None and mark in ("```", "```python"):
            block = []
        elif block is not None and mark == "```":
            found, block = "\n".join(block), None
        elif block is not None:
            block.append(line)
    return found


def _wrong(question: Question, rng: np.random.Generator) -> str:
    """What somebody says who does not compute."""
    if question.name:
        return f"```python\ndef {question.name}(x):\n    return 0\n```"
    digits = max(1, len(str(abs(int(str(question.answer))))))
    return f"The answer is {int(rng.integers(10 ** (digits - 1), 10**digits))}."
