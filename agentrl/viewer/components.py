"""The components of a recorded stage, each on its own: what the configuration names, and what may be run here.

One that is not the framework's keeps its name and is not run, and says nothing about the others. No name is ever
filled in: where the configuration names none, none is shown.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from agentrl.algo import advantage, loss, recipes, staleness  # noqa: F401 (their components register themselves)
from agentrl.algo.component import Component
from agentrl.train.schedule import ScalarSchedule, scheduled

_HOME = recipes.__name__.split(".")[0]


@dataclass(frozen=True, slots=True)
class Part:
    """One component: its name, and itself, or `why` it is not run here."""

    name: str | None
    made: Component | None
    why: str = ""


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage as the configuration of its run has it; `values` is empty where it has none with that label."""

    label: str
    values: Mapping[str, Any]
    step: int

    @classmethod
    def of(cls, config: Mapping[str, Any], label: str, step: int) -> Stage:
        """The stage with that label (`rl`, then `rl2`, …) at one of its steps."""
        seen: dict[str, int] = {}
        for values in config.get("stages") or ():
            if not isinstance(values, Mapping):
                continue
            kind = str(values.get("type"))
            seen[kind] = seen.get(kind, 0) + 1
            if label == (kind if seen[kind] == 1 else f"{kind}{seen[kind]}"):
                return cls(label, values, step)
        return cls(label, {}, step)

    def part(self, key: str) -> Part:
        """The component at `key`."""
        if key not in self.values:
            return Part(None, None, self.missing(key))
        return self._made(self.values[key], key, key)

    def parts(self, key: str) -> tuple[Part, ...] | None:
        """The list of components at `key`; None where the configuration does not say (see `missing`)."""
        found = self.values.get(key)
        if not isinstance(found, list | tuple):
            return None
        return tuple(self._made(value, key.removesuffix("s"), f"{key}.{i}") for i, value in enumerate(found))

    def missing(self, key: str) -> str:
        """Why there is nothing at `key`."""
        if not self.values:
            return f"the configuration that was kept has no stage {self.label!r}"
        return f"the configuration does not say which {key} the stage had"

    def _made(self, value: object, point: str, path: str) -> Part:
        name = type_of(value)
        if not name:
            return Part(None, None, f"the configuration does not name the {point}")
        _know_recipes()
        cls = Component.registry.get(point, {}).get(name)
        if cls is None or cls.__module__.split(".")[0] != _HOME:
            why = f"the {point} {name!r} is not the framework's, and a run's own code is not run here"
            return Part(name, None, why)
        try:
            made = cls.model_validate(value if isinstance(value, Mapping) else {"type": name})
            return Part(name, self._at_step(made, path))
        except (ValueError, TypeError, KeyError):
            return Part(name, None, f"this version does not know the options of the {point} {name!r}")

    def _at_step(self, made: Component, path: str) -> Component:
        """With the numbers that the stage's schedules gave it."""
        given = self.values.get("schedules") or {}
        mine = {key.removeprefix(f"{path}."): v for key, v in given.items() if key.startswith(f"{path}.")}
        if not mine:
            return made
        schedules = {key: ScalarSchedule.model_validate(v) for key, v in mine.items()}
        return scheduled(made, schedules, self.step, int(self.values["steps"]))[0]


@cache
def _know_recipes() -> None:
    for module in pkgutil.iter_modules(recipes.__path__):  # so do theirs
        importlib.import_module(f"{recipes.__name__}.{module.name}")


def type_of(value: object) -> str:
    """The name of a component in a configuration, "" where it has none."""
    if isinstance(value, Mapping):
        return str(value.get("type") or "")
    return value if isinstance(value, str) else ""
