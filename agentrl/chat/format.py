"""One tokenizer's chat format: what ends a turn, how calls are written, what the policy said."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from agentrl.chat.calls import CallFormat, Schemas, call_format
from agentrl.chat.codec import Codec, frozen
from agentrl.chat.gaps import Gaps, Toolset
from agentrl.chat.layout import Layouts
from agentrl.chat.messages import Parsed
from agentrl.chat.reading import Reader
from agentrl.chat.saying import Sayings
from agentrl.chat.template import Line, Template, Voice, template_source
from agentrl.env import Say
from agentrl.errors import UsageError
from agentrl.pictures import Pictures
from agentrl.trajectory import Ids, Role

if TYPE_CHECKING:
    from agentrl.chat.dialogue import Dialogue

_NOTHING: Mapping[str, Any] = MappingProxyType({})


class ChatFormat:
    """How messages become ids for one tokenizer, and ids are understood. Immutable; shared by all episodes.

    `tokenizer` is a Hugging Face tokenizer with a chat template; `template_options` go to the template
    (`{"enable_thinking": False}`); `tool_format` is "auto", a name of `agentrl.chat.calls`, or
    "regex:PATTERN"; `pictures` is given for a model that sees: without it a picture is its `Image.alt`.
    Raises `UsageError` for a tokenizer without a template, or one that renders nothing.

    `stop_ids` end a turn: the template's end-of-turn token, role tokens that may follow a turn where no
    end token closes it, and the end-of-sequence ids of the tokenizer and its generation_config.json. Where the model
    sees, the placeholders of pictures end a turn too: a policy that writes one is told so, and its episode ends.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        tool_format: str = "auto",
        template_options: Mapping[str, Any] = _NOTHING,
        pictures: Pictures | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.pictures = pictures
        source = template_source(tokenizer)
        self.calls: CallFormat = call_format(tool_format, source)
        self.template = Template(tokenizer, template_options, self.calls)
        tags = self.template.thinking
        meaningful = "\n".join((source, *self.calls.marks, *tags))
        self.codec = Codec(tokenizer, meaningful)
        self.vocab_size = self.codec.size
        self.template.probe()
        if pictures is not None:
            shown = self.template.picture(pictures.pad)
            self.codec = Codec(tokenizer, "\n".join((meaningful, *pictures.reserved)), shown, pictures.pad)
        eos = _eos_ids(tokenizer)
        layouts = Layouts(self.template, self.codec, eos)
        self.gaps = Gaps(layouts, self.codec)
        self.end_ids = self.gaps.end_ids
        self._role_stops = self._announcing()
        self._ends = {
            role: frozen([self._role_stops[role]]) if role in self._role_stops else self.end_ids
            for role in ("tool", "user")
        }
        ends = (*self.codec.controls(self.end_ids)[-1:], *self._role_stops.values())
        turn_ends = frozenset((*ends, *eos))
        reserved = pictures.reserved_ids if pictures is not None else ()
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys((*ends, *eos, *reserved)))
        # What is said is encoded behind the header, where the spaces of some vocabularies depend on it.
        header = self.template.header
        spans = self.codec.control_spans(header)
        self._lead = header[spans[-1][0] - len(self.codec.string_of(spans[-1][1])) :] if spans else ""
        self._lead_ids = self.codec.encode(self._lead)
        inside = header.rfind(tags[0]) > header.rfind(tags[1])
        self.reader = Reader(self.codec, self.calls, tags, inside, turn_ends, frozenset(reserved))
        self._sayings = Sayings(self.template, self.codec, self.calls, inside)
        self._calls_known = tool_format != "auto" or self._sayings.reads_template()

    def _announcing(self) -> dict[Role, int]:
        """The ids that stop a turn by announcing who speaks next, where no end token closes it."""
        stops: dict[Role, int] = {}
        after: tuple[tuple[Role, int], ...] = (("user", 0), ("tool", 1))
        for role, calls in after:
            try:
                rule = self.gaps.rule(self.gaps.toolset(()), False, False, Voice(False, calls), [Line(role, "x")])
            except UsageError:
                continue
            if rule.stop is not None:
                stops[role] = rule.stop
        return stops

    def parse(self, ids: Ids, parameters: Schemas = MappingProxyType({})) -> Parsed:
        """Understand what the policy sampled (`ids` [n], the stop id included). Never raises for what it wrote.

        A malformed call, one cut by the limit, or thinking without an end gives `error` and no calls: it
        is never taken for a final answer. `parameters` (tool -> parameter -> JSON schema) types the
        arguments of formats that write them as bare text; `Dialogue.parse` passes its own tools'.
        """
        return self.reader.parse(ids, parameters)

    def say(self, dialogue: Dialogue, say: Say) -> Ids:
        """A scripted expert's message in `dialogue` as the ids that the policy would have sampled there.

        The template's own way of writing thinking and calls is used where it has one, else the tool
        format's. The ids end with the stop id. Raises `RecordError` where it is not the actor's turn.
        """
        dialogue.expect("say")
        text, n = self._sayings.text(say), self._lead_ids.size
        ids = self.codec.encode(self._lead + text)
        # Where a token straddles the end of the header, what is said begins with a token of its own.
        ids = ids[n:] if np.array_equal(ids[:n], self._lead_ids) else self.codec.encode(text)
        return frozen(np.concatenate([ids, self._ends["tool" if say.calls else "user"]]))

    def toolset(self, tools: Sequence[dict[str, Any]]) -> Toolset:
        """The interned form of `tools`. Raises `UsageError` where the template writes calls in an unknown form."""
        if tools and self.template.has_tools and not self._calls_known:
            raise UsageError(
                f"this chat template writes tool calls in a form that tool_format {self.calls.name!r} does not read: "
                "set tool_format to the family's, or to 'regex:…(?P<name>…)…(?P<arguments>…)…'"
            )
        return self.gaps.toolset(tools)


def _eos_ids(tokenizer: Any) -> tuple[int, ...]:
    """End-of-sequence ids of the tokenizer and of the generation config in its folder."""
    found = [tokenizer.eos_token_id]
    name = getattr(tokenizer, "name_or_path", "")
    config = Path(name) / "generation_config.json" if name else None
    if config is not None and config.is_file():
        try:
            told = json.loads(config.read_text("utf-8")).get("eos_token_id")
        except (OSError, ValueError) as error:
            raise UsageError(f"{config} cannot be read: {error}") from error
        found += told if isinstance(told, list) else [told]
    return tuple(dict.fromkeys(int(index) for index in found if index is not None))
