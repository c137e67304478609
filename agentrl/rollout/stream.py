"""A stream of groups: draws go in whenever somebody has some, groups land one by one as they finish.

The rollout manager plays one stream per stage. A batch is a stream that is given all its draws at once
and awaited; training that overlaps with rollouts submits draws while earlier ones are still at play.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from agentrl.algo.sampler import TaskDraw
from agentrl.context import AppendOnly, ContextPolicy
from agentrl.rollout.actors import Actor
from agentrl.rollout.play import Keep, Play, Recorded, Setting, Tally
from agentrl.rollout.strategy import RolloutStrategy
from agentrl.store.key import EpisodeKey
from agentrl.trajectory import Group

if TYPE_CHECKING:
    from agentrl.rollout.manager import RolloutManager


@dataclass(slots=True, eq=False)
class Flight:
    """One draw on its way. `landed` counts the stream's groups in the order in which they finished, from 1;
    0 while it is at play. `place` says how often the task was drawn in its step before, and how often sampled. `born`
    is for the caller: the weight version at submission."""

    draw: TaskDraw
    place: tuple[int, int]
    play: Play
    task: asyncio.Task[Group]
    landed: int = 0
    born: int = 0

    @property
    def group(self) -> Group:
        """The group, once landed."""
        return self.task.result()


class GroupStream:
    """Plays the draws of one (stage, split). Used as an async context manager: leaving it ends what is at play."""

    def __init__(
        self,
        manager: RolloutManager,
        *,
        stage: str,
        split: str = "train",
        attempt: int = 0,
        recorded: Recorded | None = None,
        keep: Keep | None = None,
    ) -> None:
        self._manager = manager
        self._first = EpisodeKey(stage, 0, split, "", 0, (), attempt)
        self._recorded = recorded or Recorded()
        self._keep = keep
        self._tally = Tally(stage)
        self._numbers: dict[int, tuple[Counter[str], Counter[str]]] = {}
        self.flying: dict[asyncio.Task[Group], Flight] = {}
        self._landed = 0
        self._news = asyncio.Event()
        self._error: BaseException | None = None
        self._watchdog: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._watchdog = asyncio.create_task(self._manager.watch(), name="watchdog")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def submit(
        self,
        draws: Sequence[TaskDraw],
        actor: Actor,
        *,
        strategy: RolloutStrategy,
        context: ContextPolicy | None = None,
        priority: int = 0,
    ) -> list[Flight]:
        """Begin to play `draws`. Those of larger priority are admitted to places before others, those of equal priority
        in the order of submission."""
        setting = Setting(actor, strategy, context or AppendOnly(), self._recorded, self._keep, priority)
        flights = []
        for draw in draws:
            self._tally.total += draw.samples
            again, sample = place = self._place(draw)
            first = replace(self._first, step=draw.step, task_id=draw.task.id, sample=sample)
            group_id = first.group_id + (f"~{again}" if again else "")
            play = Play(self._manager, draw, setting, self._tally, first, group_id)
            task = asyncio.create_task(play.run(), name=group_id)
            flight = self.flying[task] = Flight(draw, place, play, task)
            task.add_done_callback(self._land)
            flights.append(flight)
        return flights

    async def until(self, reached: Callable[[], bool]) -> None:
        """Wait for groups to land until `reached()`. Raises what broke any episode of the stream."""
        while True:
            if self._error is not None:
                raise self._error
            if reached():
                return
            self._news.clear()
            await self._news.wait()

    def take(self, flights: Sequence[Flight]) -> list[Group]:
        """The groups of flights that have landed; they no longer count as progress to be made."""
        n = sum(flight.draw.samples for flight in flights)
        self._manager.tell(self._tally)
        self._tally.total, self._tally.done = self._tally.total - n, max(0, self._tally.done - n)
        return [flight.group for flight in flights]

    async def drop(self, flights: Sequence[Flight]) -> None:
        """End these flights; nothing of them stays in flight, in the record either."""
        for flight in flights:
            flight.play.unwanted = True
            flight.task.cancel()
        await asyncio.gather(*(flight.task for flight in flights), return_exceptions=True)
        self._tally.total = max(self._tally.done, self._tally.total - sum(f.draw.samples for f in flights))

    async def close(self, *, unwanted: bool = False) -> None:
        """End what is at play and release what it holds. Its turns stay in the record for a resumed run, unless
        they are `unwanted`. Idempotent."""
        for flight in self.flying.values():
            flight.play.unwanted = unwanted
        left: list[asyncio.Task[Any]] = [*self.flying, *([self._watchdog] if self._watchdog else [])]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    def forget(self, step: int) -> None:
        """No task will be drawn for `step` or earlier any more."""
        self._numbers = {other: numbers for other, numbers in self._numbers.items() if other > step}

    def numbers(self) -> dict[str, list[dict[str, int]]]:
        """How often tasks were drawn and sampled per step, as JSON values for a checkpoint."""
        return {str(step): [dict(drawn), dict(samples)] for step, (drawn, samples) in self._numbers.items()}

    def restore(self, numbers: Mapping[str, Sequence[Mapping[str, int]]]) -> None:
        """Undo `numbers`."""
        self._numbers = {int(step): (Counter(drawn), Counter(samples)) for step, (drawn, samples) in numbers.items()}

    def _place(self, draw: TaskDraw) -> tuple[int, int]:
        """A task drawn again in the same step (a small task set, a refill) counts its samples on and gets a group
        of its own. A draw that has its place already (it was drawn before a restart) keeps it."""
        if draw.place is not None:
            return draw.place
        drawn, samples = self._numbers.setdefault(draw.step, (Counter(), Counter()))
        place = (drawn[draw.task.id], samples[draw.task.id])
        drawn[draw.task.id] += 1
        samples[draw.task.id] += draw.samples
        return place

    def _land(self, task: asyncio.Task[Group]) -> None:
        flight = self.flying.pop(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._error = self._error or _first(error)
        elif not task.cancelled():
            self._landed += 1
            flight.landed = self._landed
        self._news.set()


def _first(error: BaseException) -> BaseException:
    """The first error of a group of tasks: its siblings were cancelled because of it."""
    return _first(error.exceptions[0]) if isinstance(error, BaseExceptionGroup) else error
