"""Rows and tiny random models for the tests of the forward pass, the policy and the optimisers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from agentrl.trajectory import Row, as_ids

VOCAB = 97

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHS: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen2_window": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen3": {"tie_word_embeddings": True},
    "llama": {"attention_bias": True},
    "mistral": {"sliding_window": 7},
    "gemma": {},
    "gemma2": {"sliding_window": 7},
    "gemma3_text": {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 7, "rope_parameters": None},
    "granite": {"logits_scaling": 3.0},
}


def tiny(arch: str, seed: int = 0, **more: Any) -> PreTrainedModel:
    """A random two-layer model of an architecture, with weights large enough that mistakes show."""
    keys = {**_SIZES, **ARCHS.get(arch, {}), **more}
    config = AutoConfig.for_model(keys.pop("model_type", arch), **keys)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(3) if p.ndim >= 2 else p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def row(ids: Any, targets: Any) -> Row:
    """A row of one turn."""
    where = np.asarray(targets, dtype=np.int64)
    return Row(as_ids(ids), where, np.zeros_like(where), np.arange(where.size))


def grouped_rows(seed: int = 0, vocab: int = VOCAB, groups: int = 3, samples: int = 4) -> list[Row]:
    """Shuffled rows of a few groups: a common system turn, prompts, ragged tails with gaps between their
    targets, a duplicate, and a row that leaves another one half way through its tail."""
    rng = np.random.default_rng(seed)
    rows = []
    system = rng.integers(3, vocab, 5)
    for _ in range(groups):
        prompt = np.concatenate([system, rng.integers(3, vocab, rng.integers(4, 10))])
        for _ in range(samples):
            tail = int(rng.integers(4, 18))
            ids = np.concatenate([prompt, rng.integers(3, vocab, tail)])
            picked = rng.choice(np.arange(prompt.size, ids.size), tail // 2, replace=False)
            rows.append(row(ids, np.sort(picked)))
    rows.append(rows[0])
    branch = np.concatenate([rows[1].ids[:-2], [5, 6, 7]])
    rows.append(row(branch, np.arange(branch.size - 5, branch.size)))
    return [rows[index] for index in rng.permutation(len(rows))]


def plain_logprobs(model: PreTrainedModel, rows: list[Row], temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """What is to be matched: every row alone through the model, a softmax over all its logits."""
    logprobs, entropies = [], []
    for one in rows:
        ids = torch.from_numpy(one.ids[None].astype(np.int64)).to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0].float() / temperature
        table = logits.log_softmax(-1)[one.targets - 1]
        logprobs.append(table[np.arange(one.targets.size), one.ids[one.targets].astype(np.int64)])
        entropies.append(-(table.exp() * table).sum(-1))
    return torch.cat(logprobs), torch.cat(entropies)


def gradients(model: PreTrainedModel, logprobs: Tensor, entropies: Tensor) -> dict[str, Tensor]:
    """Gradients of a loss in which every token and entropy has a weight of its own."""
    model.zero_grad()
    weights = torch.linspace(-1, 1, logprobs.numel(), device=logprobs.device)
    (logprobs * weights + 0.3 * entropies * weights.flip(0)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
