"""Stands in for SGLang's compiled kernels where there is no GPU: SGLang imports the module, and calls none of it there.

On the path of a launched server's process only (`agentrl.engines.launch`).

SGLang's LoRA layers ask for pinned memory, which there is none of without a GPU. With AGENTRL_PAGEABLE set it is plain
memory that they get; SGLang imports this module before it makes any tensor.
"""

import functools
import os
from collections.abc import Callable
from typing import Any, NoReturn

__version__ = "0"
__path__: list[str] = []  # so that submodules are asked of __getattr__ too


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args: Any, **keys: Any) -> NoReturn:
        raise RuntimeError(f"sgl_kernel.{name} needs a GPU build of SGLang's kernels")

    return missing


def _pageable(make: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(make)
    def made(*args: Any, pin_memory: bool = False, **keys: Any) -> Any:
        return make(*args, **keys)

    return made


if os.environ.get("AGENTRL_PAGEABLE"):
    import torch

    for _name in ("empty", "ones", "tensor", "zeros"):
        setattr(torch, _name, _pageable(getattr(torch, _name)))
    torch.Tensor.pin_memory = lambda self, *args: self  # type: ignore[assignment, method-assign]
