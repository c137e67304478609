"""Stands in for SGLang's compiled kernels where there is no GPU: SGLang imports the module, and calls none of it there.

On the path of a launched server's process only (`agentrl.engines.launch`).

SGLang's LoRA layers ask for pinned memory, which there is none of without a GPU. With AGENTRL_PAGEABLE set it is plain
memory that they get; SGLang imports this module before it makes any tensor.

Models that see pictures share a file with others, which take four compiled operators by name as they are imported. Only
those four stand here too: SGLang asks after others to learn whether it may use them.
"""

import functools
import os
from collections.abc import Callable
from typing import Any, NoReturn

import torch

__version__ = "0"
__path__: list[str] = []  # so that submodules are asked of __getattr__ too


_TAKEN = (
    "fused_sigmoid_mul_cpu",
    "fused_qk_gemma_rmsnorm_cpu",
    "fused_qk_gemma_rmsnorm_with_gate_cpu",
    "fused_qkvzba_split_reshape_cat_contiguous_cpu",
)


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args: Any, **keys: Any) -> NoReturn:
        raise RuntimeError(f"sgl_kernel.{name} needs a GPU build of SGLang's kernels")

    return missing


for _name in _TAKEN:
    if not hasattr(torch.ops.sgl_kernel, _name):
        setattr(torch.ops.sgl_kernel, _name, __getattr__(_name))


def _pageable(make: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(make)
    def made(*args: Any, pin_memory: bool = False, **keys: Any) -> Any:
        return make(*args, **keys)

    return made


if os.environ.get("AGENTRL_PAGEABLE"):
    for _name in ("empty", "ones", "tensor", "zeros"):
        setattr(torch, _name, _pageable(getattr(torch, _name)))
    torch.Tensor.pin_memory = lambda self, *args: self  # type: ignore[assignment, method-assign]
