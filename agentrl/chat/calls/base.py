"""What a tool-call format is: it finds calls in what the policy wrote, and writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from agentrl.trajectory import ToolCall

Schemas = Mapping[str, Mapping[str, Any]]
"""Tool name -> its parameters' JSON schemas by name; may be empty where unknown."""


class Malformed(Exception):
    """A call that cannot be understood; the message is a sentence for the policy."""


@dataclass(frozen=True, slots=True)
class Found:
    """The calls in a text, in order, and `rest`: the text without them."""

    calls: tuple[ToolCall, ...]
    rest: str


class CallFormat(Protocol):
    """One way of writing tool calls.

    `marks` are strings to which the format gives a meaning; `example` shows one call.
    """

    name: str
    marks: tuple[str, ...]
    example: str

    def find(self, text: str, cut: bool, schemas: Schemas) -> Found:
        """All calls in `text` (without thinking). `cut`: the limit ended the turn. Raises `Malformed`."""

    def write(self, calls: Sequence[ToolCall]) -> str:
        """`calls` as the policy would write them."""


def cut_off(what: str, cut: bool) -> Malformed:
    """The sentence for a call that does not end: cut by the limit, or just left open."""
    if cut:
        return Malformed(f"The tool call was cut off by the token limit before {what}; write a shorter one.")
    return Malformed(f"The tool call is not closed: {what} is missing.")


def to_json(value: Any) -> str:
    """JSON as chat templates write it."""
    return json.dumps(value, ensure_ascii=False)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")


_decoder = json.JSONDecoder(parse_constant=_no_constant)


def json_at(text: str, start: int, cut: bool, closer: str) -> tuple[Any, int]:
    """The JSON value at or after `start` and where it ends. Raises `Malformed` naming the mistake."""
    while start < len(text) and text[start].isspace():
        start += 1
    if start >= len(text):
        raise cut_off(closer, cut)
    try:
        value, end = _decoder.raw_decode(text, start)
        if "\\u" in text[start:end]:
            to_json(value).encode()
    except json.JSONDecodeError as error:
        if cut and (error.pos >= len(text) - 1 or error.msg.startswith("Unterminated")):
            raise cut_off(closer, cut) from None
        near = text[max(start, error.pos - 12) : error.pos + 12]
        raise Malformed(
            f"The tool call is not valid JSON: {error.msg} at character {error.pos - start}, near {near!r}."
        ) from None
    except RecursionError:
        raise Malformed("The tool call is not valid JSON: it is nested too deeply.") from None
    except UnicodeEncodeError:
        raise Malformed("The tool call is not valid JSON: a \\u escape names half of a character.") from None
    except ValueError as error:
        raise Malformed(f"The tool call is not valid JSON: {error}.") from None
    return value, end


def call_of(value: Any, example: str) -> ToolCall:
    """A JSON object {"name", "arguments" or "parameters", "id"?} as a call. Raises `Malformed`."""
    if not isinstance(value, dict):
        raise Malformed(f"A tool call must be a JSON object such as {example}")
    inner = value.get("function")
    if isinstance(inner, dict):
        value = {**inner, "id": value.get("id", "")}
    elif isinstance(inner, str) and "name" not in value:
        value = {**value, "name": inner}
    name = value.get("name")
    if not isinstance(name, str) or not name:
        raise Malformed(f'The tool call has no "name"; write it as {example}')
    key = "arguments" if "arguments" in value else "parameters"
    if key not in value:
        raise Malformed(f'The call of {name} has no "arguments"; write it as {example}')
    arguments = value[key]
    if isinstance(arguments, str):
        arguments, _ = json_at(arguments, 0, False, "the arguments")
    if not isinstance(arguments, dict):
        raise Malformed(f'The "{key}" of {name} must be a JSON object, not {to_json(arguments)[:40]}')
    identity = value.get("id")
    return ToolCall(name, arguments, identity if isinstance(identity, str) else "")
