"""Whether the engine computes what the trainer computes, asked after every hand-over of weights.

A server that took half of the weights, kept an old cache, or serves another model goes on answering, with log-probs of
no policy that exists: training on them fails slowly and in silence. One short forward pass on each side tells.
"""

from __future__ import annotations

import asyncio

import numpy as np
import torch

from agentrl.engines import Engine
from agentrl.errors import RunFailed
from agentrl.train.policy import Policy
from agentrl.trajectory import Floats, Ids, as_floats, as_ids

IDS = 48
EXACT, ROUGH = 1e-4, 0.2  # nats, of the mean difference: where both compute in float32, and where one does not


class Probe:
    """Compares log-probs of one fixed row of ids.

    Args:
        tolerance: largest mean difference in nats; default: by the policy's dtype and whether servers share it.
    """

    def __init__(self, policy: Policy, engine: Engine, *, exact: bool, tolerance: float | None = None) -> None:
        vocab, most = policy.vocab_size, engine.capabilities.max_context or IDS
        self._policy = policy
        self._engine = engine
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
        return worst


def plain_logprobs(policy: Policy, ids: Ids) -> Floats:
    """Log-probs of ids[1:] given what stands before each, by the architecture's own forward. Shape [n - 1]."""
    with torch.no_grad():
        batch = torch.from_numpy(ids[None].astype(np.int64)).to(policy.device)
        logits = policy.base(batch, use_cache=False).logits[0, :-1]
        picked = torch.log_softmax(logits.float(), -1).gather(1, batch[0, 1:, None])[:, 0]
    return as_floats(picked.cpu().numpy())
