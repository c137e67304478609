"""Tool-call formats, each an object that finds and writes calls, and the choice among them."""

from __future__ import annotations

from agentrl.chat.calls.base import CallFormat as CallFormat
from agentrl.chat.calls.base import Found as Found
from agentrl.chat.calls.base import Malformed as Malformed
from agentrl.chat.calls.base import Schemas as Schemas
from agentrl.chat.calls.jsonlike import HermesCalls, LlamaCalls, MistralCalls
from agentrl.chat.calls.markup import ArgumentTagCalls, FunctionTagCalls, GemmaCalls
from agentrl.chat.calls.pattern import PatternCalls
from agentrl.errors import UsageError

# What only one family's template says, most telling first.
_TELLTALES = (
    ("<function=", "qwen-xml"),
    ("<arg_key>", "glm"),
    ("[TOOL_CALLS]", "mistral"),
    ("<|tool_call>call:", "gemma"),
    ("<tool_call>", "hermes"),
    ('"parameters": ', "llama"),
    ("<|python_tag|>", "llama"),
)
NAMES = ("hermes", "llama", "mistral", "qwen-xml", "glm", "gemma")


def call_format(name: str, template: str) -> CallFormat:
    """The format called `name`; "auto" reads it off the template's text (Hermes where it tells nothing);
    "regex:PATTERN" makes one. Raises `UsageError` for an unknown name."""
    if name.startswith("regex:"):
        return PatternCalls(name.removeprefix("regex:"))
    if name == "auto":
        plain = template.replace("\\", "")
        name = next((known for text, known in _TELLTALES if text in plain), "hermes")
    if name == "mistral":
        return MistralCalls(pairs="[ARGS]" in template)
    made: dict[str, type[HermesCalls | LlamaCalls | FunctionTagCalls | ArgumentTagCalls | GemmaCalls]] = {
        "hermes": HermesCalls,
        "llama": LlamaCalls,
        "qwen-xml": FunctionTagCalls,
        "glm": ArgumentTagCalls,
        "gemma": GemmaCalls,
    }
    if name not in made:
        raise UsageError(f"tool_format {name!r} is unknown; use auto, {', '.join(NAMES)}, or regex:PATTERN")
    return made[name]()
