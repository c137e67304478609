"""Packages that are verbs: `agentrl.train(config)` works although `agentrl.train` is also a package.

Importing a submodule binds it on its parent, over any function of the same name; so the package itself
is made callable and hands the call to `agentrl.api`.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any


class _Verb(ModuleType):
    def __call__(self, *arguments: Any, **keys: Any) -> Any:
        return getattr(importlib.import_module("agentrl.api"), self.__name__.rpartition(".")[2])(*arguments, **keys)


def make_callable(name: str) -> None:
    """Let the package `name` (agentrl.<verb>) be called like agentrl.api.<verb>."""
    sys.modules[name].__class__ = _Verb
