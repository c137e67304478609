"""PyPI's torchvision is a CUDA build whose compiled half cannot load beside a CPU torch: its registrations stay empty.

Python imports this at the start of a launched server's process, for its folder stands on PYTHONPATH there.
"""

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence

_EMPTY = {"torchvision._meta_registrations", "torchvision._autograd_registrations"}


class _Empty(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(fullname, self) if fullname in _EMPTY else None

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing: the module stays empty."""


sys.meta_path.insert(0, _Empty())
