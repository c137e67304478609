"""The tokenizer's own chat template: rendered, and coaxed where it refuses.

Templates differ in what they take. Some have no system role, no tools or no tool role; some demand
structured calls with ids before a tool's message, some refuse parallel ones; some want user and
assistant to alternate. A conversation is therefore offered in several *modes*, the most faithful
first, until one is rendered with everything in it.

Where the template has no system role, the system's text stands before the first user's. Where it
has no tools, their schemas stand in the system message in a plain form. Where it renders no tool
role, a tool's result is a user message that holds `<tool_response>…</tool_response>`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2

from agentrl.chat.calls import CallFormat
from agentrl.chat.calls.base import to_json
from agentrl.errors import UsageError
from agentrl.trajectory import Role

_THINKING_FIELDS = ("reasoning_content", "reasoning", "thinking")
_THINKING_TAGS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel>thought", "<channel|>"),
)
_RENDER_ERRORS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError)


class Refused(Exception):
    """The template does not render this conversation, or loses a part of it."""


class Line(NamedTuple):
    """A message as the template gets it: plain text, and for tools always a name and an id."""

    role: Role
    text: str
    name: str = ""
    call_id: str = ""


class Voice(NamedTuple):
    """The place of an assistant's turn: only its shape is known to the template, never its words."""

    thinking: bool = False
    calls: int = 0


Item = Line | Voice


class Mode(NamedTuple):
    """How a conversation is offered.

    `calls`: "structured" (text and calls), "bare" (calls alone), "plain" (all of it as text),
    "forced" (calls also where none were made, for templates that demand them), "user" (tool results
    as user messages). `merge`: adjacent user messages become one. `each` gives every voice (and the
    results that answer it) a way of its own, so that a turn is shown the same whatever comes later.
    """

    calls: str = "structured"
    merge: bool = False
    each: tuple[str, ...] = ()

    def of(self, voice: int) -> str:
        """`calls` for the voice with this number."""
        return self.each[voice] if self.each else self.calls


def sentinel(kind: str, i: int, j: int = 0) -> str:
    """A stand-in of 9 characters (the length that some templates demand of an id)."""
    return f"\uf8f2{kind}{i:03d}{j:03d}\uf8f3"


def call_key(item: int, call: int, items: Sequence[Item]) -> tuple[str, str]:
    """The (name, id) that the `call`-th call of the voice at `item` has: those of its result where one follows."""
    at = item + 1 + call
    following = items[item + 1 : at + 1]
    if len(following) == call + 1 and all(isinstance(line, Line) and line.role == "tool" for line in following):
        line = following[-1]
        assert isinstance(line, Line)
        return line.name, line.call_id
    return sentinel("n", item, call), sentinel("i", item, call)


class Template:
    """A chat template with its options. `source` is its text; `thinking` the tags around thinking."""

    def __init__(self, tokenizer: Any, options: Mapping[str, Any], calls: CallFormat | None = None) -> None:
        self._tokenizer = tokenizer
        self._options = dict(options)
        self.source = template_source(tokenizer)
        self.calls = calls
        self._in_parts = False
        known = next((tags for tags in _THINKING_TAGS if tags[1] in self.source), None)
        self.thinking = known or _THINKING_TAGS[0]
        self.thinking_field = next((name for name in _THINKING_FIELDS if self._reads(name)), None)
        # A template that says nothing of thinking shows it as it shows any text.
        self.knows_thinking = known is not None or self.thinking_field is not None

    def _reads(self, name: str) -> bool:
        """True where the template's text takes `name` from a message."""
        return re.search(rf"""(?:\.|get\(['"]|\[['"]){name}\b|['"]{name}['"] in """, self.source) is not None

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[dict[str, Any]], generate: bool) -> str:
        """The template's text. Raises `Refused` with the template's reason."""
        given = [dict(message) for message in messages]
        if self._in_parts:
            for message in given:
                message["content"] = [{"type": "text", "text": message["content"]}]
        return self._rendered(given, tools, generate)

    def _rendered(self, given: list[dict[str, Any]], tools: Sequence[dict[str, Any]], generate: bool) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                given,
                tools=list(tools) or None,
                add_generation_prompt=generate,
                tokenize=False,
                **self._options,
            )
        except _RENDER_ERRORS as error:
            raise Refused(str(error)) from error
        return str(text)

    # -- what it can do ------------------------------------------------------------------------------

    def probe(self) -> None:
        """Find out whether there are a system role and tools. Raises `UsageError` where nothing works."""
        user = {"role": "user", "content": sentinel("u", 0)}
        alone = ""
        reason = "it drops the text"
        for self._in_parts in (False, True):  # templates of multimodal models want lists of parts
            try:
                alone = self.render([user], (), True)
            except Refused as error:
                reason = str(error)
            if sentinel("u", 0) in alone:
                break
        else:
            raise UsageError(f"the chat template does not render a user's message ({reason}); check chat_template")
        self.header = alone[alone.rindex(sentinel("u", 0)) + 9 :]
        self.has_system = self._shows([{"role": "system", "content": sentinel("s", 0)}, user], (), sentinel("s", 0))
        tool = {
            "type": "function",
            "function": {
                "name": sentinel("n", 0),
                "description": sentinel("d", 0),
                "parameters": {"type": "object", "properties": {}},
            },
        }
        self.has_tools = self._shows([user], (tool,), sentinel("n", 0))

    def picture(self, pad: str) -> str:
        """What stands in a message's words for a picture between them. Raises `UsageError` where that is not told."""
        before, after = " \n" + sentinel("u", 0), sentinel("u", 1) + "\n "  # words and pictures trimmed alike, or not
        words = [{"type": "text", "text": before}, {"type": "text", "text": after}]
        try:
            spoken = self.render([{"role": "user", "content": before + after}], (), True)
            shown = self._rendered([{"role": "user", "content": [words[0], {"type": "image"}, words[1]]}], (), True)
        except Refused as error:
            raise UsageError(f"the chat template takes no picture ({error}); put its family's own there") from error
        start, stop = shown.find(before) + len(before), shown.find(after)
        text = shown[start:stop]
        if text.count(pad) != 1 or shown[:start] + shown[stop:] != spoken:
            raise UsageError(
                f"the chat template does not write a picture as one {pad} between the words around it; put the model "
                "family's own chat_template.jinja there"
            )
        return text

    def _shows(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[dict[str, Any]], what: str) -> bool:
        try:
            text = self.render(messages, tools, True)
        except Refused:
            return False
        return what in text and sentinel("u", 0) in text

    # -- conversations -------------------------------------------------------------------------------

    def modes(self, items: Sequence[Item]) -> Iterator[Mode]:
        """The modes worth trying for `items`, the most faithful first."""
        tools = any(isinstance(item, Line) and item.role == "tool" for item in items)
        calls = any(isinstance(item, Voice) and item.calls for item in items)
        for merge in (False, True):
            if calls:
                yield Mode("structured", merge)
                yield Mode("bare", merge)
            yield Mode("plain", merge)
            if tools:
                yield Mode("forced", merge)
        if tools:
            yield Mode("user", False)
            yield Mode("user", True)

    def script(self, items: Sequence[Item], tools: Sequence[dict[str, Any]], mode: Mode) -> list[dict[str, Any]]:
        """`items` as messages for `render`, voices as sentinels (t thinking, c content, n name, z argument)."""
        messages: list[dict[str, Any]] = []
        n_voices, way = 0, mode.calls
        for index, item in enumerate(items):
            if isinstance(item, Voice):
                way = mode.of(n_voices)
                n_voices += 1
                messages.append(self._voiced(index, item, items, way))
            elif item.role == "tool" and way == "user":
                text = f"<tool_response>\n{item.text}\n</tool_response>"
                if index and messages[-1].get("wrapped"):
                    messages[-1]["content"] += "\n" + text
                else:
                    messages.append({"role": "user", "content": text, "wrapped": True})
            elif item.role == "tool":
                messages.append({"role": "tool", "content": item.text, "name": item.name, "tool_call_id": item.call_id})
            elif mode.merge and item.role == "user" and messages and messages[-1]["role"] == "user":
                messages[-1]["content"] += "\n\n" + item.text
            else:
                messages.append({"role": item.role, "content": item.text})
        for message in messages:
            message.pop("wrapped", None)
        return self.adapted(messages, tools)

    def adapted(self, messages: list[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Tools and the system's text put where this template takes them."""
        if tools and not self.has_tools:
            plain = self.plain_tools(tools)
            if messages and messages[0]["role"] == "system":
                text = messages[0]["content"]
                messages[0] = {"role": "system", "content": f"{text}\n\n{plain}" if text else plain}
            else:
                messages.insert(0, {"role": "system", "content": plain})
        if not self.has_system and messages and messages[0]["role"] == "system":
            system = messages.pop(0)["content"]
            if messages and messages[0]["role"] == "user":
                first = messages[0]["content"]
                messages[0] = {"role": "user", "content": f"{system}\n\n{first}" if system else first}
            else:
                messages.insert(0, {"role": "user", "content": system})
        return messages

    def plain_tools(self, tools: Sequence[dict[str, Any]]) -> str:
        """The schemas for templates without tools."""
        example = self.calls.example if self.calls else ""
        schemas = "\n".join(to_json(tool.get("function", tool)) for tool in tools)
        return f"# Tools\n\nYou may call these functions:\n{schemas}\n\nTo call one, write:\n{example}"

    def _voiced(self, index: int, voice: Voice, items: Sequence[Item], way: str) -> dict[str, Any]:
        content = sentinel("c", index)
        n = self.n_calls(index, voice, items, way)
        if n and way == "bare":
            content = ""
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if voice.thinking:
            self.think(message, sentinel("t", index))
        if n:
            message["tool_calls"] = [
                self.structured(*call_key(index, call, items), {"a": sentinel("z", index, call)}) for call in range(n)
            ]
        return message

    def think(self, message: dict[str, Any], thinking: str) -> None:
        """Put thinking into an assistant's message: in the template's field, else in the text."""
        if self.thinking_field:
            message[self.thinking_field] = thinking
        else:
            opener, closer = self.thinking
            message["content"] = f"{opener}\n{thinking}\n{closer}\n\n{message['content']}"

    @staticmethod
    def structured(name: str, identity: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        return {"type": "function", "id": identity, "function": {"name": name, "arguments": dict(arguments)}}

    @staticmethod
    def n_calls(index: int, voice: Voice, items: Sequence[Item], way: str) -> int:
        """How many structured calls the voice at `index` is given in this way (`Mode.calls`)."""
        if way in ("structured", "bare"):
            return voice.calls
        if way != "forced":
            return 0
        results = 0
        for item in items[index + 1 :]:
            if not isinstance(item, Line) or item.role != "tool":
                break
            results += 1
        return max(voice.calls, results) if results else 0


def template_source(tokenizer: Any) -> str:
    """The text of the chat template (of all of them, where there are several by name)."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        name = getattr(tokenizer, "name_or_path", "") or "this tokenizer"
        raise UsageError(
            f"{name} has no chat template, so messages cannot become tokens: use an instruction-tuned model, or put a "
            "chat_template.jinja of the model's family into its folder (or set tokenizer.chat_template)"
        )
    return "\n".join(template.values()) if isinstance(template, dict) else str(template)
