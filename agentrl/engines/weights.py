"""Weights: names and tensors, or the folder that holds them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from agentrl.errors import UsageError

if TYPE_CHECKING:
    import torch

Weights: TypeAlias = "Iterable[tuple[str, torch.Tensor]] | Mapping[str, torch.Tensor] | str"
"""All weights under the architecture's own names, or the folder that holds them."""


def named(weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors, without gradients. A folder's are read one by one. Raises `UsageError` for one without any."""
    if isinstance(weights, str):
        yield from _read(Path(weights))
        return
    for name, tensor in weights.items() if isinstance(weights, Mapping) else weights:
        yield name, tensor.detach()


def _read(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors import safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UsageError(f"{folder} holds no safetensors; write the weights there first")
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no dictionary
                yield name, opened.get_tensor(name)
