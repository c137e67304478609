"""Attention of one packed step over the slot cache, plugged into the model's own forward.

A step is one row of T tokens: some belong to prompts, the last ones are each the newest token of a running row. Every
layer first writes their keys and values into the slots, then attends in blocks. A block is a set of slots with the same
number of queries each: all slots of a pool with one query (decode: views, no gather), a long prompt (one slot, many
queries), or several short suffixes (gathered slots, padded queries). The mask is a function of positions alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers.modeling_utils import AttentionInterface

from agentrl.engines.kv import Pool

NAME = "agentrl_slots"


@dataclass(slots=True)
class Block:
    """`slots` of `pool` (a range, or indices to gather), `queries` tokens each, the first `length` keys of each.

    `take` [slots * queries] are the tokens that ask (a range, or indices); `positions`
    [slots, queries] are where they stand. A slot without a token asks with any token at position 0: nobody reads
    the answer.
    """

    pool: Pool
    slots: slice | torch.Tensor
    take: slice | torch.Tensor
    positions: torch.Tensor
    length: int
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def mask(self, window: int | None, heads: int, group: int, dtype: torch.dtype) -> torch.Tensor:
        """0 where a query may look, else -inf. Shape [slots * heads, 1 or queries * group, length]."""
        if window not in self.masks:
            count, queries = self.positions.shape
            keys = torch.arange(self.length, device=self.positions.device)
            here = self.positions[..., None]
            seen = keys <= here
            if window is not None:
                seen &= keys > here - window
            zero = torch.zeros((), dtype=dtype, device=keys.device)
            mask = torch.where(seen, zero, -torch.inf).to(dtype)
            if queries == 1:
                mask = mask[:, None].expand(count, heads, 1, self.length)
            else:
                mask = mask[:, None, :, None].expand(count, heads, queries, group, self.length)
            self.masks[window] = mask.reshape(count * heads, -1, self.length)
        return self.masks[window]


@dataclass(slots=True)
class Write:
    """Tokens `take` (a range, or indices) go to `slots`, `positions` of `pool`."""

    pool: Pool
    take: slice | torch.Tensor
    slots: torch.Tensor
    positions: torch.Tensor


@dataclass(slots=True)
class Plan:
    """One step: what is written where, the blocks, and for each of T tokens its line in the blocks' joined answers."""

    writes: list[Write]
    blocks: list[Block]
    back: torch.Tensor | None

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """query [T, H, D], key [T, KV, D], value [T, KV, E] -> [T, H, E]."""
        for write in self.writes:
            pool, take = write.pool, write.take
            keys, values = pool.by_slot(pool.keys[layer]), pool.by_slot(pool.values[layer])
            keys[write.slots, :, write.positions] = _pick(key, take)
            values[write.slots, :, write.positions] = _pick(value, take)
        answers = [ask(block, layer, query, key.shape[1], scaling, window, softcap) for block in self.blocks]
        joined = answers[0] if len(answers) == 1 else torch.cat(answers)
        return joined if self.back is None else joined.index_select(0, self.back)


def _pick(tokens: torch.Tensor, take: slice | torch.Tensor) -> torch.Tensor:
    return tokens[take] if isinstance(take, slice) else tokens.index_select(0, take)


def ask(
    block: Block,
    layer: int,
    query: torch.Tensor,
    heads: int,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """The answers of one block. Shape [slots * queries, H, E]."""
    count, queries = block.positions.shape
    group = query.shape[1] // heads
    asked = _pick(query, block.take)
    if queries > 1:
        asked = asked.view(count, queries, heads, group, -1).transpose(1, 2)
    asked = asked.reshape(count * heads, queries * group, -1)
    keys, values = block.pool.keys[layer], block.pool.values[layer]
    if isinstance(block.slots, slice):
        span = slice(block.slots.start * heads, block.slots.stop * heads)
        keys, values = keys[span, : block.length], values[span, : block.length]
    else:
        keys = block.pool.by_slot(keys)[:, :, : block.length].index_select(0, block.slots).flatten(0, 1)
        values = block.pool.by_slot(values)[:, :, : block.length].index_select(0, block.slots).flatten(0, 1)
    mask = block.mask(window, heads, group, query.dtype)
    if softcap is None:
        scores = torch.baddbmm(mask, asked, keys.transpose(1, 2), alpha=scaling)
    else:
        scores = torch.tanh(torch.bmm(asked, keys.transpose(1, 2)) * (scaling / softcap)) * softcap + mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(values.dtype)
    answer = torch.bmm(weights, values)
    if queries > 1:
        answer = answer.view(count, heads, queries, group, -1).transpose(1, 2)
    return answer.reshape(count * queries, heads * group, -1)


def pad_queries(lengths: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Offsets [m, max] of a padded block over runs of `lengths`, and which of them are real."""
    offsets = np.arange(int(lengths.max()))
    real = offsets < lengths[:, None]
    return np.where(real, offsets, 0), real


class Hook:
    """Where the registered attention function finds the step's plan: one per engine, shared by its layers."""

    __slots__ = ("calls", "plan")

    def __init__(self) -> None:
        self.plan: Plan | None = None
        self.calls: list[dict[str, Any]] | None = None


def slot_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The function that transformers calls in each layer: [1, H, T, D] -> [1, T, H, E]."""
    hook: Hook = module.agentrl_hook  # type: ignore[assignment]
    layer: int = module.agentrl_layer  # type: ignore[assignment]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = sliding_window if sliding_window is not None else module.agentrl_window
    if hook.calls is not None:
        hook.calls.append({"module": module, "key": key.shape, "value": value.shape, "window": window, **kwargs})
    if hook.plan is None:
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[-1]), None
    answer = hook.plan.attend(
        layer,
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        scale,
        window,  # type: ignore[arg-type]
        softcap,
    )
    return answer[None], None


AttentionInterface.register(NAME, slot_attention)
