"""What is replayed: a run's record, the environment and the tasks it was made with, and which episodes of it.

Nothing here loads torch: an environment and its record are all that a replay needs.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from agentrl.config import SCHEMA_VERSION, Config
from agentrl.env import Env, tasks_of
from agentrl.errors import InfraError, UsageError
from agentrl.loader import Loaded, load
from agentrl.registry import make_env
from agentrl.replay.acting import CannotReplay
from agentrl.rollout.manager import Watcher
from agentrl.rollout.places import Places
from agentrl.store import DamagedFrame, Entry, StoreReader, TokensNotKept
from agentrl.store.run import read_info
from agentrl.task import Task
from agentrl.trajectory import Trajectory

RESOLVED = "config.resolved.yaml"
_PATIENCE = 100_000  # tasks drawn without finding one of those looked for, until they count as gone
_PAGE = 1000
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Selection:
    """Which episodes of a run. `id` is that of a trajectory or of a group; `sample` the number of an episode among
    those of its task; at most `n` of them, spread evenly over all that fit. `attempt` None: the latest."""

    id: str | None = None
    stage: str | None = None
    step: int | None = None
    split: str | None = None
    sample: int | None = None
    attempt: int | None = None
    n: int | None = None

    def of(self, reader: StoreReader) -> list[Entry]:
        """The entries, oldest first. Raises `UsageError` where there are none."""
        found = [entry for entry in self._listed(reader) if self._fits(entry)]
        if not found:
            raise UsageError(self._nothing(reader))
        if self.n is None or self.n >= len(found):
            return found
        return [found[math.floor(i * len(found) / self.n)] for i in range(self.n)]

    def _listed(self, reader: StoreReader) -> Iterable[Entry]:
        after = None
        while True:
            page = reader.trajectories(
                after=after,
                limit=_PAGE,
                step=self.step,
                stage=self.stage,
                split=self.split,
                all_attempts=self.attempt is not None,
            )
            yield from page.entries
            if page.next is None:
                return
            after = page.next

    def _fits(self, entry: Entry) -> bool:
        if self.id is not None and self.id not in (entry.id, entry.group_id):
            return False
        if self.attempt is not None and entry.attempt != self.attempt:
            return False
        return self.sample is None or entry.id.rpartition("/")[2].partition(".")[0] == str(self.sample)

    def _nothing(self, reader: StoreReader) -> str:
        names = ("stage", "step", "split", "sample", "attempt")
        asked = [f"--{name} {value}" for name in names if (value := getattr(self, name)) is not None]
        some = reader.trajectories(limit=3).entries
        if not some:
            return "the run has no finished episode yet; wait for its first step"
        what = f"no trajectory {self.id!r} is stored" if self.id is not None else "no trajectory is stored"
        fits = f" with {' '.join(asked)}" if asked else ""
        return f"{what}{fits}; ids look like {', '.join(entry.id for entry in some)}"


def located(source: str) -> tuple[Path, str | None]:
    """`RUN` or `RUN/TRAJECTORY` as a run folder and an id. Raises `UsageError` where no run lies on the way."""
    end = len(source)
    while end > 0:
        folder = Path(source[:end])
        if (folder / RESOLVED).is_file():
            return folder, source[end:].strip("/") or None
        end = source.rfind("/", 0, end)
    raise UsageError(f"{source} is not (in) a run folder: {RESOLVED} is missing; name RUN or RUN/TRAJECTORY")


@dataclass(slots=True)
class Recorded:
    """A run's record, opened to be replayed. `tasks` are those of the chosen episodes, by (split, id)."""

    folder: Path
    loaded: Loaded[Config]
    env: Env
    reader: StoreReader
    entries: Sequence[Entry] = ()
    tasks: dict[tuple[str, str], Task] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, overrides: Sequence[str] = ()) -> Recorded:
        """Raises `UsageError` for a folder without a record, or whose environment cannot be found."""
        try:
            loaded: Loaded[Config] = load([folder / RESOLVED], overrides)
        except UsageError as error:
            raise _of_its_time(folder, error) from error
        config = loaded.config
        return cls(folder, loaded, make_env(config.env.id, config.env.options), StoreReader(folder))

    @property
    def config(self) -> Config:
        """The run's configuration, with the overrides."""
        return self.loaded.config

    async def choose(self, selection: Selection) -> None:
        """Choose episodes, and find their tasks."""
        self.entries = selection.of(self.reader)
        await self.env.prepare()
        wanted: dict[str, set[str]] = {}
        for entry in self.entries:
            wanted.setdefault(_split(entry.split), set()).add(entry.task_id)
        for split, ids in wanted.items():
            self.tasks.update(await asyncio.to_thread(self._find, split, ids))

    def _find(self, split: str, ids: set[str]) -> dict[tuple[str, str], Task]:
        found: dict[tuple[str, str], Task] = {}
        missing, idle = set(ids), 0
        for task in tasks_of(self.env, split, self.config.seed):
            idle += 1
            if task.id in missing:
                missing.discard(task.id)
                found[split, task.id] = task
                idle = 0
            if not missing or idle > _PATIENCE:
                break
        return found

    def task(self, entry: Entry) -> Task:
        """The task of an episode. Raises `CannotReplay` where the environment poses it no more."""
        task = self.tasks.get((_split(entry.split), entry.task_id))
        if task is None:
            name = type(self.env).__name__
            raise CannotReplay(f"{name} has no task {entry.task_id!r} in split {_split(entry.split)!r} any more")
        return task

    def load(self, entry: Entry) -> Trajectory:
        """A stored trajectory, with its tokens where they were kept. Raises `CannotReplay` where it is damaged."""
        try:
            try:
                return self.reader.get(entry.id, entry.attempt)
            except TokensNotKept:
                return self.reader.get(entry.id, entry.attempt, tokens=False)
        except (DamagedFrame, FileNotFoundError) as error:
            raise CannotReplay(f"its record is damaged: {error}") from error

    @property
    def changed(self) -> list[str]:
        """The spec hashes that the chosen episodes were played with, other than the environment's present one."""
        return sorted({entry.env for entry in self.entries} - {self.env.spec_hash})

    async def each(
        self, work: Callable[[Entry], Awaitable[T]], what: str, watcher: Watcher | None, entries: Sequence[Entry]
    ) -> list[T]:
        """`work` on every entry, as many at once as the run had places for episodes; results in their order."""
        places, done = Places(self.config.rollout.episodes), 0

        async def one(entry: Entry) -> T:
            nonlocal done
            async with places.take():
                result = await work(entry)
            done += 1
            if watcher is not None:
                watcher.progress(what, done, len(entries), {})
            return result

        try:
            async with asyncio.TaskGroup() as tasks:
                running = [tasks.create_task(one(entry)) for entry in entries]
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None  # the others were cancelled because of it
        return [task.result() for task in running]

    async def patiently(self, work: Callable[[], Awaitable[T]]) -> T:
        """`work`, again where infrastructure failed. Raises `CannotReplay` once the run's retries are spent."""
        for left in range(self.config.rollout.retries, -1, -1):
            try:
                return await work()
            except InfraError as error:
                if not left:
                    raise CannotReplay(f"infrastructure failed: {error}") from error
        raise AssertionError("unreachable: the last try returns or raises")

    async def close(self) -> None:
        """Let go of the environment and the record."""
        self.reader.close()
        await self.env.retire()


def _of_its_time(folder: Path, error: UsageError) -> UsageError:
    """`error`, with what the run's configuration was written for where that is another schema."""
    try:
        theirs = read_info(folder).config_version
    except UsageError:
        return error
    if theirs == SCHEMA_VERSION:
        return error
    return UsageError(
        f"{folder / RESOLVED} has schema {theirs}, this version reads {SCHEMA_VERSION} ({error}); replay it with the "
        "version that run.json names, or take out what is not known here"
    )


def _split(split: str) -> str:
    """The split whose tasks an episode was played on: demonstrations are of the training tasks."""
    return "train" if split == "demo" else split
