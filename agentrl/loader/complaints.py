"""What pydantic finds wrong, said to a person: where it stands, what is wrong, what may be meant.

pydantic names a place in its own terms (union tags among the keys). Here that place is followed
through the tree of `Node`s to the line or the override that wrote the value, and the schema is
asked which keys it has, so that a misspelt key is answered with the right one.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from agentrl.errors import UsageError
from agentrl.loader.layers import Node, did_you_mean
from agentrl.loader.slots import Slot, key_paths, types_of

_LISTED = 12
_INDEX = re.compile(r"\.\d+(?=\.|$)")
_QUOTED = re.compile(r"'([^']*)'")


def complaints(error: ValidationError, root: Node, model: type[BaseModel], above: str = "") -> list[UsageError]:
    """One `UsageError` per mistake in `error`, in the order in which pydantic met them.

    `above` is the dotted path of `root` itself, where it is not the whole configuration."""
    seen: dict[str, UsageError] = {}
    for detail in error.errors(include_url=False):
        spot = _follow(detail, root, Slot((model,)))
        if detail["type"] == "too_short" and _long_enough(detail, spot.node):
            continue
        text, where = _sentence(detail, spot, model), spot.node.where
        if detail["type"] == "value_error":
            where = _subject(text, spot.node).where
        path = ".".join(filter(None, (above, spot.path)))
        made = UsageError(f"{path}: {text}" if path else text, where=where)
        seen.setdefault(str(made), made)
    return list(seen.values())


@dataclass(frozen=True, slots=True)
class _Spot:
    """A place in the tree: the nearest node that exists there, its slot, and the mapping around it."""

    path: str
    node: Node
    slot: Slot
    around: tuple[Node, Slot]


def _follow(detail: ErrorDetails, root: Node, slot: Slot) -> _Spot:
    node, around = root, (root, slot)
    path: list[str] = []
    loc = detail["loc"]
    for n, step in enumerate(loc, 1):
        at_end = n == len(loc)
        if isinstance(node.value, dict):
            tag = node.value.get("type")
            is_tag = tag is not None and tag.value == step and not at_end
            found = None if is_tag else node.value.get(str(step))
        elif isinstance(node.value, list) and isinstance(step, int) and step < len(node.value):
            found = node.value[step]
        else:
            found = None
        if found is not None:
            around = (node, slot)
            node, slot, path = found, slot.below(str(step), node), [*path, str(step)]
        elif at_end and detail["type"] == "missing":
            path = [*path, str(step)]
    if detail["type"] == "union_tag_invalid" and isinstance(node.value, dict):
        node = node.value.get("type", node)
    return _Spot(".".join(path), node, slot, around)


def _long_enough(detail: ErrorDetails, node: Node) -> bool:
    """pydantic counts a list's valid entries; where they are bad and not few, their own errors say it all."""
    return isinstance(node.value, list) and len(node.value) >= detail.get("ctx", {}).get("min_length", 0)


def _sentence(detail: ErrorDetails, spot: _Spot, model: type[BaseModel]) -> str:
    kind, context, given = detail["type"], detail.get("ctx", {}), _short(spot.node.plain())
    match kind:
        case "extra_forbidden":
            return f"unknown key{_meant_key(spot, model)}"
        case "missing":
            return "this key is required; add it"
        case "union_tag_not_found":
            return f"name a type{_one_of([name for owner in spot.slot.models() for name in types_of(owner)])}"
        case "union_tag_invalid":
            known, tag = _QUOTED.findall(str(context.get("expected_tags", ""))), str(context.get("tag"))
            return f"there is no {tag!r}{did_you_mean(tag, known) or _one_of(known)}"
        case "literal_error" | "enum":
            expected = str(context.get("expected", ""))
            meant = did_you_mean(str(spot.node.value), _QUOTED.findall(expected))
            return f"should be {expected}, not {given}{meant}"
        case "value_error" | "assertion_error":
            return str(context.get("error", detail["msg"]))
        case "too_short" | "too_long" if "actual_length" in context:
            edge = f"least {context['min_length']}" if kind == "too_short" else f"most {context['max_length']}"
            return f"should have at {edge} entries, not {context['actual_length']}"
        case "model_type" | "model_attributes_type" | "dict_type":
            return f"should be a mapping of keys to values, not {given}"
    message = detail["msg"].removeprefix("Input ").split(", unable to ")[0].split(", got a ")[0]
    message = (
        message.replace("a valid integer", "a whole number")
        .replace("a valid tuple", "a list")
        .replace("a valid ", "a ")
    )
    return f"{message[:1].lower()}{message[1:]}, not {given}"


def _subject(text: str, node: Node) -> Node:
    """The key of the mapping `node` that a validator's sentence speaks of first, else `node` itself."""
    if isinstance(node.value, dict):
        for word in re.findall(r"\w+", text):
            if word in node.value:
                return node.value[word]
    return node


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _one_of(known: list[str]) -> str:
    names = list(dict.fromkeys(known))
    return f"; it is one of {', '.join(names[:_LISTED])}{', …' if len(names) > _LISTED else ''}" if names else ""


def _meant_key(spot: _Spot, model: type[BaseModel]) -> str:
    around, slot = spot.around
    key, known = spot.path.rsplit(".", 1)[-1], slot.keys(around)
    near = did_you_mean(key, known)
    if near:
        return near
    elsewhere = sorted({path for path in key_paths(model) if path.rsplit(".", 1)[-1] == key}, key=len)
    here = _INDEX.sub(".0", spot.path)
    if here in elsewhere and isinstance(around.value, dict) and "type" in around.value:
        return f"; it does not belong to type {around.value['type'].value!r}"
    if elsewhere:
        return f"; did you mean {elsewhere[0]!r}?"
    return f"; the keys here are {', '.join(sorted(set(known)))}" if 0 < len(known) <= _LISTED else ""
