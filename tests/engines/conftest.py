"""Tiny random models of several families, and the plain forward pass that every figure is compared with."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from agentrl.engines import Generation, Request
from agentrl.engines.local import LocalEngine
from agentrl.trajectory import Sampling, as_ids

sys.path.insert(0, str(Path(__file__).parent))  # importlib mode adds no path: the tests import `shaky`

VOCAB = 97
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 12, "tie_word_embeddings": True}),
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": 11, "head_dim": 8}),
    "gemma2": (
        "Gemma2",
        {"sliding_window": 9, "head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0},
    ),
    "gemma3": ("Gemma3", {"sliding_window": 9, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]}),
}


def make(family: str = "qwen3", seed: int = 0, **changes: Any) -> transformers.PreTrainedModel:
    """A random model of `family`: two layers, four heads over two key-value heads, 97 ids."""
    name, own = FAMILIES[family]
    config_name = f"{name}TextConfig" if family == "gemma3" else f"{name}Config"
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.15,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
        "attn_implementation": "eager",  # sdpa leaves Gemma's soft cap out
    }
    config = getattr(transformers, config_name)(**{**settings, **own, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, f"{name}ForCausalLM")(config)
    model.train(False)
    return model


def forward(model: torch.nn.Module, ids: list[int], start: int, temperature: float = 1.0) -> tuple[Any, Any]:
    """Log-probs of ids[start:] and the entropies there, by one plain forward pass over all ids."""
    with torch.no_grad():
        logits = model(torch.tensor(ids)[None]).logits[0, start - 1 : -1].double() / temperature
    logprobs = logits.log_softmax(-1)
    chosen = logprobs.gather(1, torch.tensor(ids[start:])[:, None])[:, 0]
    return chosen.numpy(), -(logprobs.exp() * logprobs).sum(-1).numpy()


@asynccontextmanager
async def engine_of(model: transformers.PreTrainedModel, **settings: Any) -> AsyncIterator[LocalEngine]:
    engine = LocalEngine(model, **settings)
    try:
        yield engine
    finally:
        await engine.close()


def request(ids: Any, session: str = "s", forced: Any = None, **sampling: Any) -> Request:
    """A request in one line."""
    return Request(as_ids(ids), Sampling(**sampling), session, forced=None if forced is None else as_ids(forced))


async def play(
    engine: LocalEngine, index: int, naps: np.random.Generator | None = None, turns: int = 3, group: int = 4
) -> list[tuple[list[int], Generation]]:
    """One ragged episode: `group` neighbours share a prompt; contexts, lengths and seeds follow from `index`."""
    prompt = np.random.default_rng(index // group)
    rng = np.random.default_rng([7, index])
    context = prompt.integers(0, VOCAB, 5 + 23 * (index // group)).tolist()
    record = []
    for turn in range(turns):
        settings = {
            "max_tokens": int(rng.integers(2, 30)),
            "temperature": (1.0, 0.7)[index % 2],
            "seed": 100 * index + turn,
        }
        if naps is not None:
            await asyncio.sleep(float(naps.random()) * 0.004)
        reply = await engine.generate(request(context, f"e{index}", **settings))
        record.append((context, reply))
        context = [*context, *reply.ids.tolist(), *rng.integers(0, VOCAB, int(rng.integers(1, 40))).tolist()]
    await engine.release(f"e{index}")
    return record


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Tools:
    """What the tests of this folder share."""

    make = staticmethod(make)
    forward = staticmethod(forward)
    engine = staticmethod(engine_of)
    request = staticmethod(request)
    play = staticmethod(play)
    families: Callable[[], list[str]] = staticmethod(lambda: list(FAMILIES))


@pytest.fixture
def tools() -> Tools:
    return Tools()
