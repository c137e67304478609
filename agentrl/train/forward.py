"""Log-probs of a row's targets under a model: only what is needed, each shared token once.

A `Network` is a causal LM seen as backbone and head. Two properties are *measured* when it is made,
on a few tokens, and never assumed: whether the packed form of `packing` and `attention` gives the
model's own hidden states (else rows are padded and forwarded plainly), and whether logits are just
the head applied to them (else the whole model is called, with logits at the targets alone: soft caps,
scales and heads that are not linear stay right).

Rows with pictures are forwarded one at a time, unshared, by the model's own forward with what it makes of them: equal
ids do not mean equal pictures, and positions follow from their sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from agentrl.errors import UsageError
from agentrl.train.attention import NAME, Packed, Picker, Unsupported, attend
from agentrl.train.head import CHUNK, target_logprobs
from agentrl.train.packing import Layout, Share, lay_out, needed, plan
from agentrl.trajectory import Place, Row, as_ids

__all__ = ["Network", "TokenOutputs", "plan", "score_rows", "token_logprobs"]

AttentionInterface.register(NAME, attend)


@dataclass(frozen=True, slots=True, eq=False)
class TokenOutputs:
    """`logprobs` [M] float32 in row order, with gradient where the caller's mode has one; `entropies`
    likewise or None. `tokens`: how many tokens were forwarded for them."""

    logprobs: Tensor
    entropies: Tensor | None
    tokens: int


class HasNetwork(Protocol):
    """A policy, as far as this module cares."""

    @property
    def network(self) -> Network: ...


Look = Callable[[Sequence[Place], int], dict[str, Tensor]]
"""What the model's forward takes for the pictures at these places of so many ids."""


class Network:
    """A causal LM as backbone and head. `packed` and `direct` say what the probe found; `look` is given for a model
    that sees."""

    def __init__(self, model: PreTrainedModel, look: Look | None = None) -> None:
        self.look = look
        self.model: Any = model
        self.backbone: Any = model.base_model
        head: object = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        self.head = head if type(head) is nn.Linear and self.backbone is not model else None
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype
        self.packed, self.direct = _probe(self)

    @contextmanager
    def packed_attention(self) -> Iterator[None]:
        """Layers attend by `attention.attend` inside; the model is left as it was found."""
        config = self.backbone.config
        before = config._attn_implementation
        config._attn_implementation = NAME
        try:
            yield
        finally:
            config._attn_implementation = before


def token_logprobs(
    policy: HasNetwork | Network,
    rows: Sequence[Row],
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    chunk: int = CHUNK,
    share_prompts: Share = "auto",
) -> TokenOutputs:
    """Log-probs (and entropies) of every target of `rows`, one micro-batch, at `temperature`.

    `chunk` bounds the logits that exist at once. Exact whatever `share_prompts` is: it only says
    whether tokens that rows share are forwarded once.
    """
    network = policy if isinstance(policy, Network) else policy.network
    if any(row.pictures for row in rows):
        words = [row for row in rows if not row.pictures]
        rest = token_logprobs(network, words, temperature=temperature, entropy=entropy, chunk=chunk)
        return _with_pictures(network, rows, rest, temperature, entropy, chunk)
    if not sum(row.targets.size for row in rows):
        empty = torch.zeros(0, device=network.device)
        return TokenOutputs(empty, empty if entropy else None, 0)
    if not network.packed:
        return _padded(network, rows, temperature, entropy, chunk)
    layout = lay_out([row for row in rows if row.targets.size], share_prompts)
    packed = Packed.of(layout, network.device)
    return _packed(network, layout, packed, temperature, entropy, chunk)


@torch.no_grad()
def score_rows(
    policy: HasNetwork | Network,
    rows: Sequence[Row],
    *,
    token_budget: int,
    temperature: float = 1.0,
    entropy: bool = False,
    share_prompts: Share = "auto",
) -> list[tuple[Tensor, Tensor | None]]:
    """Log-probs and entropies [len(targets)] of each row, without gradient, in micro-batches."""
    results: list[tuple[Tensor, Tensor | None]] = [(torch.zeros(0), None)] * len(rows)
    for part in plan(rows, token_budget=token_budget, share_prompts=share_prompts):
        batch = [rows[index] for index in part]
        out = token_logprobs(policy, batch, temperature=temperature, entropy=entropy, share_prompts=share_prompts)
        sizes = [row.targets.size for row in batch]
        logprobs = torch.split(out.logprobs, sizes)
        entropies = torch.split(out.entropies, sizes) if out.entropies is not None else [None] * len(part)
        for index, pair in zip(part, zip(logprobs, entropies, strict=True), strict=True):
            results[index] = pair
    return results


def _targets(
    network: Network,
    ids: Tensor,
    call: dict[str, Any],
    at: Picker,
    next_ids: Tensor,
    temperature: float,
    entropy: bool,
    chunk: int,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs of `next_ids` [n] predicted at flat places `at.index` [n] of ids [B, S]."""
    if network.direct and network.head is not None:
        hidden = network.backbone(input_ids=ids, **call).last_hidden_state.flatten(0, 1)
        weight, bias = network.head.weight, network.head.bias
        return target_logprobs(
            at(hidden), weight, bias, next_ids, temperature=temperature, entropy=entropy, chunk=chunk
        )
    keep, column = torch.unique(at.index % ids.shape[1], return_inverse=True)
    logits = network.model(input_ids=ids, logits_to_keep=keep, **call).logits
    logprobs = torch.log_softmax(logits[at.index // ids.shape[1], column].float() / temperature, dim=-1)
    entropies = -(logprobs.exp() * logprobs).sum(-1) if entropy else None
    return logprobs.gather(1, next_ids[:, None])[:, 0], entropies


def _packed(
    network: Network, layout: Layout, packed: Packed, temperature: float, entropy: bool, chunk: int
) -> TokenOutputs:
    """All distinct tokens of a micro-batch as one sequence."""
    ids, positions, next_ids = (
        torch.from_numpy(array).to(network.device)
        for array in (layout.ids[None], layout.positions[None], layout.next_ids)
    )
    call = {"position_ids": positions, "use_cache": False, "packed": packed}
    with network.packed_attention():
        logprobs, entropies = _targets(network, ids, call, packed.at, next_ids, temperature, entropy, chunk)
    entropies = None if entropies is None else packed.pairs(entropies[:, None])[:, 0]
    return TokenOutputs(packed.pairs(logprobs[:, None])[:, 0], entropies, layout.ids.size)


def _padded(network: Network, rows: Sequence[Row], temperature: float, entropy: bool, chunk: int) -> TokenOutputs:
    """The plain form: rows padded on the right to one length."""
    width = max(needed(row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    seen = torch.zeros(len(rows), width, dtype=torch.int64)
    for line, row in enumerate(rows):
        ids[line, : needed(row)] = torch.from_numpy(row.ids[: needed(row)].astype(np.int64))
        seen[line, : needed(row)] = 1
    at = np.concatenate([line * width + row.targets - 1 for line, row in enumerate(rows)])
    next_ids = np.concatenate([row.ids[row.targets] for row in rows]).astype(np.int64)
    call = {"attention_mask": seen.to(network.device), "use_cache": False}
    places = Picker.of(at, ids.numel(), None, network.device)
    targets = torch.from_numpy(next_ids).to(network.device)
    outputs = _targets(network, ids.to(network.device), call, places, targets, temperature, entropy, chunk)
    return TokenOutputs(*outputs, tokens=ids.numel())


def _with_pictures(
    network: Network, rows: Sequence[Row], rest: TokenOutputs, temperature: float, entropy: bool, chunk: int
) -> TokenOutputs:
    """Rows in their order: those with pictures one at a time, the others out of `rest`, which was made of them."""
    if network.look is None:
        raise UsageError("rows with pictures can be trained by a model that takes pictures only")
    logprobs: list[Tensor] = []
    entropies: list[Tensor] = []
    tokens, edge = rest.tokens, 0
    for row in rows:
        m = row.targets.size
        if not row.pictures:
            logprobs.append(rest.logprobs[edge : edge + m])
            entropies += [rest.entropies[edge : edge + m]] if rest.entropies is not None else []
            edge += m
            continue
        n = needed(row)
        seen = network.look([place for place in row.pictures if place.stop <= n], n)
        call = {name: tensor.to(network.device) for name, tensor in seen.items()} | {"use_cache": False}
        ids, next_ids = (
            torch.from_numpy(array.astype(np.int64)).to(network.device)
            for array in (row.ids[None, :n], row.ids[row.targets])
        )
        at = Picker.of(row.targets - 1, n, None, network.device)
        mine, spread = _targets(network, ids, call, at, next_ids, temperature, entropy, chunk)
        logprobs.append(mine)
        entropies += [spread] if spread is not None else []
        tokens += n
    return TokenOutputs(torch.cat(logprobs), torch.cat(entropies) if entropy else None, tokens)


@torch.no_grad()
def _probe(network: Network) -> tuple[bool, bool]:
    """Is the packed form exact, and are logits the head of the hidden states? Measured on three rows."""
    vocab = int(network.model.config.get_text_config().vocab_size)
    draws = np.random.default_rng(0).integers(0, vocab, size=16)
    tails = (draws[:9], np.concatenate([draws[:5], draws[9:14]]), draws[10:])
    rows = [Row(as_ids(t), np.arange(1, t.size), np.zeros(t.size - 1, int), np.arange(t.size - 1)) for t in tails]
    truth = []
    direct = network.head is not None
    for row in rows:
        ids = torch.from_numpy(row.ids[None].astype(np.int64)).to(network.device)
        logits = network.model(input_ids=ids, use_cache=False).logits
        if network.head is not None and direct:
            hidden = network.backbone(input_ids=ids, use_cache=False).last_hidden_state
            direct = _close(network.head(hidden), logits, network.dtype)
        logprobs = torch.log_softmax(logits[0].float(), dim=-1)
        truth.append(logprobs[row.targets - 1, row.ids[row.targets].astype(np.int64)])
    network.packed, network.direct = True, direct
    config = network.backbone.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or []
    if not {"full_attention", "sliding_attention"}.issuperset(kinds):
        return False, direct
    layout = lay_out(rows, share_prompts=True)
    packed = Packed.of(layout, network.device)
    try:
        got = _packed(network, layout, packed, 1.0, False, CHUNK).logprobs
    except Unsupported:
        return False, direct
    # A window is longer than the probe: it counts as known only where the layers pass it on.
    layers = kinds or ["sliding_attention" if getattr(config, "sliding_window", None) else ""] * len(packed.windows)
    known = layers.count("sliding_attention") == sum(window is not None for window in packed.windows)
    return known and _close(got, torch.cat(truth), network.dtype), direct


def _close(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    """Equal as far as arithmetic in `dtype` goes."""
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    return bool((a - b).abs().max() <= tolerance * b.abs().max())
