"""Dialogues: what is shared, kept, sliced, forced and never repeated."""

from __future__ import annotations

import numpy as np
import pytest
from chat_cases import TOOLS, call, chat_of, hear, sampled, say, talk, text_of_ids
from chat_dialects import DIALECTS, tokenizer_of

from agentrl.chat import ChatFormat, Dialogue, Message
from agentrl.content import Image
from agentrl.env import Say
from agentrl.errors import UsageError
from agentrl.trajectory import Outcome, RecordError, Sampling, Trajectory, Turn, as_ids, ids_of, rows_of

NAMES = sorted(DIALECTS)
DROPS_THINKING = {"qwen3", "qwen3-nothink", "qwen3.5", "glm4.5", "gemma4"}


def shown(dialogue: Dialogue) -> str:
    return text_of_ids(dialogue.chat, ids_of(dialogue.context))


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"mistral", "qwen3-nothink"}))
def test_results_only_append_and_rows_merge(name: str) -> None:
    dialogue = talk(name, Message("system", "Be good."), Message("user", "What is 1+2?"))
    turns = []
    for results in (["3"], ["", "4\n"], ["naïve <|im_end|> 中"]):
        context = dialogue.context
        span, parsed = say(dialogue, "", *(call(i) for i in range(len(results))), thinking="hm")
        turns.append(Turn(context, (span,), parsed.text, parsed.final_text, Sampling(), "stop"))
        said = ids_of(dialogue.context)
        now = ids_of(dialogue.extend([Message("tool", text) for text in results]))
        assert np.array_equal(now[: said.size], said) and now.size > said.size
    trajectory = Trajectory("t", "g", "k", tuple(turns), Outcome("completed"), 0)
    assert len(rows_of(trajectory)) == 1


@pytest.mark.parametrize("name", sorted(DROPS_THINKING))
def test_dropped_thinking_is_a_slice_of_the_same_span(name: str) -> None:
    dialogue = talk(name)
    span, _ = say(dialogue, "", call(), thinking="a first PONDER")
    dialogue.extend([Message("tool", "3")])
    second, _ = say(dialogue, "It is three.", thinking="another PONDER")
    if name != "qwen3-nothink":
        assert shown(dialogue).count("PONDER") == 2
    dialogue.extend([Message("user", "And then?")])
    assert "PONDER" not in shown(dialogue) and "It is three." in shown(dialogue) and "And then?" in shown(dialogue)
    pieces = [piece for piece in dialogue.context if piece.span.origin == "sampled"]
    assert [piece.span for piece in pieces] == [span, second]
    assert all(piece.start > 0 and piece.stop == len(piece.span) for piece in pieces)
    assert dialogue.n_tokens == ids_of(dialogue.context).size
    say(dialogue, "Bye.", thinking="a last PONDER")
    assert shown(dialogue).count("PONDER") == 1


def test_text_in_the_token_that_ends_thinking_is_kept() -> None:
    """A token that straddles the end of thinking and the answer stays whole: nothing said is lost."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = [
        "<|im_end|>",
        "<|im_start|>",
        "user",
        "assistant",
        "\n",
        "<think>",
        "hm",
        "</think>\n\nYes",
        "</think>",
        "\n\n",
        "!",
    ]
    letters = [chr(c) for c in range(32, 127)]
    vocab = {word: i for i, word in enumerate(dict.fromkeys([*words, *letters]))}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    backend.add_special_tokens(words[:2])
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    tokenizer.chat_template = tokenizer_of("qwen3").chat_template
    reader = ChatFormat(tokenizer).reader
    ids = [vocab[w] for w in ("<think>", "\n", "hm", "</think>\n\nYes", "!", "<|im_end|>")]
    assert reader.after_thinking(as_ids(ids)) == 3
    ids = [vocab[w] for w in ("<think>", "hm", "</think>", "\n\n", "\n", "Y", "<|im_end|>")]
    assert reader.after_thinking(as_ids(ids)) == 5
    ids = [vocab[w] for w in ("<think>", "hm", "hm", "<|im_end|>")]
    assert reader.after_thinking(as_ids(ids)) == 3
    assert reader.after_thinking(as_ids(ids[:3])) == 3


@pytest.mark.parametrize("name", NAMES)
def test_a_cut_turn_is_ended_by_force_and_an_ended_one_is_not(name: str) -> None:
    dialogue = talk(name)
    chat = dialogue.chat
    _, ended = hear(dialogue.fork(), "One two")
    assert [span.origin for span in ended] == ["sampled"]
    span, cut = hear(dialogue, "One two", end=False)
    if chat.end_ids.size:
        assert [s.origin for s in cut] == ["sampled", "forced"] and cut[1].ids.tolist() == chat.end_ids.tolist()
    else:
        assert [s.origin for s in cut] == ["sampled"]
    dialogue.extend([Message("user", "Go on.")])
    other = talk(name)
    hear(other, "One two")
    other.extend([Message("user", "Go on.")])
    assert shown(dialogue) == shown(other)
    if name != "qwen3.5":  # its header opens the thinking block: all of it was thinking, and is dropped here
        assert span in [piece.span for piece in dialogue.context]


def test_a_turn_without_a_single_token_is_ended_too() -> None:
    dialogue = talk("qwen3")
    empty = sampled([])
    output = dialogue.heard(empty, dialogue.parse(empty.ids))
    assert [span.origin for span in output] == ["sampled", "forced"]
    dialogue.extend([Message("user", "Hello?")])
    assert "<|im_start|>assistant\n<|im_end|>\n<|im_start|>user\nHello?" in shown(dialogue)


def test_glm_stops_at_the_next_role_which_is_not_repeated() -> None:
    chat = chat_of("glm4.5")
    user, observation = (chat.codec.control[token] for token in ("<|user|>", "<|observation|>"))
    assert chat.end_ids.size == 0 and {user, observation} <= set(chat.stop_ids)
    dialogue = talk("glm4.5")
    span, _ = say(dialogue, "", call())
    assert span.ids[-1] == observation
    dialogue.extend([Message("tool", "3")])
    assert shown(dialogue).count("<|observation|>") == 1
    span, _ = say(dialogue, "Three.")
    assert span.ids[-1] == user
    dialogue.extend([Message("user", "More?")])
    assert ids_of(dialogue.context).tolist().count(user) == 2


def test_glm_stopping_at_another_role_keeps_what_was_sampled_and_appends_the_whole_suffix() -> None:
    dialogue = talk("glm4.5")
    chat = dialogue.chat
    ids = chat.say(dialogue, Say("", (call(),))).tolist()
    ids[-1] = chat.codec.control["<|user|>"]
    dialogue.heard(sampled(ids), dialogue.parse(as_ids(ids)))
    dialogue.extend([Message("tool", "3")])
    assert "</tool_call><|user|><|observation|>\n<tool_response>\n3" in shown(dialogue)


def test_another_stop_id_takes_the_place_of_the_end_token() -> None:
    """Llama's <|eom_id|> ends a turn as well as <|eot_id|> does: a turn ends once."""
    tokenizer = tokenizer_of("llama3.1")
    chat = ChatFormat(tokenizer)
    dialogue = Dialogue(chat, TOOLS)
    dialogue.start([Message("user", "x")])
    eom = chat.codec.control["<|eom_id|>"]
    chat.reader._stops |= {eom}
    ids = [*chat.codec.encode('{"name": "calc", "parameters": {"a": 1}}').tolist(), eom]
    output = dialogue.heard(sampled(ids), dialogue.parse(as_ids(ids)))
    assert len(output) == 1
    dialogue.extend([Message("tool", "3")])
    assert "<|eom_id|><|start_header_id|>ipython" in shown(dialogue)


def test_stop_ids_come_from_the_template_the_tokenizer_and_its_generation_config(tmp_path) -> None:  # type: ignore[no-untyped-def]
    from transformers import AutoTokenizer

    folder = tmp_path / "model"
    tokenizer_of("qwen3").save_pretrained(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    chat = ChatFormat(AutoTokenizer.from_pretrained(folder))
    assert chat.stop_ids == (chat.codec.control["<|im_end|>"], 0)


@pytest.mark.parametrize("name", NAMES)
def test_consecutive_results_stand_in_order(name: str) -> None:
    dialogue = talk(name)
    say(dialogue, "", call(0), call(1), call(2))
    dialogue.extend([Message("tool", word) for word in ("ALPHA", "BETA", "GAMMA")])
    text = shown(dialogue)
    assert text.find("ALPHA") < text.find("BETA") < text.find("GAMMA")


def test_qwen_merges_results_in_one_user_turn() -> None:
    dialogue = talk("qwen3")
    say(dialogue, "", call(0), call(1))
    dialogue.extend([Message("tool", "1"), Message("tool", "2")])
    assert shown(dialogue).endswith(
        "<|im_start|>user\n<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_mistral_results_carry_the_ids_of_the_calls() -> None:
    dialogue = talk("mistral", Message("user", "x"))
    hear(dialogue, '[TOOL_CALLS] [{"name": "calc", "arguments": {"a": 1}, "id": "Ab3dE6gH9"}]')
    dialogue.extend([Message("tool", 'say "3"')])
    assert shown(dialogue).endswith('[TOOL_RESULTS] {"content": "say \\"3\\"", "call_id": "Ab3dE6gH9"}[/TOOL_RESULTS]')


@pytest.mark.parametrize("name", NAMES)
def test_an_error_after_a_malformed_call_is_rendered_as_a_tool_result_or_a_user_message(name: str) -> None:
    for role in ("tool", "user"):
        dialogue = talk(name)
        hear(dialogue, "I think so.")
        dialogue.extend([Message(role, "Your call was malformed.")])  # type: ignore[arg-type]
        assert "Your call was malformed." in shown(dialogue)
        hear(dialogue, "Sorry.")
        dialogue.extend([Message("tool", "ONE"), Message("user", "TWO")])
        assert shown(dialogue).find("ONE") < shown(dialogue).find("TWO")


def test_no_tool_role_falls_back_to_a_user_message() -> None:
    dialogue = talk("gemma", Message("system", "SYS"), Message("user", "USER"))
    text = shown(dialogue)
    assert text.startswith("<bos><start_of_turn>user\nSYS\n\n# Tools") and '"name": "calc"' in text
    say(dialogue, "", call())
    dialogue.extend([Message("tool", "3")])
    assert shown(dialogue).endswith(
        "<start_of_turn>user\n<tool_response>\n3\n</tool_response><end_of_turn>\n<start_of_turn>model\n"
    )


@pytest.mark.parametrize("name", NAMES)
def test_samples_of_a_group_share_the_prompt_by_reference(name: str) -> None:
    one, two = talk(name), talk(name)
    assert [piece.span for piece in one.context] == [piece.span for piece in two.context]
    assert one.context is two.context
    other = talk(name, Message("user", "Another question"))
    assert other.context is not one.context


def test_forks_share_what_was_said_and_go_their_own_way() -> None:
    dialogue = talk("qwen3")
    say(dialogue, "", call(), thinking="hm")
    before = dialogue.context
    branch = dialogue.fork()
    dialogue.extend([Message("tool", "3")])
    branch.extend([Message("tool", "4")])
    assert branch.context[: len(before)] == before == dialogue.context[: len(before)]
    assert "4" in shown(branch) and shown(branch) != shown(dialogue)
    say(branch, "Four.")
    branch.extend([Message("user", "Sure?")])
    assert "hm" in shown(dialogue) and "hm" not in shown(branch)


def test_roles_and_origins_of_spans() -> None:
    dialogue = talk("qwen3", Message("system", "Be good."), Message("user", "What is 1+2?"))
    assert {piece.span.origin for piece in dialogue.context} == {"template"}
    assert [piece.span.role for piece in dialogue.context if "Be good" in text_of_ids(dialogue.chat, piece.ids)] == [
        "system"
    ]
    say(dialogue, "", call())
    dialogue.extend([Message("tool", "RESULT")])
    markup, content, header = dialogue.context[-3:]
    assert [p.span.origin for p in (markup, content, header)] == ["template", "tool", "template"]
    assert [p.span.role for p in (markup, content, header)] == ["tool", "tool", "assistant"]
    assert text_of_ids(dialogue.chat, content.ids).strip() == "RESULT"


def test_images_become_their_alt_text() -> None:
    picture = Image(b"\x89PNG\r\n\x1a\n" + b"\0" * 8 + (3).to_bytes(4, "big") + (2).to_bytes(4, "big"))
    dialogue = talk("qwen3", Message("user", ["See ", picture, "!"]))
    assert f"See {picture.alt}!" in shown(dialogue)


@pytest.mark.parametrize("text", ["", " ", "\n\n", "x" * 50_000, "\ud800 half", "\x00\x07"])
@pytest.mark.parametrize("name", NAMES)
def test_odd_outputs(name: str, text: str) -> None:
    dialogue = talk(name)
    say(dialogue, "", call())
    said = ids_of(dialogue.context)
    now = ids_of(dialogue.extend([Message("tool", text)]))
    assert now.size > said.size or name in ("mistral",)
    assert text.strip().replace("\ud800", "\ufffd")[:200] in shown(dialogue) or "\\u0000" in shown(dialogue)
    hear(dialogue, "Fine.")
    dialogue.extend([Message("user", text)])


def test_calls_out_of_turn_are_bugs_of_the_caller() -> None:
    dialogue = Dialogue(chat_of("qwen3"), [])
    with pytest.raises(RecordError, match=r"waits for start"):
        dialogue.extend([Message("user", "x")])
    dialogue.start([Message("user", "x")])
    with pytest.raises(RecordError, match=r"waits for heard"):
        dialogue.extend([Message("user", "x")])
    with pytest.raises(RecordError, match=r"waits for heard"):
        dialogue.start([Message("user", "x")])
    hear(dialogue, "y")
    with pytest.raises(RecordError, match=r"waits for extend"):
        hear(dialogue, "z")
    with pytest.raises(RecordError, match="at least one"):
        dialogue.extend([])


def test_a_tokenizer_without_a_template_says_what_to_do() -> None:
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer_of("qwen3").backend_tokenizer)
    with pytest.raises(UsageError, match=r"no chat template.*chat_template\.jinja"):
        ChatFormat(bare)


def test_a_template_that_writes_calls_in_an_unknown_form_says_what_to_do() -> None:
    from transformers import PreTrainedTokenizerFast

    odd = PreTrainedTokenizerFast(tokenizer_object=tokenizer_of("chatml").backend_tokenizer, eos_token="<|im_end|>")
    odd.chat_template = (
        "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content }}{% for c in m.tool_calls %}CALL {{ c.function.name }} {{ c.function.arguments | tojson }} DONE"
        "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    with pytest.raises(UsageError, match="tool_format"):
        Dialogue(ChatFormat(odd), TOOLS)
    chat = ChatFormat(odd, tool_format=r"regex:CALL (?P<name>\w+) (?P<arguments>\{.*?\}) DONE")
    dialogue = Dialogue(chat, TOOLS)
    dialogue.start([Message("user", "x")])
    _, parsed = say(dialogue, "Now.", call())
    assert parsed.calls[0].name == "calc" and parsed.final_text == "Now." and parsed.error is None
    assert chat.reader.parse(chat.codec.encode("CALL calc {"), {}).error


def test_templates_that_want_lists_of_parts() -> None:
    from transformers import PreTrainedTokenizerFast

    odd = PreTrainedTokenizerFast(tokenizer_object=tokenizer_of("chatml").backend_tokenizer, eos_token="<|im_end|>")
    odd.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content %}{{ p.text }}{% endfor %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    dialogue = Dialogue(ChatFormat(odd), [])
    dialogue.start([Message("user", "Hello")])
    hear(dialogue, "Hi")
    dialogue.extend([Message("user", "Bye")])
    assert shown(dialogue) == (
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
