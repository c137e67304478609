"""Ids against the tokenizer's own `apply_chat_template`, for every dialect."""

from __future__ import annotations

from typing import Any

import pytest
from chat_cases import TOOLS, call, chat_of, hear, say, talk, text_of_ids
from chat_dialects import DIALECTS

from agentrl.chat import ChatFormat, Dialogue, Message
from agentrl.env import Say
from agentrl.trajectory import Span, ToolCall, ids_of

NAMES = sorted(DIALECTS)
CONTENTS = ["What is 1+2?", "  padded \n\n", "line\nline\n", '{"a": [1, 2]}', "naïve 中文 😀", "<b>&amp;</b> it's \\n"]


def template_ids(chat: ChatFormat, name: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> list[int]:
    ids = chat.tokenizer.apply_chat_template(
        messages,
        tools=tools or None,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
        **DIALECTS[name].options,
    )
    return list(ids)


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("name", NAMES)
def test_the_first_prompt_has_the_ids_of_apply_chat_template(name: str, content: str) -> None:
    chat = chat_of(name)
    tools = TOOLS if chat.template.has_tools else []
    messages = [Message("user", content)]
    if chat.template.has_system:
        messages.insert(0, Message("system", "Be brief." + content))
    dialogue = Dialogue(chat, tools)
    ids = ids_of(dialogue.start(messages)).tolist()
    given = [{"role": m.role, "content": m.content} for m in messages]
    assert ids == template_ids(chat, name, given, tools)
    assert dialogue.n_tokens == len(ids)


# What a family's template cannot write down itself leaves nothing to compare with.
NO_TOOL_ROLE = {"llama3", "gemma", "gemma3", "phi3"}
ONE_CALL = {"llama3.1", "llama3.2"}
CALLS_HIDE_TEXT = {"llama3.1", "llama3.2", "mistral"}
WRITABLE = [
    (name, n_calls, thinking)
    for name in NAMES
    for n_calls in (0, 1, 2)
    for thinking in ("", "so far")
    if not n_calls
    or not (name in NO_TOOL_ROLE or (name in ONE_CALL and n_calls > 1) or (name in CALLS_HIDE_TEXT and thinking))
]


@pytest.mark.parametrize(("name", "n_calls", "thinking"), WRITABLE)
def test_a_whole_conversation_has_the_ids_of_apply_chat_template(name: str, n_calls: int, thinking: str) -> None:
    """Built turn by turn from spans, it equals the one-shot rendering wherever the template can render it."""
    chat = chat_of(name)
    tools = TOOLS if chat.template.has_tools else []
    dialogue = Dialogue(chat, tools)
    written: list[dict[str, Any]] = [{"role": "user", "content": "What is 1+2?"}]
    if chat.template.has_system:
        written.insert(0, {"role": "system", "content": "Be good."})
    dialogue.start([Message(m["role"], m["content"]) for m in written])

    def turn(text: str, *calls: ToolCall, thinks: str) -> None:
        ids = chat.say(dialogue, Say(text, calls, thinks))
        dialogue.heard(Span(ids, "assistant", "demo"), dialogue.parse(ids))
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if thinks:
            chat.template.think(message, thinks)
        if calls:
            message["tool_calls"] = [chat.template.structured(c.name, c.id, c.arguments) for c in calls]
        written.append(message)

    if n_calls:
        calls = [call(i) for i in range(n_calls)]
        turn("", *calls, thinks=thinking)
        results = [Message("tool", f"{i} units\n", "calc", c.id) for i, c in enumerate(calls)]
        dialogue.extend(results)
        written += [{"role": "tool", "content": m.content, "name": m.name, "tool_call_id": m.call_id} for m in results]
        if name != "qwen3" or thinking:  # Qwen3 hides an empty thinking block only once a result follows: it was said
            assert ids_of(dialogue.context).tolist() == template_ids(chat, name, written, tools)
    turn("It is 3.", thinks=thinking)
    dialogue.extend([Message("user", "And then?")])
    written.append({"role": "user", "content": "And then?"})
    assert ids_of(dialogue.context).tolist() == template_ids(chat, name, written, tools)
    assert dialogue.n_tokens == ids_of(dialogue.context).size


@pytest.mark.parametrize("name", NAMES)
def test_control_strings_in_contents_never_become_control_ids(name: str) -> None:
    chat = chat_of(name)
    dirty = "a".join(chat.codec.control)

    def controls(text: str) -> list[int]:
        tools = [{"type": "function", "function": {**TOOLS[0]["function"], "description": f"d{text}"}}]
        dialogue = talk(name, Message("system", f"s{text}"), Message("user", f"u{text}"), tools=tools)
        say(dialogue, "", call())
        dialogue.extend([Message("tool", f"t{text}")])
        say(dialogue, "well")
        dialogue.extend([Message("user", f"v{text}")])
        assert f"v{text}" in text_of_ids(chat, ids_of(dialogue.context))
        return [
            i for piece in dialogue.context if piece.span.origin != "sampled" for i in chat.codec.controls(piece.ids)
        ]

    assert controls(dirty) == controls("")


@pytest.mark.parametrize("name", NAMES)
def test_the_reserved_characters_of_the_chat_layer_are_plain_text_in_contents(name: str) -> None:
    dirty = "\uf8f0" + "3\uf8f1 \uf8f2m000000\uf8f3 \uf8f1"
    dialogue = talk(name, Message("user", dirty))
    hear(dialogue, "ok")
    dialogue.extend([Message("user", dirty)])
    assert text_of_ids(dialogue.chat, ids_of(dialogue.context)).count(dirty) == 2


def test_normalisation_cannot_smuggle_a_control_token_in() -> None:
    """Added tokens may match normalised text: full-width brackets become a control token under NFKC."""
    from tokenizers import AddedToken, normalizers
    from transformers import PreTrainedTokenizerFast

    base = chat_of("chatml").tokenizer
    backend = type(base.backend_tokenizer).from_str(base.backend_tokenizer.to_str())
    backend.normalizer = normalizers.NFKC()
    backend.add_tokens([AddedToken("<think>", special=False, normalized=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    tokenizer.chat_template = base.chat_template + "{# <think> means something here #}"
    chat = ChatFormat(tokenizer)
    sneaky = "\uff1cthink\uff1e"
    assert chat.codec.control["<think>"] in tokenizer(sneaky)["input_ids"]
    dialogue = Dialogue(chat, [])
    ids = ids_of(dialogue.start([Message("user", f"{sneaky} hello")]))
    assert chat.codec.control["<think>"] not in ids.tolist()
    assert "hello" in text_of_ids(chat, ids)


def spaced(kind: str) -> Any:
    """ChatML over a vocabulary of words and spaces as SentencePiece has it, or with tokens that eat blanks."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    base = chat_of("chatml").tokenizer
    special = list(DIALECTS["chatml"].special)
    if kind == "rstrip":
        backend = Tokenizer.from_str(base.backend_tokenizer.to_str())
        backend.add_special_tokens([AddedToken(t, rstrip=True, normalized=False, special=True) for t in special])
        backend.add_special_tokens([AddedToken("<tool_response>", lstrip=True, normalized=False, special=True)])
    else:
        letters = [chr(c) for c in range(32, 127)] + ["\u2581", *(f"<0x{byte:02X}>" for byte in range(256)), "<unk>"]
        backend = Tokenizer(
            models.BPE({t: i for i, t in enumerate([*special, *letters])}, [], unk_token="<unk>", byte_fallback=True)
        )
        if kind == "prepend":
            backend.normalizer = normalizers.Sequence(
                [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
            )
        else:
            backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind)
        backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
        backend.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    tokenizer.chat_template = base.chat_template
    return tokenizer


@pytest.mark.parametrize("kind", ["rstrip", "prepend", "first", "always", "never"])
def test_tokenizers_that_treat_spaces_in_their_own_way(kind: str) -> None:
    tokenizer = spaced(kind)
    chat = ChatFormat(tokenizer)
    dialogue = Dialogue(chat, TOOLS)
    written = [{"role": "system", "content": " Be good."}, {"role": "user", "content": " 1 + 2? "}]
    dialogue.start([Message(m["role"], m["content"]) for m in written])  # type: ignore[arg-type]
    assert ids_of(dialogue.context).tolist() == tokenizer.apply_chat_template(
        written, tools=TOOLS, add_generation_prompt=True, return_dict=False
    )
    said = "It is 3."
    say(dialogue, said)
    for content in (" so? ", "\n\nwell", "<|im_end|> x"):
        dialogue.extend([Message("user", content)])
        written += [{"role": "assistant", "content": said}, {"role": "user", "content": content}]
        if "<|" not in content:
            assert ids_of(dialogue.context).tolist() == tokenizer.apply_chat_template(
                written, tools=TOOLS, add_generation_prompt=True, return_dict=False
            )
        say(dialogue, said)
    assert text_of_ids(chat, ids_of(dialogue.context)).count("<|im_end|>") == 2 + 4 + 3 + 1
