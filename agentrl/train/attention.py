"""Attention over a packed layout, as an attention implementation that transformers calls.

The model's own layers run on the flat tokens [1, T]; only here do rows exist. Queries, keys and
values are gathered into each block's padded shape, attended to causally, and the answers put back.
A gather's backward is a gather-sum over the inverse index, in a fixed order: fast, and the same bits
every time, which scattered additions are not.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from agentrl.train.packing import Block, Index, Layout

NAME = "agentrl_packed"

_FRUGAL = 8  # gathered keys per distinct token beyond which they are not kept for backward

_HARMLESS = frozenset({"position_ids", "use_cache", "is_causal", "cache_position", "output_attentions"})


class Unsupported(TypeError):
    """This model's attention asks for something that the packed form does not know."""


@dataclass(frozen=True, slots=True, eq=False)
class Picker:
    """`x[index]` over the first of two axes, with a deterministic backward.

    `index` [n]; `order` and `offsets` list, for each row of x, the places that picked it. Places
    where `index` is padding are in nobody's list, so no gradient comes from them.
    """

    index: Tensor
    order: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, index: Index, size: int, real: Index | None, device: torch.device) -> Picker:
        """`real`: the places that are not padding (all where None)."""
        places = np.arange(index.size) if real is None else real
        order = places[np.argsort(index[places], kind="stable")]
        offsets = np.searchsorted(index[order], np.arange(size + 1))
        return cls(*(torch.from_numpy(array).to(device) for array in (index, order, offsets)))

    def __call__(self, x: Tensor) -> Tensor:
        """x [size, D] -> [n, D]."""
        picked: Tensor = _Pick.apply(x, self)  # type: ignore[no-untyped-call]
        return picked


class _Pick(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, picker: Picker) -> Tensor:
        ctx.picker = picker
        return x.index_select(0, picker.index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        picker: Picker = ctx.picker
        return F.embedding_bag(
            picker.order, grad.contiguous(), picker.offsets, mode="sum", include_last_offset=True
        ), None


@dataclass(slots=True, eq=False)
class _BlockView:
    """A block on its device, with the masks that its layers asked for."""

    rows: int
    queries: Picker
    keys: Picker
    starts: Tensor
    lengths: Tensor
    causal: bool
    masks: dict[tuple[int | None, torch.dtype], Tensor | None] = field(default_factory=dict)

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """Additive [1 or R, 1, Q, K], or None where plain causal attention is meant.

        Padded queries repeat the row's last position, so that no line is masked whole (NaN)."""
        width = self.keys.index.numel() // self.rows
        if window is not None and window >= width:
            window = None
        if (window, dtype) not in self.masks:
            self.masks[window, dtype] = None if self.causal and window is None else self._mask(window, width, dtype)
        return self.masks[window, dtype]

    def _mask(self, window: int | None, width: int, dtype: torch.dtype) -> Tensor:
        count = self.queries.index.numel() // self.rows
        key = torch.arange(width, device=self.starts.device)
        query = self.starts[:, None] + torch.arange(count, device=self.starts.device)
        if bool((self.starts == self.starts[0]).all()) and window is None:
            query = query[:1]
        else:
            query = torch.minimum(query, self.lengths[:, None] - 1)
        distance = query[:, :, None] - key
        hidden = distance < 0
        if window is not None:
            hidden |= distance >= window
        return torch.zeros(hidden.shape, dtype=dtype, device=key.device).masked_fill_(hidden, -torch.inf)[:, None]


@dataclass(slots=True, eq=False)
class Packed:
    """A layout on a device: what the attention function needs, made once per micro-batch.

    `frugal`: rows repeat so many shared keys that a layer's copies are made again in backward instead of
    kept. `windows`: the sliding window (or None) of every layer that has attended so far."""

    blocks: list[_BlockView]
    place: Picker
    at: Picker
    pairs: Picker
    frugal: bool
    windows: list[int | None] = field(default_factory=list)

    @classmethod
    def of(cls, layout: Layout, device: torch.device) -> Packed:
        size = layout.ids.size
        blocks = [_view(block, size, device) for block in layout.blocks]
        queries = sum(block.queries.size for block in layout.blocks)
        return cls(
            blocks,
            place=Picker.of(layout.place, queries, None, device),
            at=Picker.of(layout.at, size, None, device),
            pairs=Picker.of(layout.pairs, layout.at.size, None, device),
            frugal=sum(block.keys.size for block in layout.blocks) > _FRUGAL * size,
        )


def _view(block: Block, size: int, device: torch.device) -> _BlockView:
    count, width = block.queries.shape[1], block.keys.shape[1]
    tails = (block.lengths - block.starts)[:, None]
    return _BlockView(
        rows=len(block.starts),
        queries=Picker.of(block.queries.ravel(), size, np.flatnonzero(np.arange(count) < tails), device),
        keys=Picker.of(block.keys.ravel(), size, np.flatnonzero(np.arange(width) < block.lengths[:, None]), device),
        starts=torch.from_numpy(block.starts).to(device),
        lengths=torch.from_numpy(block.lengths).to(device),
        causal=not block.starts.any(),
    )


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed: Packed | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **extra: Any,
) -> tuple[Tensor, None]:
    """query [1, H, T, d], key and value [1, Hkv, T, d] -> [1, T, H, d].

    Raises `Unsupported` for anything that would change the result and is not done here.
    """
    strange = [name for name, given in extra.items() if given is not None and name not in _HARMLESS]
    if packed is None or attention_mask is not None or dropout or strange or extra.get("is_causal") is False:
        raise Unsupported(f"packed attention does not know {strange or 'this call'}")
    packed.windows.append(sliding_window)
    heads = query.shape[1]
    flat = [x[0].transpose(0, 1).flatten(1) for x in (query, key, value)]
    answers = []
    for block in packed.blocks:
        run = partial(_attend_block, block, heads, key.shape[1], block.mask(sliding_window, query.dtype), scaling)
        if packed.frugal and torch.is_grad_enabled():
            answers.append(checkpoint(run, *flat, use_reentrant=False, preserve_rng_state=False))
        else:
            answers.append(run(*flat))
    joined = packed.place(answers[0] if len(answers) == 1 else torch.cat(answers))
    return joined.view(1, -1, heads, value.shape[-1]), None


def _attend_block(
    block: _BlockView,
    heads: int,
    kv_heads: int,
    mask: Tensor | None,
    scaling: float | None,
    flat_q: Tensor,
    flat_k: Tensor,
    flat_v: Tensor,
) -> Tensor:
    """Flat queries [T, H d], keys and values [T, Hkv d] -> the block's answers [R Q, H d], padding included."""
    q = block.queries(flat_q).view(block.rows, -1, heads, flat_q.shape[1] // heads).transpose(1, 2)
    k, v = (
        block.keys(x).view(block.rows, -1, kv_heads, x.shape[1] // kv_heads).transpose(1, 2) for x in (flat_k, flat_v)
    )
    grouped = heads != kv_heads
    if grouped and mask is not None and q.is_cuda:  # its fast kernels take a mask or grouped heads, not both
        k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
        grouped = False
    answer = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
    )
    return answer.transpose(1, 2).flatten(2).flatten(0, 1)
