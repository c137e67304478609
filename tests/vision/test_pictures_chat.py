"""A picture in a message is the ids that the model's own template and processor give, and text stays as it was."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from transformers import AutoImageProcessor

from agentrl.chat import ChatFormat, Dialogue, Message
from agentrl.content import Image
from agentrl.errors import EnvError, PolicyError, UsageError
from agentrl.pictures import Pictures, sees
from agentrl.train.policy import Policy
from agentrl.trajectory import RecordError, Span, as_floats, as_ids, ids_of, places_of

Paint = Callable[..., Image]
TOOL = {"type": "function", "function": {"name": "zoom", "description": "d", "parameters": {"type": "object"}}}
CALL = '<tool_call>\n{"name": "zoom", "arguments": {}}\n</tool_call>'


def sampled(chat: ChatFormat, text: str, *, end: bool = True) -> Span:
    from agentrl.trajectory import VersionRun

    ids = [*chat.tokenizer.encode(text, add_special_tokens=False), *([chat.stop_ids[0]] if end else [])]
    n = len(ids)
    return Span(as_ids(ids), "assistant", "sampled", logprobs=as_floats([-1.0] * n), versions=(VersionRun(0, 0, n),))


def hear(dialogue: Dialogue, text: str) -> None:
    span = sampled(dialogue.chat, text)
    dialogue.heard(span, dialogue.parse(span.ids))


def as_processor(policy: Policy, messages: list[dict[str, Any]], images: list[Image]) -> list[int]:
    """The ids of Hugging Face's own way: the template's text, each placeholder repeated for its grid, tokenised."""
    folder = policy.path
    text = policy.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    opened = [PIL.Image.open(io.BytesIO(image.data)).convert("RGB") for image in images]
    grids = processor(opened, return_tensors="np")["image_grid_thw"]
    head, *rest = text.split("<|image_pad|>")
    for grid, tail in zip(grids, rest, strict=True):
        head += "<|image_pad|>" * (int(grid.prod()) // processor.merge_size**2) + tail
    return policy.tokenizer.encode(head, add_special_tokens=False)


def test_ids_are_those_of_the_processor(policy: Policy, chat: ChatFormat, paint: Paint) -> None:
    sizes = [(32, 32), (50, 37), (300, 20), (64, 48)]
    images = [paint((40 * n, 10, 200), *size) for n, size in enumerate(sizes)]
    dialogue = Dialogue(chat, [])
    dialogue.start(
        [
            Message("system", "You see.\n"),
            Message("user", (" Two: ", images[0], images[1], "\n\nand ", "more ")),
            Message("user", (images[2],)),
            Message("user", ("last ", images[3], " ")),
        ]
    )
    picture = {"type": "image"}

    def said(text: str) -> dict[str, str]:
        return {"type": "text", "text": text}

    messages = [
        {"role": "system", "content": "You see.\n"},
        {"role": "user", "content": [said(" Two: "), picture, picture, said("\n\nand more ")]},
        {"role": "user", "content": [picture]},
        {"role": "user", "content": [said("last "), picture, said(" ")]},
    ]
    assert ids_of(dialogue.context).tolist() == as_processor(policy, messages, images)
    shown, places = dialogue.shown()
    assert [image.sha256 for image in shown] == [image.sha256 for image in images]
    ids = ids_of(dialogue.context)
    pad = policy.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert [int(i) for start, stop in places for i in range(start, stop)] == (ids == pad).nonzero()[0].tolist()
    assert [piece.span.images for piece in dialogue.context if piece.span.images] == [(i.sha256,) for i in images]
    assert len(ids) == dialogue.n_tokens


TEXTS = [
    [Message("user", "What is it?")],
    [Message("system", "Be good."), Message("user", "<|vision_start|><|image_pad|><|vision_end|> \uf8f0 x\uf8f1")],
    [Message("user", ("a", "b", "<|image_pad|>")), Message("user", " \n")],
]


@pytest.mark.parametrize("messages", TEXTS)
@pytest.mark.parametrize("tools", [(), (TOOL,)])
def test_ids_of_text_stay_as_they_were(policy: Policy, chat: ChatFormat, messages: Any, tools: Any) -> None:
    blind = Dialogue(ChatFormat(policy.tokenizer), tools)
    seeing = Dialogue(chat, tools)
    for dialogue in (blind, seeing):
        dialogue.start(messages)
        hear(dialogue, f"ok {CALL}" if tools else "ok")
        dialogue.extend([Message("tool" if tools else "user", "fine <|image_pad|>")])
    assert ids_of(blind.context).tolist() == ids_of(seeing.context).tolist()
    assert [len(piece) for piece in blind.context] == [len(piece) for piece in seeing.context]
    pad = policy.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert pad not in ids_of(seeing.context).tolist() and seeing.shown() == ((), ())


def test_a_model_of_text_reads_what_stands_for_a_picture(policy: Policy, paint: Paint) -> None:
    image = paint()
    dialogue = Dialogue(ChatFormat(policy.tokenizer), [])
    dialogue.start([Message("user", ("See ", image))])
    assert image.alt in policy.tokenizer.decode(ids_of(dialogue.context).tolist())
    assert dialogue.shown() == ((), ())


def test_later_pictures_are_appended(chat: ChatFormat, paint: Paint) -> None:
    first, second, third = paint((9, 9, 9)), paint((200, 0, 0), 48), paint((0, 200, 0), 48)
    dialogue = Dialogue(chat, [TOOL])
    dialogue.start([Message("user", ("What? ", first))])
    before = ids_of(dialogue.context)
    hear(dialogue, CALL)
    branch = dialogue.fork()
    said = ids_of(dialogue.context)
    dialogue.extend([Message("tool", ("here: ", second)), Message("user", ("and ", third, first))])
    now = ids_of(dialogue.context)
    assert np.array_equal(now[: before.size], before) and np.array_equal(now[: said.size], said)
    assert [image.sha256 for image in dialogue.shown()[0]] == [i.sha256 for i in (first, second, third, first)]
    branch.extend([Message("tool", ("other: ", third))])
    assert [image.sha256 for image in branch.shown()[0]] == [first.sha256, third.sha256]
    spans = [piece.span for piece in dialogue.context if piece.span.images]
    assert [span.origin for span in spans] == ["template", "tool", "tool", "tool"]
    places = places_of(dialogue.context)
    assert [place.sha256 for place in places] == [i.sha256 for i in (first, second, third, first)]
    with pytest.raises(RecordError, match="whole, in a span of its own"):
        places_of((spans[0][:1],))


def test_equal_prompts_share_their_spans_and_other_pictures_do_not(chat: ChatFormat, paint: Paint) -> None:
    def opened(image: Image) -> Dialogue:
        dialogue = Dialogue(chat, [])
        dialogue.start([Message("user", ("What? ", image))])
        return dialogue

    one, again, other = opened(paint()), opened(paint()), opened(paint((1, 2, 3)))
    assert all(a.span is b.span for a, b in zip(one.context, again.context, strict=True))
    assert ids_of(one.context).tolist() == ids_of(other.context).tolist()
    assert one.shown()[0] != other.shown()[0]


def test_a_policy_that_writes_a_placeholder_is_told_and_cannot_go_on(chat: ChatFormat, paint: Paint) -> None:
    dialogue = Dialogue(chat, [])
    dialogue.start([Message("user", ("What? ", paint()))])
    assert set(chat.pictures.reserved_ids) < set(chat.stop_ids)  # so that it is the last id of its turn
    span = sampled(chat, "red<|image_pad|>", end=False)
    parsed = dialogue.parse(span.ids)
    assert parsed.error and "stands for a picture" in parsed.error and not parsed.final_text
    output = dialogue.heard(span, parsed)
    assert [part.origin for part in output] == ["sampled", "forced"]
    dialogue.extend([Message("tool", f"Error: {parsed.error}")])
    with pytest.raises(PolicyError, match="wrote a token that stands for a picture"):
        dialogue.shown()


@pytest.mark.parametrize("data", [b"no picture", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_a_picture_that_cannot_be_read(chat: ChatFormat, data: bytes) -> None:
    with pytest.raises(EnvError, match=r"the picture \w{8} \(image/png\) cannot be read"):
        Dialogue(chat, []).start([Message("user", ("What? ", Image(data)))])


def test_a_picture_too_narrow_for_the_model(chat: ChatFormat, paint: Paint) -> None:
    with pytest.raises(EnvError, match="takes no picture of 900 x 4 pixels"):
        Dialogue(chat, []).start([Message("user", (paint(width=900, height=4),))])


def test_templates_that_show_no_pictures(policy: Policy) -> None:
    policy.tokenizer.chat_template = "{% for m in messages %}{{ m.content if m.content is string else '' }}{% endfor %}"
    with pytest.raises(UsageError, match=r"does not write a picture as one <\|image_pad\|>"):
        ChatFormat(policy.tokenizer, pictures=policy.pictures)


def test_a_folder_without_a_processor(policy: Policy, tmp_path: Path) -> None:
    policy.save_hf(tmp_path)
    names = {"preprocessor_config.json", "video_preprocessor_config.json"}
    assert names <= {path.name for path in tmp_path.iterdir()}  # an exported model can be served
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "qwen3_vl"
    again = Policy.from_folder(tmp_path)
    assert again.pictures is not None
    config = tmp_path / "config.json"
    assert sees(tmp_path)
    config.write_text(config.read_text().replace('"model_type": "qwen3_vl"', '"model_type": "llava"'))
    assert not sees(tmp_path)
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(tmp_path / "config.json", bare)
    with pytest.raises(UsageError, match="no processor for them that can be read"):
        Pictures(bare, policy.tokenizer)
