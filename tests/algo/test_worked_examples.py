"""Every formula against numbers worked out by hand."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agentrl.algo import loss, statistics
from agentrl.algo.advantage import GRPO, RLOO, DrGRPO, SharedPrefix
from agentrl.algo.editor import DropConstant
from agentrl.algo.recipes.arpo_agentic import branches
from agentrl.algo.recipes.otc_grpo import OTCReward, call_reward
from agentrl.algo.reward import ToolCost
from agentrl.algo.state import StateStore
from agentrl.trajectory import Member, as_floats

WORKED: dict[str, Any] = json.loads((Path(__file__).parent / "worked_examples.json").read_text())


def flat(members: list[Member]) -> list[float]:
    return [float(member.advantages[0][0]) for member in members if member.advantages]


def test_grpo() -> None:
    example = WORKED["grpo"]
    assert statistics.grpo(example["rewards"]) == pytest.approx(example["adv_sample_std"], abs=1e-6)
    assert statistics.grpo(example["rewards"], std="population") == pytest.approx(
        example["adv_population_std"], abs=1e-6
    )
    constant = WORKED["grpo_constant_group"]
    assert statistics.grpo(constant["rewards"]).tolist() == constant["adv"]


def test_dr_grpo_and_rloo() -> None:
    for name, formula in (("dr_grpo", statistics.centred), ("rloo", statistics.leave_one_out)):
        assert formula(WORKED[name]["rewards"]) == pytest.approx(WORKED[name]["adv"], abs=1e-6)


@pytest.mark.parametrize("formula", [statistics.grpo, statistics.centred, statistics.leave_one_out])
def test_a_group_of_one_keeps_its_raw_reward(formula: Any) -> None:
    assert formula([0.7]).tolist() == [0.7]


@pytest.mark.parametrize("estimator", [GRPO(), DrGRPO(), RLOO()])
def test_missing_rewards_stay_out_of_the_statistics(estimator: Any, group: Any) -> None:
    whole, holed = group([1.0, 0.0, 0.0]), group([1.0, None, 0.0, 0.0])
    estimator.estimate([whole, holed])
    assert holed.members[1].advantages is None
    assert flat(holed.members) == flat(whole.members)


def test_flow_grpo_statistics_are_per_trajectory(group: Any, turn: Any) -> None:
    example = WORKED["flow_grpo"]
    turns = [[turn() for _ in range(t["turns"])] for t in example["trajectories"].values()]
    for unit, wanted in (
        ("trajectory", list(example["adv_per_trajectory_stats"].values())),
        ("row", [example["adv_per_row_stats"][0], example["adv_per_row_stats"][1]]),
    ):
        made = group([t["reward"] for t in example["trajectories"].values()], turns=turns)
        GRPO(stats_unit=unit).estimate([made])
        assert flat(made.members) == pytest.approx(wanted, abs=1e-5)
        # the outcome reaches every turn and every token
        assert all((a == flat([m])[0]).all() for m in made.members for a in m.advantages or [])


def test_advantages_come_before_length_drops(group: Any) -> None:
    example = WORKED["row_drop_order"]
    made = group(example["rewards"])
    GRPO().estimate([made])
    kept = [a for a, long in zip(flat(made.members), example["too_long"], strict=True) if not long]
    assert kept == pytest.approx(example["adv_then_drop"], abs=1e-5)


def test_ppo_clip_and_dual_clip() -> None:
    for case in WORKED["ppo_dual_clip"]["cases"]:
        tokens = tokens_of([math.log(case["ratio"])], [case["adv"]])
        surrogate = loss.PPOClip(low=case["clip_low"], high=case["clip_high"], dual=case["c"])
        assert float(surrogate.loss(tokens)[0].detach()) == pytest.approx(case["loss"], abs=1e-5)


def tokens_of(log_ratio: list[float], advantages: list[float]) -> loss.Tokens:
    n = len(log_ratio)
    return loss.Tokens(
        logprobs=torch.tensor(log_ratio, requires_grad=True),
        behaviour=torch.zeros(n),
        advantages=torch.tensor(advantages),
        correction=torch.ones(n),
        weights=torch.full((n,), 1 / n),
        trajectories=torch.zeros(n, dtype=torch.int64),
    )


def test_importance_weights() -> None:
    example = WORKED["tis_mis"]
    ratios = np.exp(as_floats(example["log_pi_train_minus_rollout"]))
    assert loss.importance_weights(ratios, "tis", 0.5, 2.0) == pytest.approx(example["tis_cap_2"], abs=1e-5)
    assert loss.importance_weights(ratios, "mis", 0.5, 2.0).tolist() == example["mis_mask_0p5_2"]


def test_aggregators() -> None:
    example = WORKED["loss_agg"]
    values = [
        [v for v, m in zip(r, mask, strict=True) if m]
        for r, mask in zip(example["token_loss"], example["mask"], strict=True)
    ]
    rows = np.repeat(np.arange(len(values)), [len(v) for v in values])
    units, flat_values = loss.Units(rows, rows, rows), np.concatenate(values)

    def total(aggregator: loss.Aggregator) -> float:
        return float((aggregator.weigh(units) * flat_values).sum())

    assert total(loss.TokenMean()) == pytest.approx(example["token_mean"], abs=1e-6)
    assert total(loss.UnitMean()) == pytest.approx(example["seq_mean_token_mean"])
    assert total(loss.ConstantNorm(length=4)) == pytest.approx(example["seq_mean_token_sum_norm_L4"])


def test_turns_then_trajectories() -> None:
    # trajectory 0 has turns of 1 and 3 tokens, trajectory 1 one turn of 2 tokens
    units = loss.Units(np.array([0, 1, 1, 1, 2, 2]), np.array([0, 1, 1, 1, 5, 5]), np.array([0, 0, 0, 0, 1, 1]))
    wanted = [1 / 4, 1 / 12, 1 / 12, 1 / 12, 1 / 4, 1 / 4]
    assert loss.TurnThenTrajectory().weigh(units) == pytest.approx(wanted)


def test_kl_estimators() -> None:
    ratio = torch.tensor([0.3, -0.2])
    assert loss.kl_estimate(ratio, "k1").tolist() == pytest.approx([0.3, -0.2], abs=1e-6)
    assert loss.kl_estimate(ratio, "k2").tolist() == pytest.approx([0.045, 0.02], abs=1e-6)
    assert loss.kl_estimate(ratio, "k3").tolist() == pytest.approx(
        [math.exp(-0.3) + 0.3 - 1, math.exp(0.2) - 0.2 - 1], abs=1e-6
    )


def test_groups_are_dropped_on_the_shaped_reward(group: Any) -> None:
    flat_group, costly = group([1.0, 1.0]), group([1.0, 1.0], calls=[0, 2])
    ToolCost(mode="subtract", weight=0.1).shape(costly, StateStore())
    kept = asyncio.run(DropConstant().edit([flat_group, costly], StateStore(), None, no_refill))
    assert kept == [costly]
    assert costly.members[1].parts == {"tool_cost": pytest.approx(-0.2)}


def test_dynamic_sampling_looks_at_success(group: Any) -> None:
    example = WORKED["dapo_dynamic_sampling"]
    groups = [group([float(x) for x in rewards]) for rewards in example["groups"]]
    kept = asyncio.run(DropConstant(on="success").edit(groups, StateStore(), None, no_refill))
    assert [groups.index(g) for g in kept] == example["kept"]


def test_dynamic_sampling_refills(group: Any) -> None:
    asked: list[int] = []

    async def refill(n: int) -> list[Any]:
        asked.append(n)
        return [group([1.0, 1.0]), group([0.0, 1.0])] if n == 2 else [group([0.0, 1.0])]

    start = [group([1.0, 1.0]), group([0.0, 0.0]), group([1.0, 0.0])]
    kept = asyncio.run(DropConstant(on="success", refill=True).edit(start, StateStore(), None, refill))
    assert len(kept) == 3 and asked == [2, 1]


async def no_refill(n: int) -> list[Any]:
    raise AssertionError("nothing asked for new groups")


def test_tool_cost_discount(group: Any) -> None:
    made = group([1.0, 1.0, 0.0], calls=[1, 3, 0])
    ToolCost(mode="discount", factor=0.7).shape(made, StateStore())
    assert [m.reward for m in made.members] == pytest.approx([1.0, 0.49, 0.0])


def test_otc_table() -> None:
    example = WORKED["otc_grpo"]
    for key, wanted in example["table"].items():
        m, n = (int(part.split("=")[1]) for part in key.split(","))
        assert call_reward(m, n, example["c"]) == pytest.approx(wanted, abs=1e-6)


def test_otc_group_and_memory(group: Any) -> None:
    example = WORKED["otc_grpo_group"]
    store = StateStore()
    made = group(
        [float(c) for c, _ in example["correct_and_calls"]], calls=[n for _, n in example["correct_and_calls"]]
    )
    OTCReward(c=4.0, alpha=example["alpha"]).shape(made, store)
    assert [m.reward for m in made.members] == pytest.approx(example["reward"], abs=1e-6)
    GRPO().estimate([made])
    assert flat(made.members) == pytest.approx(example["adv"], abs=1e-4)
    assert store.get("otc_grpo", "task") == example["n"]
    # the next epoch finds nobody faster: the remembered best still counts, also out of a checkpoint
    later = group([1.0, 0.0], calls=[4, 1])
    OTCReward(c=4.0).shape(later, StateStore(store.dump()))
    assert [m.reward for m in later.members] == pytest.approx([call_reward(4, 2, 4.0), 0.0])


def test_arpo_branch_rule() -> None:
    example = WORKED["arpo_entropy_branch"]
    for case in example["code_cases"]:
        got = branches(case["u"], case["dH"], weight=example["w"], probability=example["branch_probability"])
        assert got == case["branch"]


def test_arpo_hard_and_soft_credit(group: Any, turn: Any) -> None:
    example = WORKED["arpo_hard_advantage"]
    shared = turn(n=2)
    turns = [[shared, turn(start=20)] if i in example["shared_prefix_of"] else [turn(), turn()] for i in range(4)]
    made = group(example["rewards"], turns=turns)
    GRPO().estimate([made])
    assert flat(made.members) == pytest.approx(example["adv"], abs=1e-4)
    soft = sum(float(made.members[i].advantages[0][0]) for i in example["shared_prefix_of"])
    SharedPrefix(mode="hard", count="once").transform([made])
    for i in example["shared_prefix_of"]:
        member = made.members[i]
        assert member.advantages[0] == pytest.approx([example["shared_adv"]] * 2, abs=1e-4)
        assert member.advantages[1][0] == pytest.approx(example["adv"][i], abs=1e-4)
        assert member.weights[0] == pytest.approx([1 / 3] * 2)
    # equal in the on-policy limit: d copies of the mean are the sum of the d advantages
    assert 3 * example["shared_adv"] == pytest.approx(soft, abs=1e-4)
    assert soft == pytest.approx(WORKED["arpo_soft_hard_equiv"]["summed_weight_duplicated"], abs=1e-4)
    assert made.members[3].weights is None
