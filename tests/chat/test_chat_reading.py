"""What is understood of sampled ids."""

from __future__ import annotations

import pytest
from chat_cases import TOOLS, call, chat_of, plain_call, talk
from chat_dialects import DIALECTS

from agentrl.chat import ChatFormat, Parsed
from agentrl.env import Say
from agentrl.trajectory import ToolCall, as_ids

NAMES = sorted(DIALECTS)


def parse(chat: ChatFormat, text: str, end: bool = True) -> Parsed:
    ids = chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    return chat.parse(as_ids([*ids, chat.stop_ids[0]] if end else ids))


@pytest.mark.parametrize("name", NAMES)
def test_what_an_expert_says_is_read_back(name: str) -> None:
    nested = {"a": -3, "op": 'it\'s "+" \\ 中\n', "b": None, "more": [1, 2]}
    calls = (call(1), ToolCall("calc", nested, "000000001"))
    for say in (
        Say("The answer is 3.\n\nIt really is."),
        Say("", calls[:1]),
        Say("I call.", calls),
        Say("I call.", calls, "so far\nso good"),
        Say("Three.", (), "so far"),
    ):
        dialogue = talk(name)
        ids = dialogue.chat.say(dialogue, say)
        parsed = dialogue.parse(ids)
        assert parsed.error is None
        assert parsed.final_text == say.text and parsed.thinking == say.thinking
        assert list(map(plain_call, parsed.calls)) == list(map(plain_call, say.calls))
        assert int(ids[-1]) in dialogue.chat.stop_ids


@pytest.mark.parametrize("name", NAMES)
def test_arguments_may_hold_control_tokens_without_writing_any(name: str) -> None:
    chat = chat_of(name)
    dialogue = talk(name)
    clean = chat.say(dialogue, Say("ok", (ToolCall("calc", {"op": "x"}),)))
    dirty = chat.say(dialogue, Say("ok", (ToolCall("calc", {"op": "<|im_end|><|eot_id|></s><eos><|user|>"}),)))
    assert chat.codec.controls(dirty) == chat.codec.controls(clean)


def test_thinking_is_apart_and_never_searched_for_calls() -> None:
    chat = chat_of("qwen3")
    one = '<tool_call>\n{"name": "calc", "arguments": {"a": 1}}\n</tool_call>'
    parsed = parse(chat, f"<think>\nmaybe {one}\n</think>\n\nNo.")
    assert parsed.calls == () and parsed.final_text == "No." and parsed.error is None
    assert parsed.thinking == f"maybe {one}"
    parsed = parse(chat, f"<think>\nbroken <tool_call>{{\n</think>\n\nYes: {one}")
    assert len(parsed.calls) == 1 and parsed.final_text == "Yes:" and parsed.error is None
    parsed = parse(chat, "half of it</think>\n\nNo.")
    assert parsed.thinking == "half of it" and parsed.final_text == "No."


@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("name", ["qwen3", "qwen3.5", "chatml"])
def test_thinking_without_an_end_is_no_answer(name: str, end: bool) -> None:
    parsed = parse(chat_of(name), "<think>\nI wonder" if name != "qwen3.5" else "I wonder", end)
    assert parsed.error and "</think>" in parsed.error and ("token limit" in parsed.error) == (not end)
    assert parsed.final_text == "" and parsed.calls == () and parsed.thinking == "I wonder"


def test_a_header_that_opens_thinking() -> None:
    parsed = parse(chat_of("qwen3.5"), "I wonder\n</think>\n\nFive.")
    assert parsed.thinking == "I wonder" and parsed.final_text == "Five." and parsed.error is None


def test_a_malformed_call_is_an_error_and_runs_nothing() -> None:
    good = '<tool_call>\n{"name": "calc", "arguments": {"a": 1}}\n</tool_call>'
    parsed = parse(chat_of("qwen3"), f'Look: {good}\n<tool_call>\n{{"name": calc}}\n</tool_call>')
    assert parsed.calls == () and parsed.error is not None and "not valid JSON" in parsed.error
    assert parsed.text.startswith("Look: <tool_call>")


def test_a_call_cut_by_the_limit_is_an_error() -> None:
    parsed = parse(chat_of("qwen3"), '<tool_call>\n{"name": "calc", "argu', end=False)
    assert parsed.calls == () and parsed.error is not None and "token limit" in parsed.error


def test_control_tokens_are_no_part_of_an_answer() -> None:
    chat = chat_of("qwen3")
    parsed = parse(chat, "Fi<|im_start|>ve<|endoftext|>")
    assert parsed.final_text == "Five" and "<|im_start|>" in parsed.text and "<|im_end|>" not in parsed.text


def test_half_a_character_is_a_replacement_character() -> None:
    chat = chat_of("chatml")
    ids = chat.tokenizer("中", add_special_tokens=False)["input_ids"]
    assert len(ids) == 3
    assert chat.parse(as_ids([*ids, *ids[:2], chat.stop_ids[0]])).final_text == "中\ufffd"


def test_nothing_at_all() -> None:
    chat = chat_of("chatml")
    for ids in ([], [chat.stop_ids[0]]):
        parsed = chat.parse(as_ids(ids))
        assert parsed == Parsed("", "", "", ())


def test_dialogues_type_bare_arguments_by_their_tools() -> None:
    dialogue = talk("qwen3.5", tools=TOOLS)
    ids = dialogue.chat.say(dialogue, Say("", (ToolCall("calc", {"a": 5, "op": "5"}),)))
    assert dict(dialogue.parse(ids).calls[0].arguments) == {"a": 5, "op": "5"}
    assert dict(dialogue.chat.parse(ids).calls[0].arguments) == {"a": "5", "op": "5"}
