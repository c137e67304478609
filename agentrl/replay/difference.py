"""Where a replay and its record part: the first difference, with its place."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from agentrl.trajectory import ToolCall, ToolResult, Trajectory, Turn

What = Literal["prompt", "state", "result", "observation", "reward", "length", "outcome", "score", "environment"]
_BEFORE, _AFTER = 24, 72  # characters shown before the first one that differs, and from it on


@dataclass(frozen=True, slots=True)
class Difference:
    """What was recorded and what is now. `turn` None: before the first turn (reset), or at the end. `call`: its number
    within the turn."""

    what: What
    recorded: Any
    now: Any
    turn: int | None = None
    call: int | None = None
    name: str = ""

    @property
    def place(self) -> str:
        """For example "turn 2, call 0 (calc)"."""
        if self.turn is None:
            return "the end" if self.what in ("outcome", "score") else "reset"
        if self.call is None:
            return f"turn {self.turn}"
        return f"turn {self.turn}, call {self.call} ({self.name})"

    @property
    def shown(self) -> tuple[str, str]:
        """The two sides as one short line each, from shortly before the first character that differs."""
        mine, yours = _text(self.recorded), _text(self.now)
        same = next(
            (i for i, (a, b) in enumerate(zip(mine, yours, strict=False)) if a != b), min(len(mine), len(yours))
        )
        start = max(0, same - _BEFORE)
        return _window(mine, start, same), _window(yours, start, same)

    def as_json(self) -> dict[str, Any]:
        """Both sides whole."""
        fields = ("what", "turn", "call", "name", "recorded", "now")
        return {name: getattr(self, name) for name in fields}


def _text(value: Any) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)[1:-1]
    return json.dumps(value, ensure_ascii=False, default=str)


def _window(text: str, start: int, same: int) -> str:
    stop = same + _AFTER
    return ("…" if start else "") + (text[start:stop] or "(nothing)") + ("…" if len(text) > stop else "")


def differing_result(turn: int, call: int, name: str, recorded: ToolResult, now: ToolResult) -> Difference | None:
    """Two results of one call: kind of error, text, images. Seconds, and the cost that hangs on them, may differ."""
    for mine, yours in (
        (recorded.error or "ok", now.error or "ok"),
        (recorded.text, now.text),
        (list(recorded.images), list(now.images)),
    ):
        if mine != yours:
            return Difference("result", mine, yours, turn, call, name)
    return None


def differing_turn(number: int, recorded: Turn, now: Turn) -> Difference | None:
    """The first difference of two turns made of the same words: state, results, observation, turn reward."""
    if recorded.anchor is not None and recorded.anchor != now.anchor:
        return Difference("state", recorded.anchor, now.anchor, number)
    if [use.call for use in recorded.tools] != [use.call for use in now.tools]:
        calls = [[spelt(use.call) for use in turn.tools] for turn in (recorded, now)]
        return Difference("environment", calls[0], calls[1], number)
    for call, (mine, yours) in enumerate(zip(recorded.tools, now.tools, strict=True)):
        different = differing_result(number, call, mine.call.name, mine.result, yours.result)
        if different is not None:
            return different
    if recorded.observation != now.observation:
        return Difference("observation", recorded.observation, now.observation, number)
    if recorded.reward != now.reward:
        return Difference("reward", recorded.reward, now.reward, number)
    return None


def spelt(call: ToolCall) -> str:
    """A call as one writes it: `lookup(order=3)`."""
    return f"{call.name}({', '.join(f'{key}={value!r}' for key, value in call.arguments.items())})"


def differing_score(
    recorded: Trajectory, parts: Mapping[str, float | None], reward: float | None, success: bool | None
) -> Difference | None:
    """The recorded verdict against another."""
    for mine, yours in (
        (dict(recorded.score), dict(parts)),
        ({"reward": recorded.reward}, {"reward": reward}),
        ({"success": recorded.success}, {"success": success}),
    ):
        if mine != yours:
            return Difference("score", mine, yours)
    return None
