"""Configuration loading: files and overrides in, one validated configuration out, or every mistake at once.

Everything is merged to one tree first (`agentrl.loader.overlay`) and validated once, so that a shared value
cannot fail to propagate and an unknown key cannot be ignored. What is wrong is reported whole: one
line for each mistake, with `file:line` or the override's text. Relative paths inside a configuration
are relative to the working directory, as on any command line; only `base:` is relative to its file.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

from pydantic import BaseModel, SecretStr, ValidationError
from ruamel.yaml import YAML

from agentrl.errors import UsageError
from agentrl.loader import environment, overlay
from agentrl.loader.complaints import complaints
from agentrl.loader.layers import Layers, Node
from agentrl.loader.overlay import Overlay
from agentrl.loader.slots import Slot

M = TypeVar("M", bound=BaseModel)
Schema = Callable[[list[str]], type[M]]


class ConfigError(UsageError):
    """Everything that is wrong with a configuration; its text has one line for each of `mistakes`."""

    def __init__(self, mistakes: Sequence[UsageError]) -> None:
        super().__init__("\n".join(map(str, mistakes)))
        self.mistakes = tuple(mistakes)


@dataclass(frozen=True, slots=True)
class Loaded(Generic[M]):
    """A validated configuration.

    `origin` maps the dotted path of every value that was set to `file:line` or the override's text;
    a path that is absent is a default. `resolved` is the whole configuration with its defaults as plain
    data: written with `to_yaml` and loaded again, it gives an equal `config`. `${env:NAME}` stays as it
    was written there, so that a run folder never holds a secret.
    """

    config: M
    origin: Mapping[str, str]
    resolved: dict[str, Any]

    @property
    def yaml(self) -> str:
        """`resolved` as text: what config.resolved.yaml holds."""
        return to_yaml(self.resolved)

    def with_section(self, name: str, section: BaseModel) -> Loaded[M]:
        """The same with section `name` replaced by one made in Python; the others stay as they were written."""
        config = self.config.model_copy(update={name: section})
        return Loaded(config, self.origin, {**self.resolved, name: _plain(section)})

    def place(self, path: str) -> str | None:
        """Where the key at a dotted `path`, or the nearest key around it, was set; None where nowhere."""
        steps = path.split(".")
        tried = (".".join(steps[:length]) for length in range(len(steps), 0, -1))
        return next((self.origin[key] for key in tried if key in self.origin), None)


@overload
def load(paths: Sequence[str | Path], overrides: Sequence[str] = ()) -> Loaded[Any]: ...
@overload
def load(paths: Sequence[str | Path], overrides: Sequence[str] = (), *, schema: Schema[M]) -> Loaded[M]: ...
def load(
    paths: Sequence[str | Path], overrides: Sequence[str] = (), *, schema: Schema[Any] | None = None
) -> Loaded[Any]:
    """Merge `paths` from left to right, apply `overrides`, validate once.

    `schema` takes the configuration's `imports:` and returns the pydantic model to validate with; by
    default `agentrl.config.prepare`, and then the environment is found and its model checks its options.
    Raises `ConfigError` with all that is wrong.
    """
    layers = Layers()
    files = [layer for path in paths for layer in layers.file(Path(path))]
    steps = overlay.read(overrides, layers)
    if layers.unread:
        raise ConfigError(layers.mistakes)
    where = str(paths[0]) if paths else "the command line"
    model = _model(schema or _default_schema, Overlay().build(files, steps, where), layers)
    root = Overlay(Slot((model,)), layers).build(files, steps, where)
    found = environment.check(root) if schema is None else []
    try:
        config = model.model_validate(root.plain())
        found += _bare_secrets(config, root)
    except ValidationError as error:
        found = [*complaints(error, root, model), *found]
    if layers.mistakes or found:
        raise ConfigError([*layers.mistakes, *(each for each in found if each.where not in layers.broken)])
    return Loaded(config, origins(root), _resolved(config, root))


def _default_schema(imports: list[str]) -> type[BaseModel]:
    from agentrl.config import prepare

    model: type[BaseModel] = prepare(imports)
    return model


def _model(schema: Schema[M], draft: Node, layers: Layers) -> type[M]:
    """The model to validate with, after the modules that the configuration imports are loaded."""
    asked = draft.value.get("imports") if isinstance(draft.value, dict) else None
    names = asked.plain() if asked is not None else []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        names = []  # the model will say what is wrong with them
    try:
        return schema(names)
    except UsageError as error:
        if error.where is not None or asked is None:
            raise
        raise ConfigError([*layers.mistakes, UsageError(str(error), where=asked.where)]) from error


def origins(node: Node, path: str = "") -> dict[str, str]:
    """The origin of every value below `node`, by dotted path."""
    if isinstance(node.value, dict):
        below = {f"{path}.{key}" if path else key: child for key, child in node.value.items()}
    elif isinstance(node.value, list):
        below = {f"{path}.{place}": child for place, child in enumerate(node.value)}
    else:
        below = {}
    found = {path: node.where} if path else {}
    for name, child in below.items():
        found |= origins(child, name)
    return found


def _bare_secrets(value: object, node: Node, path: str = "") -> list[UsageError]:
    """What is wrong with secrets: one that is written out would be kept in the run folder, and shown."""
    if isinstance(value, SecretStr) and node.written is None:
        name = path.rpartition(".")[2].upper()
        return [UsageError(f"{path} is a secret, so it is never written out: write ${{env:{name}}}", where=node.where)]
    if not (isinstance(value, BaseModel) and isinstance(node.value, dict)):
        return []
    below = ((key, getattr(value, key, None), child) for key, child in node.value.items())
    return [wrong for key, held, child in below for wrong in _bare_secrets(held, child, f"{path}.{key}".lstrip("."))]


def as_text(config: BaseModel) -> str:
    """A configuration that was made in Python, as YAML that loads to an equal one, but for its secrets: they are left
    out. One that came from a file has its text with `${env:…}` unresolved in `Loaded.yaml`; use that."""
    return to_yaml(_plain(config))


def _plain(config: BaseModel) -> dict[str, Any]:
    data = _without_secrets(config.model_dump(mode="json", by_alias=True), config.model_dump(by_alias=True))
    plain: dict[str, Any] = _escaped(data)
    return plain


def _without_secrets(data: Any, held: Any) -> Any:
    """`data` with None for every secret of `held`, whose stars would be taken for the secret."""
    if isinstance(held, SecretStr):
        return None
    if isinstance(held, Mapping) and isinstance(data, dict):
        return {key: _without_secrets(item, held.get(key)) for key, item in data.items()}
    if isinstance(held, list | tuple) and isinstance(data, list):
        return [_without_secrets(item, each) for item, each in zip(data, held, strict=True)]
    return data


def _resolved(config: BaseModel, root: Node) -> dict[str, Any]:
    data: dict[str, Any] = _unresolve(_plain(config), root)
    return data


def _escaped(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return value.replace("${", "$${") if isinstance(value, str) else value


def _unresolve(data: Any, node: Node) -> Any:
    """`data` with every value that came from `${env:…}` as it was written."""
    if node.written is not None:
        return node.written
    if isinstance(node.value, dict) and isinstance(data, dict):
        return {key: _unresolve(item, node.value[key]) if key in node.value else item for key, item in data.items()}
    if isinstance(node.value, list) and isinstance(data, list) and len(data) == len(node.value):
        return [_unresolve(item, child) for item, child in zip(data, node.value, strict=True)]
    return data


def to_yaml(data: Mapping[str, Any]) -> str:
    """Plain data as YAML 1.2 text."""
    out = io.StringIO()
    writer = YAML(typ="safe", pure=True)
    writer.default_flow_style = False
    writer.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    writer.width = 120
    writer.dump(dict(data), out)
    return out.getvalue()
