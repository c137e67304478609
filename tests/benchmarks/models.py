"""The random models of the engine benchmark: sizes that the design's own figures were taken with."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

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
