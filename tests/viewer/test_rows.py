"""What the token view says of each token: sampled by the policy, and looked at by the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from agentrl.algo.advantage import GRPO
from agentrl.algo.loss import LOSS_WEIGHTS, PPOClip, RolloutBehaviour, TokenMean
from agentrl.algo.staleness import AGES, MaxAge
from agentrl.store import StoreReader, StoreWriter
from agentrl.train.update import Objective, note_weights, train_rows
from agentrl.trajectory import Group, as_floats
from agentrl.viewer.rows import arrays_of, view_of


def seen(folder: Path, group: Group) -> list[dict[str, Any]]:
    """Each member's arrays once the group is stored; only its sampled tokens."""
    with StoreWriter(folder) as writer:
        writer.add([member.trajectory for member in group.members], step=0, stage="rl")
        writer.credit(group, step=0)
    out = []
    with StoreReader(folder) as reader:
        for member in group.members:
            view = view_of(reader.get(member.trajectory.id))
            assert view is not None
            arrays = arrays_of(view, reader.credit(member.trajectory.id, 0))
            assert arrays["mask"].sum() == view.sampled.size < view.ids.size
            assert "trained" not in arrays or not arrays["trained"][arrays["mask"] == 0].any()
            out.append({name: array[view.sampled] for name, array in arrays.items()})
    return out


def updated(group: Group) -> None:
    objective = Objective(RolloutBehaviour(), PPOClip(), TokenMean())
    note_weights(group.members, [train_rows(group.members, objective)], objective.aggregator)


def test_what_the_loss_looked_at_is_trained(tmp_path: Path, group: Any, turn: Any) -> None:
    made: Group = group([1.0, 0.0], turns=[[turn(n=3), turn(n=2, start=20)]] * 2)
    GRPO().estimate([made])
    updated(made)
    for arrays in seen(tmp_path, made):
        assert arrays["trained"].tolist() == [1] * 5


def test_tokens_that_are_too_old_are_not_trained(tmp_path: Path, group: Any, turn: Any) -> None:
    made: Group = group([1.0, 0.0], turns=[[turn(n=3), turn(n=2, start=20)]] * 2)
    for member in made.members:
        member.arrays[AGES] = [as_floats([3, 0, 1]), as_floats([2, 0])]
    GRPO().estimate([made])
    MaxAge(updates=1).transform([made])
    updated(made)
    for arrays in seen(tmp_path, made):
        assert arrays["mask"].tolist() == [1] * 5
        assert arrays["trained"].tolist() == [0, 1, 1, 0, 1]


def test_a_token_outside_the_loss_is_not_trained(tmp_path: Path, group: Any) -> None:
    made: Group = group([1.0, 0.0])
    GRPO().estimate([made])
    updated(made)
    made.members[0].arrays[LOSS_WEIGHTS][0][1] = 0.0
    assert [arrays["trained"].tolist() for arrays in seen(tmp_path, made)] == [[1, 0, 1], [1, 1, 1]]


def test_a_dropped_group_is_not_trained(tmp_path: Path, group: Any) -> None:
    for arrays in seen(tmp_path, group([1.0, 1.0])):
        assert arrays["trained"].tolist() == [0, 0, 0]


def test_where_the_record_does_not_say_nothing_is_claimed(tmp_path: Path, group: Any) -> None:
    made: Group = group([1.0, 0.0])
    GRPO().estimate([made])  # as earlier versions recorded it: no loss weights
    assert all("trained" not in arrays for arrays in seen(tmp_path, made))
    with StoreReader(tmp_path) as reader:
        view = view_of(reader.get("t0"))
        assert view is not None
        arrays = arrays_of(view, None)  # an evaluation episode has no credit
    assert "trained" not in arrays and np.count_nonzero(arrays["mask"]) == 3
