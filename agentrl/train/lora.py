"""LoRA through peft: adapters on, and their products merged without touching the model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from agentrl.errors import UsageError
from agentrl.train.options import LoraOptions

_ADAPTER = "default"


class GradientDropout(nn.Dropout):
    """Dropout wherever gradients are recorded, and nowhere else: log-probs that are only read stay exact."""

    def forward(self, input: Tensor) -> Tensor:
        return F.dropout(input, self.p, training=torch.is_grad_enabled())


def add_adapters(model: PreTrainedModel, options: LoraOptions) -> nn.Module:
    """Put adapters into `model` (in place; they change nothing until trained) and freeze the rest.

    Returns peft's wrapper. Raises `UsageError` where peft is missing or a target is in no module's name.
    """
    try:
        import peft
    except ImportError as error:
        raise UsageError("model.lora needs peft; run: pip install 'agentrl-framework[lora]'") from error
    config = peft.LoraConfig(
        r=options.r,
        lora_alpha=options.alpha,  # type: ignore[arg-type]  # a float does as well
        lora_dropout=options.dropout,
        target_modules=options.targets if isinstance(options.targets, str) else list(options.targets),
        task_type="CAUSAL_LM",
    )
    _all_there(model, options)
    try:
        wrapped: nn.Module = peft.get_peft_model(model, config)
    except ValueError as error:
        raise UsageError(f"model.lora: {str(error).splitlines()[0]}") from error
    for module in model.modules():
        drops: Any = getattr(module, "lora_dropout", None)
        if isinstance(drops, nn.ModuleDict):
            for name, drop in drops.items():
                if isinstance(drop, nn.Dropout):
                    drops[name] = GradientDropout(drop.p)
    return wrapped.eval()


def deltas(model: nn.Module) -> dict[str, Callable[[], Tensor]]:
    """By name of each adapted module: what its adapter adds to the weight, computed when called."""
    found: dict[str, Callable[[], Tensor]] = {}
    for name, module in model.named_modules():
        delta: Any = getattr(module, "get_delta_weight", None)
        if delta is not None:
            found[name] = partial(delta, _ADAPTER)
    return found


def merged(wrapped: nn.Module) -> PreTrainedModel:
    """A plain copy of the model with its adapters added in."""
    plain: PreTrainedModel = copy.deepcopy(wrapped).merge_and_unload()  # type: ignore[operator]
    return plain


def _all_there(model: nn.Module, options: LoraOptions) -> None:
    if isinstance(options.targets, str):
        return
    ends = sorted({name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)})
    for target in options.targets:
        if not any(name == target or name.endswith(f".{target}") for name, _ in model.named_modules()):
            raise UsageError(f"model.lora.targets: the model has no module {target!r}; it has {', '.join(ends)}")
