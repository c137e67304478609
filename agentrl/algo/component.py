"""Components: one class per extension point and name; a component *is* its own configuration.

A point (`TaskSampler`, `RewardShaper`, …) is an abstract `Component` that names itself in `point`.
A concrete subclass declares `type: Literal["its-name"] = "its-name"` and its options as fields; that
alone registers it. In a configuration it is chosen by `type:`; a bare name is shorthand for its
defaults. Components are frozen: what a method remembers between steps lives in the `StateStore`.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from agentrl.errors import UsageError


class Component(BaseModel):
    """Base of all components. Subclass a point, not this."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    point: ClassVar[str] = ""
    registry: ClassVar[dict[str, dict[str, type[Component]]]] = {}

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        field = cls.model_fields.get("type")
        if field is None:
            return
        if not cls.point or get_origin(field.annotation) is not Literal:
            raise UsageError(
                f"{cls.__name__} must subclass an extension point and write type: Literal['name'] = 'name'"
            )
        (name,) = get_args(field.annotation)
        known = Component.registry.setdefault(cls.point, {})
        other = known.get(name)
        if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise UsageError(
                f"the {cls.point} {name!r} is already {other.__module__}.{other.__qualname__}; pick another name"
            )
        known[name] = cls


class Choice:
    """Annotation: "one registered component of this point", a union tagged by `type`."""

    def __init__(self, base: type[Component]) -> None:
        self.base = base

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        known = Component.registry.get(self.base.point, {})
        choices: dict[Any, CoreSchema] = {name: handler.generate_schema(cls) for name, cls in known.items()}
        tagged = core_schema.tagged_union_schema(choices, discriminator="type", from_attributes=False)
        return core_schema.no_info_before_validator_function(_expand, tagged)


def _expand(value: Any) -> Any:
    """A bare name is short for its defaults; a component made in Python is taken as it is written down."""
    if isinstance(value, Component):
        return value.model_dump()
    return {"type": value} if isinstance(value, str) else value


C = TypeVar("C", bound=Component)


def one_of(base: type[C]) -> Any:
    """The annotation of a config field that holds one component of `base`'s point."""
    return Annotated[base, Choice(base)]
