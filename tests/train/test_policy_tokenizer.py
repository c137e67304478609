"""The scratch tokenizer: boilerplate merges, digits do not, control tokens stay whole, the template holds."""

from __future__ import annotations

import json

import numpy as np
import pytest
from transformers import AutoTokenizer

from agentrl.errors import UsageError
from agentrl.train.options import ScratchTokenizer
from agentrl.train.tokenizer import MARKS, bootstrap_tokenizer, train_tokenizer

TOOL = {
    "type": "function",
    "function": {
        "name": "calc",
        "description": "Do one operation on two integers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "op": {"enum": ["+", "-", "*"]}, "b": {"type": "integer"}},
            "required": ["a", "op", "b"],
        },
    },
}


def episode(a: int, op: str, b: int, answer: int, *, structured: bool = True) -> list[dict[str, object]]:
    arguments: object = {"a": a, "op": op, "b": b}
    if not structured:
        arguments = json.dumps(arguments)
    call = {"type": "function", "function": {"name": "calc", "arguments": arguments}}
    return [
        {"role": "user", "content": f"Compute {a} {op} {b}."},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": str(answer)},
        {"role": "assistant", "content": f"The answer is {answer}."},
    ]


def texts(n: int = 300) -> list[str]:
    rng = np.random.default_rng(0)
    tokenizer = bootstrap_tokenizer(ScratchTokenizer())
    made = []
    for _ in range(n):
        a, b, op = int(rng.integers(2, 100)), int(rng.integers(2, 100)), str(rng.choice(["+", "-", "*"]))
        result = {"+": a + b, "-": a - b, "*": a * b}[op]
        made.append(tokenizer.apply_chat_template(episode(a, op, b, result), tools=[TOOL], tokenize=False))
    return made


def test_boilerplate_is_few_tokens_and_text_comes_back() -> None:
    corpus = texts()
    tokenizer = train_tokenizer(corpus, ScratchTokenizer())
    lengths = [len(tokenizer(text).input_ids) for text in corpus]
    assert np.mean(lengths) < 55 < 200 < np.mean([len(text) for text in corpus]) / 2
    assert len(tokenizer) < 700
    assert all(tokenizer.decode(tokenizer(text).input_ids) == text for text in [*corpus, "é ☃ <b> 12345\n\n x"])


def test_digits_never_merge_beyond_two() -> None:
    tokenizer = train_tokenizer(texts(), ScratchTokenizer())
    pieces = [tokenizer.decode([index]) for index in range(len(tokenizer))]
    assert any(piece.isdigit() and len(piece) == 2 for piece in pieces)
    assert all(piece.isdigit() and len(piece) <= 2 for piece in pieces if any(c.isdigit() for c in piece))
    assert [tokenizer.decode([i]) for i in tokenizer("2044").input_ids] == ["20", "44"]


def test_control_tokens_are_one_id_and_in_no_merge() -> None:
    tokenizer = train_tokenizer(texts(), ScratchTokenizer())
    for mark in (*MARKS, "<|im_start|>", "<|im_end|>"):
        assert len(tokenizer(mark).input_ids) == 1
    pieces = [tokenizer.decode([index]) for index in range(len(tokenizer))]
    assert sum("tool_call" in piece for piece in pieces) == 2
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token_id != tokenizer.eos_token_id


def test_only_the_first_texts_count_and_equal_texts_give_equal_tokenizers() -> None:
    corpus = texts(60)
    few = train_tokenizer([*corpus[:20], *["zebra " * 9] * 40], ScratchTokenizer(texts=20))
    assert few.get_vocab() == train_tokenizer(corpus, ScratchTokenizer(texts=20)).get_vocab()
    assert len(train_tokenizer(corpus, ScratchTokenizer(vocab_size=300))) == 300


def test_the_template() -> None:
    tokenizer = bootstrap_tokenizer(ScratchTokenizer())
    messages = [{"role": "system", "content": "Be brief."}, *episode(53, "*", 40, 2120)]
    text = tokenizer.apply_chat_template(messages[:-1], tools=[TOOL], tokenize=False, add_generation_prompt=True)
    schema = json.dumps(TOOL["function"])
    assert text == (
        f"<|im_start|>system\nBe brief.\nTools:\n{schema}\n"
        'Call: <tool_call>\n{"name": NAME, "arguments": OBJECT}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\nCompute 53 * 40.<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>\n{"name": "calc", "arguments": {"a": 53, "op": "*", "b": 40}}\n'
        "</tool_call><|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n2120\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )
    as_text = [{"role": "system", "content": "Be brief."}, *episode(53, "*", 40, 2120, structured=False)]
    assert tokenizer.apply_chat_template(as_text, tokenize=False) == tokenizer.apply_chat_template(
        messages, tokenize=False
    )
    assert tokenizer.apply_chat_template(messages[1:2], tokenize=False) == (
        "<|im_start|>user\nCompute 53 * 40.<|im_end|>\n"
    )


def test_several_calls_and_results_share_their_turns() -> None:
    tokenizer = bootstrap_tokenizer(ScratchTokenizer())
    user, said, result, _ = episode(1, "+", 2, 3)
    said = {**said, "content": "Both.", "tool_calls": [*said["tool_calls"], *said["tool_calls"]]}  # type: ignore[misc]
    text = tokenizer.apply_chat_template([user, said, result, result], tokenize=False)
    call = '<tool_call>\n{"name": "calc", "arguments": {"a": 1, "op": "+", "b": 2}}\n</tool_call>'
    assert f"assistant\nBoth.\n{call}\n{call}<|im_end|>" in text
    response = "\n<tool_response>\n3\n</tool_response>"
    assert text.endswith(f"<|im_start|>user{response}{response}<|im_end|>\n")


def test_it_survives_a_folder(tmp_path: object) -> None:
    tokenizer = train_tokenizer(texts(50), ScratchTokenizer())
    tokenizer.save_pretrained(str(tmp_path))
    again = AutoTokenizer.from_pretrained(str(tmp_path))
    assert again.get_vocab() == tokenizer.get_vocab() and again.chat_template == tokenizer.chat_template
    assert again("Compute 7 * 8.\n").input_ids == tokenizer("Compute 7 * 8.\n").input_ids
    assert again.eos_token_id == tokenizer.eos_token_id


def test_a_bad_pattern() -> None:
    with pytest.raises(UsageError, match="no regular expression"):
        bootstrap_tokenizer(ScratchTokenizer(pattern="("))
