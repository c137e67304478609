"""Whether the engine computes what the trainer computes, asked after every hand-over of weights.

A server that took half of the weights, kept an old cache, or serves another model goes on answering, with log-probs of
no policy that exists: training on them fails slowly and in silence. One short forward pass on each side tells, and for
a model that sees one more with a picture: servers remember what older weights saw in it.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import numpy as np
import torch

from agentrl.content import Image
from agentrl.engines import Engine, Request
from agentrl.errors import RunFailed
from agentrl.pictures import painted
from agentrl.train.policy import Policy
from agentrl.trajectory import Floats, Ids, Sampling, as_floats, as_ids

IDS = 48
EXACT, ROUGH = 1e-4, 0.2  # nats, of the mean difference: where both compute in float32, and where one does not


class Probe:
    """Compares log-probs of one fixed row of ids, by every server; with a picture, of what one of them samples.

    Args:
        tolerance: largest mean difference in nats; default: by the policy's dtype and whether servers share it.
    """

    def __init__(self, policy: Policy, engine: Engine, *, exact: bool, tolerance: float | None = None) -> None:
        vocab, most = policy.vocab_size, engine.capabilities.max_context or IDS
        self._policy = policy
        self._engine = engine
        self._shown = _Shown.of(policy) if policy.pictures is not None else None
        self._ids = as_ids(np.random.Generator(np.random.Philox(0)).integers(0, vocab, min(IDS, most)))
        self.tolerance = tolerance or (EXACT if exact else ROUGH)

    async def check(self) -> float:
        """The largest mean difference of any server, in nats. Raises `RunFailed` where it is over the tolerance."""
        theirs = await self._engine.scores(self._ids, 1)
        ours = await asyncio.to_thread(plain_logprobs, self._policy, self._ids)
        worst = 0.0
        for name, values in theirs.items():
            gap = float(np.abs(values.astype(np.float64) - ours).mean())
            if not gap <= self.tolerance:
                raise RunFailed(
                    f"after weights {self._policy.version}, {name} gives log-probs that are {gap:.2g} nats from the "
                    f"trainer's on average, more than {self.tolerance:g}: it does not hold these weights, or computes "
                    "otherwise (dtype, quantisation, another model). Look at its log; engine.tolerance sets the bound"
                )
            worst = max(worst, gap)
        return worst if self._shown is None else max(worst, await self._look(self._shown))

    async def _look(self, shown: _Shown) -> float:
        """The mean difference behind a picture, in nats. Raises `RunFailed` where it is over the tolerance."""
        name = f"probe-picture-{self._policy.version}"
        where = self._engine.where(name)
        try:
            reply = await self._engine.generate(shown.request(name))
        finally:
            await self._engine.release(name)
        ours = await asyncio.to_thread(shown.logprobs, self._policy, reply.ids)
        gap = float(np.abs(reply.logprobs.astype(np.float64) - ours).mean())
        if not gap <= self.tolerance:
            raise RunFailed(
                f"after weights {self._policy.version}, log-probs behind a picture by {where} are {gap:.2g} nats from "
                f"the trainer's on average, more than {self.tolerance:g}: it goes on with what older weights saw "
                "in the picture, or resizes otherwise. Start it as agentrl engine serve does (SGLang "
                "with SGLANG_VLM_CACHE_SIZE_MB=0 and --image-processor-backend pil)"
            )
        return gap


@dataclass(frozen=True, slots=True, eq=False)
class _Shown:
    """A fixed context with one picture."""

    ids: Ids
    image: Image
    place: tuple[int, int]
    stop_ids: tuple[int, ...]

    @classmethod
    def of(cls, policy: Policy) -> _Shown:
        eyes = policy.pictures
        assert eyes is not None
        rng = np.random.Generator(np.random.Philox(1))
        words = [
            i for i in rng.integers(0, policy.vocab_size, IDS).tolist() if i not in (*eyes.reserved_ids, *eyes.around)
        ]
        image = painted(rng, 4 * eyes.factor, 4 * eyes.factor)
        n = eyes.tokens(image)
        ids = [*words[:8], eyes.around[0], *[eyes.pad_id] * n, eyes.around[1], *words[8:16]]
        return cls(as_ids(ids), image, (9, 9 + n), eyes.reserved_ids)

    def request(self, session: str) -> Request:
        sampling = Sampling(max_tokens=8, stop_ids=self.stop_ids)
        return Request(self.ids, sampling, session, images=(self.image,), places=(self.place,))

    def logprobs(self, policy: Policy, said: Ids) -> Floats:
        """Those of `said` behind the context, by the architecture's own forward. Shape [len(said)]."""
        assert policy.pictures is not None
        n, whole = self.ids.size, np.concatenate([self.ids, said]).astype(np.int64)
        seen = policy.pictures.inputs((self.image,), (self.place,), whole.size - 1)
        with torch.no_grad():
            batch = torch.from_numpy(whole[None, :-1]).to(policy.device)
            call = {name: tensor.to(policy.device) for name, tensor in seen.items()}
            logits = policy.base(input_ids=batch, use_cache=False, **call).logits[0, n - 1 :]
            found = torch.log_softmax(logits.float(), -1).cpu()
        return as_floats(found[torch.arange(said.size), torch.from_numpy(whole[n:])].numpy())


def plain_logprobs(policy: Policy, ids: Ids) -> Floats:
    """Log-probs of ids[1:] given what stands before each, by the architecture's own forward. Shape [n - 1]."""
    with torch.no_grad():
        batch = torch.from_numpy(ids[None].astype(np.int64)).to(policy.device)
        logits = policy.base(batch, use_cache=False).logits[0, :-1]
        picked = torch.log_softmax(logits.float(), -1).gather(1, batch[0, 1:, None])[:, 0]
    return as_floats(picked.cpu().numpy())
