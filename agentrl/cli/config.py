"""`agentrl config show|schema|diff`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

from cyclopts import App

from agentrl.cli import inputs

app = App(name="config", help="Show, compare and describe configurations.", version_flags=[])


@app.command
def show(*words: inputs.Inputs, origin: inputs.Flag = False) -> None:
    """Print the whole configuration as it will be used, defaults included.

    Args:
        words: the configuration.
        origin: one key a line, with the file and line or the override that set it.
    """
    from agentrl.loader import to_yaml

    loaded = inputs.load(words, verb="config show")
    if not origin:
        sys.stdout.write(to_yaml(loaded.resolved))
        return
    leaves = dict(_leaves(loaded.resolved))
    width = min(max(len(f"{path}: {value}") for path, value in leaves.items()), 72)
    for path, value in leaves.items():
        sys.stdout.write(f"{f'{path}: {value}':<{width}}  # {loaded.origin.get(path, 'default')}\n")


@app.command
def schema(*imports: str) -> None:
    """Print the JSON schema of a configuration, for editors and for other programs.

    Args:
        imports: files or modules that register components of your own.
    """
    from agentrl.config import prepare

    sys.stdout.write(json.dumps(prepare(imports).model_json_schema(), indent=2) + "\n")


@app.command
def diff(a: str, b: str, /) -> None:
    """Print the keys in which two configurations (files or run folders) differ, defaults included.

    Args:
        a: the first.
        b: the second.
    """
    left, right = (dict(_leaves(inputs.load([word], verb="config diff").resolved)) for word in (a, b))
    for path in dict.fromkeys((*left, *right)):
        if left.get(path) != right.get(path):
            sys.stdout.write(f"{path}: {left.get(path, '(absent)')} → {right.get(path, '(absent)')}\n")


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every scalar (and every empty mapping or list) by its dotted path, as JSON text."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if (path and not value) or not isinstance(value, dict | list):
        yield path, json.dumps(value, ensure_ascii=False)
    for key, item in items:
        yield from _leaves(item, f"{path}.{key}" if path else str(key))
