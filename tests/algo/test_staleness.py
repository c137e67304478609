"""Ages of tokens, what drops the old ones, and corrections at both levels, against numbers by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from agentrl.algo import loss, staleness
from agentrl.config import prepare
from agentrl.train.stages import RLStage
from agentrl.trajectory import (
    Group,
    Member,
    Outcome,
    Sampling,
    Span,
    Trajectory,
    Turn,
    VersionRun,
    as_floats,
    as_ids,
)

WORKED = json.loads((Path(__file__).with_name("worked_examples.json")).read_text())
prepare()


def turn(*runs: tuple[int, int], logprob: float = -1.0) -> Turn:
    """A turn whose tokens were sampled by (version, how many) one after another."""
    versions, at = [], 0
    for version, n in runs:
        versions.append(VersionRun(version, at, at + n))
        at += n
    span = Span(
        as_ids(range(at)), "assistant", "sampled", "policy", as_floats([logprob] * at), versions=tuple(versions)
    )
    return Turn((), (span,), "", "", Sampling(), "stop")


def member(*turns: Turn, advantage: float | None = 1.0) -> Member:
    trajectory = Trajectory("id", "group", "task", turns, Outcome("completed"), 0, reward=1.0)
    made = Member(trajectory)
    if advantage is not None:
        made.advantages = made.spread([advantage] * len(turns))
    return made


def test_an_age_is_the_number_of_updates_since_the_token_was_sampled() -> None:
    trajectory = member(turn((3, 2)), turn((3, 1), (5, 2), (-1, 1))).trajectory
    first, second = staleness.ages(trajectory, 5)
    assert first.tolist() == [2, 2] and second.tolist() == [2, 0, 0, staleness.UNKNOWN]


def test_a_turn_without_sampled_tokens_has_no_ages() -> None:
    spoken = Turn((), (), "hello", "hello", Sampling(), "stop")
    assert [ages.size for ages in staleness.ages(member(spoken).trajectory, 3)] == [0]


def test_crossing_an_update_is_seen_within_and_between_turns() -> None:
    assert staleness.crossed(member(turn((1, 2), (2, 1))).trajectory)
    assert staleness.crossed(member(turn((1, 2)), turn((2, 1))).trajectory)
    assert not staleness.crossed(member(turn((1, 2)), turn((1, 1))).trajectory)


def test_the_report_counts_tokens() -> None:
    members = [member(turn((5, 2)), turn((4, 1))), member(turn((2, 3), (3, 1)), turn((-1, 1)))]
    staleness.stamp(members, 5)
    found = staleness.report(members, 3, [staleness.MaxAge(updates=1), staleness.MaxAge(updates=2)])
    assert found == pytest.approx(
        {
            "staleness/mean": (0 + 0 + 1 + 3 * 3 + 2) / 7,
            "staleness/max": 3,
            "staleness/crossed": 1.0,
            "staleness/unknown": 1 / 8,
            "staleness/age_0": 2 / 8,
            "staleness/age_1": 1 / 8,
            "staleness/age_2": 1 / 8,
            "staleness/age_3": 3 / 8,
            "correction/too_old": 4 / 8,
        }
    )
    assert staleness.report([], 1)["staleness/mean"] == 0.0


def test_max_age_takes_the_weight_of_old_tokens_and_no_others() -> None:
    old, uncredited = member(turn((1, 2), (3, 1)), turn((-1, 1))), member(turn((1, 1)), advantage=None)
    unstamped = member(turn((1, 1)))
    staleness.stamp([old, uncredited], 3)
    old.weights = old.spread([0.5, 0.25])
    staleness.MaxAge(updates=1).transform([Group("g", "task", [old, uncredited, unstamped])])
    assert [w.tolist() for w in old.weights or []] == [[0, 0, 0.5], [0.25]]
    assert uncredited.weights is None and unstamped.weights is None


def behaviour(**options: object) -> tuple[loss.OldBehaviour, list[list[float]]]:
    """The worked example's three tokens in two turns, corrected."""
    logs = WORKED["tis_mis"]["log_pi_train_minus_rollout"]
    one = member(turn((0, 2)), turn((0, 1)))
    one.arrays["old"] = [as_floats([-1 + v for v in logs[:2]]), as_floats([-1 + logs[2]])]
    model = loss.OldBehaviour.model_validate({"type": "old", **options})
    _, weights = model.denominator(one)
    return model, [array.tolist() for array in weights or []]


def test_corrections_of_a_token_and_of_a_sequence() -> None:
    example = WORKED["tis_mis"]
    _, tokens = behaviour(correction="tis")
    assert [w for part in tokens for w in part] == pytest.approx(example["tis_cap_2"], abs=1e-5)
    _, whole = behaviour(correction="tis", level="sequence", cap=100.0)
    assert [w for part in whole for w in part] == pytest.approx([example["seq_ratio"]] * 3, abs=1e-5)
    _, cut = behaviour(correction="tis", level="sequence")
    assert cut == [[2.0, 2.0], [2.0]]
    _, masked = behaviour(correction="mis", level="sequence")
    assert masked == [[0.0, 0.0], [0.0]]
    _, kept = behaviour(correction="mis", level="sequence", cap=5.0)
    assert kept == [[1.0, 1.0], [1.0]]


def test_a_long_sequence_does_not_overflow() -> None:
    (far,) = loss.sequence_ratios([np.full(5000, 1.0, np.float32)])
    assert np.isfinite(far).all() and far.shape == (5000,)


def test_a_correction_says_what_it_did() -> None:
    model, tokens = behaviour(correction="tis")
    weights = as_floats([w for part in tokens for w in part])
    assert model.report(weights) == pytest.approx(
        {"correction/mean_weight": (1.648721 + 0.818731 + 2) / 3, "correction/truncated": 1 / 3}, abs=1e-5
    )
    model, tokens = behaviour(correction="mis")
    weights = as_floats([w for part in tokens for w in part])
    assert model.report(weights)["correction/masked"] == pytest.approx(1 / 3)
    assert loss.RolloutBehaviour().report(weights) == {}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"overdue": "drop"}, "does nothing where max_staleness is 0"),
        ({"max_staleness": 2, "transforms": [{"type": "max_age", "updates": 2}]}, "lets none be"),
        ({"behaviour": {"type": "old", "level": "sequence"}, "annotators": ["old_logprobs"]}, "without a correction"),
        ({"max_staleness": 1, "schedules": {"max_staleness": {"start": 0, "end": 1}}}, "begin another stage"),
    ],
)
def test_options_that_would_do_nothing_are_refused(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        RLStage.model_validate({"steps": 2, "optimizer": {"lr": 1e-4}} | options)
