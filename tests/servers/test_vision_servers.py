"""A model that sees, behind real servers: exact behind pictures, played, replayed from the record, and trained."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agentrl.api import train
from agentrl.content import Image
from agentrl.engines import Request
from agentrl.engines.conformance import CHECKS
from agentrl.engines.exam import Exam
from agentrl.engines.launch import Launch, ServerProcess, free_port
from agentrl.engines.remote import RemoteEngine
from agentrl.engines.sglang import SGLangServer
from agentrl.engines.vllm import VLLMServer
from agentrl.errors import UsageError
from agentrl.store import StoreReader
from agentrl.train.policy import Policy
from agentrl.trajectory import Sampling, as_ids, ids_of, places_of

HERE = Path(__file__).parent
ON_SGLANG = pytest.mark.xdist_group("sglang")
ON_VLLM = pytest.mark.xdist_group("vllm")
KINDS = [pytest.param("sglang", marks=ON_SGLANG), pytest.param("vllm", marks=ON_VLLM)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sys.path.insert(0, str(HERE.parent / "benchmarks"))  # importlib mode adds no path
    from models import write_vision_model

    made = tmp_path_factory.mktemp("seeing")
    write_vision_model(made, eager=True)
    return made


@pytest.fixture(scope="module")
def seeing(
    request: pytest.FixtureRequest, folder: Path, environments: dict[str, Path], tmp_path_factory: Any
) -> Iterator[tuple[str, str]]:
    """The kind and the address of a server of the model."""
    kind: Any = request.param
    python = environments.get(kind)
    if python is None:
        pytest.skip(f"AGENTRL_SERVERS does not name {kind}")
    launch = Launch(kind, python, folder, free_port())
    process = ServerProcess.start(launch, tmp_path_factory.mktemp("log") / f"{kind}.log")
    try:
        asyncio.run(process.ready())
        yield kind, launch.url
    finally:
        asyncio.run(process.stop())


@pytest.mark.parametrize("seeing", KINDS, indirect=True)
def test_behind_pictures_a_server_is_exact(seeing: tuple[str, str], folder: Path) -> None:
    kind, url = seeing
    policy = Policy.from_folder(folder)

    async def main() -> str:
        server = SGLangServer(url) if kind == "sglang" else VLLMServer(url)
        engine = await RemoteEngine.connect([server], vocab=policy.vocab_size)
        try:
            assert engine.capabilities.images
            await engine.update_weights(policy.weights(), 0)
            exam = Exam.of(engine, policy.base, policy.vocab_size, pictures=policy.pictures)
            return "; ".join([await CHECKS[name](exam) for name in ("images", "prefix reuse", "stale keys and values")])
        finally:
            await engine.close()

    assert "nats from another picture; 100.0% used again" in asyncio.run(main())


@pytest.mark.parametrize(
    "served", [pytest.param("sglang", marks=ON_SGLANG), pytest.param("vllm", marks=ON_VLLM)], indirect=True
)
def test_a_text_model_is_sent_no_picture(served: Any) -> None:
    shown = Request(as_ids([1, 2, 3]), Sampling(max_tokens=2), "s", images=(Image(b"x"),), places=((1, 2),))

    async def main() -> None:
        async with served.engine("disk") as engine:
            assert not engine.capabilities.images
            await engine.generate(shown)

    with pytest.raises(UsageError, match="serves a model of text, which would ignore the request's pictures"):
        asyncio.run(main())


@pytest.mark.parametrize("seeing", KINDS, indirect=True)
def test_a_run_that_sees(seeing: tuple[str, str], folder: Path, tmp_path: Path) -> None:
    """Rollouts, training and evaluation through the real path; then the record, read back, is forwarded once more."""
    kind, url = seeing
    config = {
        "name": "sees",
        "out": str(tmp_path),
        "seed": 1,
        "env": {"id": f"{HERE / 'colours.py'}:Colours"},
        "model": {"type": "hf", "path": str(folder)},
        "engine": {"type": kind, "urls": [url]},
        "rollout": {"max_tokens": 12},
        "eval": {"tasks": 4},
        "stages": [{"type": "rl", "steps": 3, "prompts": 3, "samples": 4, "optimizer": {"lr": 3e-3}}],
    }
    train(config)
    run = tmp_path / "sees"
    steps = [
        line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "gap/max_abs" in line
    ]
    assert len(steps) == 3 and max(step["gap/max_abs"] for step in steps) <= 1e-5  # the trainer's against the server's
    assert max(step["gap/probe"] for step in steps) <= 1e-5 and all(step["grad_norm"] > 0 for step in steps)
    policy = Policy.from_folder(folder)
    assert policy.pictures is not None
    worst, pictures = 0.0, 0
    with StoreReader(run) as reader:
        first = [trajectory for trajectory in map(reader.get, reader.finished(0, "rl"))]
        for turn in (turn for trajectory in first for turn in trajectory.turns if turn.n_sampled):
            places, context = places_of(turn.context), ids_of(turn.context)
            images = [Image(reader.image(place.sha256).read_bytes()) for place in places]
            whole = np.concatenate([context, turn.sampled[0].ids]).astype(np.int64)
            seen = policy.pictures.inputs(images, [(p.start, p.stop) for p in places], whole.size - 1)
            with torch.no_grad():
                logits = policy.base(input_ids=torch.from_numpy(whole[None, :-1]), use_cache=False, **seen).logits[0]
            logps = torch.log_softmax(logits, -1)[context.size - 1 :]
            found = logps[torch.arange(turn.n_sampled), torch.from_numpy(whole[context.size :])].numpy()
            worst = max(worst, float(np.abs(found - turn.logprobs).max()))
            pictures = max(pictures, len(places))
    assert worst <= 1e-5 and pictures >= 2
