"""The state store: what methods remember between steps, keyed, serialisable, checkpointed.

Best numbers of calls (OTC), pass rates, length targets and the like live here and nowhere else, so
that a resumed run remembers exactly what a run that was never killed would.
"""

from __future__ import annotations

import json
from typing import Any


class StateStore:
    """A two-level map: namespace (a component's name) -> key -> JSON value. One owner, no locks."""

    def __init__(self, values: dict[str, dict[str, Any]] | None = None) -> None:
        self._values: dict[str, dict[str, Any]] = values or {}

    def get(self, space: str, key: str, default: Any = None) -> Any:
        """The value at `key`, or `default`."""
        return self._values.get(space, {}).get(key, default)

    def put(self, space: str, key: str, value: Any) -> None:
        """Store a JSON value. Raises TypeError for anything that JSON cannot hold."""
        json.dumps(value, allow_nan=False)
        self._values.setdefault(space, {})[key] = value

    def ewma(self, space: str, key: str, value: float, decay: float = 0.9) -> float:
        """Move the average at `key` towards `value` and return it; the first value counts fully."""
        old = self.get(space, key)
        new = value if old is None else decay * old + (1 - decay) * value
        self.put(space, key, new)
        return float(new)

    def dump(self) -> dict[str, dict[str, Any]]:
        """A deep copy fit for a checkpoint."""
        return json.loads(json.dumps(self._values))  # type: ignore[no-any-return]
