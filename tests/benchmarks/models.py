"""Random models: the engine benchmark's, in sizes that the design's own figures were taken with, and one that sees."""

from __future__ import annotations

import io
import json
from pathlib import Path

import PIL.Image
import torch
from transformers import (
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from agentrl.train.options import ScratchTokenizer
from agentrl.train.tokenizer import CHAT_TEMPLATE, bootstrap_tokenizer

# 4.2 M parameters: what engines and trainers are compared with on a CPU
BENCH = dict(vocab_size=4096, hidden_size=256, num_hidden_layers=4, head_dim=64, intermediate_size=768)
# 283 k parameters: the quickstart's policy
QUICKSTART = dict(vocab_size=642, hidden_size=96, num_hidden_layers=2, head_dim=24, intermediate_size=288)
SIZES = {"bench": BENCH, "quickstart": QUICKSTART}


def random_qwen3(size: str = "bench", seed: int = 0) -> PreTrainedModel:
    """A Qwen3 with tied embeddings and random weights, float32, in evaluation mode, without an end token."""
    config = Qwen3Config(
        **SIZES[size],
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.06,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    model.train(False)
    return model


# -- a model that sees -------------------------------------------------------------------------------------------------

PICTURE_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
PARTS = """\
{%- macro content(said) -%}
{%- if said is string -%}{{- said -}}
{%- else -%}
{%- for part in said -%}
{%- if part.type == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- else -%}{{- part.text -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
"""  # as Qwen3-VL's own template puts pictures between words


def vision_template() -> str:
    """The template of models trained from nothing, whose messages may hold pictures too."""
    spoken = CHAT_TEMPLATE.replace("(message.content or '')", "content(message.content or '')")
    spoken = spoken.replace("+ message.content +", "+ content(message.content) +")
    return PARTS + spoken.replace("messages[0].content if", "content(messages[0].content) if")


def write_vision_model(folder: Path, seed: int = 0, context: int = 1024, *, eager: bool = False) -> None:
    """A Qwen3-VL with random weights and all files that servers want of it: nothing is downloaded.

    Pictures are cut into patches of 8 pixels, four of which make one token; bytes are its words. `eager`: every sixth
    id ends a turn, so that a policy of noise takes turns.
    """
    tokenizer = bootstrap_tokenizer(ScratchTokenizer())
    tokenizer.add_special_tokens({"additional_special_tokens": list(PICTURE_TOKENS)})
    n = len(tokenizer)
    words = 64 * -(-n // 64)
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|end_{i}|>" for i in range(n, words)]})
    tokenizer.chat_template = vision_template()
    start, end, image, video = tokenizer.convert_tokens_to_ids(list(PICTURE_TOKENS))
    text = dict(
        vocab_size=words,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,  # vLLM's attention on a CPU wants heads of 32
        max_position_embeddings=context,
        initializer_range=0.1,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [6, 5, 5],
            "mrope_interleaved": True,
        },
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    eyes = dict(
        depth=2,
        hidden_size=32,
        intermediate_size=48,
        num_heads=2,
        patch_size=8,
        out_hidden_size=64,
        num_position_embeddings=64,
        deepstack_visual_indexes=[0, 1],
        initializer_range=0.3,
    )
    config = Qwen3VLConfig(
        text_config=text,
        vision_config=eyes,
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3VLForConditionalGeneration(config)
    ends = range(n, words) if eager else ()
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *ends]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor = {
        "processor_class": "Qwen3VLProcessor",
        "patch_size": 8,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "size": {"shortest_edge": 256, "longest_edge": 64 * 64},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    kinds = {
        "preprocessor_config.json": {"image_processor_type": "Qwen2VLImageProcessorFast"},
        "video_preprocessor_config.json": {"video_processor_type": "Qwen3VLVideoProcessor"},
    }
    for name, kind in kinds.items():
        (folder / name).write_text(json.dumps(processor | kind))


def picture(color: tuple[int, int, int], width: int = 32, height: int = 32) -> bytes:
    """A square of one colour with a dark corner, as PNG."""
    made = PIL.Image.new("RGB", (width, height), color)
    made.paste((20, 20, 20), (0, 0, width // 4, height // 4))
    sink = io.BytesIO()
    made.save(sink, "PNG")
    return sink.getvalue()
