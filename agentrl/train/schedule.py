"""Scalar schedules: a number in a stage's configuration that changes with the step. Torch-free.

A stage names the number by its path ("surrogate.high", "shapers.0.weight", "max_tokens"); `scheduled` gives the stage
as it is at one step, with everything else the same. So a component never knows that it is scheduled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

S = TypeVar("S", bound=BaseModel)


class ScalarSchedule(BaseModel):
    """From `start` to `end` over `steps` steps (default: the stage's), then `end`.

    `cosine` falls or rises along half a period; with `period` it swings between the two for ever, starting at `start`
    (SIRI, arXiv:2509.25176). `jump` is `start` before step `steps` and `end` from it on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    shape: Literal["linear", "cosine", "jump"] = "linear"
    start: float
    end: float
    steps: int | None = Field(default=None, ge=1)
    period: int | None = Field(default=None, ge=2)

    def model_post_init(self, context: Any) -> None:
        if self.period is not None and (self.shape != "cosine" or self.steps is not None):
            raise ValueError("period belongs to shape: cosine, without steps; remove one of them")

    def at(self, step: int, stage_steps: int) -> float:
        """The value before optimiser step `step` (from 0) of a stage of `stage_steps` steps."""
        if self.period is not None:
            done = (1 - math.cos(2 * math.pi * step / self.period)) / 2
        else:
            whole = self.steps or max(1, stage_steps - 1)
            part = min(1.0, step / whole)
            done = {"linear": part, "cosine": (1 - math.cos(math.pi * part)) / 2, "jump": float(part >= 1)}[self.shape]
        return self.start + (self.end - self.start) * done


def scheduled(stage: S, schedules: Mapping[str, ScalarSchedule], step: int, steps: int) -> tuple[S, dict[str, float]]:
    """`stage` with the numbers that `schedules` give it at `step`, and those numbers by path.

    Raises `ValueError` for a path that is no number of the stage, or a value that its field does not take.
    """
    values = {path: schedule.at(step, steps) for path, schedule in schedules.items()}
    for path, value in values.items():
        stage = _put(stage, path, path.split("."), value)
    return stage, values


def _put(owner: Any, path: str, keys: list[str], value: float) -> Any:
    """A copy of `owner` (a model, or a tuple of models) with the number at `keys` replaced."""
    key, rest = keys[0], keys[1:]
    if isinstance(owner, tuple):
        if not key.isdigit() or int(key) >= len(owner):
            raise ValueError(f"schedules: {path!r} names item {key!r} of a list of {len(owner)}")
        items = list(owner)
        items[int(key)] = _put(items[int(key)], path, rest, value) if rest else value
        return tuple(items)
    if not isinstance(owner, BaseModel) or key not in type(owner).model_fields:
        known = ", ".join(type(owner).model_fields) if isinstance(owner, BaseModel) else "nothing"
        raise ValueError(f"schedules: {path!r} does not exist; at {key!r} there is {known}")
    old = getattr(owner, key)
    if rest:
        return owner.model_copy(update={key: _put(old, path, rest, value)})
    kind = type(owner).model_fields[key].annotation
    whole = isinstance(old, int) or kind in (int, int | None)
    if isinstance(old, bool) or not (old is None or isinstance(old, int | float)):
        raise ValueError(f"schedules: {path!r} is not a number")
    try:
        fields = {name: getattr(owner, name) for name in owner.model_fields_set if name != "schedules"}
        checked = type(owner).model_validate(fields | {key: round(value) if whole else value})
    except ValidationError as error:
        raise ValueError(f"schedules: {path!r} = {value:g}: {error.errors()[0]['msg']}") from error
    return owner.model_copy(update={key: getattr(checked, key)})
