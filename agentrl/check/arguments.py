"""Arguments that fit a JSON schema and know nothing of the task: edges, ordinary values, odd text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from agentrl.tool import Tool

_INTEGERS = (0, 1, -1, 2, 3, 10, 99, -1000, 10**6, 10**18)  # 10**18 cannot be allocated, so it is harmless to try
_NUMBERS = (0.0, 1.0, -1.0, 0.5, 3.14, 1e6, -1e18)
_STRINGS = ("", "a", "hello world", "0", "1", "ünï ✓ 漢", "line\nbreak", "'\"; --", "../x", "[]", "x" * 300)
_DEPTH = 4


def arguments_for(tool: Tool, rng: np.random.Generator) -> dict[str, Any]:
    """Arguments as a policy could write them: JSON values that fit the tool's schema."""
    schema = tool.arguments.model_json_schema()
    made = _value({**schema, "type": "object"}, schema.get("$defs", {}), rng, 0)
    assert isinstance(made, dict)
    return made


def _value(schema: Mapping[str, Any], defs: Mapping[str, Any], rng: np.random.Generator, depth: int) -> Any:
    if "$ref" in schema:
        return _value(defs[schema["$ref"].rpartition("/")[2]], defs, rng, depth + 1)
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return _pick(schema["enum"], rng)
    for union in ("anyOf", "oneOf"):
        if union in schema:
            return _value(_pick(schema[union], rng), defs, rng, depth + 1)
    if "allOf" in schema:
        return _value({key: value for part in schema["allOf"] for key, value in part.items()}, defs, rng, depth + 1)
    kind = schema.get("type")
    if kind == "object":
        return _object(schema, defs, rng, depth)
    if kind == "array":
        return _array(schema, defs, rng, depth)
    if kind in ("integer", "number"):
        return _number(schema, kind, rng)
    if kind == "boolean":
        return bool(rng.integers(2))
    if kind == "null":
        return None
    return _string(schema, rng)


def _object(schema: Mapping[str, Any], defs: Mapping[str, Any], rng: np.random.Generator, depth: int) -> Any:
    required = schema.get("required", ())
    made = {
        name: _value(inner, defs, rng, depth + 1)
        for name, inner in schema.get("properties", {}).items()
        if name in required or (depth < _DEPTH and rng.integers(2))
    }
    extra = schema.get("additionalProperties")
    if isinstance(extra, dict) and depth < _DEPTH:
        made |= {name: _value(extra, defs, rng, depth + 1) for name in ("a", "b")[: int(rng.integers(3))]}
    return made


def _array(schema: Mapping[str, Any], defs: Mapping[str, Any], rng: np.random.Generator, depth: int) -> list[Any]:
    if "prefixItems" in schema:
        return [_value(item, defs, rng, depth + 1) for item in schema["prefixItems"]]
    low = schema.get("minItems", 0)
    size = low if depth >= _DEPTH else min(low + int(rng.integers(3)), schema.get("maxItems", 1 << 30))
    return [_value(schema.get("items", {}), defs, rng, depth + 1) for _ in range(size)]


def _number(schema: Mapping[str, Any], kind: str, rng: np.random.Generator) -> Any:
    step = schema.get("multipleOf", 1 if kind == "integer" else 0)
    low = schema.get("minimum", schema.get("exclusiveMinimum", float("-inf")))
    high = schema.get("maximum", schema.get("exclusiveMaximum", float("inf")))
    low += ("exclusiveMinimum" in schema) * (step or 1e-6)
    high -= ("exclusiveMaximum" in schema) * (step or 1e-6)
    value = min(max(_pick(_INTEGERS if kind == "integer" else _NUMBERS, rng), low), high)
    return int(value // step * step) if kind == "integer" else value


def _string(schema: Mapping[str, Any], rng: np.random.Generator) -> str:
    low, high = schema.get("minLength", 0), schema.get("maxLength", 1 << 30)
    text: str = _pick(_STRINGS, rng) + "a" * low
    return text[:high]


def _pick(options: Any, rng: np.random.Generator) -> Any:
    return options[int(rng.integers(len(options)))]
