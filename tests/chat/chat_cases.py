"""What the chat tests share: a tool, spans of sampled ids, an expert's turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from chat_dialects import DIALECTS, tokenizer_of

from agentrl.chat import ChatFormat, Dialogue, Message, Parsed
from agentrl.env import Say
from agentrl.trajectory import Ids, Span, ToolCall, VersionRun, as_floats, as_ids

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "calc",
            "description": "One operation on two numbers.",
            "parameters": {
                "type": "object",
                "properties": {
                    "a": {"type": "integer", "description": "the left number"},
                    "op": {"type": "string", "enum": ["+", "-"]},
                    "b": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
                    "more": {"type": "array", "items": {"type": "integer"}},
                },
                "required": ["a"],
            },
        },
    }
]
_FORMATS: dict[str, ChatFormat] = {}


def chat_of(name: str) -> ChatFormat:
    """The dialect's chat format; one for all tests, as it is one for all episodes."""
    if name not in _FORMATS:
        _FORMATS[name] = ChatFormat(tokenizer_of(name), template_options=DIALECTS[name].options)
    return _FORMATS[name]


def sampled(ids: Sequence[int] | Ids) -> Span:
    vector = as_ids(ids)
    versions = (VersionRun(0, 0, vector.size),) if vector.size else ()
    return Span(vector, "assistant", "sampled", logprobs=as_floats(np.full(vector.size, -0.5)), versions=versions)


def say(dialogue: Dialogue, text: str = "", *calls: ToolCall, thinking: str = "") -> tuple[Span, Parsed]:
    """An expert's turn, taken as if it had been sampled."""
    ids = dialogue.chat.say(dialogue, Say(text, calls, thinking))
    span, parsed = sampled(ids), dialogue.parse(ids)
    dialogue.heard(span, parsed)
    return span, parsed


def hear(dialogue: Dialogue, text: str, end: bool = True) -> tuple[Span, tuple[Span, ...]]:
    """The policy writes `text`, ended by the first stop id or cut."""
    chat = dialogue.chat
    ids = chat.tokenizer(text, add_special_tokens=False)["input_ids"] + ([chat.stop_ids[0]] if end else [])
    span = sampled(ids)
    return span, dialogue.heard(span, dialogue.parse(span.ids))


def call(index: int = 0, **arguments: Any) -> ToolCall:
    return ToolCall("calc", arguments or {"a": index, "op": "+"}, f"{index:09d}")


def talk(name: str, *first: Message, tools: Sequence[dict[str, Any]] | None = None) -> Dialogue:
    chat = chat_of(name)
    dialogue = Dialogue(chat, TOOLS if tools is None else tools)
    dialogue.start(first or [Message("user", "What is 1+2?")])
    return dialogue


def plain_call(one: ToolCall) -> tuple[str, Mapping[str, Any]]:
    return one.name, dict(one.arguments)


def text_of_ids(chat: ChatFormat, ids: Ids) -> str:
    return chat.codec.decode(ids.tolist())
