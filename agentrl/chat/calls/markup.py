"""Calls written with tags around each argument: Qwen3-Coder, GLM, Gemma.

Tags carry no types. Where the tool's schema is known, a value that is not a string there is read
as JSON; where it is not, only objects and lists are, and the tool's validation does the rest.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from agentrl.chat.calls.base import Found, Malformed, Schemas, cut_off, json_at, to_json
from agentrl.trajectory import ToolCall


def _value(raw: str, schema: Any) -> Any:
    """The value that `raw` spells, by the parameter's schema where there is one."""
    if isinstance(schema, Mapping):
        branches = [schema, *schema.get("anyOf", ()), *schema.get("oneOf", ())]
        kinds = [kind for b in branches for kind in _kinds(b)]
        if "string" in kinds or (not kinds and "enum" not in schema):
            return raw
    elif not raw.lstrip().startswith(("{", "[")):
        return raw
    lowered = {"True": "true", "False": "false", "None": "null"}.get(raw.strip(), raw)
    try:
        value, end = json_at(lowered, 0, False, "the value")
    except Malformed:
        return raw
    return raw if lowered[end:].strip() else value


def _kinds(schema: Any) -> list[str]:
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    return [kind] if isinstance(kind, str) else list(kind or ())


def _text(value: Any) -> str:
    return value if isinstance(value, str) else to_json(value)


class _Blocks:
    """What Qwen3-Coder and GLM share: `<tool_call>…</tool_call>` around each call."""

    name = ""
    example = ""
    opener, closer = "<tool_call>", "</tool_call>"
    inner: tuple[str, ...] = ()

    def find(self, text: str, cut: bool, schemas: Schemas) -> Found:
        start = text.find(self.opener)
        calls: list[ToolCall] = []
        rest: list[str] = []
        edge = 0
        while start >= 0:
            rest.append(text[edge:start])
            end = text.find(self.closer, start)
            if end < 0:
                raise cut_off(self.closer, cut)
            calls.append(self.read(text[start + len(self.opener) : end], schemas))
            edge = end + len(self.closer)
            start = text.find(self.opener, edge)
        left = "".join(rest) + text[edge:]
        for mark in (self.closer, *self.inner):
            if mark in left:
                raise Malformed(f"{mark} stands outside a tool call; write {self.example}")
        return Found(tuple(calls), left)

    def read(self, block: str, schemas: Schemas) -> ToolCall:
        raise NotImplementedError


_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>(.*?)</function>\s*", re.DOTALL)
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>\s*", re.DOTALL)


class FunctionTagCalls(_Blocks):
    """Qwen3-Coder: `<function=name>\\n<parameter=key>\\nvalue\\n</parameter>\\n</function>` in a block."""

    name = "qwen-xml"
    inner = ("<function=", "</function>")
    marks: tuple[str, ...] = ("<tool_call>", "</tool_call>", *inner, "<parameter=", "</parameter>")
    example = "<tool_call>\n<function=tool>\n<parameter=key>\nvalue\n</parameter>\n</function>\n</tool_call>"

    def read(self, block: str, schemas: Schemas) -> ToolCall:
        function = _FUNCTION.fullmatch(block)
        if function is None:
            raise Malformed(f"A tool call holds one <function=name>…</function>; write {self.example}")
        name, body = function.group(1).strip(), function.group(2)
        known = schemas.get(name)
        arguments: dict[str, Any] = {}
        edge = 0
        while match := _PARAMETER.match(body, edge):
            key = match.group(1).strip()
            arguments[key] = _value(match.group(2), None if known is None else known.get(key, {}))
            edge = match.end()
        if body[edge:].strip():
            raise Malformed(
                f"The call of {name} holds {body[edge:].strip()[:40]!r} where <parameter=key>…</parameter> is expected."
            )
        return ToolCall(name, arguments)

    def write(self, calls: Sequence[ToolCall]) -> str:
        return "\n".join(
            f"<tool_call>\n<function={call.name}>\n"
            + "".join(f"<parameter={key}>\n{_text(value)}\n</parameter>\n" for key, value in call.arguments.items())
            + "</function>\n</tool_call>"
            for call in calls
        )


_PAIR = re.compile(r"\s*<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>\s*", re.DOTALL)


class ArgumentTagCalls(_Blocks):
    """GLM: `<tool_call>name\\n<arg_key>key</arg_key>\\n<arg_value>value</arg_value>\\n</tool_call>`."""

    name = "glm"
    inner = ("<arg_key>", "<arg_value>")
    marks: tuple[str, ...] = ("<tool_call>", "</tool_call>", *inner, "</arg_key>", "</arg_value>")
    example = "<tool_call>tool\n<arg_key>key</arg_key>\n<arg_value>value</arg_value>\n</tool_call>"

    def read(self, block: str, schemas: Schemas) -> ToolCall:
        name, _, _ = block.partition("<arg_key>")
        body, name = block[len(name) :], name.strip()
        if not name or any(mark in name for mark in ("<", "{", "\n")):
            raise Malformed(f"A tool call begins with the tool's name alone on its line; write {self.example}")
        known = schemas.get(name)
        arguments: dict[str, Any] = {}
        edge = 0
        while match := _PAIR.match(body, edge):
            key = match.group(1).strip()
            arguments[key] = _value(match.group(2), None if known is None else known.get(key, {}))
            edge = match.end()
        if body[edge:].strip():
            raise Malformed(
                f"The call of {name} holds {body[edge:].strip()[:40]!r} where "
                "<arg_key>…</arg_key><arg_value>…</arg_value> is expected."
            )
        return ToolCall(name, arguments)

    def write(self, calls: Sequence[ToolCall]) -> str:
        return "\n".join(
            f"<tool_call>{call.name}\n"
            + "".join(
                f"<arg_key>{key}</arg_key>\n<arg_value>{_text(value)}</arg_value>\n"
                for key, value in call.arguments.items()
            )
            + "</tool_call>"
            for call in calls
        )


_QUOTE = '<|"|>'
_BARE = re.compile(r"[^,:{}\[\]<\s]+")


class GemmaCalls:
    """Gemma 4: `<|tool_call>call:name{key:<|"|>text<|"|>,n:5}<tool_call|>`, keys sorted, strings in `<|"|>`."""

    name = "gemma"
    opener, closer = "<|tool_call>", "<tool_call|>"
    marks: tuple[str, ...] = (opener, closer, _QUOTE)
    example = '<|tool_call>call:tool{key:<|"|>value<|"|>}<tool_call|>'

    def find(self, text: str, cut: bool, schemas: Schemas) -> Found:
        start = text.find(self.opener)
        calls: list[ToolCall] = []
        rest: list[str] = []
        edge = 0
        while start >= 0:
            rest.append(text[edge:start])
            head = re.compile(r"\s*call:([^{\s]+)").match(text, start + len(self.opener))
            if head is None:
                if not text[start + len(self.opener) :].strip():
                    raise cut_off(self.closer, cut)
                raise Malformed(f"Write a tool call as {self.example}")
            arguments, end = self._read(text, head.end(), cut)
            if not isinstance(arguments, dict):
                raise Malformed(f"The call of {head.group(1)} needs its arguments in braces; write {self.example}")
            if not text.startswith(self.closer, end):
                raise cut_off(self.closer, cut)
            calls.append(ToolCall(head.group(1), arguments))
            edge = end + len(self.closer)
            start = text.find(self.opener, edge)
        left = "".join(rest) + text[edge:]
        if self.closer in left:
            raise Malformed(f"{self.closer} stands alone; write a call as {self.example}")
        return Found(tuple(calls), left)

    def _read(self, text: str, at: int, cut: bool) -> tuple[Any, int]:
        """The value at `at` and where it ends."""
        if text.startswith(_QUOTE, at):
            end = text.find(_QUOTE, at + len(_QUOTE))
            if end < 0:
                raise cut_off(_QUOTE, cut)
            return text[at + len(_QUOTE) : end], end + len(_QUOTE)
        if text.startswith(("{", "["), at):
            closer = "}" if text[at] == "{" else "]"
            pairs: dict[str, Any] = {}
            items: list[Any] = []
            at += 1
            while not text.startswith(closer, at):
                if closer == "}":
                    key, at = self._read(text, at, cut)
                    if not text.startswith(":", at):
                        raise (
                            cut_off(":", cut) if at >= len(text) else Malformed(f"A key needs a colon: {self.example}")
                        )
                    pairs[str(key)], at = self._read(text, at + 1, cut)
                else:
                    item, at = self._read(text, at, cut)
                    items.append(item)
                if text.startswith(",", at):
                    at += 1
                elif not text.startswith(closer, at):
                    raise cut_off(closer, cut)
            return (pairs if closer == "}" else items), at + 1
        bare = _BARE.match(text, at)
        if bare is None:
            raise cut_off(self.closer, cut) if at >= len(text) else Malformed(f"Write a tool call as {self.example}")
        try:
            value, end = json_at(bare.group(), 0, False, "the value")
        except Malformed:
            return bare.group(), bare.end()
        return (value if end == len(bare.group()) else bare.group()), bare.end()

    def write(self, calls: Sequence[ToolCall]) -> str:
        return "".join(f"{self.opener}call:{call.name}{self._write(call.arguments)}{self.closer}" for call in calls)

    def _write(self, value: Any) -> str:
        if isinstance(value, str):
            return f"{_QUOTE}{value}{_QUOTE}"
        if isinstance(value, Mapping):
            return "{" + ",".join(f"{key}:{self._write(value[key])}" for key in sorted(value, key=str.lower)) + "}"
        if isinstance(value, list | tuple):
            return "[" + ",".join(self._write(item) for item in value) + "]"
        return to_json(value)
