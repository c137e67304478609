"""Environments: what a user subclasses.

An `Env` that you hold is a *template*; each episode runs on a `spawn()` of it, which is used once.
Tasks pose problems, tools change the episode's state, `score` judges the record. Everything has a
default except `tasks` and `score`.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import traceback
from collections.abc import Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import BaseModel

from agentrl.content import Content
from agentrl.errors import AgentRLError, UsageError
from agentrl.task import Task
from agentrl.tool import Tool, Toolkit, branch, gathered, rewire, tools_of
from agentrl.trajectory import Hint, Outcome, ToolCall, ToolUse, Trajectory, Turn

if TYPE_CHECKING:
    import gymnasium

Split = str  # "train", "test", or a name of the environment's own


@dataclass(frozen=True, slots=True)
class Obs:
    """What the policy sees next, with an optional turn reward; `done` ends the episode (terminated).

    `hint`: as what the viewer may show a tool's text ("table", "board", "diff", "markdown", "json"). The text stays
    text there, never HTML, and the policy does not see the hint.
    """

    content: Content
    reward: float | None = None
    done: bool = False
    hint: Hint | None = None


@dataclass(frozen=True, slots=True)
class Score:
    """Named parts (total = sum of weight x part, any None = missing) and success, a channel of its own."""

    parts: Mapping[str, float | None]
    success: bool


@dataclass(frozen=True, slots=True)
class Say:
    """One message of a scripted expert: thinking, text and tool calls, rendered by the policy's own chat format."""

    text: str = ""
    calls: tuple[ToolCall, ...] = ()
    thinking: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Episode:
    """A finished (or running) episode as `score` reads it: the task and the recorded turns."""

    task: Task
    turns: Sequence[Turn] = ()
    outcome: Outcome | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def final_text(self) -> str:
        """The last message without thinking and tool calls; empty where the policy never answered."""
        return self.turns[-1].final_text if self.turns else ""

    @property
    def calls(self) -> tuple[ToolUse, ...]:
        return tuple(use for turn in self.turns for use in turn.tools)

    @classmethod
    def of(cls, task: Task, trajectory: Trajectory) -> Self:
        return cls(task, trajectory.turns, trajectory.outcome, trajectory.extra)


class Env:
    """A tool environment. Subclass it, write `tasks` and `score`, add `@tool` methods.

    Class attributes: `max_turns` per episode; `reward_range` (checked); `success_at`, the total from
    which a plain float counts as success; `reward_weights` for scores with named parts; `isolation`:
    "process" runs the episode's tools in a worker process that can be killed; `tools`: toolkits taken
    in by composition.
    """

    max_turns: int = 8
    reward_range: tuple[float, float] = (0.0, 1.0)
    success_at: float = 1.0
    reward_weights: Mapping[str, float] = MappingProxyType({})
    isolation: Literal["thread", "process"] = "thread"
    tools: tuple[Toolkit, ...] = ()

    class Options(BaseModel, extra="forbid", frozen=True):
        """The environment's own configuration keys; override with fields of your own."""

    def __getattr__(self, name: str) -> Any:
        if name == "options":
            raise UsageError(f"{type(self).__name__}.__init__ must call super().__init__(options, **keys) first")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __init__(self, options: BaseModel | Mapping[str, Any] | None = None, **keys: Any) -> None:
        if isinstance(options, BaseModel):
            self.options: Any = options
        else:
            self.options = self.Options.model_validate({**(options or {}), **keys})

    async def setup(self) -> None:
        """Once per process, before the first episode: indices, pools. What it makes is shared."""

    def tasks(self, split: Split, seed: int) -> Iterable[Task]:
        """Yield tasks lazily; ids are stable, and one (split, seed) gives one sequence."""
        raise UsageError(f"{type(self).__name__} has no tasks: write tasks(self, split, seed)")

    def reset(self, task: Task, rng: np.random.Generator) -> Obs | None:
        """Set the episode's state up. All randomness comes from `rng`. May be async."""
        return None

    def reply(self, text: str) -> Obs | None:
        """The policy spoke without calling a tool. None = that was its final answer. May be async."""
        return None

    def anchor(self) -> Hashable | None:
        """A key of the present state (GiGPO's anchor, replay's check). None = hash of the last observation."""
        return None

    def score(self, episode: Episode) -> float | Score | None:
        """Judge the record; idempotent. None = missing. May be async."""
        raise UsageError(f"{type(self).__name__} has no score: write score(self, episode)")

    def demonstrate(self, task: Task, rng: np.random.Generator) -> Generator[Say, Obs, None]:
        """A scripted expert: yield `Say`, receive the observation. Optional; the supervised stage needs it."""
        raise UsageError(f"{type(self).__name__} offers no demonstrations: write demonstrate(self, task, rng)")

    def spawn(self) -> Self:
        """An instance for one episode: a shallow copy of the template, with toolkits spawned alike."""
        child = copy.copy(self)
        child._template = self.template
        if self.tools:
            fresh = {id(kit): kit.spawn() for kit in self.kits}
            child.tools = tuple(fresh[id(kit)] for kit in self.tools)
            rewire((child, *fresh.values()), fresh)
        return child

    def fork(self) -> Self:
        """A deep copy of the episode's own state for a branch; what the template holds stays shared."""
        twins = {id(kit): kit.fork() for kit in self.kits}
        child = branch(self, self.template, twins)
        rewire(twins.values(), twins)
        return child

    async def close(self) -> None:
        """Release the episode's resources. Idempotent."""

    # -- what the framework asks; not meant to be overridden ------------------------------------

    _template: Env | None = None
    _prepared: bool = False
    _tool_cache: ClassVar[dict[type, dict[str, Tool]]] = {}

    @property
    def template(self) -> Env:
        """The instance this episode was spawned from (itself, for a template)."""
        return self._template or self

    @property
    def kits(self) -> tuple[Toolkit, ...]:
        """The toolkits in `tools`, then those they hold in attributes (a sandbox that several share), each once."""
        return gathered(self.tools)

    async def prepare(self) -> None:
        """Run `setup`, the toolkits' too, unless that was done before: what every runner calls first."""
        template = self.template
        if not template._prepared:
            template._prepared = True
            await settled(template.setup())
            for kit in template.kits:
                await settled(kit.setup())

    async def retire(self) -> None:
        """Close the template and its toolkits: what a runner that called `prepare` calls last. Idempotent."""
        template = self.template
        template._prepared = False
        owners: tuple[Env | Toolkit, ...] = (template, *template.kits)
        for owner in owners:
            await settled(owner.close())

    def toolbox(self) -> dict[str, tuple[Any, Tool]]:
        """Every tool by name with the object it acts on: the environment's own, then its toolkits'."""
        box: dict[str, tuple[Any, Tool]] = {}
        for owner in (self, *self.tools):
            cls = type(owner)
            if cls not in self._tool_cache:
                base = Env if isinstance(owner, Env) else Toolkit
                hides = [
                    made.function.__name__ for made in tools_of(cls).values() if hasattr(base, made.function.__name__)
                ]
                if hides:
                    raise UsageError(
                        f"{cls.__name__}.{hides[0]} is a tool but hides {base.__name__}.{hides[0]}: "
                        f"name the method otherwise, with @tool(name={hides[0]!r})"
                    )
                self._tool_cache[cls] = tools_of(cls)
            for name, made in self._tool_cache[cls].items():
                if name in box:
                    raise UsageError(
                        f"{type(self).__name__} has two tools named {name!r}; rename one with @tool(name=…)"
                    )
                box[name] = (owner, made)
        return box

    def tool_schemas(self) -> list[dict[str, Any]]:
        """The JSON schemas of all tools, as chat templates take them."""
        return [made.schema for _, made in self.toolbox().values()]

    @cached_property
    def spec_hash(self) -> str:
        """A short hash of what the policy is told and how it is judged; recorded with every episode."""
        spec = {
            "class": f"{type(self).__module__}:{type(self).__qualname__}",
            "options": self.options.model_dump(mode="json"),
            "tools": self.tool_schemas(),
            "max_turns": self.max_turns,
            "range": list(self.reward_range),
            "weights": dict(self.reward_weights),
        }
        return hashlib.sha256(json.dumps(spec, sort_keys=True, default=str).encode()).hexdigest()[:16]

    def total(self, score: float | Score | None) -> tuple[dict[str, float | None], float | None, bool | None]:
        """Turn what `score` returned into (parts, total reward, success); total None = missing."""
        if score is None:
            return {}, None, None
        if isinstance(score, Score):
            parts = dict(score.parts)
            unknown = sorted(set(self.reward_weights) - set(parts))
            if unknown:
                raise UsageError(f"{type(self).__name__}.reward_weights names {unknown}, which score() did not return")
            if any(value is None for value in parts.values()):
                return parts, None, None
            reward = sum(self.reward_weights.get(name, 1.0) * float(value or 0.0) for name, value in parts.items())
            return parts, float(reward), bool(score.success)
        reward = float(score)
        return {"score": reward}, reward, reward >= self.success_at

    def as_gym(self, split: Split = "train", seed: int = 0) -> gymnasium.Env[str, str]:
        """This environment as a `gymnasium.Env`: an action is one assistant message."""
        from agentrl.gym import GymEnv

        return GymEnv(self, split=split, seed=seed)


async def settled(value: Any) -> Any:
    """`value`, awaited where a method was async."""
    return await value if inspect.isawaitable(value) else value


def tasks_of(env: Env, split: str, seed: int) -> Iterator[Task]:
    """`env.tasks`, with a sentence for what may be wrong with it. Raises `UsageError`."""
    name = type(env).__name__
    try:
        for task in env.tasks(split, seed):
            if not isinstance(task, Task):
                found = f"{type(task).__name__} {str(task)[:40]!r}"
                raise UsageError(f"{name}.tasks yielded {found}; yield Task(id, prompt, …)")
            yield task
    except (AgentRLError, GeneratorExit):
        raise
    except Exception as error:  # the environment's own code
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(frame.filename).name}:{frame.lineno}"
        raise UsageError(f"{name}.tasks failed with {type(error).__name__}: {error} ({where})") from error
