"""One environment per mistake that `agentrl env check` finds, each with just that mistake. Loaded by path."""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, Literal

import numpy as np

from agentrl import Env, Episode, InfraError, Obs, Say, Task, ToolCall, ToolError, tool


class Sound(Env):
    """Nothing is wrong with this one: a counter with some noise and a hidden number."""

    def tasks(self, split: str, seed: int) -> Iterable[Task]:
        rng = np.random.default_rng([seed, split == "test"])
        while True:
            hidden = int(rng.integers(1000, 10_000))
            yield Task(f"n{hidden}", "Find the number.", answer=hidden)

    def reset(self, task: Task, rng: np.random.Generator) -> None:
        self.rng = rng
        self.hidden = task.answer
        self.log: list[int] = []

    @tool(timeout=5)
    def add(self, x: int, label: str = "", kind: Literal["a", "b"] = "a") -> str:
        """Add to the log.

        Args:
            x: what to add.
            label: ignored.
            kind: ignored, too.
        """
        if abs(x) > 10**6:
            raise ToolError("too large")
        self.log.append(x)
        return f"{len(self.log)} entries, noise {self.rng.integers(100)}"

    def anchor(self) -> Any:
        return tuple(self.log)

    def score(self, episode: Episode) -> float:
        return float(episode.final_text == str(episode.task.answer))

    def demonstrate(self, task: Task, rng: np.random.Generator) -> Iterator[Say]:  # type: ignore[override]
        yield Say(calls=(ToolCall("add", {"x": int(rng.integers(9))}),))
        yield Say(str(task.answer) if rng.random() < 0.6 else "no idea")


class Setup(Sound):
    async def setup(self) -> None:
        raise FileNotFoundError("index.bin")


class Machinery(Sound):
    name = "setup"

    @tool
    def search(self, query: str) -> str:
        """Search.

        Args:
            query: the words.
        """
        raise InfraError("the index is not running")


class SchemaDocstring(Sound):
    name = "schema"

    @tool
    def ask(self, question: str) -> str:
        """Ask.

        Args:
            question: what to ask.
            questoin: a name that is no parameter.
        """
        return "no"


class SchemaAnnotation(Sound):
    name = "schema"

    @tool
    def ask(self, question) -> str:  # type: ignore[no-untyped-def]
        """Ask."""
        return "no"


class SchemaDefault(Sound):
    name = "schema"

    @tool
    def ask(self, times: int = None) -> str:  # type: ignore[assignment]  # noqa: RUF013
        """Ask.

        Args:
            times: how often.
        """
        return "no"


class SchemaTwins(Sound):
    name = "schema"

    @tool(name="has space")
    def ask(self) -> str:
        """Ask."""
        return "no"


class Described(Sound):
    @tool
    def ask(self, question: str) -> str:
        return "no"


class Tasks(Sound):
    def tasks(self, split: str, seed: int) -> Iterable[Task]:
        time.sleep(2)
        return super().tasks(split, seed)


class TasksEmpty(Sound):
    name = "tasks"

    def tasks(self, split: str, seed: int) -> Iterable[Task]:
        return []


class TasksRaise(Sound):
    name = "tasks"

    def tasks(self, split: str, seed: int) -> Iterable[Task]:
        yield from ()
        raise KeyError("questions")


class TaskIds(Sound):
    def tasks(self, split: str, seed: int) -> Iterable[Task]:
        for task in super().tasks(split, seed):
            yield Task(str(uuid.uuid4()), task.prompt, answer=task.answer)


class TaskIdsTwice(Sound):
    name = "task_ids"

    def tasks(self, split: str, seed: int) -> Iterable[Task]:
        for task in super().tasks(split, seed):
            yield Task("same", task.prompt, answer=task.answer)


class TaskIdsBySeed(Sound):
    name = "task_ids"

    def tasks(self, split: str, seed: int) -> Iterable[Task]:
        for index, task in enumerate(super().tasks(split, seed)):
            yield Task(f"task-{index}", task.prompt, answer=task.answer)


class Reset(Sound):
    def reset(self, task: Task, rng: np.random.Generator) -> None:
        raise KeyError("orders")


class GlobalRng(Sound):
    @tool
    def roll(self) -> str:
        """Roll."""
        return str(random.randint(1, 6))


class GlobalNumpy(Sound):
    name = "global_rng"

    def reset(self, task: Task, rng: np.random.Generator) -> None:
        super().reset(task, rng)
        self.noise = np.random.rand()  # noqa: NPY002


class GlobalTasks(Sound):
    name = "global_rng"

    def tasks(self, split: str, seed: int) -> Iterable[Task]:
        random.seed(seed)
        return super().tasks(split, seed)


class GlobalScore(Sound):
    name = "global_rng"

    def score(self, episode: Episode) -> float:
        random.random()
        return super().score(episode)


class GlobalDemonstrate(Sound):
    name = "global_rng"

    def demonstrate(self, task: Task, rng: np.random.Generator) -> Iterator[Say]:  # type: ignore[override]
        random.random()
        yield Say(str(task.answer))


class Timeout(Sound):
    @tool(timeout=0.05)
    def wait(self) -> str:
        """Wait."""
        time.sleep(0.3)
        return "done"


class Oversize(Sound):
    @tool(max_chars=100)
    def dump(self) -> str:
        """Dump."""
        return "x" * 1000


class Escapes(Sound):
    @tool
    def look(self, index: int) -> str:
        """Look.

        Args:
            index: which.
        """
        return "abc"[index]


class ResultType(Sound):
    @tool
    def count(self) -> int:
        """Count."""
        return len(self.log)


class Reply(Sound):
    def reply(self, text: str) -> Obs | None:
        return Obs("twice that") if int(text) else None


class ScoreRaises(Sound):
    name = "score"

    def score(self, episode: Episode) -> float:
        return float(episode.final_text)


class RewardRange(Sound):
    success_at = 10.0

    def score(self, episode: Episode) -> float:
        return 10 * super().score(episode)


class ScoreIdempotent(Sound):
    asked: ClassVar[int] = 0

    def score(self, episode: Episode) -> float:
        self.log.append(0)
        return super().score(episode) or min(0.5, len(self.log) / 100)


class Deterministic(Sound):
    @tool
    def now(self) -> str:
        """What time it is."""
        return str(time.perf_counter_ns())


class DeterministicAnchor(Sound):
    name = "deterministic"

    def anchor(self) -> Any:
        return str(uuid.uuid4())


class DeterministicLeak(Sound):
    name = "deterministic"
    shared: ClassVar[list[int]] = []

    @tool
    def visit(self) -> str:
        """Visit."""
        self.shared.append(1)
        return str(len(self.shared))


class DeterministicOrder(Sound):
    name = "deterministic"

    @tool
    def words(self) -> str:
        """Some words."""
        return " ".join({"one", "two", "three", "four", "five", "six", "seven"})


class DeterministicExpert(Sound):
    name = "deterministic"

    def demonstrate(self, task: Task, rng: np.random.Generator) -> Iterator[Say]:  # type: ignore[override]
        yield Say(calls=(ToolCall("add", {"x": time.perf_counter_ns() % 10**6}),))
        yield Say(str(task.answer))


class Fork(Sound):
    def fork(self) -> Fork:
        import copy

        return copy.copy(self)  # shares the log and the generator


class ForkForgets(Sound):
    name = "fork"

    def fork(self) -> ForkForgets:
        child = super().fork()
        child.log = []
        return child


class Close(Sound):
    async def close(self) -> None:
        del self.log


class CloseTwice(Sound):
    name = "close"
    closed = False

    async def close(self) -> None:
        if self.closed:
            raise RuntimeError("closed already")
        self.closed = True


class Demonstrations(Sound):
    def demonstrate(self, task: Task, rng: np.random.Generator) -> Iterator[Say]:  # type: ignore[override]
        yield Say("no idea")


class DemonstrationsRaise(Sound):
    name = "demonstrations"

    def demonstrate(self, task: Task, rng: np.random.Generator) -> Iterator[Say]:  # type: ignore[override]
        yield Say(str(task.data["steps"]))


class DemonstrationsYield(Sound):
    name = "demonstrations"

    def demonstrate(self, task: Task, rng: np.random.Generator) -> Iterator[Any]:  # type: ignore[override]
        yield str(task.answer)


class AnswerInPrompt(Sound):
    def tasks(self, split: str, seed: int) -> Iterable[Task]:
        for task in super().tasks(split, seed):
            yield Task(task.id, f"Find the number (not {task.answer}).", answer=task.answer)


class AnswerFromTool(Sound):
    @tool
    def peek(self, where: Literal["here", "there"]) -> str:
        """Peek.

        Args:
            where: in which place.
        """
        return f"the number is {self.hidden}" if where == "here" else "nothing"


class JunkPays(Sound):
    def score(self, episode: Episode) -> float:
        return float(bool(episode.final_text))


class Process(Sound):
    isolation = "process"

    def __init__(self, path: str, port: int) -> None:
        super().__init__()
