"""New scores for old episodes: from the record where that is all the score reads, else by acting them out again.

Nothing is overwritten: the verdicts go to a file of their own, RUN/rescored/<time>.jsonl.
"""

from __future__ import annotations

import json
import secrets
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from agentrl.errors import EnvError, UsageError
from agentrl.replay.acting import Acting, CannotReplay, host_of
from agentrl.replay.guard import scored_from_record
from agentrl.replay.recorded import Recorded
from agentrl.rollout.manager import Watcher
from agentrl.store import Entry
from agentrl.store.run import write_atomic
from agentrl.trajectory import Trajectory

FOLDER = "rescored"
_COMPARED = 3  # episodes scored from the record that are acted out besides
Tools = Literal["auto", "recorded", "live"]
How = Literal["record", "acted", "kept", "not"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Named parts, the episode's reward (turn rewards included; None = missing), and success."""

    parts: Mapping[str, float | None]
    reward: float | None
    success: bool | None


@dataclass(frozen=True, slots=True)
class Rescored:
    """One episode's old and new verdict. `how`: from the `record`; `acted` out again; `kept`, for an episode that
    has no score (it failed); or `not` at all, and `why`."""

    id: str
    attempt: int
    stage: str
    step: int
    split: str
    how: How
    old: Verdict
    new: Verdict | None = None
    why: str = ""

    @property
    def changed(self) -> bool:
        """Whether the new verdict is another."""
        return self.new is not None and self.new != self.old


@dataclass(frozen=True, slots=True)
class Rescoring:
    """All of them. `because` says why episodes were acted out; `compared` how many of those that were scored from the
    record were acted out besides, and came to the same; `file` holds the verdicts, where they could be kept."""

    episodes: Sequence[Rescored]
    name: str
    env: str
    changed: Sequence[str] = ()
    because: Sequence[tuple[str, int]] = ()
    compared: int = 0
    file: Path | None = None

    @property
    def how(self) -> dict[str, int]:
        """Episodes by how they were scored."""
        return dict(Counter(each.how for each in self.episodes))


@dataclass(slots=True)
class Rescore:
    """Scores episodes of one record again.

    `tools` "recorded" calls no tool and replays no message: what a score reads beyond the record cannot be had
    then. "live" acts every episode out. "auto" acts out those whose score reads live state, and a few others to
    compare; where such a one comes out otherwise than from the record, all of them.
    """

    source: Recorded
    tools: Tools = "auto"
    watcher: Watcher | None = None
    _because: Counter[str] = field(default_factory=Counter)
    _compared: int = 0
    _distrust: str = ""

    async def run(self) -> Rescoring:
        """The verdicts on all chosen episodes, kept beside the record."""
        source = self.source
        entries = list(source.entries)
        if self.tools == "auto":
            await self._compare(entries)
        found = await source.each(self.one, "rescore", self.watcher, entries)
        env = source.env
        name = type(env).__name__
        because = self._because.most_common()
        return Rescoring(found, name, env.spec_hash, source.changed, because, self._compared)

    async def one(self, entry: Entry) -> Rescored:
        """One episode's new verdict."""
        place = (entry.id, entry.attempt, entry.stage, entry.step, entry.split)
        try:
            record = self.source.load(entry)
        except CannotReplay as error:
            return Rescored(*place, "not", Verdict({}, entry.reward, entry.success), why=str(error))
        old = Verdict(dict(record.score), record.reward, record.success)
        if record.outcome.kind == "failed":
            return Rescored(*place, "kept", old, old, str(record.outcome))
        try:
            how, new, why = await self._scored(entry, record)
        except (CannotReplay, EnvError) as error:
            return Rescored(*place, "not", old, why=str(error))
        if how == "acted" and why:
            self._because[why] += 1
        return Rescored(*place, how, old, new, why)

    async def _scored(self, entry: Entry, record: Trajectory) -> tuple[How, Verdict, str]:
        why = "asked for" if self.tools == "live" else self._distrust
        if not why:
            new, why = await self._read(entry, record)
            if not why:
                return "record", new, ""
            if self.tools == "recorded":
                raise CannotReplay(f"{why}, which recorded tools do not bring about; leave out --tools recorded")
        return "acted", await self.source.patiently(lambda: self._acted(entry, record)), why

    async def _read(self, entry: Entry, record: Trajectory) -> tuple[Verdict, str]:
        """The verdict of the record alone, and why it is void ("" where it holds)."""
        found = await self.source.patiently(lambda: scored_from_record(self.source, entry, record))
        parts, reward, success, touched = found
        return Verdict(parts, reward, success), f"score reads self.{touched[0]}" if touched else ""

    async def _acted(self, entry: Entry, record: Trajectory) -> Verdict:
        source = self.source
        task = source.task(entry)
        host = host_of(source.env, task, entry.id, source.config.seed, source.config.rollout.deadlines)
        acting = Acting(record, host)
        try:
            different = await acting.play(rewards=False)
            if different is not None:
                raise CannotReplay(f"it goes another way now: {different.what} at {different.place}")
            if not acting.whole:
                raise CannotReplay("; ".join(acting.left))
            return Verdict(*await acting.score(task))
        finally:
            await host.close()

    async def _compare(self, entries: Sequence[Entry]) -> None:
        """Act out a few episodes whose score reads nothing but the record: does it come to the same?"""
        for entry in entries[:: max(1, len(entries) // (4 * _COMPARED))]:
            if self._compared == _COMPARED or self._distrust:
                return
            try:
                record = self.source.load(entry)
                if record.outcome.kind == "failed":
                    continue
                read, void = await self._read(entry, record)
                if void:
                    continue
                acted = await self.source.patiently(lambda e=entry, r=record: self._acted(e, r))  # type: ignore[misc]
            except (CannotReplay, EnvError):
                continue  # said when its own turn comes
            if acted != read:
                self._distrust = f"acted out, {entry.id} has another score than from its record"
            self._compared += 1


def keep(folder: Path, rescoring: Rescoring) -> Path:
    """Write the verdicts into a new file of the run; its first line says when, and with what environment.

    Raises `UsageError` where the folder cannot be written.
    """
    now = datetime.now(UTC)
    path = folder / FOLDER / f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(3)}.jsonl"
    head = {"created": now.isoformat(timespec="seconds"), "env": rescoring.env, "how": rescoring.how}
    lines = [head, *(asdict(each) for each in rescoring.episodes)]
    try:
        path.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise UsageError(f"the new scores cannot be kept in {path.parent}: {error.strerror}") from error
    write_atomic(path, "".join(json.dumps(line) + "\n" for line in lines))
    return path


def rescorings(folder: Path) -> Iterator[tuple[dict[str, Any], list[Rescored]]]:
    """Every rescoring of a run, oldest first: its head, and the episodes."""
    for path in sorted((folder / FOLDER).glob("*.jsonl")):
        head, *lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        episodes = []
        for line in lines:
            old, new = Verdict(**line.pop("old")), line.pop("new")
            episodes.append(Rescored(**line, old=old, new=None if new is None else Verdict(**new)))
        yield head, episodes
