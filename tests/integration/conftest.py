"""Small runs through the real thing: environment, engine, trainer, store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent

MakeConfig = Callable[..., dict[str, Any]]


@pytest.fixture
def small(tmp_path: Path, arch: dict[str, Any], muon: dict[str, Any]) -> MakeConfig:
    """A run of seconds; keyword arguments replace top-level keys, `rl` and `sft` update their stages."""

    def make(rl: dict[str, Any] | None = None, sft: dict[str, Any] | None = None, **keys: Any) -> dict[str, Any]:
        stages: list[dict[str, Any]] = [
            {
                "type": "sft",
                "demonstrations": 300,
                "steps": 60,
                "batch": 32,
                "optimizer": {**muon, "lr": 8e-3},
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
                "optimizer": {**muon, "lr": 1e-3, **(rl or {}).get("optimizer", {})},
            },
        ]
        return {
            "name": "small",
            "out": str(tmp_path / "runs"),
            "threads": 1,
            "env": "calculator",
            "model": {"type": "scratch", "arch": arch, "tokenizer": {"texts": 100}},
            "engine": {"rows": 32, "max_context": 320},
            "rollout": {"max_tokens": 24, "episodes": 32, "deadlines": {"tool": 5, "turn": 60, "episode": 300}},
            "stages": stages,
            "eval": {"tasks": 16, "every": 2},
            "checkpoint": {"every": 2, "keep": 5},
        } | keys

    return make
