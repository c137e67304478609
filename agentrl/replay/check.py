"""The check: every chosen episode is acted out again, and compared with its record turn by turn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from agentrl.errors import EnvError
from agentrl.replay.acting import Acting, CannotReplay, host_of
from agentrl.replay.difference import Difference, differing_score
from agentrl.replay.guard import scored_from_record
from agentrl.replay.opening import differing_opening, first_words
from agentrl.replay.recorded import Recorded
from agentrl.rollout.manager import Watcher
from agentrl.store import Entry
from agentrl.trajectory import Trajectory

Status = Literal["same", "partly", "diverged", "not"]


@dataclass(frozen=True, slots=True)
class Checked:
    """One episode's replay. `partly`: the same as far as its record goes; `why` says what is left, or what stood in
    the way where it was `not` replayed. `turns` and `calls` are those that agreed."""

    id: str
    attempt: int
    stage: str
    step: int
    split: str
    status: Status
    turns: int = 0
    calls: int = 0
    difference: Difference | None = None
    why: str = ""

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        names = ("id", "attempt", "stage", "step", "split", "status", "turns", "calls", "why")
        shown = {name: getattr(self, name) for name in names}
        return shown | {"difference": self.difference.as_json() if self.difference is not None else None}


@dataclass(frozen=True, slots=True)
class Report:
    """What a check found, in the order of the record. `changed`: spec hashes of the record that the environment
    has no more; `env` is its present one."""

    episodes: Sequence[Checked]
    env: str
    changed: Sequence[str] = ()
    tools: str = "live"

    @property
    def diverged(self) -> list[Checked]:
        """The episodes that went another way."""
        return [each for each in self.episodes if each.status == "diverged"]

    @property
    def first(self) -> Checked | None:
        """The first of them."""
        return next(iter(self.diverged), None)

    @property
    def counts(self) -> dict[str, int]:
        """Episodes by status; and turns and calls that agreed."""
        by = Counter(each.status for each in self.episodes)
        sums = {name: sum(getattr(each, name) for each in self.episodes) for name in ("turns", "calls")}
        return {"episodes": len(self.episodes), **sums, **{name: by[name] for name in _STATUSES}}

    @property
    def reasons(self) -> list[tuple[str, int]]:
        """Why episodes were replayed in part or not at all, most frequent first."""
        return Counter(each.why for each in self.episodes if each.why).most_common()


_STATUSES: tuple[Status, ...] = ("same", "partly", "diverged", "not")


@dataclass(slots=True)
class Check:
    """Checks episodes of one record. With tools "recorded" nothing is acted out: only the score is asked again."""

    source: Recorded
    tools: Literal["live", "recorded"] = "live"
    watcher: Watcher | None = None

    async def run(self) -> Report:
        """The report on all chosen episodes."""
        source = self.source
        found = await source.each(self.one, "replay", self.watcher, source.entries)
        return Report(found, source.env.spec_hash, source.changed, self.tools)

    async def one(self, entry: Entry) -> Checked:
        """One episode's replay, tried again where infrastructure fails."""
        try:
            record = self.source.load(entry)
            if self.tools == "recorded":
                return await self.source.patiently(lambda: self._judged(entry, record))
            return await self.source.patiently(lambda: self._acted(entry, record))
        except CannotReplay as error:
            return _checked(entry, "not", why=str(error))

    async def _acted(self, entry: Entry, record: Trajectory) -> Checked:
        source = self.source
        task = source.task(entry)
        host = host_of(source.env, task, entry.id, source.config.seed, source.config.rollout.deadlines)
        words = partial(first_words, source.reader, record)
        acting = Acting(record, host, lambda first: differing_opening(record, task, first, words))
        try:
            different = await acting.play()
            if different is None and acting.whole and record.outcome.kind != "failed":
                try:
                    different = differing_score(record, *await acting.score(task))
                except EnvError as error:
                    different = Difference("score", _verdict(record), str(error))
        finally:
            await host.close()
        if different is not None and acting.timed_out:  # what the lost call did to the state is not known
            acting.left.append(f"{different.place} differs after that")
            different = None
        status: Status = "diverged" if different is not None else "partly" if acting.left else "same"
        return _checked(entry, status, acting.turns, acting.calls, different, "; ".join(acting.left))

    async def _judged(self, entry: Entry, record: Trajectory) -> Checked:
        if record.outcome.kind == "failed":
            return _checked(entry, "partly", why=f"{record.outcome} has no score to compare")
        try:
            parts, reward, success, touched = await scored_from_record(self.source, entry, record)
        except EnvError as error:
            return _checked(entry, "diverged", difference=Difference("score", _verdict(record), str(error)))
        if touched:
            raise CannotReplay(f"score reads self.{touched[0]}, which only a live episode has")
        different = differing_score(record, parts, reward, success)
        return _checked(entry, "same" if different is None else "diverged", difference=different)


def _verdict(record: Trajectory) -> dict[str, Any]:
    return {**record.score, "reward": record.reward, "success": record.success}


def _checked(
    entry: Entry,
    status: Status,
    turns: int = 0,
    calls: int = 0,
    difference: Difference | None = None,
    why: str = "",
) -> Checked:
    place = (entry.id, entry.attempt, entry.stage, entry.step, entry.split)
    return Checked(*place, status, turns, calls, difference, why)
