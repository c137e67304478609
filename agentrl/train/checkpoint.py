"""Checkpoints: everything a run needs to go on as if it had never been killed.

A checkpoint is a folder written beside its final name and renamed into place, so that it is whole or
absent. It holds the policy, the optimiser, random states, the position in the task stream, the state
store, the weight version, and the results so far.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from agentrl.errors import UsageError

_FORMAT = 1


@dataclass(slots=True)
class Progress:
    """Where a run stands, in plain JSON values. `stage` counts stages, `step` steps of that stage done."""

    stage: int = 0
    step: int = 0
    tasks_taken: int = 0
    version: int = 0
    wall_s: float = 0.0
    best: float = -1.0
    store: dict[str, dict[str, Any]] = field(default_factory=dict)
    evals: list[dict[str, Any]] = field(default_factory=list)
    totals: dict[str, float] = field(default_factory=dict)
    ahead: dict[str, Any] = field(default_factory=dict)  # drawn and not trained yet: `Supply.state`

    def add_throughput(self, values: Mapping[str, float]) -> None:
        """Add one RL step's tokens, episodes and seconds to the totals."""
        for total, name in (
            ("gen_tokens", "tokens"),
            ("gen_s", "time/rollout"),
            ("train_tokens", "train_tokens"),
            ("train_s", "time/update"),
            ("episodes", "episodes"),
        ):
            self.totals[total] = self.totals.get(total, 0.0) + values.get(name, 0.0)

    def rate(self, what: str, seconds: str) -> float | None:
        """A total per second, or None where nothing was timed."""
        return self.totals[what] / self.totals[seconds] if self.totals.get(seconds) else None


def save(folder: Path, name: str, progress: Progress, tensors: Mapping[str, Any], *, keep: int) -> Path:
    """Write checkpoint `name` under `folder`, then remove all but the newest `keep` (never "best")."""
    final, temporary = folder / name, folder / f".{name}.tmp"
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    with (temporary / "state.pt").open("wb") as file:
        torch.save(dict(tensors), file)
        file.flush()
        os.fsync(file.fileno())
    with (temporary / "progress.json").open("w") as text:
        json.dump({"format": _FORMAT, **asdict(progress)}, text, sort_keys=True)
        text.flush()
        os.fsync(text.fileno())
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    _sync(folder)
    for old in ordered(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def ordered(folder: Path) -> list[Path]:
    """The numbered checkpoints of a run, oldest first."""
    found = [path for path in folder.glob("[0-9]*-*-*") if (path / "progress.json").is_file()]
    return sorted(found, key=lambda path: (int(path.name.split("-")[0]), int(path.name.rsplit("-", 1)[1])))


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None."""
    found = ordered(folder)
    return found[-1] if found else None


def chosen(run: Path | None, name: str | None) -> Path | None:
    """The checkpoint of a run that `name` means: "best" (the default), "last", or a folder; without a run a folder, or
    none. Raises `UsageError` where the run has none such."""
    if run is None:
        return None if name is None else Path(name)
    folder = run / "checkpoints"
    if name is None or name == "best":
        if (folder / "best").is_dir():
            return folder / "best"
        if name == "best":
            raise UsageError(f"{run} has no best checkpoint yet (none was evaluated); use --checkpoint last")
    if name in (None, "last"):
        found = latest(folder)
        if found is None:
            raise UsageError(f"{run} has no checkpoint yet; train longer, or lower checkpoint.every")
        return found
    return Path(name) if Path(name).is_dir() else folder / str(name)


def load(path: Path) -> tuple[Progress, dict[str, Any]]:
    """Read a checkpoint. Raises `UsageError` where it is missing, damaged, or of another format."""
    try:
        progress = progress_of(path)
        tensors = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UsageError(
            f"{path} is not a checkpoint (no {Path(error.filename).name}); name a folder under checkpoints/"
        ) from error
    except UsageError:
        raise
    except (OSError, ValueError, RuntimeError, EOFError, KeyError) as error:
        raise UsageError(f"checkpoint {path} cannot be read ({error}); use an older one under checkpoints/") from error
    except Exception as error:  # torch's unpickler raises its own kinds for damaged files
        raise UsageError(f"checkpoint {path} is damaged ({type(error).__name__}); use an older one") from error
    return progress, tensors


def progress_of(path: Path) -> Progress:
    """How far a checkpoint is, without its tensors. Raises `UsageError` for another format, `OSError`, `ValueError`."""
    values = json.loads((path / "progress.json").read_text())
    if values.pop("format", None) != _FORMAT:
        raise UsageError(f"checkpoint {path} is of another format version; it was written by another release")
    return Progress(**values)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
