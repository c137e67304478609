"""Runs to replay: demonstrations recorded in a second by the real manager and store, and one small trained run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import agentrl
from agentrl import cli
from agentrl.config import SCHEMA_VERSION, Config, parse
from agentrl.loader import as_text
from agentrl.registry import load_file
from agentrl.store import RunFolder, StoreWriter
from agentrl.train.options import ScratchTokenizer
from agentrl.train.parts import demonstrate, make_chat, make_env, make_manager, take
from agentrl.train.stages import RLStage
from agentrl.train.tokenizer import bootstrap_tokenizer

WAYWARD = Path(__file__).parent / "wayward.py"
DEADLINES = {"tool": 5, "turn": 60, "episode": 300}

Record = Callable[..., Path]
Said = Callable[..., tuple[int, str]]


@pytest.fixture
def record(tmp_path: Path, arch: dict[str, Any]) -> Record:
    """`record(env, n, pieces=…, **keys)`: a run folder that holds `n` demonstrations, played like those of a supervised
    stage, with the words of its tokens or without."""

    def make(env: str | dict[str, Any], n: int = 4, name: str = "run", pieces: bool = False, **keys: Any) -> Path:
        config = parse(
            {
                "name": name,
                "out": str(tmp_path),
                "env": env,
                "model": {"type": "scratch", "arch": arch, "tokenizer": {"texts": 20}},
                "rollout": {"episodes": 8, "deadlines": DEADLINES},
                "stages": [{"type": "sft", "steps": 1, "optimizer": {"lr": 1e-3}}],
            }
            | keys
        )
        with RunFolder.create(tmp_path / name, as_text(config), config_version=SCHEMA_VERSION) as folder:
            asyncio.run(_play(config, folder.path, n, pieces))
        return tmp_path / name

    return make


async def _play(config: Config, folder: Path, n: int, pieces: bool) -> None:
    env = make_env(config)
    await env.prepare()
    chat = make_chat(config, bootstrap_tokenizer(ScratchTokenizer()))
    words = (lambda ids: [str(chat.tokenizer.decode([int(i)])) for i in ids]) if pieces else None
    with StoreWriter(folder, pieces=words) as writer:
        manager, tasks = make_manager(config, env, writer), take(env, n, seed=config.seed)
        context = next((stage.context for stage in config.stages if isinstance(stage, RLStage)), None)
        groups = await demonstrate(manager, chat, tasks, stage="sft", context=context)
        writer.add([m.trajectory for g in groups for m in g.members], step=0, stage="sft", split="demo")
    await env.retire()


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, arch: dict[str, Any], muon: dict[str, Any]) -> Path:
    """A run of all stages, whose reinforcement learning branches its episodes."""
    out = tmp_path_factory.mktemp("runs")
    sft = {"type": "sft", "demonstrations": 300, "steps": 60, "batch": 32, "optimizer": {**muon, "lr": 8e-3}}
    strategy = {"type": "arpo_agentic", "initial": 3, "probability": 1.0}
    rl = {"type": "rl", "steps": 2, "prompts": 4, "samples": 6, "editors": [], "strategy": strategy}
    agentrl.train(
        {
            "name": "small",
            "out": str(out),
            "threads": 1,
            "env": "calculator",
            "model": {"type": "scratch", "arch": arch, "tokenizer": {"texts": 100}},
            "engine": {"rows": 32, "max_context": 320},
            "rollout": {"max_tokens": 24, "episodes": 32, "deadlines": DEADLINES},
            "stages": [sft, {**rl, "optimizer": {**muon, "lr": 1e-3}}],
            "eval": {"tasks": 8},
            "checkpoint": {"every": 1, "keep": 5},
        }
    )
    return out / "small"


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    """The command line: exit code, and all that it printed."""

    def run(*words: object) -> tuple[int, str]:
        capsys.readouterr()
        code = cli.run([str(word) for word in words])
        heard = capsys.readouterr()
        return code, " ".join((heard.out + heard.err).split())

    return run


@pytest.fixture(autouse=True)
def wayward() -> ModuleType:
    """The environment's module, its globals as at the start."""
    module = load_file(WAYWARD)
    module.COUNT[0] = 0
    for each in (module.CLOSED, module.GONE, module.SEEN):
        each.clear()
    return module
