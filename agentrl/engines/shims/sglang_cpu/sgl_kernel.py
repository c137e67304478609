"""Stands in for SGLang's compiled kernels where there is no GPU: SGLang imports the module, and calls none of it there.

On the path of a launched server's process only (`agentrl.engines.launch`).
"""

from typing import Any, NoReturn

__version__ = "0"
__path__: list[str] = []  # so that submodules are asked of __getattr__ too


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args: Any, **keys: Any) -> NoReturn:
        raise RuntimeError(f"sgl_kernel.{name} needs a GPU build of SGLang's kernels")

    return missing
