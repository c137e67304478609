"""A task: one problem an environment can pose, with a stable id."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from agentrl.content import Content


@dataclass(frozen=True, slots=True)
class Task:
    """`id` is stable across processes and runs. `prompt` is the user's first message, `system` an
    optional system message. `answer` and `data` are for the environment alone: the policy never sees them.
    """

    id: str
    prompt: Content
    answer: Any = None
    data: Mapping[str, Any] = field(default_factory=dict)
    system: str | None = None
