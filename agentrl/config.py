"""The typed configuration of a run. No key is accepted and ignored.

`prepare` imports the user's own component modules first, so that what they register can be named in
`type:`; the loader then validates one merged dictionary against the class it returns.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from agentrl.algo.component import one_of
from agentrl.chaos import ChaosOptions
from agentrl.engines.options import EngineOptions, LocalOptions
from agentrl.errors import UsageError
from agentrl.rollout.deadlines import Deadlines
from agentrl.train.options import ModelOptions
from agentrl.train.stages import RLStage, SupervisedStage, TrainingStage

SCHEMA_VERSION = 1


class Section(BaseModel):
    """A part of the configuration: frozen, unknown keys refused. Errors do not repeat what was given: it may hold a
    secret."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class EnvSection(Section):
    """Which environment: a registered id, `file.py:Class` or `package.module:Class`, and its own options."""

    id: str
    options: dict[str, Any] = {}


class ChatSection(Section):
    """How messages become tokens: the tool-call format and options for the tokenizer's own template."""

    tool_format: str = "auto"
    template_options: dict[str, Any] = {}


class RolloutSection(Section):
    """Limits of an episode and of the manager."""

    max_tokens: int = Field(default=256, ge=1, description="new tokens per turn")
    max_episode_tokens: int | None = Field(default=None, ge=1, description="sampled tokens per episode")
    episodes: int = Field(default=256, ge=1, description="episodes in flight")
    engine_requests: int | None = Field(
        default=None, ge=1, description="requests in flight; default: no limit of its own"
    )
    retries: int = Field(default=2, ge=0, description="new tries of an episode whose infrastructure failed")
    deadlines: Deadlines = Deadlines()


class EvalSection(Section):
    """Held-out evaluation after every stage, and every so many RL steps."""

    tasks: int = Field(default=256, ge=1)
    every: int | None = Field(
        default=None, ge=1, description="RL steps between evaluations; default: only after each stage"
    )
    tasks_every: int | None = Field(
        default=None, ge=1, description="tasks of the evaluations in between; default: tasks"
    )
    decode: tuple[Literal["sampled", "greedy"], ...] = ("sampled", "greedy")
    split: str = "test"
    temperature: float = Field(default=1.0, gt=0, description="of the sampled evaluation")

    @model_validator(mode="after")
    def _used(self) -> EvalSection:
        if not self.decode:
            raise ValueError("decode is empty: name sampled, greedy, or both")
        if self.tasks_every is not None and self.every is None:
            raise ValueError("tasks_every does nothing without every; set every, or remove it")
        return self


class StoreSection(Section):
    """Which trajectories keep their token arrays: all, every n-th step, or the last k steps."""

    tokens: Literal["all", "every_n", "last_k"] = "all"
    n: int = Field(default=1, ge=1)


class LogSection(Section):
    """Loggers beside metrics.jsonl. wandb "auto" is online with an API key and offline without."""

    tensorboard: bool = False
    wandb: Literal["off", "auto", "offline", "online"] = "off"
    project: str = "agentrl"


class CheckpointSection(Section):
    """A checkpoint every so many steps of a stage; the best by held-out success is kept besides."""

    every: int = Field(default=10, ge=1)
    keep: int = Field(default=2, ge=1)


def _bare_env(value: object) -> object:
    return {"id": value} if isinstance(value, str) else value


class Config(Section):
    """One run, whole."""

    name: str = Field(default="run", pattern=r"^[\w.-]+$")
    out: str = Field(default="runs", description="the folder that holds run folders")
    seed: int = Field(default=0, ge=0)
    deterministic: bool = Field(
        default=False, description="same numbers whatever the timing; padded forwards cost time"
    )
    threads: int | None = Field(default=None, ge=1, description="torch threads; default: torch's own choice")
    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:N")
    imports: tuple[str, ...] = ()
    env: Annotated[EnvSection, BeforeValidator(_bare_env)]
    model: ModelOptions
    engine: EngineOptions = LocalOptions()
    chat: ChatSection = ChatSection()
    rollout: RolloutSection = RolloutSection()
    stages: tuple[one_of(TrainingStage), ...] = Field(min_length=1)  # type: ignore[valid-type]
    eval: EvalSection | None = EvalSection()
    store: StoreSection = StoreSection()
    log: LogSection = LogSection()
    checkpoint: CheckpointSection = CheckpointSection()
    chaos: ChaosOptions | None = None

    @model_validator(mode="after")
    def _settled(self) -> Config:
        for stage in self.stages:
            if self.deterministic and isinstance(stage, RLStage) and stage.max_staleness:
                raise ValueError(
                    f"deterministic: true with max_staleness {stage.max_staleness} cannot be: which weights sample "
                    "which token then hangs on timing; set max_staleness: 0, or deterministic: false"
                )
        return self


def prepare(imports: Sequence[str] = ()) -> type[Config]:
    """Register the recipes and the modules in `imports` (files or module names), and return `Config`
    rebuilt over all components known now. Raises `UsageError` for a module that cannot be imported."""
    recipes = importlib.import_module("agentrl.algo.recipes")
    for found in pkgutil.iter_modules(recipes.__path__):
        importlib.import_module(f"{recipes.__name__}.{found.name}")
    for spec in imports:
        import_module(spec)
    for cls in (SupervisedStage, RLStage, Config):
        cls.model_rebuild(force=True)
    return Config


def import_module(spec: str) -> ModuleType:
    """Import `package.module` or `path/to/file.py` (once per file)."""
    try:
        if not spec.endswith(".py"):
            return importlib.import_module(spec)
        path = Path(spec).resolve()
        if not path.is_file():
            raise UsageError(f"imports: no file {spec!r}; paths are relative to the working directory")
        name = f"agentrl_user_{path.stem}_{abs(hash(str(path))):x}"
        if name in sys.modules:
            return sys.modules[name]
        module_spec = importlib.util.spec_from_file_location(name, path)
        if module_spec is None or module_spec.loader is None:
            raise UsageError(f"imports: {spec!r} cannot be read as a Python module")
        module = importlib.util.module_from_spec(module_spec)
        sys.modules[name] = module
        module_spec.loader.exec_module(module)
        return module
    except ImportError as error:
        raise UsageError(f"imports: {spec!r} cannot be imported: {error}") from error


def parse(values: Mapping[str, Any]) -> Config:
    """A configuration from a plain dictionary (from Python; files go through `agentrl.loader`)."""
    return prepare(values.get("imports", ())).model_validate(values)
