"""A scripted expert's words, as the policy would have sampled them.

How a template writes an assistant's message (thinking, text, calls) is learnt once per shape and
verified with other words; a template that cannot write calls gets them from the tool format.
"""

from __future__ import annotations

from dataclasses import dataclass

from agentrl.chat.calls import CallFormat, Malformed
from agentrl.chat.codec import Codec
from agentrl.chat.template import Refused, Template, sentinel
from agentrl.env import Say
from agentrl.trajectory import ToolCall


@dataclass(frozen=True, slots=True)
class _Words:
    thinking: str
    text: str
    calls: tuple[ToolCall, ...]


class Sayings:
    """Writes messages. `inside`: the generation header has opened the thinking block."""

    def __init__(self, template: Template, codec: Codec, calls: CallFormat, inside: bool) -> None:
        self._template = template
        self._codec = codec
        self._calls = calls
        self._inside = inside
        self._patterns: dict[tuple[bool, bool, int], tuple[str, ...] | None] = {}

    def text(self, say: Say) -> str:
        """The (defused) text of `say`, without the end of the turn."""
        calls = tuple(
            ToolCall(self._codec.defuse(c.name), self._codec.defuse_all(c.arguments), c.id or f"{i:09d}")
            for i, c in enumerate(say.calls)
        )
        defuse = self._codec.defuse
        words = _Words(defuse(say.thinking.strip()), defuse(say.text.strip()), calls)
        shape = (bool(words.thinking), bool(words.text), len(calls))
        if shape not in self._patterns:
            self._patterns[shape] = self._learn(*shape)
        literals = self._patterns[shape]
        if literals is None:
            return self._write(words)
        parts = self._parts(words)
        return "".join(text for pair in zip(literals, (*parts, ""), strict=True) for text in pair)

    def reads_template(self) -> bool:
        """False where the template writes calls in a form that the tool format does not understand."""
        call = ToolCall("look", {"a": "b"}, "000000000")
        try:
            message = {"role": "assistant", "content": "", "tool_calls": [self._structured(call)]}
            text = self._template.render([{"role": "user", "content": "x"}, message], (), False)
        except Refused:
            return True
        if "look" not in text:
            return True
        try:
            # The prompt may hold an example in the same form: only the last call is the one written here.
            found = self._calls.find(text[text.rindex("x") :] if "x" in text else text, False, {})
        except Malformed:
            return False
        return any(c.name == "look" and dict(c.arguments) == {"a": "b"} for c in found.calls)

    def _parts(self, words: _Words) -> tuple[str, ...]:
        parts = (words.thinking, words.text, self._calls.write(words.calls))
        return tuple(part for part in parts if part)

    def _learn(self, thinking: bool, text: bool, n: int) -> tuple[str, ...] | None:
        """The literals around the parts of a message of this shape, or None."""
        words = _Words(
            sentinel("t", 0) * thinking,
            sentinel("c", 0) * text,
            tuple(ToolCall(sentinel("n", 0, i), {"a": sentinel("z", 0, i)}, f"{i:09d}") for i in range(n)),
        )
        other = _Words(
            "so\n\"it'<b> é" * thinking,
            "well\n\n{'x': \"y\"} <i>" * text,
            tuple(ToolCall("f", {"b": [1, "x\n"], "c": {"d": None, "e": True}}, f"{i:09d}") for i in range(n)),
        )
        written = self._write(words)
        literals: list[str] = []
        for part in self._parts(words):
            before, found, written = written.partition(part)
            if not found:
                return None
            literals.append(before)
        literals.append(written)
        again = "".join(t for pair in zip(literals, (*self._parts(other), ""), strict=True) for t in pair)
        return tuple(literals) if again == self._write(other) else None

    def _write(self, words: _Words) -> str:
        try:
            return self._rendered(words)
        except Refused:
            return self._composed(words)

    def _rendered(self, words: _Words) -> str:
        """By the template, as the last message; what follows the last part is the end of the turn."""
        user = {"role": "user", "content": sentinel("u", 0)}
        message: dict[str, object] = {"role": "assistant", "content": words.text}
        if words.thinking:
            self._template.think(message, words.thinking)
        if words.calls:
            message["tool_calls"] = [self._structured(call) for call in words.calls]
        header = self._template.render([user], (), True)
        text = self._template.render([user, message], (), False)
        parts = self._parts(words)
        if not text.startswith(header) or not parts:
            raise Refused("the template writes a last message unlike the header for one")
        edge = len(header)
        for part in parts:
            at = text.find(part, edge)
            if at < 0:
                raise Refused("the template loses a part of the message")
            edge = at + len(part)
        return text[len(header) : edge]

    def _composed(self, words: _Words) -> str:
        """By hand: the thinking block, the text, the calls as the tool format writes them."""
        opener, closer = self._template.thinking
        lead = ""
        if words.thinking or self._inside:
            lead = f"{'' if self._inside else opener + chr(10)}{words.thinking}\n{closer}\n\n"
        return lead + "\n".join(self._parts(_Words("", words.text, words.calls)))

    def _structured(self, call: ToolCall) -> dict[str, object]:
        return self._template.structured(call.name, call.id, call.arguments)
