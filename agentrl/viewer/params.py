"""Query parameters: declared once, checked on every request, and written into the OpenAPI document.

A request with a parameter that its route does not know, twice the same one, or one that is no value of its
kind is refused with one sentence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from starlette.datastructures import QueryParams

Kind = Literal["text", "int", "number", "flag"]
LONGEST = 2048  # characters of one value
_SCHEMAS: dict[Kind, dict[str, Any]] = {
    "text": {"type": "string", "maxLength": LONGEST},
    "int": {"type": "integer"},
    "number": {"type": "number"},
    "flag": {"type": "integer", "enum": [0, 1]},
}


class BadRequest(Exception):
    """A request that cannot be served: a 4xx status and one sentence."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Param:
    """One query parameter. `low` and `high` bound numbers (closed)."""

    name: str
    kind: Kind = "text"
    required: bool = False
    choices: tuple[str, ...] = ()
    low: int | None = None
    high: int | None = None

    def parse(self, text: str) -> Any:
        """The value that `text` stands for. Raises `BadRequest`."""
        if len(text) > LONGEST:
            raise BadRequest(f"{self.name} is longer than {LONGEST} characters", 414)
        if "\0" in text:
            raise BadRequest(f"{self.name} may not hold the character NUL")
        if self.choices and text not in self.choices:
            raise BadRequest(f"{self.name} is one of {', '.join(self.choices)}, not {text[:80]!r}")
        if self.kind == "text":
            return text
        if self.kind == "flag":
            if text not in ("0", "1"):
                raise BadRequest(f"{self.name} is 0 or 1, not {text[:80]!r}")
            return text == "1"
        try:
            number = int(text) if self.kind == "int" else float(text)
        except ValueError:
            what = "a whole number" if self.kind == "int" else "a number"
            raise BadRequest(f"{self.name} is {what}, not {text[:80]!r}") from None
        if not math.isfinite(number) or abs(number) >= 2**63:
            raise BadRequest(f"{self.name} is out of range")
        if (self.low is not None and number < self.low) or (self.high is not None and number > self.high):
            bounds = f"from {self.low}" + ("" if self.high is None else f" to {self.high}")
            raise BadRequest(f"{self.name} is a number {bounds}, not {text[:80]}")
        return number

    def schema(self) -> dict[str, Any]:
        """The parameter in an OpenAPI document."""
        schema = dict(_SCHEMAS[self.kind])
        if self.choices:
            schema["enum"] = list(self.choices)
        if self.low is not None:
            schema["minimum"] = self.low
        if self.high is not None:
            schema["maximum"] = self.high
        return {"name": self.name, "in": "query", "required": self.required, "schema": schema}


def parse(query: QueryParams, params: Sequence[Param]) -> Mapping[str, Any]:
    """Every parameter by name, None where it was not given. Raises `BadRequest`."""
    known = {param.name: param for param in params}
    out: dict[str, Any] = dict.fromkeys(known)
    for name, text in query.multi_items():
        param = known.get(name)
        if param is None:
            raise BadRequest(f"there is no parameter {name[:80]!r} here; there are: {', '.join(known) or 'none'}")
        if out[name] is not None:
            raise BadRequest(f"{name} is given twice")
        out[name] = param.parse(text)
    missing = [param.name for param in params if param.required and out[param.name] is None]
    if missing:
        raise BadRequest(f"{' and '.join(missing)} must be given")
    return out
