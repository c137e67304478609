"""Which tasks are drawn, and how many samples of each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from agentrl.algo.component import Component
from agentrl.algo.state import StateStore
from agentrl.errors import UsageError
from agentrl.task import Task
from agentrl.trajectory import Group


@dataclass(frozen=True, slots=True)
class TaskDraw:
    """One task drawn for one step, with the number of samples its group may spend. `index` is its
    place in the step (the same task may be drawn twice); `options` is what a sampler tells a strategy. `place`
    is kept where a draw outlived its process: see `Flight`."""

    task: Task
    samples: int
    step: int = 0
    index: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    place: tuple[int, int] | None = None


class TaskStream:
    """Reads an environment's lazy tasks by position, epoch after epoch, and can go back after a crash.

    Only the position is state: `seek` re-reads the generator, so nothing is lost or repeated.
    """

    def __init__(self, make: Callable[[], Iterable[Task]]) -> None:
        self._make = make
        self._iterator: Iterator[Task] = iter(make())
        self.position = 0

    def take(self, n: int) -> list[Task]:
        """The next `n` tasks; starts over when the environment has no more."""
        out: list[Task] = []
        while len(out) < n:
            task = next(self._iterator, None)
            if task is None:
                self._iterator = iter(self._make())
                task = next(self._iterator, None)
                if task is None:
                    raise UsageError("the environment yields no tasks for this split: let tasks() yield at least one")
            out.append(task)
            self.position += 1
        return out

    def seek(self, position: int) -> None:
        """Go to `position` tasks from the start."""
        self._iterator = iter(self._make())
        self.position = 0
        while self.position < position:
            self.take(min(1024, position - self.position))

    def find(self, ids: Collection[str]) -> dict[str, Task]:
        """The tasks of these ids among those taken so far. Raises `UsageError` for an id that is not there."""
        missing, found = set(ids), dict[str, Task]()
        tasks = iter(self._make())
        for _ in range(self.position if missing else 0):
            task = next(tasks, None)
            if task is None or not missing:
                break
            if task.id in missing:
                found[task.id] = task
                missing.discard(task.id)
        if missing:
            raise UsageError(
                f"the task {min(missing)!r} was drawn before the run stopped, and the environment does not yield it "
                "any more; let tasks() yield the same tasks for the same seed"
            )
        return found


class TaskSampler(Component):
    """Point 1. `draw` says what the step works on; `observe` sees the finished groups."""

    point: ClassVar[str] = "sampler"

    def draw(self, step: int, prompts: int, samples: int, tasks: TaskStream, store: StateStore) -> list[TaskDraw]:
        """`prompts` draws for `step`. May not look at tokens."""
        raise NotImplementedError

    def observe(self, groups: Sequence[Group], store: StateStore) -> None:
        """Learn from the step's groups (pass rates, …) through the store."""


class UniformSampler(TaskSampler):
    """The tasks in the environment's own order, each with the same number of samples."""

    type: Literal["uniform"] = "uniform"

    def draw(self, step: int, prompts: int, samples: int, tasks: TaskStream, store: StateStore) -> list[TaskDraw]:
        return [TaskDraw(task, samples, step, index) for index, task in enumerate(tasks.take(prompts))]
