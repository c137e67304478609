"""What is said of a token's credit, on records made for it: every estimator, every correction, and runs whose
configuration says less than it should."""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from agentrl.algo.advantage import AdvantageEstimator, SharedPrefix
from agentrl.algo.component import Component
from agentrl.algo.loss import LOSS_WEIGHTS, OldBehaviour
from agentrl.algo.staleness import AGES, MaxAge
from agentrl.store import RunFolder, StoreReader, StoreWriter
from agentrl.trajectory import (
    Fork,
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
from agentrl.viewer.app import make_app
from agentrl.viewer.explain import explain

ESTIMATORS = {
    name: cls
    for name, cls in Component.registry["estimator"].items()
    if cls.__module__.startswith("agentrl.") and issubclass(cls, AdvantageEstimator)
}
OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "stats_unit": st.sampled_from(["trajectory", "row"]),
    "std": st.sampled_from(["sample", "population"]),
    "eps": st.sampled_from([1e-6, 1e-4]),
}


class Mine(AdvantageEstimator):
    """A run's own estimator that this process happens to know."""

    type: Literal["mine_in_a_test"] = "mine_in_a_test"

    def estimate(self, groups: Sequence[Group]) -> None:
        raise AssertionError("a run's own code was run")


def stage_of(**parts: Any) -> dict[str, Any]:
    stage = {
        "type": "rl", "steps": 4, "shapers": [], "estimator": {"type": "grpo"}, "transforms": [],
        "behaviour": {"type": "rollout"}, "surrogate": {"type": "ppo_clip"}, "aggregator": {"type": "token_mean"},
        "aux": [],
    }  # fmt: skip
    return {"stages": [{name: part for name, part in {**stage, **parts}.items() if part is not None}]}


def turn_of(start: int) -> Turn:
    """Two sampled tokens."""
    logprobs = as_floats([-1.0, -1.0])
    ids = as_ids([start, start + 1])
    said = Span(ids, "assistant", "sampled", logprobs=logprobs, versions=(VersionRun(0, 0, 2),))
    return Turn((), (said,), "text", "text", Sampling(), "stop")


def group_of(rewards: Sequence[float | None], turns: Sequence[int] | None = None) -> Group:
    members = []
    for i, (reward, n) in enumerate(zip(rewards, turns or [1] * len(rewards), strict=True)):
        outcome = Outcome("failed", "infra") if reward is None else Outcome("completed")
        score = {} if reward is None else {"answer": reward}
        made = tuple(turn_of(10 * k) for k in range(n))
        members.append(Member(Trajectory(f"t{i}", "g", "task", made, outcome, 0, score=score, reward=reward)))
    group = Group("g", "task", members)
    for member in group.scored:
        member.arrays[LOSS_WEIGHTS] = member.spread([0.25] * len(member.trajectory.turns))
    return group


def told(config: dict[str, Any], group: Group, member: int = 0, step: int = 0) -> dict[str, Any]:
    """What the page is told of the last token of a member, once the group is stored."""
    with tempfile.TemporaryDirectory() as folder:
        with StoreWriter(Path(folder)) as writer:
            writer.add([m.trajectory for m in group.members], step=step, stage="rl")
            writer.credit(group, step=step, stage="rl")
        with StoreReader(Path(folder)) as reader:
            id = group.members[member].trajectory.id
            entry = next(e for e in reader.trajectories().entries if e.id == id)
            trajectory = reader.get(id)
            return explain(reader, config, entry, trajectory, len(trajectory.turns) - 1, 1, None)


def link(answer: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = (link for link in answer["chain"] if link["name"] == name)
    return dict(found)


def worked_out(line: dict[str, Any]) -> float:
    """The formula of a line, `name = …` up to a semicolon, with the line's own numbers put in."""
    text = line["of"].partition(" = ")[2].partition(";")[0]
    for name in sorted(line["numbers"], key=len, reverse=True):
        text = re.sub(rf"\b{re.escape(name)}\b", f"({line['numbers'][name]!r})", text)
    assert re.fullmatch(r"[-+*/() .\de]*", text), text  # every word of it is a number that is shown
    return float(eval(text, {"__builtins__": {}}))


@pytest.mark.parametrize("name", ESTIMATORS)
@settings(max_examples=30)
@given(data=st.data())
def test_the_lines_give_the_recorded_advantage_for_every_estimator(name: str, data: st.DataObject) -> None:
    fields = ESTIMATORS[name].model_fields
    given = {option: data.draw(values, option) for option, values in OPTIONS.items() if option in fields}
    members = data.draw(
        st.lists(
            st.tuples(st.none() | st.sampled_from([0.0, 0.25, 1.0, -3.0]) | st.floats(-9, 9), st.integers(1, 3)),
            min_size=1,
            max_size=6,
        ).filter(lambda made: made[0][0] is not None)
    )
    group = group_of([reward for reward, _ in members], [turns for _, turns in members])
    ESTIMATORS[name].model_validate(given).estimate([group])  # type: ignore[attr-defined]
    answer = told(stage_of(estimator={"type": name, **given}), group)
    recorded = float((group.members[0].advantages or [])[-1][1])
    estimator, baseline = link(answer, "estimator"), link(answer, "group baseline")
    assert math.isclose(worked_out(estimator), recorded, rel_tol=1e-5, abs_tol=1e-6)
    assert math.isclose(estimator["value"], recorded, rel_tol=1e-5, abs_tol=1e-6)
    assert answer["adds_up"] is True and answer["unchecked"] is None
    # What the baseline says that it is, by hand.
    row = given.get("stats_unit") == "row"
    pool = [reward for reward, turns in members if reward is not None for _ in range(turns if row else 1)]
    if baseline["value"] is None:
        assert len(pool) == 1 and baseline["of"].startswith("none: a group of one")
        return
    pool = pool[1:] if "other" in baseline["of"] else pool
    assert ("rows" in baseline["of"]) == row
    assert math.isclose(baseline["value"], float(np.mean(pool)), rel_tol=1e-9, abs_tol=1e-9)
    assert baseline["value"] in [v for k, v in estimator["numbers"].items() if k.startswith("mean")]
    assert baseline["numbers"].get("rows", baseline["numbers"].get("n")) == len(pool) + ("other" in baseline["of"])


def garbage(group: Group) -> None:
    for member in group.members:
        member.advantages = member.spread([1e6] * len(member.trajectory.turns))


@pytest.mark.parametrize(
    ("config", "adds_up", "why"),
    [
        (stage_of(), False, None),
        (stage_of(surrogate={"type": "own"}), False, None),
        (stage_of(aux=[{"type": "own"}], behaviour={"type": "own"}), False, None),
        (stage_of(estimator={"type": "own"}), None, "the estimator 'own' is not the framework's"),
        (stage_of(estimator={"type": "mine_in_a_test"}), None, "the estimator 'mine_in_a_test' is not the framework's"),
        (stage_of(transforms=[{"type": "own"}]), None, "the transform 'own' is not the framework's"),
        (stage_of(estimator={"type": "grpo", "new": 1}), None, "does not know the options of the estimator 'grpo'"),
        (stage_of(estimator=None), None, "does not say which estimator"),
        (stage_of(transforms=None), None, "does not say which transforms"),
        ({}, None, "has no stage 'rl'"),
    ],
)
def test_it_adds_up_only_where_the_advantage_was_made_again(
    config: dict[str, Any], adds_up: bool | None, why: str | None
) -> None:
    group = group_of([1.0, 0.0, 0.0])
    garbage(group)
    answer = told(config, group)
    assert answer["adds_up"] is adds_up
    assert (answer["unchecked"] is None) if why is None else (why in answer["unchecked"])
    advantage = link(answer, "advantage")
    assert advantage["value"] == 1e6 and ("not checked" in advantage["of"]) == (why is not None)


def test_no_component_is_named_that_the_configuration_does_not_name() -> None:
    group = group_of([1.0, 0.0])
    garbage(group)
    group.members[0].parts["length"] = 0.0
    answer = told({}, group)
    assert {line["component"] for line in answer["chain"]} == {"environment", None}
    push = link(answer, "push")
    assert push["value"] is None and "not calculated" in push["of"]


def test_a_member_without_advantages_has_nothing_that_adds_up() -> None:
    answer = told(stage_of(), group_of([1.0, 1.0]))
    assert answer["adds_up"] is None and "dropped before advantages" in answer["unchecked"]


def test_a_schedule_of_another_part_leaves_the_estimator_checked() -> None:
    group = group_of([1.0, 0.0])
    estimator = ESTIMATORS["grpo"].model_validate({"eps": 0.5})
    estimator.estimate([group])  # type: ignore[attr-defined]
    schedules = {
        "estimator.eps": {"shape": "linear", "start": 0.0, "end": 1.5},
        "surrogate.of_my_own": {"shape": "linear", "start": 0.0, "end": 1.0},
    }
    answer = told(stage_of(schedules=schedules, surrogate={"type": "own"}), group, step=1)
    assert answer["adds_up"] is True and link(answer, "estimator")["numbers"]["eps"] == 0.5


def test_what_an_editor_dropped_is_not_in_the_baseline() -> None:
    group = group_of([1.0, 0.0, 0.5])
    kept = Group("g", "task", group.members[:2])
    ESTIMATORS["dr_grpo"].model_validate({}).estimate([kept])  # type: ignore[attr-defined]
    answer = told(stage_of(estimator={"type": "dr_grpo"}), group)
    assert answer["adds_up"] is True and link(answer, "group baseline")["value"] == 0.5


@pytest.mark.parametrize("correction", ["tis", "mis"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("shift", [0.0, 0.3, -0.4, 9.0])
def test_the_correction_is_worked_out_from_its_numbers(correction: Any, level: Any, shift: float) -> None:
    group = group_of([1.0, 0.0], [2, 1])
    ESTIMATORS["grpo"].model_validate({}).estimate([group])  # type: ignore[attr-defined]
    for member in group.members:
        member.arrays["old"] = [
            as_floats(turn.logprobs + [0.0, shift] * (turn.n_sampled // 2)) for turn in member.trajectory.turns
        ]
    behaviour = OldBehaviour(correction=correction, level=level)
    wanted = (behaviour.denominator(group.members[0])[1] or [])[-1][1]
    # The surrogate is the run's own: the correction is known all the same.
    answer = told(stage_of(behaviour=behaviour.model_dump(), surrogate={"type": "own"}), group)
    line = link(answer, "correction")
    assert math.isclose(line["value"], float(wanted), rel_tol=1e-6)
    bounded = line["numbers"]["ratio" if level == "token" else "product"]
    if level == "sequence":
        assert "old" not in line["numbers"] and line["numbers"]["sampled tokens"] == 4
        assert math.isclose(bounded, math.exp(line["numbers"]["sum of old - rollout"]), rel_tol=1e-5)
        assert math.isclose(line["numbers"]["sum of old - rollout"], 2 * shift, abs_tol=1e-6)
    else:
        assert math.isclose(bounded, math.exp(line["numbers"]["old"] - line["numbers"]["rollout"]), rel_tol=1e-5)
    low, cap = line["numbers"].get("low", 0.0), line["numbers"]["cap"]
    by_hand = min(bounded, cap) if correction == "tis" else float(low <= bounded <= cap)
    assert math.isclose(line["value"], by_hand, rel_tol=1e-6)
    assert link(answer, "push")["value"] is None
    push = link(told(stage_of(behaviour=behaviour.model_dump()), group), "push")
    assert push["numbers"]["correction"] == line["value"]
    assert math.isclose(push["value"], math.prod(push["numbers"].values()))


def test_the_push_names_the_terms_that_it_leaves_out() -> None:
    group = group_of([1.0, 0.0])
    ESTIMATORS["grpo"].model_validate({}).estimate([group])  # type: ignore[attr-defined]
    for member in group.members:
        member.arrays["reference"] = member.spread([-1.25])
    aux = [{"type": "kl", "coef": 0.5}, {"type": "entropy", "coef": 0.1}, {"type": "own"}]
    answer = told(stage_of(aux=aux), group)
    terms = [line for line in answer["chain"] if line["name"] == "term"]
    assert [term["component"] for term in terms] == ["kl", "entropy", "own"]
    assert terms[0]["numbers"] == {"coef": 0.5, "reference": -1.25, "rollout": -1.0}
    assert terms[1]["numbers"]["coef"] == 0.1 and "not the framework's" in terms[2]["of"]
    push = link(answer, "push")
    assert push["component"] == "ppo_clip" and "without the terms above: kl, entropy, own" in push["of"]
    assert math.isclose(push["value"], math.prod(push["numbers"].values()))
    assert "terms" not in link(told(stage_of(), group), "push")["of"]


@pytest.mark.parametrize("mode", ["hard", "soft"])
def test_shared_turns_and_old_tokens_are_worked_out(mode: Any) -> None:
    group = group_of([1.0, 0.0, 0.5])
    parent, branch = group.members[:2]
    object.__setattr__(branch.trajectory, "turns", parent.trajectory.turns)
    object.__setattr__(branch.trajectory, "fork", Fork(parent.trajectory.id, 1, 0))
    for member in group.members:
        member.arrays[AGES] = member.spread([2.0])
    ESTIMATORS["rloo"].model_validate({}).estimate([group])  # type: ignore[attr-defined]
    own = [float((member.advantages or [])[0][0]) for member in group.members]
    transforms = [SharedPrefix(mode=mode, count="once"), MaxAge(updates=1)]
    for transform in transforms:
        transform.transform([group])
    stage = stage_of(estimator={"type": "rloo"}, transforms=[t.model_dump() for t in transforms])
    answer = told(stage, group, member=1)
    assert answer["adds_up"] is True
    shared, old = (line for line in answer["chain"] if line["name"] == "transform")
    numbers = shared["numbers"]
    assert numbers["branches that share the turn"] == 2
    branches = [value for name, value in numbers.items() if re.fullmatch(r"branch \d", name)]
    assert branches == (pytest.approx(own[:2]) if mode == "hard" else [])
    assert math.isclose(shared["value"], np.mean(own[:2]) if mode == "hard" else own[1], rel_tol=1e-6)
    assert numbers["weight after"] == numbers["weight before"] / 2 == 0.5
    assert old["numbers"] == {
        "before": shared["value"], "weight before": 0.5, "age": 2.0, "updates": 1.0, "weight after": 0.0
    }  # fmt: skip
    weight = link(answer, "weight")
    assert weight["value"] == weight["numbers"]["made again"] == 0.0


def test_a_recorded_weight_that_no_transform_made_does_not_add_up() -> None:
    group = group_of([1.0, 0.0])
    ESTIMATORS["grpo"].model_validate({}).estimate([group])  # type: ignore[attr-defined]
    group.members[0].weights = group.members[0].spread([0.5])
    assert told(stage_of(), group)["adds_up"] is False


def test_siblings_whose_tokens_were_not_kept_are_not_compared(tmp_path: Path) -> None:
    group = group_of([1.0, 0.0])
    ESTIMATORS["grpo"].model_validate({}).estimate([group])  # type: ignore[attr-defined]
    with StoreWriter(tmp_path, tokens="last_k", n=1) as writer:
        writer.add([group.members[1].trajectory], step=0, stage="rl")
        writer.add([group.members[0].trajectory], step=1, stage="rl")
        writer.credit(group, step=1, stage="rl")
    with StoreReader(tmp_path) as reader:
        entry = next(e for e in reader.trajectories().entries if e.id == "t0")
        answer = explain(reader, stage_of(), entry, reader.get("t0"), 0, 0, None)
    assert answer["adds_up"] is None and "siblings were not kept" in answer["unchecked"]


def test_tokens_that_were_not_kept_say_so(tmp_path: Path) -> None:
    group = group_of([1.0, 0.0])
    ESTIMATORS["grpo"].model_validate({}).estimate([group])  # type: ignore[attr-defined]
    with RunFolder.create(tmp_path / "forgetful", json.dumps(stage_of()), config_version=1):
        pass
    with StoreWriter(tmp_path / "forgetful", tokens="last_k", n=1) as writer:
        for step, member in enumerate(group.members):
            writer.add([member.trajectory], step=step, stage="rl")
            writer.credit(Group("g", "task", [member], step), step=step)
    with TestClient(make_app([tmp_path]), base_url="http://127.0.0.1:7860") as client:
        run = client.get("/api/runs").json()["runs"][0]["run"]
        for id, status in (("t0", 404), ("t1", 200)):
            found = client.get("/api/explain", params={"run": run, "id": id, "turn": 0, "token": 0})
            assert found.status_code == status
            assert ("tokens of this trajectory were not kept" in found.json().get("error", "")) == (status == 404)
