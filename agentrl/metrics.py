"""Metrics of a run: one JSON line a step, and the same to TensorBoard and wandb where asked.

A line is one flat object with sorted keys: `stage`, `step`, `time` and the values. `time` and keys
that begin with "time/" or "speed/" are wall-clock; all else is the same in every run of one seed.
Numbers that JSON lacks are the strings "NaN", "Infinity" and "-Infinity".
"""

from __future__ import annotations

import json
import math
import netrc
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self
from urllib.parse import urlsplit

from agentrl.errors import UsageError
from agentrl.store.run import write_atomic
from agentrl.store.segments import disk_failed, write_all

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter
    from wandb import Run

NAME = "metrics.jsonl"
SUPERSEDED = "metrics.superseded.jsonl"
WandbMode = Literal["off", "auto", "offline", "online"]
Status = Literal["completed", "failed", "cancelled"]
_RESERVED = frozenset({"stage", "step", "time"})
_ODD = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class Metrics:
    """Where a run's numbers go. Opening it cuts a line that a crash left torn.

    `wandb`: "auto" is online where a key is set and offline elsewhere. TensorBoard gets a folder per
    stage, tensorboard/<stage>. Raises `UsageError` where an optional package is missing, or where
    wandb is to be online without a key.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        tensorboard: bool = False,
        wandb: WandbMode = "off",
        project: str = "agentrl",
        run_id: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self._run_dir, self.path = run_dir, run_dir / NAME
        run_dir.mkdir(parents=True, exist_ok=True)
        self._boards: dict[str, SummaryWriter] = {}
        self._board_class = _summary_writer() if tensorboard else None
        self._wandb_stages: set[str] = set()
        self._wandb = _wandb_run(run_dir, wandb, project, run_id, config or {}) if wandb != "off" else None
        _cut_torn_line(self.path)
        self._fd = self._open()

    def _open(self) -> int:
        return os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def log(self, step: int, stage: str, values: Mapping[str, float]) -> None:
        """Write one line. Raises `ValueError` for a value named stage, step or time, `RunFailed` for a full disk."""
        clash = _RESERVED & values.keys()
        if clash:
            raise ValueError(f"metrics may not be named {sorted(clash)}; rename them")
        plain = {name: _number(value) for name, value in values.items()}
        line = {
            **{name: _json(value) for name, value in plain.items()},
            "stage": stage,
            "step": step,
            "time": time.time(),
        }
        try:
            write_all(self._fd, (json.dumps(line, sort_keys=True, allow_nan=False) + "\n").encode())
        except OSError as error:
            raise disk_failed(self.path, error) from error
        if self._board_class is not None:
            board = self._board(stage)
            for name, value in plain.items():
                board.add_scalar(name, value, step)
        if self._wandb is not None:
            if stage not in self._wandb_stages:
                self._wandb.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
                self._wandb_stages.add(stage)
            self._wandb.log({f"{stage}/step": step, **{f"{stage}/{name}": value for name, value in plain.items()}})

    def rewind(self, stages: Sequence[str], stage: int, step: int) -> int:
        """A run was restored to `step` of stage number `stage`: take back the lines beyond it; return how many.

        `stages` are the run's stages in order; "rl-eval" counts as "rl". The lines move to
        metrics.superseded.jsonl. TensorBoard hides them; wandb keeps both.
        """
        lines = self.path.read_bytes().splitlines(keepends=True)
        kept: list[bytes] = []
        cut: list[bytes] = []
        first: dict[str, int] = {}  # the first step taken back, per name
        for line in lines:
            name, at = _place(line)
            if _position(name, at, stages) <= (stage, step):
                kept.append(line)
            else:
                cut.append(line)
                first[name] = min(at, first.get(name, at))
        if not cut:
            return 0
        try:
            with (self._run_dir / SUPERSEDED).open("ab") as file:
                file.writelines(cut)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise disk_failed(self._run_dir / SUPERSEDED, error) from error
        write_atomic(self.path, b"".join(kept).decode())
        os.close(self._fd)
        self._fd = self._open()
        if self._board_class is not None:
            for name, at in first.items():
                self._board(name, purge=at)
        return len(cut)

    def _board(self, stage: str, purge: int | None = None) -> SummaryWriter:
        assert self._board_class is not None
        if purge is not None and stage in self._boards:
            self._boards.pop(stage).close()
        if stage not in self._boards:
            folder = str(self._run_dir / "tensorboard" / stage)
            self._boards[stage] = self._board_class(folder, purge_step=purge)
        return self._boards[stage]

    def close(self) -> None:
        """Finish everything. Idempotent."""
        for board in self._boards.values():
            board.close()
        self._boards.clear()
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, with NaN and infinities as floats again; a torn last line is left out."""
    lines = path.read_bytes().split(b"\n")[:-1]
    return [
        {
            name: _ODD.get(value, value) if name not in _RESERVED and isinstance(value, str) else value
            for name, value in line
        }
        for line in (json.loads(text).items() for text in lines)
    ]


def canonical_metrics(path: Path) -> bytes:
    """A metrics.jsonl without its wall-clock fields: the same in every run of one seed."""
    lines = [
        {name: value for name, value in json.loads(text).items() if name != "time" and not _is_clock(name)}
        for text in path.read_bytes().split(b"\n")[:-1]
    ]
    return b"".join(json.dumps(line, sort_keys=True).encode() + b"\n" for line in lines)


def _is_clock(name: str) -> bool:
    return name.startswith(("time/", "speed/"))


def _number(value: Any) -> float | int:
    return int(value) if isinstance(value, bool | int) else float(value)


def _json(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _cut_torn_line(path: Path) -> None:
    if path.exists():
        data = path.read_bytes()
        if data and not data.endswith(b"\n"):
            os.truncate(path, data.rfind(b"\n") + 1)


def _place(line: bytes) -> tuple[str, int]:
    found = json.loads(line)
    return str(found["stage"]), int(found["step"])


def _position(name: str, step: int, stages: Sequence[str]) -> tuple[int, int]:
    """(number of the stage, step) of a line; a line of no stage of this run stands before all."""
    owners = [i for i, stage in enumerate(stages) if name == stage or name.startswith(f"{stage}-")]
    return (max(owners, key=lambda i: len(stages[i])), step) if owners else (-1, step)


def _missing(package: str, key: str) -> UsageError:
    return UsageError(
        f"{key} needs {package}, which is not installed; turn it off, "
        f'or run: pip install "agentrl-framework[{package}]"'
    )


def _summary_writer() -> type[SummaryWriter]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise _missing("tensorboard", "logging to TensorBoard") from error
    return SummaryWriter


def _wandb_run(run_dir: Path, mode: WandbMode, project: str, run_id: str | None, config: Mapping[str, Any]) -> Run:
    try:
        import wandb
    except ImportError as error:
        raise _missing("wandb", "logging to wandb") from error
    key = has_wandb_key()
    if mode == "online" and not key:
        raise UsageError("wandb is to be online, but no key is set; set WANDB_API_KEY, or choose wandb offline")
    chosen: Literal["online", "offline"] = "online" if key and mode != "offline" else "offline"
    settings = wandb.Settings(silent=True, console="off", disable_code=True, disable_git=True)
    return wandb.init(
        project=project,
        dir=str(run_dir),
        id=run_id,
        name=run_dir.name,
        config=dict(config),
        mode=chosen,
        resume="allow" if run_id else None,
        reinit="create_new",
        settings=settings,
    )


def has_wandb_key() -> bool:
    """Whether a key for wandb is set: WANDB_API_KEY, or a line of .netrc for its host."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def wilson(k: int, n: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of k successes in n trials (Wilson 1927); (0, 1) where n is 0."""
    if not 0 <= k <= n:
        raise ValueError(f"{k} of {n} is no proportion")
    if n == 0:
        return 0.0, 1.0
    z2 = 1.959963984540054**2
    centre = (k + z2 / 2) / (n + z2)
    half = math.sqrt(z2 * (k * (n - k) / n + z2 / 4)) / (n + z2)
    return (0.0 if k == 0 else centre - half), (1.0 if k == n else centre + half)


@dataclass(frozen=True, slots=True)
class Summary:
    """summary.json: how a run ended and what it reached.

    Each record of `eval` holds at least stage, step, decode ("sampled" or "greedy"), n, success, ci95
    ([lo, hi]), mean_reward, tool_calls and tokens (means per episode); `throughput` holds gen_tok_s,
    train_tok_s and episodes_s. What was not measured, or is not a number, is null.
    """

    status: Status
    wall_s: float
    steps: int
    eval: Sequence[Mapping[str, Any]]
    throughput: Mapping[str, float | None]
    versions: Mapping[str, str]

    def __post_init__(self) -> None:
        for what, found, needed in (
            *(("an eval record", record, _EVAL_FIELDS) for record in self.eval),
            ("throughput", self.throughput, _RATES),
        ):
            if lacking := sorted(needed - found.keys()):
                raise ValueError(f"{what} of a summary lacks {lacking}")

    def write(self, run_dir: Path) -> None:
        """Write summary.json, whole or not at all."""
        write_atomic(run_dir / "summary.json", json.dumps(_finite(asdict(self)), indent=2, allow_nan=False) + "\n")

    @classmethod
    def read(cls, run_dir: Path) -> Self:
        """Raises `UsageError` where the run has no summary yet."""
        try:
            return cls(**json.loads((run_dir / "summary.json").read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise UsageError(f"{run_dir} has no summary.json: the run is not over, or this is no run folder") from None


_EVAL_FIELDS = frozenset({"stage", "step", "decode", "n", "success", "ci95", "mean_reward", "tool_calls", "tokens"})
_RATES = frozenset({"gen_tok_s", "train_tok_s", "episodes_s"})


def _finite(value: Any) -> Any:
    """Plain JSON values, with None for what is not a number."""
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
