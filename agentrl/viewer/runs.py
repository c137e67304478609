"""Run folders as they are: whole, at work, half-written, damaged, of another version, or no runs at all.

Nothing here raises for a bad folder. What can be read is shown; what cannot is a sentence in `problems`.
"""

from __future__ import annotations

import json
import math
import os
import re
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any, Literal

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from agentrl.config import SCHEMA_VERSION
from agentrl.errors import AgentRLError, UsageError
from agentrl.metrics import NAME as METRICS
from agentrl.store import StoreReader, index
from agentrl.store.run import read_info
from agentrl.store.segments import held
from agentrl.viewer.readers import Open, Slot
from agentrl.viewer.rescored import Rescorings
from agentrl.viewer.tail import parsed

Status = Literal["running", "completed", "failed", "cancelled", "unknown"]
_SIGNS = ("run.json", "index.sqlite", METRICS, "seg", "summary.json")
_DEEP = 6  # folders below the one that was named
MANY = 2000  # runs that are listed
_PAUSE = 1.0  # seconds between two searches for runs, at least


def find(folders: Sequence[Path]) -> Iterator[Path]:
    """The run folders at and under `folders`, each once, by name; a folder that is named but is none comes, too."""
    seen: set[Path] = set()
    for folder in folders:
        found = list(_under(folder, _DEEP))
        for path in found or [folder]:
            where = path.resolve()
            if where not in seen:
                seen.add(where)
                yield path


def _under(folder: Path, deep: int) -> Iterator[Path]:
    try:
        names = {entry.name: entry for entry in os.scandir(folder)}
    except OSError:
        return
    if sum(name in names for name in _SIGNS) >= 2 or "run.json" in names or "index.sqlite" in names:
        yield folder
        return
    if deep:
        for name in sorted(names):
            if names[name].is_dir(follow_symlinks=False) and not name.startswith("."):
                yield from _under(folder / name, deep - 1)


class Run:
    """One run folder. Safe to use from several threads."""

    def __init__(self, number: int, folder: Path, open: Open | None = None) -> None:
        self.key, self.folder = f"r{number}", folder
        self._looking = threading.Lock()
        self._slot = Slot(folder, open or Open())
        self._why: str | None = None
        self._lasting = True  # whether what was seen in the last look stays so until a file changes
        self._configs: tuple[Any, str, Mapping[str, Any]] | None = None
        self._facts: tuple[Any, dict[str, Any]] | None = None
        self.rescored = Rescorings(folder)

    @property
    def read_only(self) -> bool:
        """Whether nothing can be written into the folder."""
        return not os.access(self.folder, os.W_OK)

    # -- what is in the folder ----------------------------------------------------------------------

    @property
    def reader(self) -> StoreReader | None:
        """The store's reader, None where there is nothing to read; `trouble` then says why."""
        try:
            found, self._why = self._slot.get(), None
        except (AgentRLError, OSError) as error:
            self._why = self._unopened(error)
            return None
        return found

    @property
    def generation(self) -> int:
        """Counts the stores that `reader` was of: the folder may be made again, and the index rebuilt."""
        return self._slot.generation

    def _unopened(self, error: Exception) -> str:
        if self._begun() and not (self.folder / index.NAME).exists():
            return (
                f"{index.NAME} is missing, so that no trajectory can be listed; the segments are there: "
                f"run agentrl index {self.folder} --rebuild"
            )
        return one_line(error)

    def _begun(self) -> bool:
        """Whether anything was ever stored."""
        try:
            return any((self.folder / "seg").glob("*.bin")) or (self.folder / index.NAME).exists()
        except OSError:  # the system gives no more files
            return True

    @property
    def trouble(self) -> str | None:
        """Why there is no reader."""
        return None if self.reader is not None else self._why

    def status(self, summary: Mapping[str, Any] | None) -> Status:
        """What became of the run, or that it is at work now."""
        if held(self.folder / "run.lock"):
            return "running"
        found = (summary or {}).get("status")
        return found if found in ("completed", "failed", "cancelled") else "unknown"

    def summary(self) -> dict[str, Any] | None:
        return self._json("summary.json")

    def config(self) -> tuple[str, Mapping[str, Any]]:
        """The resolved configuration as text and as values (empty where it cannot be read)."""
        path = self.folder / "config.resolved.yaml"
        try:
            stamp = _stamp(path)
            if self._configs is None or self._configs[0] != stamp:
                text = path.read_text(encoding="utf-8", errors="replace")
                self._configs = stamp, text, _values(text)
        except OSError:
            return "", {}
        return self._configs[1], self._configs[2]

    def stages(self) -> list[str]:
        """The labels of the run's stages, in order: as its configuration names them, else as its records do."""
        _, config = self.config()
        kinds = [str(stage.get("type")) for stage in config.get("stages", ()) if isinstance(stage, Mapping)]
        if kinds:
            return [kind if (n := kinds[: i + 1].count(kind)) == 1 else f"{kind}{n}" for i, kind in enumerate(kinds)]
        return []

    # -- what the list of runs shows ------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        """The run's line in the list. Remembered until one of its files changes."""
        with self._looking:  # who comes meanwhile waits for the same answer
            stamp = tuple(_stamp(self.folder / name) for name in (*_SIGNS, "config.resolved.yaml", "index.sqlite-wal"))
            if self._facts is None or self._facts[0] != stamp:
                summary = self.summary()
                self._lasting = True
                facts = self._look(summary)
                self._facts = (stamp, {**facts, "_summary": summary}) if self._lasting else None
                return facts
            known = self._facts[1]
        status = self.status(known["_summary"])
        return {**{name: value for name, value in known.items() if name[0] != "_"}, "status": status}

    def _look(self, summary: dict[str, Any] | None) -> dict[str, Any]:
        reader: StoreReader | None = None
        unopened = ""
        with ExitStack() as stack:
            try:
                reader = stack.enter_context(self._slot.glance())
            except (AgentRLError, OSError) as error:
                self._said(error)
                unopened = self._unopened(error)
            return self._seen(summary, reader, unopened)

    def _seen(self, summary: dict[str, Any] | None, reader: StoreReader | None, unopened: str) -> dict[str, Any]:
        problems: list[str] = []
        _, config = self.config()
        info: dict[str, Any] = {}
        if not self.folder.is_dir():
            problems.append(f"{self.folder} is not a folder")
        elif not any((self.folder / name).exists() for name in _SIGNS):
            problems.append(f"{self.folder} holds no run: none of {', '.join(_SIGNS)} is there")
        else:
            info = self._json("run.json") or {}
            version = info.get("config_version")
            if isinstance(version, int) and version > SCHEMA_VERSION:
                problems.append(
                    f"the run was made by a newer version of agentrl (configuration schema {version}, this one knows "
                    f"{SCHEMA_VERSION}): what is new in it is not shown; update agentrl to see it all"
                )
            else:
                try:
                    info = {"created": read_info(self.folder).created}
                except (UsageError, OSError) as error:
                    problems.append(self._said(error))
            if unopened and self._begun():
                problems.append(unopened)
            if not config:
                problems.append("config.resolved.yaml is missing or cannot be read: components have no names here")
            if (self.folder / "summary.json").exists() and summary is None:
                problems.append("summary.json cannot be read")
            if reader is not None and reader.format != index.FORMAT:
                search = "no full-text search, and " if reader.format < 2 else ""
                problems.append(
                    f"the index has format {reader.format}: {search}lists are slower; "
                    f"run: agentrl index {self.folder} --rebuild"
                )
            problems += reader.problems if reader is not None else ()
            problems += self._lost(reader, summary)
        lines: list[dict[str, Any]] = []
        damaged = 0
        try:
            lines, damaged = parsed(self._texts(0))
        except OSError as error:
            problems.append(self._said(error))
        if damaged:
            problems.append(f"{damaged} lines of {METRICS} cannot be read")
        episodes = 0
        if reader is not None:
            try:
                episodes = reader.count()
            except AgentRLError as error:
                problems.append(self._said(error))
        model = config.get("model")
        env = config.get("env")
        last: dict[str, int] = {}
        for line in lines:
            stage = str(line.get("stage"))
            if not stage.endswith("-eval") and isinstance(line.get("step"), int):
                last[stage] = max(last.get(stage, 0), line["step"])
        return {
            "run": self.key,
            "name": str(config.get("name") or self.folder.name),
            "folder": str(self.folder),
            "status": self.status(summary),
            "started": _seconds(info.get("created")),
            "steps": sum(last.values()),
            "stages": self.stages() or sorted(last),
            "episodes": episodes,
            "env": _name(env),
            "model": _name(model),
            "best": best(summary, lines),
            "problems": problems,
            "read_only": self.read_only,
            "curves": curves(lines),
        }

    def _said(self, error: Exception) -> str:
        """An error as one sentence. One of the system's (no free file, no right) may pass without any file changing."""
        if any(isinstance(each, OSError | sqlite3.OperationalError) for each in (error, error.__cause__)):
            self._lasting = False
        return one_line(error)

    def _lost(self, reader: StoreReader | None, summary: dict[str, Any] | None) -> list[str]:
        """What a crash, a copy or a full disk left out."""
        out = []
        try:
            lacking = reader.lacking() if reader is not None else []
        except AgentRLError:
            lacking = []
        if lacking:
            names = ", ".join(lacking[:3]) + (" and others" if len(lacking) > 3 else "")
            out.append(f"missing or cut short in seg/: {names}. Trajectories in them are listed, but cannot be opened")
        log = self.folder / f"{index.NAME}-wal"
        if self.read_only and _stamp(log)[1]:
            out.append(
                f"the latest rows stand in {log.name}, which cannot be read in a write-protected folder: copy the "
                "folder to where you may write, to see them"
            )
        begun = (self.folder / METRICS).exists() and not (self.folder / "summary.json").exists()
        if begun and summary is None and self.status(None) == "unknown":
            out.append("the run was cut off: it wrote no summary.json. agentrl train --resume goes on with it")
        return out

    def detail(self) -> dict[str, Any]:
        """All that is known of the run as a whole."""
        text, _ = self.config()
        summary = self.summary()
        info = self._json("run.json") or {}
        return {
            **self.facts(),
            "config": text,
            "command": info.get("command") or [],
            "versions": info.get("versions") or {},
            "machine": info.get("machine") or {},
            "git_commit": info.get("git_commit"),
            "resumed": info.get("resumed") or [],
            "eval": (summary or {}).get("eval") or [],
            "summary": summary,
            "rescored": self.rescored.heads(),
        }

    def metrics(self, since: int, until: int | None = None) -> tuple[list[dict[str, Any]], int]:
        """The lines of metrics.jsonl from number `since` on (to before `until`), and how many could not be read. A
        torn end waits.

        The number of the next line is `since` plus both.
        """
        try:
            return parsed(self._texts(since)[: None if until is None else max(0, until - since)])
        except OSError:
            return [], 0

    def _texts(self, since: int) -> list[bytes]:
        try:
            return (self.folder / METRICS).read_bytes().split(b"\n")[since:-1]
        except (FileNotFoundError, NotADirectoryError):
            return []

    def close(self) -> None:
        self._slot.drop()

    def _json(self, name: str) -> dict[str, Any] | None:
        try:
            found = json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) else None


class Runs:
    """The runs under the folders that were named. Numbers stay what they are; new runs get the next."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = tuple(folders)
        self._lock = threading.Lock()
        self._walking = threading.Lock()
        self._rested = -math.inf  # when the folders may be searched again
        self._seen: tuple[Any, ...] = ()
        self._open = Open()
        self._runs: dict[Path, Run] = {}
        self._keys: dict[str, Run] = {}
        self._forks: set[Path] = set()
        self.left_out = 0

    def all(self) -> list[Run]:
        """Every run that is there now, or was, but for `left_out` of them. Looks into the folders, if not just done."""
        with self._walking:  # a big tree takes seconds: whoever names a run that is known does not wait for it
            began = time.monotonic()
            now = tuple(_stamp(folder) for folder in self._folders)
            if began >= self._rested or now != self._seen:  # a folder that got a new run says so itself
                self._seen = now
                left_out = 0
                for path in find(self._folders):
                    with self._lock:
                        if path in self._runs or len(self._runs) < MANY:
                            self._add(path)
                        else:
                            left_out += 1
                self.left_out = left_out
                self._rested = time.monotonic() + max(_PAUSE, time.monotonic() - began)
        with self._lock:
            return list(self._runs.values())

    def get(self, key: str) -> Run | None:
        """The run of that number."""
        with self._lock:
            known = self._keys.get(key)
        if known is not None or not re.fullmatch("r[0-9]{1,9}", key):
            return known
        self.all()
        with self._lock:
            return self._keys.get(key)

    def at(self, folder: Path) -> Run | None:
        """The run in that very folder, known from now on; None where there is none."""
        if not (folder / "run.json").is_file() and not (folder / index.NAME).is_file():
            return None
        with self._lock:
            if folder not in self._folders:
                self._folders = (*self._folders, folder)
            return self._add(folder)

    def _add(self, folder: Path) -> Run:
        run = self._runs.get(folder)
        if run is None:
            run = self._runs[folder] = Run(len(self._runs), folder, self._open)
            self._keys[run.key] = run
        return run

    def forks(self, run: Run) -> list[tuple[Run, str]]:
        """The runs beside `run` that `fork_of` named, sources first, each with the number of its source ("": `run`)."""
        mark = re.compile(r"-fork-\d+$")
        with self._lock:
            beside = {r.folder.name: r for r in self._runs.values() if r.folder.parent == run.folder.parent}
        sources = {run.folder.name: ""}
        out = []
        for name in sorted(beside, key=lambda name: (name.count("-fork-"), len(name), name)):
            if mark.search(name) and (source := sources.get(mark.sub("", name))) is not None:
                sources[name] = beside[name].key
                out.append((beside[name], source))
        return out

    def fork_of(self, folder: Path) -> Path:
        """A new folder beside a run, for a branch of it."""
        with self._lock:
            names = (folder.with_name(f"{folder.name}-fork-{n}") for n in count(1))
            out = next(path for path in names if path not in self._forks and not path.exists())
            self._forks.add(out)
            return out

    def close(self) -> None:
        for run in self._runs.values():
            run.close()


def best(summary: Mapping[str, Any] | None, lines: Sequence[Mapping[str, Any]]) -> float | None:
    """The best success of an evaluation, else of a training step."""
    records = (summary or {}).get("eval") or []
    found = [record.get("success") for record in records if isinstance(record, Mapping)]
    found = found or [
        value
        for line in lines
        for name, value in line.items()
        if name == "success" or (name.startswith("eval/") and name.endswith("/success"))
    ]
    numbers = [float(v) for v in found if isinstance(v, int | float) and math.isfinite(v)]
    return max(numbers, default=None)


_CURVES = ("success", "reward")
_POINTS = 60  # of a curve in the list


def curves(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[float | None]]:
    """The last training stage's success and reward over its steps, thinned out: small pictures for a list."""
    stages = [str(line.get("stage")) for line in lines if any(name in line for name in _CURVES)]
    last = next((stage for stage in reversed(stages) if not stage.endswith("-eval")), None)
    out: dict[str, list[float | None]] = {}
    for name in _CURVES:
        at = {
            line["step"]: line[name]
            for line in lines
            if line.get("stage") == last
            and isinstance(line.get("step"), int)
            and isinstance(line.get(name), int | float)
        }
        values = [float(at[step]) for step in sorted(at)]
        keep = values[:: max(1, -(-len(values) // _POINTS))]
        if values and keep[-1] is not values[-1]:
            keep.append(values[-1])
        out[name] = [value if math.isfinite(value) else None for value in keep]
    return out


def one_line(error: Exception) -> str:
    """An error as one sentence."""
    return " ".join(str(error).split())


def _values(text: str) -> Mapping[str, Any]:
    try:
        found = YAML(typ="safe", pure=True).load(text)
    except (YAMLError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, Mapping) else {}


def _name(part: object) -> str | None:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping):
        arch = part.get("arch")
        kind = f"{arch.get('model_type')} from scratch" if isinstance(arch, Mapping) else None
        found = part.get("id") or part.get("path") or part.get("name") or kind or part.get("type")
        return None if found is None else str(found)
    return None


def _seconds(moment: object) -> float | None:
    try:
        return datetime.fromisoformat(str(moment)).timestamp()
    except ValueError:
        return None


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        found = path.stat()
    except OSError:
        return 0, 0, 0
    return found.st_mtime_ns, found.st_size, found.st_ino
