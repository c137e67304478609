"""Tools: Python methods that a policy may call.

`@tool` marks a method of an `Env` or a `Toolkit`. Its JSON schema comes from the signature and the
docstring through pydantic; arguments are validated before the method runs, and a bad call becomes
an observation from which the policy can learn. A tool's cost (per call, per second, per token) is a
quantity: it is carried through the record, the reward and the metrics.
"""

from __future__ import annotations

import copy
import inspect
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self, TypeVar, overload

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic.fields import FieldInfo

from agentrl.errors import ToolError, UsageError

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")
_MARK = "__agentrl_tool__"
_MISTAKES = 5  # told at once about one call
_LOCAL = re.compile(r"^(\s*)(\w+)\s*(?:\([^)]*\))?\s*:\s*(.*)$")


@dataclass(frozen=True, slots=True)
class ToolOptions:
    """What `@tool(...)` declares. Costs are in the user's own unit; `timeout` in seconds; `max_chars`
    caps the observation."""

    name: str | None = None
    cost: float = 0.0
    cost_per_second: float = 0.0
    cost_per_token: float = 0.0
    timeout: float = 30.0
    parallel: bool = False
    max_chars: int = 16_384


@overload
def tool(method: F, /) -> F: ...
@overload
def tool(
    *,
    name: str | None = None,
    cost: float = 0.0,
    cost_per_second: float = 0.0,
    cost_per_token: float = 0.0,
    timeout: float = 30.0,
    parallel: bool = False,
    max_chars: int = 16_384,
) -> Callable[[F], F]: ...
def tool(method: F | None = None, /, **options: Any) -> F | Callable[[F], F]:
    """Mark a method (sync or async) as a tool the policy may call."""
    declared = ToolOptions(**options)
    if declared.timeout <= 0:
        raise UsageError(f"@tool(timeout={declared.timeout}) must be above 0 seconds")

    def mark(function: F) -> F:
        setattr(function, _MARK, declared)
        return function

    return mark(method) if method is not None else mark


class Tool:
    """A bound-late tool: its schema, how to check arguments, and how to call it on an instance."""

    def __init__(self, function: Callable[..., Any], options: ToolOptions) -> None:
        self.function = function
        self.options = options
        self.name = options.name or function.__name__
        if not re.fullmatch(r"[A-Za-z_][\w.-]*", self.name):
            raise UsageError(f"tool name {self.name!r} must start with a letter and hold letters, digits, _ . - only")
        self.is_async = inspect.iscoroutinefunction(function)
        self.brief = True  # whether the last call was over at once; only how a call is waited for depends on it

    def __repr__(self) -> str:
        return f"Tool({self.name})"

    @cached_property
    def _doc(self) -> tuple[str, dict[str, str]]:
        return split_docstring(inspect.getdoc(self.function) or "")

    @property
    def description(self) -> str:
        return self._doc[0]

    @cached_property
    def arguments(self) -> type[BaseModel]:
        """The pydantic model of the arguments; unknown arguments are refused.

        Its fields are named `a0, a1, …` with the parameters as aliases, so that a parameter may have any
        name (`schema`, `copy`, `_x`) without meeting an attribute of the model.
        """
        signature = inspect.signature(self.function)
        try:
            hints = typing.get_type_hints(self.function, include_extras=True)
        except NameError as error:
            raise UsageError(
                f"tool {self.name!r}: annotation {error.name!r} cannot be resolved; import it at module level"
            ) from error
        fields: dict[str, Any] = {}
        for index, parameter in enumerate(list(signature.parameters.values())[1:]):
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
                raise UsageError(
                    f"tool {self.name!r}: parameter {parameter.name!r} must be an ordinary named parameter"
                )
            if parameter.name not in hints:
                raise UsageError(
                    f"tool {self.name!r}: annotate parameter {parameter.name!r}, the schema is made from it"
                )
            if isinstance(parameter.default, FieldInfo):
                raise UsageError(f"tool {self.name!r}: write {parameter.name!r} as Annotated[type, Field(…)] = default")
            default = ... if parameter.default is parameter.empty else parameter.default
            described = self._doc[1].get(parameter.name)
            field = Field(default, description=described, alias=parameter.name)
            fields[f"a{index}"] = (hints[parameter.name], field)
        return create_model(
            f"{self.name}_arguments", __config__=ConfigDict(extra="forbid", arbitrary_types_allowed=False), **fields
        )

    @cached_property
    def schema(self) -> dict[str, Any]:
        """The tool as the JSON schema that chat templates take: {"type": "function", "function": …}."""
        parameters = _untitled(self.arguments.model_json_schema())
        parameters.pop("additionalProperties", None)
        parameters.setdefault("properties", {})
        return {
            "type": "function",
            "function": {"name": self.name, "description": self.description, "parameters": parameters},
        }

    def validate(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Typed arguments, or `ToolError` with one line per mistake."""
        try:
            model = self.arguments.model_validate(dict(arguments))
        except ValidationError as error:
            mistakes = error.errors(include_url=False, include_context=False, include_input=False)[:_MISTAKES]
            lines = [f"{'.'.join(map(str, e['loc'])) or 'arguments'}: {e['msg']}" for e in mistakes]
            raise ToolError(f"{self.name}: " + "; ".join(lines)) from None
        return {field.alias or name: getattr(model, name) for name, field in type(model).model_fields.items()}


def _untitled(schema: Any) -> Any:
    """Drop pydantic's generated titles: they only cost tokens. A property *named* title stays."""
    if isinstance(schema, dict):
        return {
            key: {name: _untitled(sub) for name, sub in value.items()}
            if key in ("properties", "$defs")
            else value
            if key in ("default", "const", "enum", "examples")
            else _untitled(value)
            for key, value in schema.items()
            if not (key == "title" and isinstance(value, str))
        }
    return [_untitled(item) for item in schema] if isinstance(schema, list) else schema


def split_docstring(doc: str) -> tuple[str, dict[str, str]]:
    """Split a Google-style docstring into its description and {argument: description}."""
    description: list[str] = []
    arguments: dict[str, str] = {}
    section, current, indent = "", "", 0
    for line in doc.splitlines():
        heading = line.strip()
        if heading in ("Args:", "Arguments:", "Parameters:", "Returns:", "Raises:", "Yields:", "Example:", "Examples:"):
            section = heading
            current = ""
        elif not section:
            description.append(line)
        elif section in ("Args:", "Arguments:", "Parameters:") and heading:
            match = _LOCAL.match(line)
            depth = len(line) - len(line.lstrip())
            if match and (not current or depth <= indent):
                current, indent = match.group(2), depth
                arguments[current] = match.group(3).strip()
            elif current:
                arguments[current] = f"{arguments[current]} {heading}".strip()
    return "\n".join(description).strip(), arguments


def tools_of(cls: type) -> dict[str, Tool]:
    """The tools that a class declares (inherited ones too), in order of definition."""
    found: dict[str, Tool] = {}
    for base in reversed(cls.__mro__):
        for name, member in vars(base).items():
            options = getattr(member, _MARK, None)
            if options is None:
                # An override without the mark takes the tool away; say so early instead of surprising.
                if any(t.function.__name__ == name for t in found.values()):
                    raise UsageError(
                        f"{cls.__name__}.{name} overrides a tool without @tool: mark it again, or rename it"
                    )
                continue
            made = Tool(member, options)
            found.pop(made.name, None)
            found[made.name] = made
    return found


class Toolkit:
    """Tools that an environment takes in by composition: `tools = (Search(index), Python(sandbox))`.

    What you hold is a template; each episode works on `spawn()` of it. `life`: seconds until what it holds for an
    episode ends by itself (None: never); the episode's deadline must be sooner. `call_seconds`: what a call may take by
    the toolkit's own limits (None: it has none); the tool deadline must be later. `places`: how many episodes can hold
    it at once (None: any number); as many at most may be in flight.
    """

    life: float | None = None
    call_seconds: float | None = None
    places: int | None = None
    _template: Toolkit | None = None

    async def setup(self) -> None:
        """Once per process, before the first episode."""

    def reset(self, rng: Any) -> None:
        """At the start of an episode."""

    async def ready(self) -> None:
        """Before each call of a tool: wait here for what the call needs, such as a sandbox. Neither the tool's deadline
        nor its cost per second counts this. May raise `InfraError`."""

    def spawn(self) -> Self:
        """A shallow copy for one episode, which knows its template."""
        child = copy.copy(self)
        child._template = self._template or self
        return child

    def fork(self) -> Self:
        """A deep copy of the episode's own state for a branch; what the template holds stays shared.

        Toolkits held in attributes are not copied here: the environment forks each once and puts the copy in place.
        """
        return branch(self, self._template or self, {id(kit): kit for kit in gathered((self,)) if kit is not self})

    def metrics(self) -> dict[str, float]:
        """Asked of the template after each training step: numbers for `metrics.jsonl`, by name."""
        return {}

    async def close(self) -> None:
        """Release what the episode (or the template) holds. Idempotent."""


def gathered(kits: Iterable[Toolkit]) -> tuple[Toolkit, ...]:
    """`kits`, then the toolkits that they hold in attributes, and so on; each once."""
    found: dict[int, Toolkit] = {}
    waiting = list(kits)
    for kit in waiting:  # grows while it is read
        if id(kit) not in found:
            found[id(kit)] = kit
            waiting += [
                value for value in vars(kit).values() if isinstance(value, Toolkit) and value is not kit._template
            ]
    return tuple(found.values())


def rewire(owners: Iterable[object], fresh: Mapping[int, Toolkit]) -> None:
    """Replace each reference that `owners` hold to an old toolkit by its successor, `fresh[id(old)]`: where several
    hold one toolkit, the copies of them must hold one copy of it."""
    for owner in owners:
        for name, value in list(vars(owner).items()):
            if id(value) in fresh and name != "_template":
                setattr(owner, name, fresh[id(value)])


def branch(source: T, template: object, known: Mapping[int, object] = types.MappingProxyType({})) -> T:
    """A copy of `source`: deep where the state is its own, shared where `template` holds the same object.

    `known` maps the ids of objects that were copied already to their copies.
    """
    child = copy.copy(source)
    memo: dict[int, object] = {id(value): value for value in vars(template).values()}
    memo |= {id(template): template, id(source): child, **known}
    for name, value in vars(source).items():
        setattr(child, name, copy.deepcopy(value, memo))
    return child


class _CallableModule(types.ModuleType):
    """`agentrl.tool` names this module and the decorator; whichever an import finds, it works."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        return tool(*args, **options)


sys.modules[__name__].__class__ = _CallableModule
