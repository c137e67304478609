"""A person at the policy's place: lines are read as tool calls or as messages, and answered in text.

`lookup(order_id=3)` (or several, `a(x=1); b()`), `{"name": "lookup", "arguments": {"order_id": 3}}`, or
anything else, which is said as it stands. `/say TEXT` says what would be read as a call.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Mapping
from typing import Any

from agentrl.env import Env
from agentrl.errors import AgentRLError, UsageError
from agentrl.task import Task
from agentrl.textual import TextEpisode
from agentrl.tool import Tool
from agentrl.trajectory import ToolCall

HELP = "call a tool: name(argument=value), or JSON; anything else is said as it stands; /say TEXT, /help, /quit"


class Game:
    """One episode that a person plays. `show(line, style)` prints."""

    def __init__(self, env: Env, task: Task, seed: int, show: Callable[..., None]) -> None:
        self.tools = {name: tool for name, (_, tool) in env.toolbox().items()}
        self.episode = TextEpisode(env, task, (seed,))
        self.show = show

    @property
    def over(self) -> bool:
        return self.episode.outcome is not None

    async def open(self) -> None:
        """Show the task and the tools."""
        first = await self.episode.open()
        self.show(f"task {self.episode.task.id}, at most {self.episode.env.max_turns} messages", "dim")
        self.show(first, "bold")
        for tool in self.tools.values():
            cost = f"  (cost {tool.options.cost:g})" if tool.options.cost else ""
            self.show(f"  {signature(tool)}{cost}", "cyan")
            self.show(f"    {tool.description}", "dim")
        self.show(HELP, "dim")

    async def take(self, line: str) -> None:
        """Play one line, and show what comes of it."""
        line = line.strip()
        if not line or line == "/help":
            self.show(HELP, "dim")
            return
        try:
            calls = [] if line.startswith("/say ") else read_calls(line, self.tools)
        except UsageError as error:  # a slip of the keyboard is not the policy's message
            self.show(str(error), "red")
            return
        heard = await self.episode.say("" if calls else line.removeprefix("/say "), calls, raw=line)
        if heard.answers:
            for answer in heard.answers:
                result = answer.result
                cost = f", cost {result.cost:g}" if result.cost else ""
                style = "" if result.ok else "red"
                self.show(result.text, style)
                self.show(f"  [{result.error or 'ok'}, {result.seconds:.3f} s{cost}]", "dim")
        elif heard.observation:
            self.show(heard.observation)
        if heard.reward is not None:
            self.show(f"  reward {heard.reward:g}", "green")
        if self.over:
            await self._finish()

    async def close(self) -> None:
        if not self.over:
            self.show("left before the end: not scored", "dim")
        await self.episode.close()

    async def _finish(self) -> None:
        try:
            parts, total, success = await self.episode.score()
        except AgentRLError as error:
            self.show(f"the score failed: {error}", "red")
            return
        uses = [use for turn in self.episode.turns for use in turn.tools]
        earned = sum(turn.reward or 0.0 for turn in self.episode.turns)
        named = ", ".join(f"{name} {value if value is None else f'{value:g}'}" for name, value in parts.items())
        reward = "missing" if total is None else f"{total + earned:g}"
        self.show(
            f"{self.episode.outcome}: reward {reward} ({named or 'no parts'}), "
            f"{'success' if success else 'no success'}, {len(uses)} calls, cost {sum(u.result.cost for u in uses):g}",
            "bold green" if success else "bold",
        )
        if not success and self.episode.task.answer is not None:
            self.show(f"  the answer was {self.episode.task.answer}", "dim")


def read_calls(line: str, tools: Mapping[str, Tool]) -> list[ToolCall]:
    """The tool calls that `line` writes; none where it is plain text.

    Raises `UsageError` for what is meant as a call but cannot be read as one.
    """
    if line.startswith(("{", "[")):
        return _from_json(line)
    try:
        statements = ast.parse(line).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return _hopeless(line, tools)
    calls = [s.value for s in statements if isinstance(s, ast.Expr) and isinstance(s.value, ast.Call)]
    names = [ast.unparse(call.func) for call in calls]
    if len(calls) < len(statements) or not any(name in tools for name in names):
        lone = len(calls) == len(statements) == 1 and isinstance(calls[0].func, ast.Name) and tools
        if not lone:
            return []
    return [ToolCall(name, _arguments(call, name, tools.get(name))) for name, call in zip(names, calls, strict=True)]


def _hopeless(line: str, tools: Mapping[str, Tool]) -> list[ToolCall]:
    name = line.partition("(")[0].strip()
    if name in tools and "(" in line:
        raise UsageError(f"cannot read this call of {name}; write {signature(tools[name])}, or /say it as text")
    return []


def _from_json(line: str) -> list[ToolCall]:
    try:
        value = json.loads(line)
    except ValueError:
        return []
    calls = value if isinstance(value, list) else [value]
    if not calls or not all(isinstance(c, dict) and isinstance(c.get("name"), str) for c in calls):
        return []
    if not all(isinstance(c.get("arguments", {}), dict) for c in calls):
        raise UsageError('"arguments" must be an object, as in {"name": "tool", "arguments": {"key": "value"}}')
    return [ToolCall(c["name"], c.get("arguments", {})) for c in calls]


def _arguments(call: ast.Call, name: str, tool: Tool | None) -> dict[str, Any]:
    """Keyword arguments, and positional ones by the tool's order. An unknown tool is the host's to refuse."""
    fields = tool.arguments.model_fields.values() if tool else ()
    order = [field.alias or "" for field in fields] if tool else [str(n) for n in range(len(call.args))]
    if len(call.args) > len(order):
        raise UsageError(f"{name} takes {len(order)} arguments; name them, as in {name}(key=value)")
    pairs = [*zip(order, call.args, strict=False), *((k.arg, k.value) for k in call.keywords)]
    try:
        return {str(key): ast.literal_eval(value) for key, value in pairs}
    except ValueError:
        raise UsageError(f"arguments of {name} must be plain values: numbers, 'text', True, None, lists") from None


def signature(tool: Tool) -> str:
    """`lookup(order_id: integer, field: "price" | "status" = "status")`."""
    schema = tool.schema["function"]["parameters"]
    required = schema.get("required", ())
    parts = []
    for name, inner in schema["properties"].items():
        default = "" if name in required else f" = {json.dumps(inner.get('default'), ensure_ascii=False)}"
        parts.append(f"{name}: {_type(inner)}{default}")
    return f"{tool.name}({', '.join(parts)})"


def _type(schema: Mapping[str, Any]) -> str:
    if "enum" in schema:
        return " | ".join(json.dumps(value, ensure_ascii=False) for value in schema["enum"])
    if "anyOf" in schema:
        return " | ".join(_type(inner) for inner in schema["anyOf"])
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    return str(schema.get("type", schema.get("$ref", "any").rpartition("/")[2] or "any"))
