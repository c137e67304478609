"""Understanding what the policy said: thinking, calls, and the rest."""

from __future__ import annotations

from agentrl.chat.calls import CallFormat, Malformed, Schemas
from agentrl.chat.codec import Codec
from agentrl.chat.messages import Parsed
from agentrl.trajectory import Ids, ToolCall


class Reader:
    """Reads sampled ids. `tags` are those around thinking; `inside`: the generation header opens them; `reserved` are
    ids that the policy must not write, though it can."""

    def __init__(
        self,
        codec: Codec,
        calls: CallFormat,
        tags: tuple[str, str],
        inside: bool,
        stops: frozenset[int],
        reserved: frozenset[int] = frozenset(),
    ) -> None:
        self._codec = codec
        self._calls = calls
        self._opener, self._closer = tags
        self._inside = inside
        self._stops = stops
        self._reserved = reserved

    def ended(self, ids: Ids) -> bool:
        """True where the turn ends with a stop id, false where a limit cut it."""
        return ids.size > 0 and int(ids[-1]) in self._stops

    def spoilt(self, ids: Ids) -> bool:
        """True where a placeholder of pictures is among what was said: no engine could tell it from a picture's."""
        return bool(self._reserved) and not self._reserved.isdisjoint(ids.tolist())

    def parse(self, ids: Ids, parameters: Schemas) -> Parsed:
        cut = not self.ended(ids)
        said = ids.tolist() if cut else ids[:-1].tolist()
        text = self._codec.decode(said)
        thinking, rest = self._split(text)
        if self.spoilt(ids):
            sentence = "You wrote a token that stands for a picture: only the environment shows pictures."
            return Parsed(text, "", thinking, (), sentence)
        if rest is None:
            how = "was cut off by the token limit" if cut else "has no end"
            sentence = f"Your thinking {how}: close it with {self._closer}, then call a tool or answer."
            return Parsed(text, "", thinking, (), sentence)
        calls: tuple[ToolCall, ...] = ()
        error = None
        try:
            found = self._calls.find(rest, cut, parameters)
            calls, rest = found.calls, found.rest
        except Malformed as mistake:
            error = str(mistake)
        if self._codec.has_control(said):
            rest = self._codec.without_control_text(rest)
        return Parsed(text, rest.strip(), thinking, calls, error)

    def _split(self, text: str) -> tuple[str, str | None]:
        """(thinking, the rest); the rest is None where thinking does not end."""
        end = text.find(self._closer)
        start = text.find(self._opener) if end < 0 else text.find(self._opener, 0, end)
        if end < 0:
            if start < 0 and not self._inside:
                return "", text
            return text[start + len(self._opener) if start >= 0 else 0 :].strip(), None
        before = text[:start] if start >= 0 and not self._inside else ""
        inner = text[start + len(self._opener) if start >= 0 else 0 : end]
        return inner.strip(), before + text[end + len(self._closer) :]

    def thinks(self, text: str) -> bool:
        """True where an assistant's `text` holds (a part of) a thinking block."""
        return self._inside or self._opener in text or self._closer in text

    def after_thinking(self, ids: Ids) -> int:
        """The index of the first token after the thinking block and the newlines behind it.

        A token that holds both the end of the block and something after it counts as after: dropping
        thinking never loses a character of what was said. Thinking without an end leaves nothing but
        the stop id.
        """
        listed = ids.tolist()
        if self._closer not in self._codec.decode(listed):
            return len(listed) - self.ended(ids)
        low, high = 1, len(listed)
        while low < high:
            middle = (low + high) // 2
            if self._closer in self._codec.decode(listed[:middle]):
                high = middle
            else:
                low = middle + 1
        if self._codec.decode(listed[:low]).partition(self._closer)[2].strip("\n"):
            return low - 1
        while low < len(listed) and not self._codec.decode(listed[low : low + 1]).strip("\n"):
            low += 1
        return low
