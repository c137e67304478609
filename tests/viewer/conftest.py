"""Real runs of seconds, one for each of several recipes, and the viewer of all of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

import agentrl
from agentrl.viewer.app import make_app

ENVS = {
    "otc": {"id": "calculator", "options": {"kind": "mixed", "lazy": None}},
    "flow": "agentrl.envs.workflow:Arithmetic",
}
RECIPES: dict[str, dict[str, Any]] = {
    "grpo": {"minibatches": 2, "annotators": ["old_logprobs"], "behaviour": {"type": "old", "correction": "tis"}},
    "otc": {
        "shapers": [{"type": "otc_grpo", "c": 4.0}, {"type": "tool_cost", "weight": 0.1}],
        "aggregator": "unit_mean",
    },
    "arpo": {
        "strategy": {"type": "arpo_agentic", "initial": 3, "beam": 2, "probability": 1.0},
        "transforms": [{"type": "shared_prefix", "mode": "hard", "count": "once"}],
    },
    "flow": {
        "context": {"type": "memory"},
        "estimator": {"type": "grpo", "stats_unit": "row"},
        "aggregator": "turn_trajectory",
        "annotators": ["reference_logprobs"],
        "aux": [{"type": "kl", "coef": 0.001}],
    },
}  # fmt: skip


def config_of(name: str, out: Path, arch: dict[str, Any], muon: dict[str, Any]) -> dict[str, Any]:
    rl = {"type": "rl", "steps": 2, "prompts": 3, "samples": 6, "editors": [], **RECIPES[name]}
    sft = {"type": "sft", "demonstrations": 400, "steps": 120, "batch": 32, "optimizer": {**muon, "lr": 8e-3}}
    return {
        "name": name,
        "out": str(out),
        "threads": 1,
        "env": ENVS.get(name, "calculator"),
        "model": {"type": "scratch", "arch": arch, "tokenizer": {"texts": 100}},
        "engine": {"rows": 32, "max_context": 320},
        "rollout": {"max_tokens": 24, "episodes": 32, "deadlines": {"tool": 5, "turn": 60, "episode": 300}},
        "stages": [sft, rl | {"optimizer": {**muon, "lr": 1e-3}}],
        "eval": {"tasks": 8, "every": 2},
    }


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, arch: dict[str, Any], muon: dict[str, Any]) -> Path:
    """A folder of four real runs, one a recipe."""
    out = tmp_path_factory.mktemp("viewed") / "runs"
    for name in RECIPES:
        agentrl.train(config_of(name, out, arch, muon))
    return out


@pytest.fixture(scope="session")
def client(runs: Path) -> Iterator[TestClient]:
    """The viewer of these runs."""
    with TestClient(make_app([runs]), base_url="http://127.0.0.1:7860") as found:
        yield found


@pytest.fixture(scope="session")
def keys(client: TestClient) -> dict[str, str]:
    """Each recipe's number in the viewer's list."""
    return {run["name"]: run["run"] for run in client.get("/api/runs").json()["runs"]}
