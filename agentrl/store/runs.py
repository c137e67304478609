"""The runs below a folder: what a list of them shows, read from each folder as far as it can be."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentrl.errors import AgentRLError
from agentrl.store.reader import StoreReader
from agentrl.store.run import LOCK, read_info
from agentrl.store.segments import held

_SIGNS = ("run.json", "index.sqlite", "config.resolved.yaml", "seg")


@dataclass(frozen=True, slots=True)
class Run:
    """A run folder. `status` is running, completed, failed, cancelled, or unknown; `created` "" where run.json is gone.

    `episodes` counts stored trajectories. `problems` says in a sentence each what cannot be read.
    """

    path: Path
    name: str
    created: str
    status: str
    episodes: int
    stages: tuple[str, ...]
    problems: tuple[str, ...] = ()


def runs(folder: Path | str, depth: int = 3) -> list[Run]:
    """The runs in `folder`: itself, or those up to `depth` levels below it, by path. None is an empty list."""
    return [_look(path) for path in _under(Path(folder), depth)]


def _under(folder: Path, depth: int) -> Iterator[Path]:
    if any((folder / sign).exists() for sign in _SIGNS):
        yield folder
    elif depth and folder.is_dir():
        for path in sorted(folder.iterdir()):
            if path.is_dir() and not path.is_symlink() and not path.name.startswith("."):
                yield from _under(path, depth - 1)


def _look(path: Path) -> Run:
    problems: list[str] = []
    created, episodes, stages = "", 0, ()
    try:
        created = read_info(path).created
    except (AgentRLError, OSError) as error:
        problems.append(str(error))
    try:
        with StoreReader(path) as reader:
            episodes, stages = reader.count(), tuple(reader.facets()["stages"])
            problems += reader.problems
    except AgentRLError as error:
        problems.append(str(error))
    if not (path / "config.resolved.yaml").is_file():
        problems.append(f"{path / 'config.resolved.yaml'} is missing: the run can be read, not replayed")
    status = "running" if held(path / LOCK) else str(_summary(path, problems).get("status", "unknown"))
    return Run(path, path.resolve().name, created, status, episodes, stages, tuple(problems))


def _summary(path: Path, problems: list[str]) -> Mapping[str, Any]:
    try:
        found = json.loads((path / "summary.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        problems.append(f"{path / 'summary.json'} cannot be read ({error})")
        return {}
    return found if isinstance(found, dict) else {}
