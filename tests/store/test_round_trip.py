"""What is read is what was written, whatever the record holds: forks, images, missing rewards, shared spans."""

from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import cast, get_args

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentrl.store import StoreReader, StoreWriter, rebuild
from agentrl.trajectory import (
    ErrorKind,
    FinishReason,
    Fork,
    Group,
    Member,
    Origin,
    Outcome,
    Role,
    Sampling,
    Source,
    Span,
    ToolCall,
    ToolResult,
    ToolUse,
    Trajectory,
    Turn,
    VersionRun,
    as_floats,
    as_ids,
)

TEXT = st.text(st.characters(codec=None, exclude_categories=()), max_size=8)
NAME = st.text(st.characters(codec="utf-8"), max_size=6)
NUMBER = st.floats(allow_nan=False)
REWARD = st.none() | st.floats(-10, 10)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | NUMBER | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
ORIGINS = [origin for origin in get_args(Origin) if origin != "sampled"]
ERROR = st.sampled_from(get_args(ErrorKind))
OUTCOMES = [
    *(Outcome(kind) for kind in ("completed", "terminated")),
    *(Outcome("truncated", why) for why in ("turns", "tokens", "context", "deadline")),
    *(Outcome("failed", why, "why \ud800") for why in ("infra", "env", "policy")),
]


@st.composite
def spans(draw: st.DrawFn, role: Role | None = None) -> Span:
    n = draw(st.integers(0, 6))
    ids = as_ids(draw(st.lists(st.integers(0, 2**31 - 1), min_size=n, max_size=n)))
    actor, images = draw(NAME), tuple(draw(st.lists(st.sampled_from(["aa", "bb"]), max_size=2)))
    where = role or cast(Role, draw(st.sampled_from(get_args(Role))))
    if where != "assistant" or draw(st.booleans()):
        return Span(ids, where, draw(st.sampled_from(ORIGINS)), actor, images=images)
    values = as_floats(draw(st.lists(st.floats(-90, 0, width=32), min_size=n, max_size=n)))
    kind = draw(st.sampled_from(["exact", "topk", "none"]))
    entropies = None if kind == "none" else as_floats(np.abs(values))
    edges = sorted({0, n, draw(st.integers(0, n))})
    runs = tuple(VersionRun(draw(st.integers(0, 99)), a, b) for a, b in pairwise(edges))
    return Span(ids, where, "sampled", actor, values, entropies, kind, runs, images)


@st.composite
def uses(draw: st.DrawFn) -> ToolUse:
    error = draw(st.none() | ERROR)
    arguments = draw(st.dictionaries(TEXT, JSON, max_size=3))
    images = tuple(draw(st.lists(st.sampled_from(["aa", "bb"]), max_size=2)))
    result = ToolResult(draw(TEXT), images, error is None, error, draw(st.floats(0, 9)), draw(st.floats(0, 9)))
    return ToolUse(ToolCall(draw(TEXT), arguments, draw(TEXT)), result)


@st.composite
def turns(draw: st.DrawFn, pool: list[Span]) -> Turn:
    fresh = draw(st.lists(spans(), max_size=3))
    pool += fresh
    context = []
    for _ in range(draw(st.integers(0, 5)) if pool else 0):
        span = draw(st.sampled_from(pool))
        start = draw(st.integers(0, len(span)))
        context.append(span[start : draw(st.integers(start, len(span)))])
    output = tuple(draw(st.lists(spans(role="assistant"), max_size=2)))
    pool += output
    sampling = Sampling(
        draw(st.floats(0, 2)), draw(st.floats(0.1, 1)), draw(st.integers(0, 9)), draw(st.integers(1, 9)),
        tuple(draw(st.lists(st.integers(0, 9), max_size=2))), draw(st.integers(0, 2**64)),
    )  # fmt: skip
    return Turn(
        tuple(context), output, draw(TEXT), draw(TEXT), sampling, draw(st.sampled_from(get_args(FinishReason))),
        draw(NAME),
        tuple(draw(st.lists(uses(), max_size=2))), draw(TEXT), draw(st.none() | ERROR), draw(REWARD),
        draw(st.none() | TEXT), draw(st.floats(0, 9)), draw(st.floats(0, 9)),
        draw(st.dictionaries(TEXT, JSON, max_size=2)),
    )  # fmt: skip


@st.composite
def families(draw: st.DrawFn) -> list[Trajectory]:
    """Trajectories of one step that share spans as forks and siblings do."""
    family: list[Trajectory] = []
    pool: list[Span] = []
    for number in range(draw(st.integers(1, 4))):
        begun: tuple[Turn, ...] = ()
        fork = None
        if family and draw(st.booleans()):
            parent = draw(st.sampled_from(family))
            at = draw(st.integers(0, len(parent.turns)))
            begun, fork = parent.turns[:at], Fork(parent.id, at, draw(st.integers(0, 99)))
        made = (*begun, *(draw(turns(pool)) for _ in range(draw(st.integers(0, 3)))))
        outcome = draw(st.sampled_from(OUTCOMES))
        reward = None if outcome.missing else draw(REWARD)
        family.append(
            Trajectory(
                f"rl-1/t/{number}", "rl-1/t", draw(NAME), made, outcome, draw(st.integers(0, 2**64)), draw(NAME),
                fork,
                draw(st.integers(0, 3)), draw(st.sampled_from(get_args(Source))),
                draw(st.dictionaries(TEXT, REWARD, max_size=2)), reward, draw(st.none() | st.booleans()),
                draw(st.dictionaries(TEXT, JSON, max_size=2)),
            )
        )  # fmt: skip
    return family


@given(families(), st.integers(1, 4))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_arbitrary_trajectories(records: ModuleType, family: list[Trajectory], batch: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with StoreWriter(folder) as store:
            for start in range(0, len(family), batch):
                store.add(family[start : start + batch], step=1, stage="rl")
        for again in (False, True):
            if again:
                assert rebuild(folder) == len(family)
            with StoreReader(folder) as reader:
                for trajectory in family:
                    found = reader.get(trajectory.id, trajectory.attempt)
                    assert records.unlike(trajectory, found) is None
                    assert sharing(found) == sharing(trajectory)
                    bare = reader.get(trajectory.id, tokens=False)
                    assert [turn.text for turn in bare.turns] == [turn.text for turn in trajectory.turns]
                    assert [turn.tools for turn in bare.turns] == [turn.tools for turn in found.turns]


def sharing(trajectory: Trajectory) -> list[int]:
    """Which span stands where, by number of first use: equal where spans are shared in the same places."""
    numbers: dict[int, int] = {}
    used = [span for turn in trajectory.turns for span in (*(piece.span for piece in turn.context), *turn.output)]
    return [numbers.setdefault(id(span), len(numbers)) for span in used]


def test_credit_comes_back_for_every_membership(tmp_path: Path, records: ModuleType) -> None:
    made = [records.episode(records.key(4, "t", sample)) for sample in range(2)]
    members = [Member(trajectory) for trajectory in (*made, made[0])]
    members[0].advantages = members[0].spread([0.5, -0.25, 1.0])
    members[0].weights = [as_floats(np.arange(turn.n_sampled)) for turn in made[0].turns]
    members[0].arrays = {"old": members[0].spread([1, 2, 3]), "value": members[0].spread([4, 5, 6])}
    members[0].parts, members[0].turn_rewards = {"score": 1.0, "cost": -0.5}, [0.0, 0.0, 1.0]
    members[1].reward = None
    members[2].source = "replay"
    group = Group("rl-4/t", "t", members, 4, {"n": 3, "hint": None})
    with StoreWriter(tmp_path) as store:
        store.add(made, step=4, stage="rl")
        store.credit(group, step=4)
        store.flush()
        with StoreReader(tmp_path) as reader:
            first = reader.credit(made[0].id, 4)
            assert first is not None
            for name in ("source", "reward", "parts", "turn_rewards", "advantages", "weights", "arrays"):
                assert records.unlike(getattr(members[0], name), getattr(first, name)) is None, name
            assert (first.group_id, first.task_id, first.draw, first.member) == (
                "rl-4/t",
                "t",
                {"n": 3, "hint": None},
                0,
            )
            assert reader.credit(made[0].id, 5) is None
            assert [(c.member, c.source, c.reward) for c in reader.credits(id=made[0].id)] == [
                (0, "policy", made[0].reward),
                (2, "replay", made[0].reward),
            ]
            assert [c.reward for c in reader.credits(group="rl-4/t")][1] is None
        members[0].reward = 9.0
        store.credit(group, step=4)  # written again: it supersedes
        store.flush()
    assert rebuild(tmp_path) == 2
    with StoreReader(tmp_path) as reader:
        assert len(reader.credits()) == 3
        again = reader.credit(made[0].id, 4)
        assert again is not None and again.reward == 9.0


def test_a_value_that_no_record_can_hold_stores_nothing(tmp_path: Path, records: ModuleType) -> None:
    good, bad = (records.episode(records.key(1, "t", i), extra={"x": {1} if i else 1}) for i in range(2))
    with StoreWriter(tmp_path) as store:
        with pytest.raises(TypeError, match="cannot hold set"):
            store.add([good, bad], step=1, stage="rl")
        store.add([good], step=1, stage="rl")
    with StoreReader(tmp_path) as reader:
        assert reader.ids() == [(good.id, 0)]
        assert records.unlike(good, reader.get(good.id)) is None


def test_a_fork_stores_its_own_tokens_only_and_a_long_episode_is_linear(tmp_path: Path, records: ModuleType) -> None:
    def stored(name: str, batches: list[list[Trajectory]]) -> int:
        with StoreWriter(tmp_path / name) as store:
            for batch in batches:
                store.add(batch, step=1, stage="rl")
        return sum(path.stat().st_size for path in (tmp_path / name / "seg").iterdir())

    parent = records.episode(records.key(1, "t"), turns=6, n=2000)
    child = records.branch(parent, records.key(1, "t", branch=(0,)), at=5)
    alone = stored("parent", [[parent]])
    for name, batches in (
        ("together", [[parent, child]]),
        ("apart", [[parent], [child]]),
        ("child first", [[child, parent]]),
    ):
        assert stored(name, batches) < 1.1 * alone + 4000
        with StoreReader(tmp_path / name) as reader:
            assert records.unlike(child, reader.get(child.id)) is None
            assert records.unlike(parent, reader.get(parent.id)) is None
    sizes = [stored(f"n{n}", [[records.episode(records.key(1, "t"), turns=n)]]) for n in (50, 200)]
    assert sizes[1] < 4.5 * sizes[0]
