"""The run folder: everything that a run leaves behind, held by one process at a time.

run.json  config.resolved.yaml  metrics.jsonl  index.sqlite  seg/  media/  checkpoints/  summary.json
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import secrets
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Self

from agentrl.errors import UsageError
from agentrl.store.segments import disk_failed

_PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "peft", "gymnasium", "pydantic")
LOCK = "run.lock"


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What run.json says: where, when and with what the run was made."""

    id: str
    created: str
    command: tuple[str, ...]
    config_version: int
    git_commit: str | None
    versions: Mapping[str, str]
    machine: Mapping[str, Any]
    resumed: tuple[str, ...] = field(default=())


class RunFolder:
    """An open run folder. Make one with `create` or `open`; `close` it, or use it in a `with` block."""

    def __init__(self, path: Path, info: RunInfo, lock: int) -> None:
        self.path, self.info, self._lock = path, info, lock

    @classmethod
    def create(
        cls,
        path: Path,
        config_yaml: str,
        *,
        config_version: int,
        command: Sequence[str] = (),
        resume: bool = False,
        machine: Mapping[str, Any] | None = None,
    ) -> Self:
        """Make a run folder, or go on with one where `resume`. Raises `UsageError` for a folder in use, and for one
        that is not empty without `resume`. `machine` adds to the description of the machine (its GPUs, say).

        A resumed run keeps run.json's identity, notes the time under `resumed`, and takes the new configuration.
        """
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path} is a file; name a folder for the run")
        if (path / "run.json").is_file():
            if not resume:
                raise UsageError(f"{path} holds a run already: use --resume, choose another name=…, or remove it")
            return cls._again(path, config_yaml)
        if path.is_dir() and any(entry.name != LOCK for entry in path.iterdir()):
            raise UsageError(f"{path} is not empty and holds no run; name an empty or a new folder")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"cannot make the run folder {path}: {error.strerror}; name another with run_dir=…"
            ) from error
        lock = _take(path)
        now = datetime.now(UTC)
        info = RunInfo(
            id=f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(3)}",
            created=now.isoformat(timespec="seconds"),
            command=tuple(command),
            config_version=config_version,
            git_commit=git_commit(),
            versions=versions(),
            machine={**machine_description(), **(machine or {})},
        )
        run = cls(path, info, lock)
        write_atomic(path / "run.json", json.dumps(asdict(info), indent=2) + "\n")
        write_atomic(path / "config.resolved.yaml", config_yaml)
        for name in ("seg", "media", "checkpoints"):
            (path / name).mkdir(exist_ok=True)
        return run

    @classmethod
    def open(cls, path: Path) -> Self:
        """Take hold of an existing run. Raises `UsageError` where there is none, or where it is in use."""
        info = read_info(path)
        return cls(path, info, _take(path))

    @classmethod
    def _again(cls, path: Path, config_yaml: str) -> Self:
        run = cls.open(path)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        run.info = RunInfo(**{**asdict(run.info), "resumed": (*run.info.resumed, now)})
        write_atomic(path / "config.resolved.yaml", config_yaml)
        write_atomic(path / "run.json", json.dumps(asdict(run.info), indent=2) + "\n")
        return run

    @property
    def attempt(self) -> int:
        """How often the run was resumed: 0 the first time."""
        return len(self.info.resumed)

    @property
    def config_path(self) -> Path:
        return self.path / "config.resolved.yaml"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def summary_path(self) -> Path:
        return self.path / "summary.json"

    def close(self) -> None:
        """Let others take the folder. Idempotent."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_info(path: Path) -> RunInfo:
    """run.json of a run, also of one in use. Raises `UsageError` where there is none."""
    try:
        values = json.loads((path / "run.json").read_text(encoding="utf-8"))
        values["command"], values["resumed"] = tuple(values["command"]), tuple(values["resumed"])
        return RunInfo(**values)
    except FileNotFoundError:
        raise UsageError(f"{path} holds no run (run.json is missing); name the folder of a run") from None
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(f"{path / 'run.json'} cannot be read ({error}); restore it from a copy") from error


def _take(path: Path) -> int:
    """A lock on the folder that ends with this process, however it ends. Raises `UsageError` where it is taken."""
    fd = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        owner = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        raise UsageError(f"{path} is in use by process {owner}; wait for it, stop it, or name another folder") from None
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def write_atomic(path: Path, text: str) -> None:
    """Write a text file so that a reader, or a crash, sees the old one or the new one, whole.

    Raises `RunFailed` where the disk refuses.
    """
    part = path.with_name(path.name + ".part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise disk_failed(path, error) from error


def versions() -> dict[str, str]:
    """The versions of Python, of this package and of those it stands on, without importing them."""
    found = {"python": platform.python_version()}
    for name in ("agentrl-framework", *_PACKAGES):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_commit(folder: Path | None = None) -> str | None:
    """The commit that the working directory stands on ("+" where it has changes), None outside a repository."""

    def ask(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = ask("rev-parse", "HEAD")
    return commit and commit + ("+" if ask("status", "--porcelain", "--untracked-files=no") else "")


def machine_description() -> dict[str, Any]:
    """The machine in a few words: system, processor, cores that this process may use, memory in GiB."""
    model = platform.processor()
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {"system": platform.platform(), "cpu": model, "cores": cores, "memory_gib": round(memory, 1)}
