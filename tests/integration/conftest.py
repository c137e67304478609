"""Small runs through the real thing: environment, engine, trainer, store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
MUON = {"name": "muon", "momentum": 0.95, "betas": [0.9, 0.95], "clip": 1.0}
ARCH = {
    "model_type": "qwen3",
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 24,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "initializer_range": 0.06,
}

MakeConfig = Callable[..., dict[str, Any]]


@pytest.fixture
def small(tmp_path: Path) -> MakeConfig:
    """A run of seconds; keyword arguments replace top-level keys, `rl` and `sft` update their stages."""

    def make(rl: dict[str, Any] | None = None, sft: dict[str, Any] | None = None, **keys: Any) -> dict[str, Any]:
        stages: list[dict[str, Any]] = [
            {
                "type": "sft",
                "demonstrations": 300,
                "steps": 60,
                "batch": 32,
                "optimizer": {**MUON, "lr": 8e-3},
                **(sft or {}),
            },
            {
                "type": "rl",
                "steps": 4,
                "prompts": 4,
                "samples": 6,
                "minibatches": 2,
                "editors": [],
                **(rl or {}),
                "optimizer": {**MUON, "lr": 1e-3, **(rl or {}).get("optimizer", {})},
            },
        ]
        return {
            "name": "small",
            "out": str(tmp_path / "runs"),
            "threads": 1,
            "env": "calculator",
            "model": {"type": "scratch", "arch": ARCH, "tokenizer": {"texts": 100}},
            "engine": {"rows": 32, "max_context": 320},
            "rollout": {"max_tokens": 24, "episodes": 32, "deadlines": {"tool": 5, "turn": 60, "episode": 300}},
            "stages": stages,
            "eval": {"tasks": 16, "every": 2},
            "checkpoint": {"every": 2, "keep": 5},
        } | keys

    return make
