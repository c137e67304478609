"""A canonical form of a store: what two runs with equal records have in common, byte for byte.

Trajectories (the latest attempt of each) and credit, sorted by id. Left out is what is not the
record's own: wall-clock fields (`seconds`, and keys of `extra` that begin with "time/"), attempt
numbers (a run that was killed and resumed equals one that was not), and where and in which order
things were stored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from agentrl.store.codec import SpanTable, raw, trajectory_out
from agentrl.store.credit import Credit
from agentrl.store.frames import Encoder
from agentrl.store.reader import StoreReader
from agentrl.trajectory import Floats, Trajectory, Turn


def canonical(run_dir: Path) -> bytes:
    """The whole store as bytes that every run with equal records shares."""
    return b"".join(part for _, part in _parts(run_dir))


def fingerprint(run_dir: Path) -> str:
    """The sha256 of `canonical`, in hexadecimal digits; memory stays at one record."""
    digest = hashlib.sha256()
    for _, part in _parts(run_dir):
        digest.update(part)
    return digest.hexdigest()


def differences(one: Path, other: Path) -> list[str]:
    """The names of the records that two stores do not share or do not agree on, sorted."""
    digests = [{name: hashlib.sha256(part).digest() for name, part in _parts(run_dir)} for run_dir in (one, other)]
    return sorted(
        name for name in digests[0].keys() | digests[1].keys() if digests[0].get(name) != digests[1].get(name)
    )


def canonical_trajectory(trajectory: Trajectory, *, strip_clock: bool = True) -> bytes:
    """A trajectory as bytes that equal ones share. Without `strip_clock`, clocks and attempt count, too."""
    if strip_clock:
        turns = tuple(_timeless(turn) for turn in trajectory.turns)
        trajectory = replace(trajectory, turns=turns, attempt=0, extra=_without_clock(trajectory.extra))
    table = SpanTable()
    head, observations = trajectory_out(trajectory, table)
    arrays, sizes = table.arrays()
    return Encoder().pack((head, observations, table.rows, sizes, arrays))


def _parts(run_dir: Path) -> Iterator[tuple[str, bytes]]:
    with StoreReader(run_dir) as reader:
        for id, _ in reader.ids():
            yield id, canonical_trajectory(reader.get(id))
        for credit in reader.credits():
            yield f"credit {credit.stage}-{credit.step} {credit.group_id} {credit.member}", _credit(credit)


def _credit(credit: Credit) -> bytes:
    c = credit
    facts = (
        c.stage,
        c.step,
        c.group_id,
        c.member,
        c.id,
        c.source,
        c.reward,
        c.task_id,
        c.parts,
        c.turn_rewards,
        c.draw,
        *([c.notes] if c.notes else ()),
    )
    arrays = [(name, _raw(values)) for name, values in sorted(c.arrays.items())]
    return Encoder().pack((facts, _raw(c.advantages), _raw(c.weights), arrays))


def _raw(arrays: list[Floats] | None) -> list[bytes] | None:
    return None if arrays is None else [raw(array) for array in arrays]


def _timeless(turn: Turn) -> Turn:
    tools = tuple(replace(use, result=replace(use.result, seconds=0.0)) for use in turn.tools)
    return replace(turn, tools=tools, seconds=0.0, extra=_without_clock(turn.extra))


def _without_clock(extra: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in extra.items() if not name.startswith("time/")}
