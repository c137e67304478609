"""The engine's own copy of a transformers causal LM, run one packed step at a time.

The architecture is not known here: the model's own forward runs, with its attention replaced by `slot_attention`. A
probe at the start compares one packed forward with the untouched model's, so that a model whose attention is something
else (sinks, linear attention, an encoder) is refused with a sentence instead of served wrongly.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from agentrl.engines.attention import NAME, Block, Hook, Plan, Write
from agentrl.engines.kv import Kept, LayerShape, Pool
from agentrl.errors import UsageError

_SERVED = ("full_attention", "sliding_attention")
_UNSTABLE_ROPE = ("dynamic", "longrope")  # their angles depend on the longest neighbour


class EngineModel:
    """`run(ids, positions, plan, keep)`: logits of the last `keep` of T packed tokens."""

    def __init__(self, model: PreTrainedModel, device: torch.device, own_weights: bool) -> None:
        _refuse(model)
        memo: dict[int, Any] = {} if own_weights else {id(t): t for t in (*model.parameters(), *model.buffers())}
        self.model: PreTrainedModel = copy.deepcopy(model, memo)
        self.model.train(False)
        if own_weights:
            self.move(device)
            self.model.requires_grad_(False)
        self.device = device
        self.dtype: torch.dtype = self.model.dtype
        text = self.model.config.get_text_config()
        embedding: Any = self.model.get_input_embeddings()
        self.vocab = int(embedding.weight.shape[0])
        self.max_context = int(getattr(text, "max_position_embeddings", 0) or 2**20)
        self.hook = Hook()
        self.shapes: tuple[LayerShape, ...] = ()
        self._fit()

    def run(self, ids: torch.Tensor, positions: torch.Tensor, plan: Plan | None, keep: int) -> torch.Tensor:
        """ids, positions [T] -> logits [keep, V] of the last `keep` tokens (keep 0: nothing, the head is skipped)."""
        self.hook.plan = plan
        arguments = {"input_ids": ids[None], "position_ids": positions[None], "use_cache": False}
        try:
            if keep:
                logits: torch.Tensor = self.model(**arguments, logits_to_keep=keep).logits[0]
                return logits
            self.model.base_model(**arguments)
            return torch.empty(0, self.vocab, device=self.device)
        finally:
            self.hook.plan = None

    def move(self, device: torch.device) -> None:
        """Put the weights on `device`; `self.device`, where they run, stays."""
        nn.Module.to(self.model, device)

    def load(self, weights: Iterable[tuple[str, torch.Tensor]] | Mapping[str, torch.Tensor] | str) -> None:
        """Copy named tensors, or those of a saved folder, over the engine's. Nothing is copied where one does not fit.

        Raises `UsageError` for a name or shape that the model does not have.
        """
        if isinstance(weights, str):
            if not (Path(weights) / "config.json").is_file():
                raise UsageError(f"{weights} is not a saved model (no config.json there); give a folder with weights")
            loaded = type(self.model).from_pretrained(weights, dtype=self.dtype)
            named: list[tuple[str, torch.Tensor]] = list(loaded.state_dict().items())
        else:
            named = list(weights.items() if isinstance(weights, Mapping) else weights)
        own = dict(self.model.state_dict(keep_vars=True))
        for name, tensor in named:
            if name not in own:
                raise UsageError(
                    f"the engine's model has no tensor {name!r}; merge adapters and strip wrappers' prefixes"
                )
            if own[name].shape != tensor.shape:
                raise UsageError(
                    f"{name} has shape {list(tensor.shape)}, the engine's {list(own[name].shape)}: not the same model"
                )
        with torch.no_grad():
            for name, tensor in named:
                target = own[name].data
                if target.data_ptr() != tensor.data_ptr() or target.device != tensor.device:
                    target.copy_(tensor.detach())

    def _fit(self) -> None:
        """Replace the attention, learn each layer's shape, and compare with the plain forward."""
        text = self.model.config.get_text_config()
        window = getattr(text, "sliding_window", None)
        n = min(self.max_context, 24 if window is None or window > 256 else window + 8)
        ids = torch.arange(n, device=self.device) * 7919 % self.vocab
        positions = torch.arange(n, device=self.device)
        with torch.inference_mode():
            self.model.set_attn_implementation("eager")
            plain = self.model(input_ids=ids[None], use_cache=False).logits[0].float()
            self.model.set_attn_implementation(NAME)
            self._learn_shapes(ids, positions)
            pool = Pool(n, self.shapes, self.device, self.dtype)
            pool.take(Kept(""))
            slots = torch.zeros(n, dtype=torch.int64, device=self.device)
            block = Block(pool, slice(0, 1), slice(0, n), positions[None], n)
            ours = self.run(
                ids, positions, Plan([Write(pool, slice(0, n), slots, positions)], [block], None), n
            ).float()
        tolerance = 1e-3 if self.dtype == torch.float32 else 0.1
        gap = float((ours.log_softmax(-1) - plain.log_softmax(-1)).abs().max())
        if not gap <= tolerance:
            raise UsageError(
                f"the local engine cannot serve {type(self.model).__name__}: its log-probs would differ by {gap:.2g} "
                "from the model's own forward; use the sglang or vllm engine"
            )

    def _learn_shapes(self, ids: torch.Tensor, positions: torch.Tensor) -> None:
        text = self.model.config.get_text_config()
        types = getattr(text, "layer_types", None) or ()
        for module in self.model.modules():
            layer = getattr(module, "layer_idx", None)
            module.agentrl_hook = self.hook  # type: ignore[assignment]
            module.agentrl_layer = -1 if layer is None else layer  # type: ignore[assignment]
            sliding = layer is not None and layer < len(types) and types[layer] == "sliding_attention"
            module.agentrl_window = text.sliding_window if sliding else None  # type: ignore[assignment]
        self.hook.calls = []
        self.run(ids, positions, None, 0)
        calls, self.hook.calls = self.hook.calls, None
        for index, call in enumerate(calls):
            call["module"].agentrl_layer = index
        if len(calls) != text.num_hidden_layers or len({id(call["module"]) for call in calls}) != len(calls):
            raise UsageError(
                f"the local engine cannot serve {type(self.model).__name__}: {len(calls)} of "
                f"{text.num_hidden_layers} layers use ordinary attention; use the sglang or vllm engine"
            )
        self.shapes = tuple(LayerShape(call["key"][1], call["key"][3], call["value"][3]) for call in calls)


def ladder(model: EngineModel, sizes: Iterable[int]) -> tuple[int, ...]:
    """Of these packed lengths, those whose products agree bit for bit with the largest one's.

    A matrix product's bits may depend on its number of rows (and on nothing that a request controls). Steps padded to
    one of the returned lengths give a token the same bits whatever else is in the step. The largest always qualifies.
    """
    ordered = sorted(set(sizes))
    largest = ordered[-1]
    ids = torch.from_numpy(np.arange(largest) * 7919 % model.vocab).to(model.device)
    positions = torch.arange(largest, device=model.device) % model.max_context
    reference = model.run(ids, positions, None, largest)
    kept = [largest]
    for size in ordered[:-1]:
        parts = (slice(0, size), slice(largest - size, largest))
        if all(torch.equal(model.run(ids[p], positions[p], None, size), reference[p]) for p in parts):
            kept.append(size)
    return tuple(sorted(kept))


def _refuse(model: PreTrainedModel) -> None:
    config = model.config
    name = type(model).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise UsageError(f"the local engine serves causal language models; {name} is an encoder-decoder")
    if model.get_output_embeddings() is None:  # type: ignore[no-untyped-call]
        raise UsageError(f"the local engine needs a model with a language-model head; {name} has none")
    text = config.get_text_config()
    other = sorted(set(getattr(text, "layer_types", None) or ()) - set(_SERVED))
    if other:
        raise UsageError(f"the local engine cannot serve {name}: its layers use {', '.join(other)}; use sglang or vllm")
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = {rope.get("rope_type")} | {v.get("rope_type") for v in rope.values() if isinstance(v, Mapping)}
    if kinds & set(_UNSTABLE_ROPE):
        raise UsageError(
            f"the local engine cannot serve {name}: its rotary angles depend on the batch; use sglang or vllm"
        )
