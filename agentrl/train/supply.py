"""The supply of groups: what is drawn when, and which groups an update trains on.

Batch b is drawn with the sampler's step b, in order, and goes to play as soon as b <= updates done +
`max_staleness` (the admission rule of AReaL, arXiv 2505.24298, section 5.1). So with 0 rollouts and
updates take turns, and with more they overlap. An update takes `prompts` groups: first those that were
submitted `max_staleness` updates ago, whose oldest tokens may not get any older, then others in the order
in which they finished. Those that the updates up to their last one would have no place for count as the first, too:
the batches that are drawn at the start are all of one age, and all have to be trained before they are too old,
however fast later ones are. So no trained token is older than `max_staleness` updates, however long its
episode takes: either the update waits for it (`overdue: wait`), or the group is dropped, counted, and
another task is drawn in its place (`overdue: drop`, which favours short episodes).

Where places or the engine are full, the batch of an earlier update goes first, for that update waits for it: older
draws are played before newer ones. Evaluation, which every update waits for, goes before all of them.

In total a stage submits as many groups as it trains (and one more for each that was dropped or asked for
by an editor), so nothing is at play any more after its last update.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from agentrl.algo.sampler import TaskDraw, TaskStream
from agentrl.algo.staleness import versions_of
from agentrl.algo.state import StateStore
from agentrl.rollout.actors import Actor
from agentrl.rollout.play import Recorded
from agentrl.rollout.stream import Flight, GroupStream
from agentrl.train.stages import RLStage
from agentrl.trajectory import Group, Trajectory, Turn


class Supply:
    """Groups for the updates of one stage, from update `start` on.

    `version()` is the number of the present weights, `actor(stage)` the policy as a stage wants it sampled.
    """

    def __init__(
        self,
        stage: RLStage,
        stream: GroupStream,
        tasks: TaskStream,
        store: StateStore,
        *,
        version: Callable[[], int],
        actor: Callable[[RLStage], Actor],
        start: int = 0,
    ) -> None:
        self._stage = stage
        self._stream = stream
        self._tasks = tasks
        self._store = store
        self._version = version
        self._actor = actor
        self._next = start
        self._indices: Counter[int] = Counter()
        self._open: list[Flight] = []
        self.dropped: list[str] = []
        self.waited = 0.0

    async def take(self, step: int) -> list[Group]:
        """The groups that update number `step` trains on, in the order in which they were drawn. `waited` and
        `dropped` then say what it cost: seconds, and the ids of groups."""
        began = time.perf_counter()
        stage, _ = self._stage.at(step)
        self._admit(step)
        need = min(stage.prompts, len(self._open))
        urgent = self._urgent(step, stage.max_staleness)
        wait_for_urgent = stage.overdue == "wait"
        await self._stream.until(
            lambda: (
                _landed(self._open) >= need
                and not (wait_for_urgent and any(_landed(flights) < min(n, need) for flights, n in urgent))
            )
        )
        chosen: list[Flight] = []
        for flights, n in [*urgent, (self._open, need)]:
            left = sorted((f for f in flights if f.landed and f not in chosen), key=lambda flight: flight.landed)
            have = sum(flight in chosen for flight in flights)
            chosen += left[: max(min(n, need) - have, 0)][: need - len(chosen)]
        oldest = self._version() - stage.max_staleness
        late = [] if wait_for_urgent else [f for f in self._open if f.born <= oldest and f not in chosen]
        self.dropped = [flight.play.group_id for flight in late]
        if late:
            await self._stream.drop(late)
            self._open = [flight for flight in self._open if flight not in late]
            self._draw(step, len(late))
        self.waited = time.perf_counter() - began
        return self._hand_out(chosen)

    def _urgent(self, step: int, bound: int) -> list[tuple[list[Flight], int]]:
        """Of which flights how many must be trained now: those that may get no older, and of those that have some
        updates left as many as these have no place for. The most urgent first."""
        found, places = [], 0
        for ahead in range(bound + 1):
            if ahead:
                places += self._stage.at(min(step + ahead, self._stage.steps - 1))[0].prompts
            flights = [flight for flight in self._open if flight.born <= self._version() - bound + ahead]
            if len(flights) > places:
                found.append((flights, len(flights) - places))
        return found

    async def refill(self, step: int, n: int) -> list[Group]:
        """`n` more groups for update `step`, drawn and played now."""
        flights = self._draw(step, n)
        await self._stream.until(lambda: all(flight.landed for flight in flights))
        return self._hand_out(flights)

    def trained(self, step: int) -> None:
        """Update `step` is done: nothing will be drawn for it any more."""
        self._stream.forget(step)
        self._indices = Counter({other: n for other, n in self._indices.items() if other > step})

    def state(self) -> dict[str, Any]:
        """What was drawn and not trained yet, as JSON values for a checkpoint."""
        return {
            "next": self._next,
            "indices": {str(step): n for step, n in self._indices.items()},
            "numbers": self._stream.numbers(),
            "draws": [
                {
                    "task": flight.draw.task.id,
                    "samples": flight.draw.samples,
                    "step": flight.draw.step,
                    "index": flight.draw.index,
                    "options": flight.draw.options,
                    "place": list(flight.place),
                    "born": flight.born,
                }
                for flight in self._open
            ],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`: what was at play goes to play again. Raises `UsageError` for a task that is gone."""
        self._next = state["next"]
        self._indices = Counter({int(step): n for step, n in state["indices"].items()})
        self._stream.restore(state["numbers"])
        tasks = self._tasks.find({draw["task"] for draw in state["draws"]})
        for one in state["draws"]:
            again, sample = one["place"]
            draw = TaskDraw(
                tasks[one["task"]], one["samples"], one["step"], one["index"], one["options"], (again, sample)
            )
            self._submit([draw], born=one["born"])

    def _admit(self, step: int) -> None:
        while self._next <= min(step + self._stage.max_staleness, self._stage.steps - 1):
            batch, self._next = self._next, self._next + 1
            self._draw(batch, self._stage.at(batch)[0].prompts)

    def _draw(self, step: int, n: int) -> list[Flight]:
        stage, _ = self._stage.at(step)
        draws = stage.sampler.draw(step, n, stage.samples, self._tasks, self._store)
        # Who draws again in the same step gets places of its own.
        draws = [replace(d, step=step, index=self._indices[step] + i) for i, d in enumerate(draws)]
        self._indices[step] += len(draws)
        return self._submit(draws, born=self._version())

    def _submit(self, draws: Sequence[TaskDraw], *, born: int) -> list[Flight]:
        flights = []
        for draw in draws:
            stage, _ = self._stage.at(draw.step)
            (flight,) = self._stream.submit(
                [draw],
                self._actor(stage),
                strategy=stage.strategy,
                context=stage.context,
                priority=-1 - draw.step,  # evaluation, and whatever else names none, has 0
            )
            flight.born = born
            flights.append(flight)
        self._open += flights
        return flights

    def _hand_out(self, flights: Sequence[Flight]) -> list[Group]:
        chosen = sorted(flights, key=lambda flight: (flight.draw.step, flight.draw.index))
        self._open = [flight for flight in self._open if flight not in chosen]
        return self._stream.take(chosen)


def _landed(flights: Sequence[Flight]) -> int:
    return sum(flight.landed > 0 for flight in flights)


def usable(recorded: Recorded, version: int) -> Recorded:
    """What a run that goes on with weights `version` may take over of `recorded`. Later weights were lost with the
    run that was killed: what they sampled is cut off, from the first turn they had a part in, and played anew."""
    finished: dict[str, Trajectory] = {}
    inflight: dict[str, Sequence[Turn]] = {}
    for id, trajectory in recorded.finished.items():
        turns = _sampled_by(trajectory.turns, version)
        if len(turns) == len(trajectory.turns):
            finished[id] = trajectory
        elif turns:
            inflight[id] = turns
    for id, said in recorded.inflight.items():
        if turns := _sampled_by(said, version):
            inflight[id] = turns
    return Recorded(finished, inflight)


def _sampled_by(turns: Sequence[Turn], version: int) -> Sequence[Turn]:
    late = (i for i, turn in enumerate(turns) if (versions_of(turn) > version).any())
    return turns[: next(late, len(turns))]
