"""Random conversations through every dialect: nothing sampled ever changes, nobody else writes control ids."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
from chat_cases import TOOLS, chat_of, sampled
from chat_dialects import DIALECTS, tokenizer_of
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from agentrl.chat import ChatFormat, Dialogue, Message
from agentrl.chat.gaps import Gaps, Rule
from agentrl.env import Say
from agentrl.trajectory import Ids, Span, ToolCall, ids_of

NAMES = sorted(DIALECTS)
# Families whose template shows earlier turns differently by its own rule; the others only ever append.
REWRITES = {"qwen3", "qwen3-nothink", "qwen3.5", "glm4.5", "gemma4", "mistral"}

_STRINGS = sorted({token for name in NAMES for token in (*DIALECTS[name].special, *DIALECTS[name].added)})
words = st.sampled_from(
    [*_STRINGS, "", " ", "\n", "\n\n", "5", "Hello", '{"a": "', "\\", "é中😀", "</", "<|", "\uf8f0", "think"]
)
contents = st.lists(words, max_size=5).map("".join)
thoughts = st.sampled_from(["", "hm", "a b\n\nc"])
arguments = st.dictionaries(
    st.sampled_from(["a", "op"]), st.sampled_from([1, "x", "é中", "<|im_end|>", "a\nb"]), max_size=2
)
calls = st.lists(st.builds(ToolCall, st.just("calc"), arguments), max_size=3)


@st.composite
def turns(draw: st.DrawFn) -> dict[str, Any]:
    """A turn: what the policy does (an expert's message, or any ids), how it is cut, and what follows."""
    made = draw(calls)
    return {
        "say": Say(draw(st.sampled_from(["", "Well.", "It is 5."])), tuple(made), draw(thoughts)),
        "raw": draw(st.none() | st.lists(st.integers(0, 10**6), max_size=12)),
        "cut": draw(st.sampled_from([0, 0, 0, 1, 4])),
        "reply": draw(
            st.sampled_from(["tools", "tools", "tool", "user"]).flatmap(
                lambda kind: st.lists(
                    contents,
                    min_size=max(1, len(made)) if kind == "tools" else 1,
                    max_size=max(1, len(made)) if kind == "tools" else 1,
                ).map(lambda texts: [("user" if kind == "user" else "tool", text) for text in texts])
            )
        ),
    }


conversations = st.fixed_dictionaries(
    {"system": st.none() | contents, "user": contents, "turns": st.lists(turns(), min_size=1, max_size=4)}
)


# An empty result tells nothing of where results go; the next one must not move it.
EMPTY_THEN_NOT = {
    "system": None,
    "user": "",
    "turns": [{"say": Say("ok"), "raw": None, "cut": 0, "reply": [("tool", text)]} for text in ("", "5", "")],
}


# Thinking of a step before the last one is dropped by a user's message, though the last one held none.
SILENT_AFTER_THOUGHT = {
    "system": None,
    "user": "Hello",
    "turns": [
        {
            "say": Say("", (ToolCall("calc", {"a": 1}),), "hm"),
            "raw": None,
            "cut": 0,
            "reply": [("tool", "5")],
        },
        {"say": Say(""), "raw": [40, 41], "cut": 0, "reply": [("user", "Hello")]},
    ],
}


def ids_said(chat: ChatFormat, dialogue: Dialogue, turn: dict[str, Any]) -> Ids:
    """What the policy samples: an expert's message or any ids at all, perhaps cut by the limit."""
    if turn["raw"] is not None:
        stops = set(chat.stop_ids)
        ids = [index % chat.vocab_size for index in turn["raw"]]
        ids = [index for index in ids if index not in stops] + [chat.stop_ids[0]]
    else:
        say: Say = turn["say"]
        ids = chat.say(dialogue, say if say.text or say.calls else Say("ok", (), say.thinking)).tolist()
    return sampled(ids[: max(0, len(ids) - turn["cut"])]).ids


def play(chat: ChatFormat, conversation: dict[str, Any], harmless: bool = False) -> tuple[list[Ids], Dialogue]:
    """The contexts of all turns. `harmless` replaces all contents by plain ones, blank where they were blank."""

    def content(text: str) -> str:
        return text if not harmless or not text.strip() else "plain"

    dialogue = Dialogue(chat, TOOLS)
    first = [Message("user", content(conversation["user"]))]
    if conversation["system"] is not None:
        first.insert(0, Message("system", content(conversation["system"])))
    contexts = [ids_of(dialogue.start(first))]
    spans: dict[int, tuple[Span, Ids]] = {}
    for turn in conversation["turns"]:
        ids = ids_said(chat, dialogue, turn)
        span = sampled(ids)
        spans[id(span)] = (span, ids.copy())
        output = dialogue.heard(span, dialogue.parse(span.ids))
        assert output[0] is span and [s.origin for s in output[1:]] in ([], ["forced"])
        assert (len(output) == 2) == (not chat.reader.ended(span.ids) and chat.end_ids.size > 0)
        said = ids_of(dialogue.context)
        context = ids_of(dialogue.extend([Message(cast(Any, role), content(text)) for role, text in turn["reply"]]))
        if not any(chat.tokenizer is tokenizer_of(name) for name in REWRITES):
            assert np.array_equal(context[: said.size], said)
        assert dialogue.n_tokens == context.size
        contexts.append(context)
        for piece in dialogue.context:
            if piece.span.origin == "sampled":
                kept, before = spans[id(piece.span)]
                assert np.array_equal(kept.ids, before)
                # All of it, or all that follows its thinking: the end of a turn is never lost.
                assert piece.stop == len(piece.span)
    return contexts, dialogue


def others(dialogue: Dialogue) -> list[int]:
    """The control ids in the context that nobody sampled."""
    return [
        index
        for piece in dialogue.context
        if piece.span.origin != "sampled"
        for index in dialogue.chat.codec.controls(piece.ids)
    ]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(conversation=conversations)
@example(conversation=EMPTY_THEN_NOT)
def test_random_conversations(name: str, conversation: dict[str, Any]) -> None:
    contexts, dialogue = play(chat_of(name), conversation)
    again, _ = play(chat_of(name), conversation)
    assert all(np.array_equal(one, two) for one, two in zip(contexts, again, strict=True))
    _, harmless = play(chat_of(name), conversation, harmless=True)
    assert others(dialogue) == others(harmless)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(conversation=conversations)
def test_forks_do_not_touch_each_other(name: str, conversation: dict[str, Any]) -> None:
    """A branch at every turn, and the trunk afterwards, give what they give alone."""
    chat = chat_of(name)
    alone, _ = play(chat_of(name), conversation)
    dialogue = Dialogue(chat, TOOLS)
    first = [Message("user", conversation["user"])]
    if conversation["system"] is not None:
        first.insert(0, Message("system", conversation["system"]))
    dialogue.start(first)
    for turn, expected in zip(conversation["turns"], alone[1:], strict=True):
        span = sampled(ids_said(chat, dialogue, turn))
        branch = dialogue.fork()
        branch.heard(sampled([]), branch.parse(sampled([]).ids))
        branch.extend([Message("user", "another way")])
        dialogue.heard(span, dialogue.parse(span.ids))
        assert np.array_equal(ids_of(dialogue.extend([Message(cast(Any, r), t) for r, t in turn["reply"]])), expected)


class Thorough:
    """Gaps without a memory: every turn is found by rendering the whole conversation."""

    def __init__(self, gaps: Gaps) -> None:
        self._gaps = gaps

    def __getattr__(self, name: str) -> Any:
        return getattr(self._gaps, name)

    def rule(self, *shape: Any) -> Rule:
        return replace(self._gaps.rule(*shape), known=None, appends=False)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(conversation=conversations)
@example(conversation=SILENT_AFTER_THOUGHT)
def test_what_is_remembered_is_what_a_full_rendering_gives(name: str, conversation: dict[str, Any]) -> None:
    short, _ = play(chat_of(name), conversation)
    thorough = copy.copy(chat_of(name))
    thorough.gaps = cast(Gaps, Thorough(thorough.gaps))
    full, _ = play(thorough, conversation)
    assert [ids.tolist() for ids in short] == [ids.tolist() for ids in full]
