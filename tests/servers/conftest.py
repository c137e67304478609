"""Real model servers, one of each kind a session, on a tiny random model; skipped where AGENTRL_SERVERS names none.

AGENTRL_SERVERS="sglang vllm" pytest tests/servers     as `agentrl engine install` made them
AGENTRL_SERVERS="sglang=/path/python" pytest tests/servers
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers

from agentrl.engines.exam import Exam
from agentrl.engines.install import python_of
from agentrl.engines.launch import Launch, ServerProcess, free_port
from agentrl.engines.remote import RemoteEngine
from agentrl.engines.sglang import SGLangServer
from agentrl.engines.vllm import VLLMServer
from agentrl.train.options import LoraOptions
from agentrl.train.policy import Policy

VOCAB = 320
LORA = LoraOptions(r=8, alpha=16.0)


def pythons() -> dict[str, Path]:
    """The servers' environments, by kind."""
    found: dict[str, Path] = {}
    for word in os.environ.get("AGENTRL_SERVERS", "").split():
        kind, _, path = word.partition("=")
        python = Path(path) if path else python_of(kind, "cpu")  # type: ignore[arg-type]
        assert python is not None, f"{kind} is to be tested and not installed; run: agentrl engine install {kind}"
        found[kind] = python
    return found


def write_model(folder: Path) -> None:
    """A random Qwen3 of two layers with a byte tokenizer; vLLM's attention on a CPU wants heads of 32."""
    config = transformers.Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=512,
        initializer_range=0.1,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,  # or servers end long requests before they can be aborted
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.Qwen3ForCausalLM(config)
    model.save_pretrained(folder)
    words = {f"<{n}>": n for n in range(VOCAB)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<0>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<0>")
    fast.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    fast.save_pretrained(folder)


@dataclass
class Served:
    """A running server, the model that it serves, and that model's adapters as folders with their merged weights."""

    kind: str
    url: str
    model: Path
    adapters: tuple[str, str] = ("", "")
    merged: list[dict[str, torch.Tensor]] = field(default_factory=list)

    def plain(self) -> transformers.PreTrainedModel:
        model = Policy.from_folder(self.model).base
        model.train(False)
        return model

    @asynccontextmanager
    async def engine(self, sync: Any, in_flight: Any = None) -> AsyncIterator[RemoteEngine]:
        server = SGLangServer(self.url) if self.kind == "sglang" else VLLMServer(self.url)
        made = await RemoteEngine.connect([server], vocab=VOCAB, sync=sync, in_flight=in_flight)
        try:
            yield made
        finally:
            await made.close()

    async def exam(self, engine: RemoteEngine, sync: str) -> Exam:
        """An exam of an engine that has the first weights."""
        model = self.plain()
        exam = Exam.of(engine, model, VOCAB)
        if sync == "adapter":
            async with self.engine("disk") as base:  # other tests leave other weights
                await base.update_weights(exam.first, 0)
            model.load_state_dict(self.merged[0], strict=False)
            exam = Exam(engine, model, VOCAB, 1e-5, self.merged[1], self.merged[0], self.adapters)
        await exam.update(0)
        return exam


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[str, str], list[dict[str, torch.Tensor]]]:
    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    policy = Policy.from_folder(folder, lora=LORA)
    noise = torch.Generator().manual_seed(1)
    adapters, merged = [], []
    for n, scale in enumerate((0.02, 0.1)):
        with torch.no_grad():
            for parameter in policy.trainable().values():
                parameter.copy_(scale * torch.randn(parameter.shape, generator=noise))
        adapters.append(str(tmp_path_factory.mktemp(f"adapter-{n}")))
        policy.save_hf(adapters[-1], merge=False)
        merged.append({name: tensor.clone() for name, tensor in policy.weights()})
    return folder, (adapters[0], adapters[1]), merged


def serve(kind: Any, models: Any, folder: Path) -> Iterator[Served]:
    """A server that takes adapters too, for as long as the session needs it."""
    found = pythons().get(kind)
    if found is None:
        pytest.skip(f"AGENTRL_SERVERS does not name {kind}")
    model, adapters, merged = models
    places = "--max-running-requests" if kind == "sglang" else "--max-num-seqs"
    launch = Launch(kind, found, model, free_port(), lora_rank=LORA.r, flags=(f"{places}=64",))
    process = ServerProcess.start(launch, folder / f"{kind}.log")
    try:
        asyncio.run(process.ready())
        yield Served(kind, launch.url, model, adapters, merged)
    finally:
        asyncio.run(process.stop())


@pytest.fixture(scope="session")
def environments() -> dict[str, Path]:
    return pythons()


@pytest.fixture(scope="session")
def sglang(models: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from serve("sglang", models, tmp_path_factory.mktemp("log"))


@pytest.fixture(scope="session")
def vllm(models: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from serve("vllm", models, tmp_path_factory.mktemp("log"))


@pytest.fixture
def served(request: pytest.FixtureRequest) -> Served:
    """The server whose kind is the parameter."""
    found: Served = request.getfixturevalue(request.param)
    return found


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
