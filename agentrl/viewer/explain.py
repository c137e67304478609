"""Where a token's advantage came from: a chain of numbers from the record, each with the component that made it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agentrl.store import Entry, StoreReader
from agentrl.trajectory import Trajectory


def explain(
    reader: StoreReader,
    config: Mapping[str, Any],
    entry: Entry,
    trajectory: Trajectory,
    turn: int,
    token: int,
    step: int | None,
) -> dict[str, Any]:
    """The chain of one sampled token: `token` counts the turn's sampled tokens. Raises `LookupError`."""
    raise LookupError("this trajectory was never credited, so no token of it has an advantage")
