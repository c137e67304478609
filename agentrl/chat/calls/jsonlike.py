"""Calls written as JSON objects: Hermes and Qwen, Llama, Mistral."""

from __future__ import annotations

import re
from collections.abc import Sequence

from agentrl.chat.calls.base import Found, Malformed, Schemas, call_of, cut_off, json_at, to_json
from agentrl.trajectory import ToolCall


class HermesCalls:
    """`<tool_call>\\n{"name": …, "arguments": {…}}\\n</tool_call>`, one block a call."""

    name = "hermes"
    opener, closer = "<tool_call>", "</tool_call>"
    marks: tuple[str, ...] = (opener, closer)
    example = '<tool_call>\n{"name": "tool", "arguments": {"key": "value"}}\n</tool_call>'

    def find(self, text: str, cut: bool, schemas: Schemas) -> Found:
        start = text.find(self.opener)
        if start < 0 and "{" not in text and self.closer not in text:
            return Found((), text)
        calls: list[ToolCall] = []
        rest: list[str] = []
        edge = 0
        while start >= 0:
            rest.append(text[edge:start])
            value, end = json_at(text, start + len(self.opener), cut, self.closer)
            calls.append(call_of(value, self.example))
            closing = text.find(self.closer, end)
            if closing < 0:
                raise cut_off(self.closer, cut)
            if text[end:closing].strip():
                raise Malformed(
                    f"There is more than one JSON object in a tool call: {text[end:closing].strip()[:40]!r}"
                )
            edge = closing + len(self.closer)
            start = text.find(self.opener, edge)
        rest.append(text[edge:])
        left = "".join(rest)
        if self.closer in left:
            raise Malformed(f"{self.closer} stands alone; write a call as {self.example}")
        if left.lstrip().startswith("{") and '"name"' in left and ('"arguments"' in left or '"parameters"' in left):
            raise Malformed(f"The tool call stands outside {self.opener} and {self.closer}; write {self.example}")
        return Found(tuple(calls), left)

    def write(self, calls: Sequence[ToolCall]) -> str:
        return "\n".join(
            f'{self.opener}\n{{"name": {to_json(call.name)}, "arguments": {to_json(call.arguments)}}}\n{self.closer}'
            for call in calls
        )


_LLAMA_START = re.compile(r'<\|python_tag\|>|^[ \t]*(?=\{\s*"(?:name|type|function)"\s*:)', re.MULTILINE)
_LLAMA_NEXT = re.compile(r"(?:\s|;|,|<\|python_tag\|>)*(?=\{)")


class LlamaCalls:
    """`{"name": …, "parameters": {…}}`, after `<|python_tag|>` or bare at the start of a line.

    A JSON object whose first key is "name" is taken for a call; several follow each other.
    """

    name = "llama"
    marks: tuple[str, ...] = ("<|python_tag|>",)
    example = '{"name": "tool", "parameters": {"key": "value"}}'

    def find(self, text: str, cut: bool, schemas: Schemas) -> Found:
        start = _LLAMA_START.search(text) if "{" in text or "<|python_tag|>" in text else None
        if start is None:
            return Found((), text)
        calls: list[ToolCall] = []
        edge = start.end()
        following = _LLAMA_NEXT.match(text, edge)
        if following is None:
            if not text[edge:].strip():
                raise cut_off("its JSON object", cut)
            raise Malformed(f"After <|python_tag|> a JSON object is expected: {self.example}")
        while following is not None:
            value, edge = json_at(text, following.end(), cut, "the closing }")
            calls.append(call_of(value, self.example))
            following = _LLAMA_NEXT.match(text, edge)
        return Found(tuple(calls), text[: start.start()] + text[edge:])

    def write(self, calls: Sequence[ToolCall]) -> str:
        return "; ".join(f'{{"name": {to_json(call.name)}, "parameters": {to_json(call.arguments)}}}' for call in calls)


class MistralCalls:
    """`[TOOL_CALLS] [{"name": …, "arguments": {…}, "id": …}, …]`, or the later `[TOOL_CALLS]name[ARGS]{…}`.

    Both are read; `pairs` says which is written.
    """

    name = "mistral"
    opener, arguments = "[TOOL_CALLS]", "[ARGS]"
    marks: tuple[str, ...] = (opener, arguments, "[CALL_ID]")

    def __init__(self, pairs: bool = False) -> None:
        self.pairs = pairs
        self.example = (
            '[TOOL_CALLS]tool[ARGS]{"key": "value"}'
            if pairs
            else '[TOOL_CALLS] [{"name": "tool", "arguments": {"key": "value"}}]'
        )

    def find(self, text: str, cut: bool, schemas: Schemas) -> Found:
        start = text.find(self.opener)
        if start < 0:
            if self.arguments in text:
                raise Malformed(f"{self.arguments} stands alone; write a call as {self.example}")
            return Found((), text)
        calls: list[ToolCall] = []
        before, edge = text[:start], start
        while text.startswith(self.opener, edge):
            edge += len(self.opener)
            while edge < len(text) and text[edge].isspace():
                edge += 1
            if text.startswith("[", edge):
                values, edge = json_at(text, edge, cut, "the closing ]")
                if not values:
                    raise Malformed(f"The list of tool calls is empty; write a call as {self.example}")
                calls += [call_of(value, self.example) for value in values]
            else:
                head, mark, _ = text[edge:].partition(self.arguments)
                if not mark:
                    raise cut_off(self.arguments, cut) if cut else Malformed(f"Write a call as {self.example}")
                value, end = json_at(text, edge + len(head) + len(mark), cut, "the closing }")
                name, _, identity = head.partition("[CALL_ID]")
                calls.append(call_of({"name": name.strip(), "arguments": value, "id": identity.strip()}, self.example))
                edge = end
            while edge < len(text) and text[edge].isspace():
                edge += 1
        return Found(tuple(calls), before + text[edge:])

    def write(self, calls: Sequence[ToolCall]) -> str:
        if self.pairs:
            return "".join(f"{self.opener}{call.name}{self.arguments}{to_json(call.arguments)}" for call in calls)
        objects = [
            {"name": call.name, "arguments": call.arguments} | ({"id": call.id} if call.id else {}) for call in calls
        ]
        return f"{self.opener} {to_json(objects)}" if calls else ""
