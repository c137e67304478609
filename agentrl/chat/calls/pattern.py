"""Calls in any form, by a regular expression of the user's own."""

from __future__ import annotations

import re
from collections.abc import Sequence

from agentrl.chat.calls.base import Found, Malformed, Schemas, call_of, cut_off, json_at, to_json
from agentrl.errors import UsageError
from agentrl.trajectory import ToolCall

_GROUP = re.compile(r"\(\?P<(name|arguments)>")


class PatternCalls:
    """`pattern` has the named groups `name` and `arguments` (a JSON object).

    What stands before the first group, as plain text, opens a call: where it occurs but the pattern
    does not match, the call is malformed. Calls are written by putting name and arguments in place
    of the groups; a pattern whose writing it does not match itself cannot write.
    """

    name = "regex"

    def __init__(self, pattern: str) -> None:
        try:
            self.pattern = re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise UsageError(f"tool_format: {pattern!r} is not a regular expression: {error}") from None
        if set(self.pattern.groupindex) < {"name", "arguments"}:
            raise UsageError(f"tool_format: {pattern!r} needs the groups (?P<name>…) and (?P<arguments>…)")
        self._parts = _literals(pattern)
        self.opener = self._parts[0] if self._parts else ""
        self.marks: tuple[str, ...] = tuple(part for part in self._parts[::2] if part)
        written = self._fill("tool", '{"key": "value"}')
        found = self.pattern.fullmatch(written)
        self._writes = found is not None and found["name"] == "tool" and found["arguments"] == '{"key": "value"}'
        self.example = written if self._writes else pattern

    def find(self, text: str, cut: bool, schemas: Schemas) -> Found:
        calls: list[ToolCall] = []
        rest: list[str] = []
        edge = 0
        for match in self.pattern.finditer(text):
            rest.append(text[edge : match.start()])
            arguments, end = json_at(match["arguments"], 0, False, "the arguments")
            if match["arguments"][end:].strip():
                raise Malformed(f"After the arguments there is more: {match['arguments'][end:].strip()[:40]!r}")
            calls.append(call_of({"name": match["name"], "arguments": arguments}, self.example))
            edge = match.end()
        left = "".join(rest) + text[edge:]
        if self.opener.strip() and self.opener.strip() in left:
            raise cut_off("its end", cut) if cut else Malformed(f"The tool call is malformed; write {self.example}")
        return Found(tuple(calls), left)

    def write(self, calls: Sequence[ToolCall]) -> str:
        if calls and not self._writes:
            raise UsageError(
                f"tool_format: calls cannot be written from the pattern {self.pattern.pattern!r}; "
                "keep everything outside the two groups plain text, or do without demonstrations"
            )
        return "\n".join(self._fill(call.name, to_json(call.arguments)) for call in calls)

    def _fill(self, name: str, arguments: str) -> str:
        values = {"name": name, "arguments": arguments}
        return "".join(values[part] if index % 2 else part for index, part in enumerate(self._parts))


def _literals(pattern: str) -> list[str]:
    """[text, group, text, group, text]: the pattern around its two groups, unescaped."""
    parts: list[str] = []
    edge = 0
    for match in _GROUP.finditer(pattern):
        if match.start() < edge:
            continue
        parts += [_unescaped(pattern[edge : match.start()]), match.group(1)]
        depth, at, in_class = 1, match.end(), False
        while at < len(pattern) and depth:
            char = pattern[at]
            at += 1 if char != "\\" else 2
            if char in "[]":
                in_class = char == "["
            elif not in_class and char in "()":
                depth += 1 if char == "(" else -1
        edge = at
    return [*parts, _unescaped(pattern[edge:])]


def _unescaped(pattern: str) -> str:
    """The plainest text that a piece of a pattern may match: optional blanks go, escapes are undone."""
    plain = re.sub(r"\\s[*?]|[\^$]$|^\^", "", pattern)
    plain = plain.replace(r"\s+", " ").replace(r"\n", "\n").replace(r"\t", "\t")
    return re.sub(r"\\(\W)", r"\1", plain)
