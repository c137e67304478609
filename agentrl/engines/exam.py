"""The exam: an engine, the model whose weights it serves, and how the two are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import PreTrainedModel

from agentrl.content import Image
from agentrl.engines import Engine, Generation, Request
from agentrl.pictures import Pictures
from agentrl.trajectory import Floats, Ids, Sampling, as_ids

PLAIN = Sampling(max_tokens=24)
FAR = 0.05  # nats by which two versions of the weights must differ for a mix-up to show


@dataclass(slots=True)
class Exam:
    """An engine that serves `model`'s weights as version 0, and what it is compared with.

    `tolerance`: largest difference of two log-probs, in nats: 1e-5 for fp32. `first`: the model's own weights;
    `others`: a second set, far enough from them to tell the two apart. `folders`: the same two as folders, for an
    engine that is not sent tensors but adapters. `pictures`: for a model that sees.
    """

    engine: Engine
    model: PreTrainedModel
    vocab: int
    tolerance: float = 1e-5
    others: Mapping[str, torch.Tensor] = field(default_factory=dict)
    first: Mapping[str, torch.Tensor] = field(default_factory=dict)
    folders: tuple[str, str] | None = None
    pictures: Pictures | None = None
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    @classmethod
    def of(
        cls,
        engine: Engine,
        model: PreTrainedModel,
        vocab: int,
        tolerance: float = 1e-5,
        pictures: Pictures | None = None,
    ) -> Exam:
        """The exam with perturbed weights as the second set."""
        noise = torch.Generator().manual_seed(0)
        first = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
        others = {
            name: tensor + 0.05 * tensor.float().std().nan_to_num(0.0) * torch.randn(tensor.shape, generator=noise)
            for name, tensor in first.items()
        }
        others = {name: tensor.to(first[name].dtype) for name, tensor in others.items()}
        return cls(engine, model, vocab, tolerance, others, first, pictures=pictures)

    @property
    def model_ends(self) -> set[int]:
        """The end ids that the model's own configuration names."""
        named = getattr(self.model.generation_config, "eos_token_id", None)
        return set(named) if isinstance(named, list) else {int(named)} if named is not None else set()

    def prompt(self, n: int) -> Ids:
        """`n` random ids."""
        return as_ids(self.rng.integers(0, self.vocab, n))

    def reference(
        self,
        ids: Ids,
        start: int,
        temperature: float = 1.0,
        *,
        second: bool = False,
        images: Sequence[Image] = (),
        places: Sequence[tuple[int, int]] = (),
    ) -> Floats:
        """Log-probs of ids[start:] by a plain forward pass of the first or second weights, with the pictures that stand
        at `places`."""
        weights = dict(self.others) if second else {}
        shown = self.pictures.inputs(images, places, len(ids) - 1) if self.pictures is not None else {}
        with torch.no_grad():
            batch = torch.tensor(ids[None].astype(np.int64))
            call = {"use_cache": False} | shown
            logits = torch.func.functional_call(self.model, weights, (batch[:, :-1],), call).logits[0]
            logps = torch.log_softmax(logits.float() / temperature, -1)
            found: Floats = logps[torch.arange(start - 1, len(ids) - 1), batch[0, start:]].numpy()
            return found

    async def sample(
        self, ids: Ids, sampling: Sampling = PLAIN, session: str = "", group: str = "", priority: int = 0
    ) -> Generation:
        name = session or f"exam-{self.rng.integers(1 << 40):x}"
        try:
            return await self.engine.generate(Request(ids, sampling, name, group, priority=priority))
        finally:
            if not session:
                await self.engine.release(name)

    async def update(self, version: int) -> None:
        """Give the engine the first weights as version 0, or the second as version 1."""
        if self.folders is None:
            await self.engine.update_weights((self.first, self.others)[version], version)
        else:
            await self.engine.update_weights(self.folders[version], version)

    def compare(self, ids: Ids, reply: Generation, temperature: float = 1.0, *, second: bool = False) -> float:
        """How far a reply's log-probs are from the forward pass. Raises `AssertionError` where that is too far."""
        whole = as_ids(np.concatenate([ids, reply.ids]))
        gap = np.abs(reply.logprobs - self.reference(whole, ids.size, temperature, second=second))
        worst = float(gap.max(initial=0.0))
        must(
            worst <= self.tolerance,
            f"log-probs differ from a forward pass by {worst:.2g}, more than {self.tolerance:g}",
        )
        return worst


def must(holds: bool, sentence: str) -> None:
    """Raises `AssertionError` unless it holds; unlike an assert statement also under `python -O`."""
    if not holds:
        raise AssertionError(sentence)
