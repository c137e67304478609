"""Drawing tokens: all rows at once, by inverse transform of one uniform number a row.

The uniforms of a request follow from its seed and the position in its output alone, so that neighbours, timing and
forced tokens never change a draw. Log-probs and entropies are of the full softmax at the row's temperature, before
top-k and top-p (temperature 0 is greedy; its log-probs are of temperature 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

_WIDE = 8192  # above this vocabulary the running sum needs double precision


def uniforms(seed: int, n: int) -> NDArray[np.float64]:
    """The first `n` uniform numbers of the stream of `seed`, in [0, 1)."""
    return np.random.Generator(np.random.Philox(key=seed & (2**128 - 1))).random(n)


@dataclass(slots=True)
class Draws:
    """What B rows ask for. Tensors are [B], on the device of the logits; None means that no row needs it."""

    uniform: torch.Tensor
    temperature: torch.Tensor | None = None
    greedy: torch.Tensor | None = None
    top_k: torch.Tensor | None = None
    top_p: torch.Tensor | None = None
    forced: torch.Tensor | None = None


def draw(logits: torch.Tensor, draws: Draws) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids [B] int64, their log-probs [B] and entropies in nats [B], from logits [B, V]."""
    logits = logits.float()
    if draws.temperature is not None:
        logits = logits / draws.temperature[:, None]
    logprobs = torch.log_softmax(logits, dim=-1)
    probs = logprobs.exp()
    entropies = -(probs * logprobs).sum(dim=-1)
    if bool(entropies.isnan().any()):  # a logit of -inf gives 0 * -inf
        entropies = torch.special.entr(probs).sum(dim=-1)
    ids = _invert(probs, draws.uniform)
    if draws.top_k is not None or draws.top_p is not None:
        ids = _truncated(probs, ids, draws)
    if draws.greedy is not None:
        ids = torch.where(draws.greedy, logits.argmax(dim=-1), ids)
    if draws.forced is not None:
        ids = torch.where(draws.forced >= 0, draws.forced, ids)
    return ids, logprobs.gather(1, ids[:, None])[:, 0], entropies


def _invert(probs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The first id whose running sum exceeds uniform * total. Shape [B]."""
    wide = probs.shape[-1] > _WIDE
    sums = probs.cumsum(dim=-1, dtype=torch.float64 if wide else torch.float32)
    total = sums[:, -1]
    target = torch.minimum(uniform.to(sums.dtype) * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(sums, target[:, None], right=True)[:, 0].clamp_(max=probs.shape[-1] - 1)


def _truncated(probs: torch.Tensor, ids: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Redraw the rows with top-k or top-p among their most probable ids. Ties keep the smaller id."""
    vocab = probs.shape[-1]
    top_k = torch.full_like(ids, vocab) if draws.top_k is None else torch.where(draws.top_k > 0, draws.top_k, vocab)
    top_p = torch.ones_like(probs[:, 0]) if draws.top_p is None else draws.top_p.to(probs.dtype)
    rows = torch.nonzero((top_k < vocab) | (top_p < 1))[:, 0]
    if not rows.numel():
        return ids
    ranked, order = probs[rows].sort(dim=-1, descending=True, stable=True)
    before = ranked.cumsum(dim=-1) - ranked
    rank = torch.arange(vocab, device=probs.device)
    keep = (rank < top_k[rows, None]) & (before < top_p[rows, None])
    keep[:, 0] = True
    picked = _invert(ranked * keep, draws.uniform[rows])
    return ids.index_put((rows,), order.gather(1, picked[:, None])[:, 0])
