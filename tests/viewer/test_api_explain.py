"""Every number of a token's credit comes from the record, and they add up, for runs of several recipes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from agentrl.store import Credit, StoreReader

pytestmark = pytest.mark.xdist_group("viewer")


def credited(run: Path) -> list[Credit]:
    with StoreReader(run) as reader:
        return [c for c in reader.credits(stage="rl") if c.advantages is not None]


def chain(client: TestClient, run: str, credit: Credit, turn: int, token: int) -> dict[str, Any]:
    asked = {"run": run, "id": credit.id, "turn": turn, "token": token, "step": credit.step}
    found = client.get("/api/explain", params=asked)
    assert found.status_code == 200, found.text
    answer: dict[str, Any] = found.json()
    return answer


def link(answer: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(link for link in answer["chain"] if link["name"] == name)
    return found


@pytest.mark.parametrize("name", ["grpo", "otc", "arpo", "flow"])
def test_it_adds_up_for_every_credited_member(client: TestClient, keys: dict[str, str], runs: Path, name: str) -> None:
    credits = credited(runs / name)
    assert any(float(a[0]) != 0 for c in credits for a in c.advantages or () if a.size)
    for credit in credits:
        assert credit.advantages is not None
        turn = next(i for i in reversed(range(len(credit.advantages))) if credit.advantages[i].size)
        answer = chain(client, keys[name], credit, turn, 0)
        assert answer["adds_up"], answer
        advantage = link(answer, "advantage")
        assert math.isclose(advantage["value"], float(credit.advantages[turn][0]), abs_tol=1e-6)
        assert math.isclose(advantage["numbers"]["made again"], advantage["value"], abs_tol=1e-5)
        assert link(answer, "shaped reward")["value"] == credit.reward
        assert answer["adds_up"] is True and answer["unchecked"] is None
        push = link(answer, "push")
        assert (name == "flow") == any(line["component"] == "kl" for line in answer["chain"])
        assert (name == "flow") == ("without the terms above: kl" in push["of"])
        assert math.isclose(push["value"], math.prod(push["numbers"].values()), rel_tol=1e-6)


@pytest.mark.parametrize("name", ["grpo", "otc", "arpo", "flow"])
def test_the_loss_weights_of_a_step_are_those_of_its_aggregator(runs: Path, name: str) -> None:
    steps = {c.step for c in credited(runs / name)}
    for step in steps:
        arrays = [c.arrays["loss_weight"] for c in credited(runs / name) if c.step == step]
        total = sum(float(part.sum(dtype=np.float64)) for turns in arrays for part in turns)
        minibatches = 2 if name == "grpo" else 1
        assert math.isclose(total, minibatches, rel_tol=1e-5)  # each mini-batch's weights are a mean


def test_shapers_say_what_they_looked_at(client: TestClient, keys: dict[str, str], runs: Path) -> None:
    credit = next(c for c in credited(runs / "otc") if len(c.parts) == 2)
    answer = chain(client, keys["otc"], credit, 0, 0)
    otc, cost = (step for step in answer["chain"] if step["name"] == "shaper")
    assert otc["component"] == "otc_grpo" and cost["component"] == "tool_cost"
    assert math.isclose(otc["numbers"]["before"] * otc["numbers"]["factor"], otc["value"], abs_tol=1e-9)
    taken = cost["numbers"]["cost"] * cost["numbers"]["weight"]
    assert math.isclose(otc["value"] - taken, cost["value"], abs_tol=1e-9)


def test_the_baseline_is_the_groups(client: TestClient, keys: dict[str, str], runs: Path) -> None:
    credit = credited(runs / "grpo")[0]
    with StoreReader(runs / "grpo") as reader:
        rewards = [c.reward for c in reader.credits(group=credit.group_id, step=credit.step)]
    baseline = link(chain(client, keys["grpo"], credit, 0, 0), "group baseline")
    assert baseline["numbers"]["n"] == len(rewards)
    assert math.isclose(baseline["value"], float(np.mean(rewards)))  # type: ignore[arg-type]
    estimator = link(chain(client, keys["grpo"], credit, 0, 0), "estimator")
    numbers = estimator["numbers"]
    assert math.isclose(numbers["std"], float(np.std(rewards, ddof=1)))  # type: ignore[arg-type]
    by_hand = (credit.reward - numbers["mean"]) / (numbers["std"] + numbers["eps"])  # type: ignore[operator]
    assert math.isclose(estimator["value"], by_hand, abs_tol=1e-6)


def test_the_baseline_of_rows_is_the_one_that_was_used(client: TestClient, keys: dict[str, str], runs: Path) -> None:
    uneven = 0
    for credit in credited(runs / "flow"):
        with StoreReader(runs / "flow") as reader:
            siblings = reader.credits(group=credit.group_id, step=credit.step)
            turns = [len(reader.get(c.id).turns) for c in siblings]
        rewards = np.repeat([c.reward for c in siblings], turns)  # type: ignore[arg-type]
        numbers = link(chain(client, keys["flow"], credit, 0, 0), "estimator")["numbers"]
        assert math.isclose(numbers["mean"], float(rewards.mean()), abs_tol=1e-9)
        assert math.isclose(numbers["std"], float(rewards.std(ddof=1)), abs_tol=1e-9)
        by_hand = (numbers["reward"] - numbers["mean"]) / (numbers["std"] + numbers["eps"])
        assert credit.advantages is not None
        assert math.isclose(by_hand, float(credit.advantages[0][0]), abs_tol=1e-5)
        uneven += len(set(turns)) > 1
    assert uneven


def test_a_shared_turn_gets_the_mean_of_its_branches(client: TestClient, keys: dict[str, str], runs: Path) -> None:
    with StoreReader(runs / "arpo") as reader:
        forks = [e for e in reader.trajectories(stage="rl", limit=500).entries if e.parent is not None]
    credits = {(c.id, c.step): c for c in credited(runs / "arpo")}
    shared = [credits[e.id, e.step] for e in forks if (e.id, e.step) in credits]
    assert shared
    transform = link(chain(client, keys["arpo"], shared[0], 0, 0), "transform")
    assert transform["component"] == "shared_prefix"
    n = transform["numbers"]["branches that share the turn"]
    assert n >= 2 and math.isclose(transform["numbers"]["weight after"], 1 / n, rel_tol=1e-6)


def test_what_was_never_credited_says_so(client: TestClient, keys: dict[str, str], runs: Path) -> None:
    with StoreReader(runs / "grpo") as reader:
        entry = reader.trajectories(stage="sft", limit=1).entries[0]
    found = client.get("/api/explain", params={"run": keys["grpo"], "id": entry.id, "turn": 0, "token": 0})
    assert found.status_code == 404 and "never credited" in found.json()["error"]
