"""The record's invariants, enforced at construction and held for random episodes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentrl.trajectory import (
    Outcome,
    RecordError,
    Row,
    Sampling,
    Span,
    SpanSlice,
    ToolResult,
    Trajectory,
    Turn,
    VersionRun,
    as_floats,
    as_ids,
    ids_of,
    rows_of,
)

ids = st.lists(st.integers(0, 999), min_size=1, max_size=6)


def sampled(values: list[int], **changes: Any) -> Span:
    n = len(values)
    given_ = {"logprobs": as_floats([-0.5] * n), "versions": (VersionRun(3, 0, n),) if n else ()} | changes
    return Span(as_ids(values), "assistant", "sampled", **given_)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: sampled([1, 2], logprobs=None), "needs 2 log-probs"),
        (lambda: sampled([1, 2], logprobs=as_floats([-1.0])), "needs 2 log-probs"),
        (lambda: sampled([1], logprobs=as_floats([0.5])), "at most 0"),
        (lambda: sampled([1], logprobs=as_floats([float("nan")])), "finite"),
        (lambda: sampled([1, 2], versions=(VersionRun(0, 0, 1),)), "cover 1 of 2"),
        (lambda: sampled([1, 2], versions=(VersionRun(0, 0, 1), VersionRun(1, 0, 2))), "tile"),
        (lambda: sampled([1], entropies=as_floats([1.0])), "must say what they are"),
        (lambda: sampled([1], entropies=as_floats([1.0, 2.0]), entropy="exact"), "needs 1 entropies"),
        (lambda: Span(as_ids([1]), "user", "sampled"), "assistant spans only"),
        (lambda: Span(as_ids([1]), "user", "template", logprobs=as_floats([-1.0])), "only sampled ids"),
        (lambda: Span(np.array([1], np.int32), "user", "template"), "read-only"),
        (lambda: as_ids([-1]), "negative"),
        (lambda: as_ids([[1]]), "one-dimensional"),
        (lambda: SpanSlice(sampled([1, 2]), 1, 3), "leaves its span"),
        (lambda: ToolResult("x", ok=True, error="tool"), "ok or has an error"),
        (lambda: Outcome("failed"), "takes one of"),
        (lambda: Outcome("completed", "turns"), "takes one of"),
        (lambda: Trajectory("t", "g", "k", (), Outcome("failed", "infra"), 0, reward=0.0), "no reward"),
        (lambda: turn_of([], [Span(as_ids([1]), "tool", "tool")]), "the assistant's"),
    ],
)
def test_broken_records_are_refused(make: Any, says: str) -> None:
    with pytest.raises(RecordError, match=says):
        make()


def turn_of(context: list[SpanSlice], output: list[Span]) -> Turn:
    return Turn(tuple(context), tuple(output), "", "", Sampling(), "stop")


def trajectory_of(turns: list[Turn]) -> Trajectory:
    return Trajectory("t", "g", "k", tuple(turns), Outcome("completed"), 0, reward=1.0)


def test_ids_cannot_change() -> None:
    span = sampled([1, 2, 3])
    with pytest.raises(ValueError, match="read-only"):
        span.ids[0] = 5
    with pytest.raises(ValueError, match="read-only"):
        ids_of([span[:2]])[0] = 5


@st.composite
def episodes(draw: st.DrawFn) -> Trajectory:
    """Turns that append, or begin afresh, or drop the head of an earlier output: whatever a context does."""
    turns: list[Turn] = []
    context: list[SpanSlice] = [Span(as_ids(draw(ids)), "user", "template")[:]]
    for _ in range(draw(st.integers(1, 5))):
        output = [sampled(draw(ids))]
        if draw(st.booleans()):
            output.append(Span(as_ids(draw(ids)), "assistant", "forced"))
        turns.append(turn_of(context, output))
        kind = draw(st.sampled_from(["append", "append", "fresh", "drop"]))
        suffix = Span(as_ids(draw(ids)), "tool", "tool")[:]
        if kind == "fresh":
            context = [Span(as_ids(draw(ids)), "user", "template")[:]]
        elif kind == "drop" and len(output[0]) > 1:
            context = [*context, output[0][1:], *(span[:] for span in output[1:]), suffix]
        else:
            context = [*context, *(span[:] for span in output), suffix]
    return trajectory_of(turns)


def expected_tokens(trajectory: Trajectory) -> list[tuple[int, int, int]]:
    return [
        (t, o, int(i))
        for t, turn in enumerate(trajectory.turns)
        for o, i in enumerate(ids_of([s[:] for s in turn.sampled]))
    ]


@given(episodes())
def test_each_sampled_token_trains_exactly_once_after_its_own_context(trajectory: Trajectory) -> None:
    rows = rows_of(trajectory)
    trained = [
        (int(t), int(o), int(row.ids[p]))
        for row in rows
        for p, t, o in zip(row.targets, row.turns, row.offsets, strict=True)
    ]
    assert sorted(trained) == expected_tokens(trajectory)
    for row in rows:
        for place, index, offset in zip(row.targets, row.turns, row.offsets, strict=True):
            turn = trajectory.turns[index]
            seen = np.concatenate([ids_of(turn.context), ids_of([span[:] for span in turn.output])[:offset]])
            assert np.array_equal(row.ids[:place], seen), "a token is predicted from exactly what its engine saw"


@given(episodes())
def test_rows_merge_exactly_where_the_context_extends(trajectory: Trajectory) -> None:
    breaks = 1
    for before, after in zip(trajectory.turns, trajectory.turns[1:], strict=False):
        whole = np.concatenate([ids_of(before.context), *(span.ids for span in before.output)])
        breaks += not np.array_equal(ids_of(after.context)[: whole.size], whole)
    assert len(rows_of(trajectory)) == breaks


def test_append_only_gives_one_row_and_memory_one_row_a_turn() -> None:
    prompt, first, answer = Span(as_ids([1]), "user", "template"), sampled([2, 3]), Span(as_ids([4]), "tool", "tool")
    second = sampled([5])
    appended = trajectory_of([turn_of([prompt[:]], [first]), turn_of([prompt[:], first[:], answer[:]], [second])])
    (row,) = rows_of(appended)
    assert row.ids.tolist() == [1, 2, 3, 4, 5] and row.targets.tolist() == [1, 2, 4]
    memory = trajectory_of([turn_of([prompt[:]], [first]), turn_of([answer[:]], [second])])
    assert [row.ids.tolist() for row in rows_of(memory)] == [[1, 2, 3], [4, 5]]


def test_forced_and_demo_tokens_train_only_where_asked() -> None:
    prompt = Span(as_ids([1]), "user", "template")
    said = Span(as_ids([2, 3]), "assistant", "demo")
    cut = Span(as_ids([9]), "assistant", "forced")
    trajectory = trajectory_of([turn_of([prompt[:]], [said, cut])])
    assert rows_of(trajectory) == []
    (row,) = rows_of(trajectory, frozenset({"demo"}))
    assert isinstance(row, Row) and row.targets.tolist() == [1, 2]


def test_other_actors_do_not_train() -> None:
    prompt = Span(as_ids([1]), "user", "template")
    turn = Turn((prompt[:],), (sampled([2], actor="opponent"),), "", "", Sampling(), "stop", actor="opponent")
    assert rows_of(trajectory_of([turn])) == []


def test_spans_are_listed_once() -> None:
    prompt, first = Span(as_ids([1]), "user", "template"), sampled([2])
    trajectory = trajectory_of([turn_of([prompt[:]], [first]), turn_of([prompt[:], first[:]], [sampled([3])])])
    assert len(trajectory.spans()) == 3
