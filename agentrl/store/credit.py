"""Credit: what a member of a group was worth at one step. A frame of its own, appended when it is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from agentrl.store.codec import raw, unraw
from agentrl.trajectory import Floats, Group, Member


@dataclass(frozen=True, slots=True, eq=False)
class Credit:
    """One member's reward and credit. Arrays are float32, one per turn, each [n_sampled of that turn]."""

    stage: str
    step: int
    group_id: str
    member: int
    id: str
    attempt: int
    source: str
    reward: float | None
    task_id: str
    parts: Mapping[str, float]
    turn_rewards: Sequence[float] | None
    advantages: list[Floats] | None
    weights: list[Floats] | None
    arrays: Mapping[str, list[Floats]] = field(default_factory=dict)
    draw: Mapping[str, Any] = field(default_factory=dict)
    notes: Mapping[str, float] = field(default_factory=dict)


def credit_out(group: Group, number: int, member: Member, *, step: int, stage: str) -> tuple[tuple[Any, ...], bytes]:
    """The meta (CREDIT_FACTS first) and the body of a CREDIT frame: every array's bytes in order."""
    named = [("", member.advantages), ("w", member.weights)]
    named += [(f"a/{name}", arrays) for name, arrays in sorted(member.arrays.items())]
    layout, body = [], []
    for name, arrays in named:
        if arrays is not None:
            layout.append((name, [array.size for array in arrays]))
            body += [raw(np.asarray(array, np.float32)) for array in arrays]
    t = member.trajectory
    meta = (
        stage, step, group.id, number, t.id, t.attempt, member.source, member.reward,
        group.task_id, member.parts, member.turn_rewards, layout, group.draw,
        *([member.notes] if member.notes else ()),
    )  # fmt: skip
    return meta, b"".join(body)


def credit_in(meta: Sequence[Any], body: bytes) -> Credit:
    """Undo `credit_out`."""
    stage, step, group, number, id_, attempt, source, reward, task, parts, turn_rewards, layout, draw, *notes = meta
    found: dict[str, list[Floats]] = {}
    at = 0
    for name, sizes in layout:
        found[name] = []
        for size in sizes:
            found[name].append(unraw(body, "<f4", size, at))
            at += 4 * size
    arrays = {name[2:]: values for name, values in found.items() if name.startswith("a/")}
    return Credit(
        stage, step, group, number, id_, attempt, source, reward, task, parts, turn_rewards,
        found.get(""), found.get("w"), arrays, draw, *notes,
    )  # fmt: skip
