"""What the schema allows at one place of a configuration.

A `Slot` holds the annotations of a place. It knows which models a mapping there may be (the one that
its `type:` chooses, where it does), which keys they have, and what a shorthand stands for: `sampler:
uniform` is `{type: uniform}`, and whatever else a field's `BeforeValidator` makes of a bare value.
Merging, overrides and error messages all ask it, so that a shorthand means one thing everywhere.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

from agentrl.algo.component import Choice, Component
from agentrl.loader.layers import Node


@dataclass(frozen=True, slots=True)
class Slot:
    """A place of the schema. `Slot()` is a place of which nothing is known."""

    annotations: tuple[Any, ...] = ()

    def models(self, node: Node | None = None) -> list[type[BaseModel]]:
        """The models that `node` may be here."""
        found = [model for annotation in self.annotations for model in _models(annotation)]
        kind = node.value.get("type") if node is not None and isinstance(node.value, dict) else None
        return [model for model in found if kind is not None and kind.value in types_of(model)] or found

    def keys(self, node: Node) -> list[str]:
        """The keys that the mapping `node` may have here."""
        return [key for model in self.models(node) for key in keys_of(model)]

    @property
    def is_list(self) -> bool:
        """Whether only a list may stand here."""
        return bool(self.annotations) and all(_is_list(annotation) for annotation in self.annotations)

    def below(self, key: str, node: Node) -> Slot:
        """The slot of `key` (a list's entry: its number) inside `node`."""
        inside = [item for annotation in self.annotations for item in _items(annotation)]
        fields = [model.model_fields for model in self.models(node)]
        named = [_annotation(info) for info in (_find(each, key) for each in fields) if info is not None]
        return Slot((*inside, *named))

    def expanded(self, node: Node) -> Node:
        """`node` with its shorthand written out, as the schema will read it."""
        if isinstance(node.value, list):
            return node
        for annotation in self.annotations:
            for expand in _expanders(annotation):
                plain = node.plain()
                full = expand(plain)
                if isinstance(full, dict) and full != plain:
                    given = node.value if isinstance(node.value, dict) else {}
                    return Node(
                        {
                            key: given.get(key) or (node if value == plain else Node(value, node.where))
                            for key, value in full.items()
                        },
                        node.where,
                    )
        return node


UNKNOWN = Slot()


def keys_of(model: type[BaseModel]) -> list[str]:
    """The keys that a mapping for `model` may have."""
    return [info.alias or name for name, info in model.model_fields.items()]


def types_of(model: type[BaseModel]) -> tuple[str, ...]:
    """The values of `type:` that choose `model`."""
    info = model.model_fields.get("type")
    return get_args(info.annotation) if info and get_origin(info.annotation) is Literal else ()


def key_paths(model: type[BaseModel], above: tuple[type[BaseModel], ...] = ()) -> Iterator[str]:
    """Every key of the schema as a dotted path; an entry of a list or dict is written `0`."""
    if model in above:
        return
    for name, info in zip(keys_of(model), model.model_fields.values(), strict=True):
        yield name
        annotation = _annotation(info)
        for owner in _models(annotation):
            yield from (f"{name}.{path}" for path in key_paths(owner, (*above, model)))
        for item in _items(annotation):
            for owner in _models(item):
                yield from (f"{name}.0.{path}" for path in key_paths(owner, (*above, model)))


def _find(fields: dict[str, FieldInfo], key: str) -> FieldInfo | None:
    return next((info for name, info in fields.items() if key in (name, info.alias)), None)


def _annotation(info: FieldInfo) -> Any:
    """A field's annotation with the metadata that pydantic keeps apart from it."""
    return Annotated[(info.annotation, *info.metadata)] if info.metadata else info.annotation


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models that a value of this annotation may be itself (not those inside a list or a dict)."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) is Annotated:
        inner, *metadata = get_args(annotation)
        for choice in (each for each in metadata if isinstance(each, Choice)):
            yield from Component.registry.get(choice.base.point, {}).values()
            return
        yield from _models(inner)
    elif get_origin(annotation) in (Union, types.UnionType):
        for option in get_args(annotation):
            yield from _models(option)


def _items(annotation: Any) -> Iterator[Any]:
    """What a list, tuple or dict of this annotation holds."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from _items(args[0])
    elif origin in (Union, types.UnionType):
        for option in args:
            yield from _items(option)
    elif isinstance(origin, type) and args:
        yield args[0] if args[-1] is Ellipsis else args[-1]


def _is_list(annotation: Any) -> bool:
    origin = get_origin(annotation)
    return _is_list(get_args(annotation)[0]) if origin is Annotated else origin in (list, tuple)


def _expanders(annotation: Any) -> Iterator[Any]:
    """The functions that write a shorthand of this annotation out, outermost first."""
    if get_origin(annotation) is Annotated:
        inner, *metadata = get_args(annotation)
        for each in reversed(metadata):
            if isinstance(each, Choice):
                yield _typed
            elif isinstance(each, BeforeValidator):
                yield each.func
        yield from _expanders(inner)
    elif get_origin(annotation) in (Union, types.UnionType):
        for option in get_args(annotation):
            yield from _expanders(option)


def _typed(value: object) -> object:
    return {"type": value} if isinstance(value, str) else value
