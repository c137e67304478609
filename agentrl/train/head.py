"""Log-probs and entropies of chosen tokens from hidden states; the matrix [tokens, vocab] never stands whole.

The vocabulary's logits are made chunk by chunk. Backward knows the closed forms
d log p(y) / dz = onehot(y) - p and dH / dz = -p (log p + H), so it needs each chunk's log-softmax
again: kept where the whole of it is small, recomputed otherwise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK = 1 << 22
"""Logits in one chunk (16 MB in float32)."""

_KEPT = 2  # chunks of log-probs that may be kept for backward


def target_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs of `targets` [n] under softmax((hidden W^T + b) / temperature), float32 [n], and that
    distribution's entropies in nats [n] (None unless asked). hidden [n, D], weight [V, D], bias [V].
    """
    logprobs, entropies = _Head.apply(hidden, weight, bias, targets, temperature, entropy, chunk)  # type: ignore[no-untyped-call]
    return logprobs, entropies if entropy else None


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        entropy: bool,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        count = hidden.shape[0]
        step = max(1, chunk // weight.shape[0])
        keep = count <= _KEPT * step and any(ctx.needs_input_grad)
        kept = []
        logprobs = torch.empty(count, dtype=torch.float32, device=hidden.device)
        entropies = torch.empty(count if entropy else 0, dtype=torch.float32, device=hidden.device)
        for start in range(0, count, step):
            part = slice(start, start + step)
            each = _logprobs(hidden[part], weight, bias, temperature)
            logprobs[part] = each.gather(1, targets[part, None])[:, 0]
            if entropy:
                entropies[part] = _entropy(each)
            if keep:
                kept.append(each)
        ctx.save_for_backward(hidden, weight, bias, targets, entropies, *kept)
        ctx.temperature, ctx.step = temperature, step
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, entropies, *kept = ctx.saved_tensors
        to_hidden, to_weight, to_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if to_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if to_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if to_bias else None
        for number, start in enumerate(range(0, hidden.shape[0], ctx.step)):
            part = slice(start, start + ctx.step)
            logprob = kept[number] if kept else _logprobs(hidden[part], weight, bias, ctx.temperature)
            probs = logprob.exp()
            if entropies.numel():
                surprise = logprob.clamp_min(torch.finfo(logprob.dtype).min) + entropies[part, None]
                delta = probs.mul(-grad[part, None]).addcmul_(probs * surprise, -grad_entropy[part, None])
            else:
                delta = probs.mul_(-grad[part, None])
            delta.scatter_add_(1, targets[part, None], grad[part, None])
            if ctx.temperature != 1.0:
                delta /= ctx.temperature
            if grad_hidden is not None:
                grad_hidden[part] = delta.to(weight.dtype) @ weight
            if grad_weight is not None:
                grad_weight.addmm_(delta.T, hidden[part].float())
            if grad_bias is not None:
                grad_bias += delta.sum(0)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.to(weight.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


def _logprobs(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    """log softmax((hidden W^T + b) / temperature), float32 [n, V]."""
    logits = torch.nn.functional.linear(hidden, weight, bias).float()
    return torch.log_softmax(logits if temperature == 1.0 else logits.div_(temperature), dim=-1)


def _entropy(logprobs: Tensor) -> Tensor:
    """-sum p log p over the last axis; p log p is 0 where p is."""
    return -(logprobs.exp() * logprobs.clamp_min(torch.finfo(logprobs.dtype).min)).sum(-1)
