"""Finding environments: by file, by module, or by a registered id.

* `my_envs.py:Orders` is a class in a file (`:Orders` may be left out where the file holds one environment).
* `pkg.mod:Orders` is a class in an importable module.
* `calculator` is an id: built in, or an entry point of group `agentrl.envs` of an installed package.

The core never imports `agentrl.envs` itself; it only reaches it through the names below.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import sys
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import ValidationError

from agentrl.env import Env
from agentrl.errors import UsageError

GROUP = "agentrl.envs"
BUILT_IN = {
    "calculator": "agentrl.envs.calculator:Calculator",
    "code_interpreter": "agentrl.envs.code_interpreter:CodeInterpreter",
    "guess": "agentrl.envs.guess:Guess",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """A registered environment: `id`, its `target` ("module:Class"), and the `source` that registered it."""

    id: str
    target: str
    source: str


def list_envs() -> list[Entry]:
    """Every registered environment, built-in ones first; a built-in id cannot be taken over."""
    points = sorted(importlib.metadata.entry_points(group=GROUP), key=lambda point: point.name)
    return [Entry(id, target, "built in") for id, target in BUILT_IN.items()] + [
        Entry(point.name, point.value, point.dist.name if point.dist else "an installed package")
        for point in points
        if point.name not in BUILT_IN
    ]


def find_env(spec: str, base: Path | None = None) -> type[Env]:
    """The environment class that `spec` names; relative files are looked for in `base` (default: here).

    Raises `UsageError`, with what exists and what was probably meant, when there is none.
    """
    name, colon, wanted = spec.strip().rpartition(":")
    if not colon or "/" in wanted or "\\" in wanted or wanted.endswith(".py"):  # a file without a class, or C:\…
        name, wanted = spec.strip(), ""
    if name.endswith(".py"):
        return _pick(load_file((base or Path.cwd()) / name), wanted, name)
    if wanted:
        return _pick(_load_module(name), wanted, name)
    targets = {entry.id: entry.target for entry in list_envs()}
    if name in targets:
        return find_env(targets[name])
    raise UsageError(
        f"no environment is called {spec!r}{_hint(name, targets)}; the ids are {_names(targets)}, "
        "and a class of your own is written as file.py:Class or package.module:Class"
    )


def make_env(spec: str, options: Mapping[str, Any]) -> Env:
    """The template of the environment that `spec` names, with its own options. Raises `UsageError` for unknown ones."""
    cls = find_env(spec)
    try:
        return cls(options)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        known = ", ".join(cls.Options.model_fields) or "none"
        raise UsageError(
            f"env.options.{'.'.join(map(str, first['loc']))}: {first['msg']} ({cls.__name__} has the options: {known})"
        ) from error


def load_file(path: str | Path, name: str | None = None) -> ModuleType:
    """Import the Python file `path` as a module, once; `name` overrides the module's generated name.

    Raises `UsageError` when the file does not exist or cannot be imported, naming file and line.
    """
    path = Path(path).expanduser().absolute()
    if not path.is_file():
        near = [other.name for other in path.parent.glob("*.py")] if path.parent.is_dir() else []
        hint = _hint(path.name, near) or " here; a path counts from the folder in which the command runs"
        raise UsageError(f"there is no file {_shown(path)}{hint}")
    name = name or f"agentrl_file_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{_shown(path)} is not a Python file")
    if str(path.parent) not in sys.path:  # so that the file may import its neighbours
        sys.path.append(str(path.parent))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, KeyboardInterrupt | UsageError):
            raise
        raise UsageError(
            f"the file cannot be imported: {type(error).__name__}: {error}", where=_where(error, path)
        ) from error
    return module


def _load_module(name: str) -> ModuleType:
    if str(Path.cwd()) not in sys.path:  # console scripts do not have it, `python -m` does
        sys.path.append(str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise UsageError(f"there is no module {name!r}; a file is written as path/to/file.py:Class") from error
        raise UsageError(f"module {name!r} cannot be imported: {error}") from error
    except Exception as error:  # whatever a user's module does at import
        raise UsageError(f"module {name!r} cannot be imported: {type(error).__name__}: {error}") from error


def _pick(module: ModuleType, wanted: str, shown: str) -> type[Env]:
    here = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, Env) and value.__module__ == module.__name__
    }
    if not wanted:
        if len(here) == 1:
            return next(iter(here.values()))
        if not here:
            raise UsageError(f"{shown} holds no environment: write a class that subclasses agentrl.Env")
        raise UsageError(f"{shown} holds several environments; write {shown}:Class with one of {_names(here)}")
    found: Any = getattr(module, wanted, None)
    if isinstance(found, type) and issubclass(found, Env) and found is not Env:
        return found
    if found is not None:
        raise UsageError(f"{shown}:{wanted} is not an environment: it must subclass agentrl.Env; {_holds(here)}")
    raise UsageError(f"{shown} has no {wanted!r}{_hint(wanted, here)}; {_holds(here)}")


def _holds(names: Iterable[str]) -> str:
    return f"it holds {_names(names)}" if list(names) else "it holds no environment"


def _names(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _hint(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {near[0]}?" if near else ""


def _shown(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _where(error: BaseException, path: Path) -> str:
    """file:line of the user's own line that failed."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{_shown(Path(error.filename))}:{error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f"{_shown(path)}:{lines[-1]}" if lines else _shown(path)
