"""Shows that AgentRL makes TRL's update: from TRL's own batch, the same prompts, advantages, loss and gradient.

    python tests/benchmarks/peers/same_update.py --model MODEL --batch batch.npz [--json OUT]

`batch.npz` is what `trl_step.py --dump` wrote. Its token ids become records, as if AgentRL's engine had sampled them;
what follows is AgentRL's own path: groups, GRPO with TRL's settings, training rows, token-mean clipped loss, backward.
Beside that, the chat layer replays every conversation and must arrive at TRL's contexts. Exit 1 where something differs
by more than `--tolerance` (gradients relative to their norm, the whole gradient and each parameter).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

import machine
import numpy as np
import torch
from chain import SYSTEM, problems
from chain_env import Chain
from numpy.typing import NDArray

from agentrl.algo.advantage import GRPO
from agentrl.algo.loss import OldBehaviour, PPOClip, TokenMean
from agentrl.chat import ChatFormat, Dialogue, Message
from agentrl.train.policy import Policy
from agentrl.train.update import Objective, backward, forward_members, train_rows
from agentrl.trajectory import (
    Context,
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
    ids_of,
)

GROUP = 8
Batch = dict[str, NDArray[Any]]


def runs(values: NDArray[Any]) -> Iterator[tuple[int, int, bool]]:
    """Maximal (start, stop, value) runs of a 0/1 vector."""
    edges = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
    for start, stop in pairwise(edges):
        yield start, stop, bool(values[start])


def prompt_of(batch: Batch, row: int) -> NDArray[Any]:
    ids: NDArray[Any] = batch["prompt_ids"][row]
    shown: NDArray[Any] = ids[batch["prompt_mask"][row] == 1]
    return shown


def completion_of(batch: Batch, row: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """The completion's ids, and 1 where the policy spoke."""
    said = batch["completion_mask"][row] == 1
    return batch["completion_ids"][row][said], batch["tool_mask"][row][said]


def trajectory(batch: Batch, row: int, prompt: Span) -> Trajectory:
    """TRL's row as a record. TRL keeps no log-probs of the sampler: zeros stand in, and nothing reads them."""
    ids, spoken = completion_of(batch, row)
    context: Context = (prompt[:],)
    turns = []
    for start, stop, sampled in runs(spoken):
        piece = as_ids(ids[start:stop])
        if not sampled:
            context = (*context, Span(piece, "tool", "tool")[:])
            continue
        n = stop - start
        span = Span(piece, "assistant", "sampled", logprobs=as_floats(np.zeros(n)), versions=(VersionRun(0, 0, n),))
        turns.append(Turn(context, (span,), "", "", Sampling(max_tokens=64), "stop"))
        context = (*context, span[:])
    reward = float(batch["rewards"][row])
    group = str(row // GROUP)
    return Trajectory(str(row), group, group, tuple(turns), Outcome("completed"), seed=row, reward=reward)


def groups_of(batch: Batch) -> list[Group]:
    """TRL's batch as groups; a group's prompt is one span, shared."""
    groups = []
    for first in range(0, len(batch["prompt_ids"]), GROUP):
        prompt = Span(as_ids(prompt_of(batch, first)), "user", "template")
        members = [Member(trajectory(batch, row, prompt)) for row in range(first, first + GROUP)]
        groups.append(Group(str(first // GROUP), str(first // GROUP), members))
    return groups


def update_differences(batch: Batch, policy: Policy) -> dict[str, float]:
    """Largest differences of advantages, loss and gradient between AgentRL's path and TRL's dump."""
    settings = json.loads(str(batch["settings"]))
    groups = groups_of(batch)
    GRPO(eps=1e-4).estimate(groups)
    members = [member for group in groups for member in group.members]
    given = [float(member.advantages[0][0]) for member in members if member.advantages]
    for member, old in zip(members, forward_members(policy, members, temperature=1.0, token_budget=4096), strict=True):
        member.arrays["old"] = old
    clip = PPOClip(low=settings["epsilon_low"], high=settings["epsilon_high"])
    objective = Objective(OldBehaviour(), clip, TokenMean())
    rows = train_rows(members, objective)
    metrics, _ = backward(policy, rows, objective, temperature=settings["temperature"], tokens_per_batch=4096)
    mine = {name: p.grad.flatten() for name, p in policy.base.named_parameters() if p.grad is not None}
    theirs = {name.removeprefix("grad/"): torch.from_numpy(batch[name]) for name in batch if name.startswith("grad/")}
    if mine.keys() != theirs.keys():
        raise SystemExit(f"parameters with a gradient differ: {sorted(mine.keys() ^ theirs.keys())}")
    gaps = {name: float((mine[name] - theirs[name]).norm() / theirs[name].norm()) for name in theirs}
    norm = float(torch.cat(list(theirs.values())).norm())
    whole = torch.cat([mine[name] - theirs[name] for name in theirs])
    return {
        "trained_tokens": float(sum(len(row.row.targets) for row in rows)),
        "advantage_difference": float(np.abs(np.array(given) - batch["advantages"]).max()),
        "loss": metrics["loss"],
        "loss_trl": float(batch["loss"]),
        "loss_difference": abs(metrics["loss"] - float(batch["loss"])),
        "gradient_norm": norm,
        "gradient_difference_largest_entry": float(whole.abs().max()),
        "gradient_difference": float(whole.norm()) / norm,
        "gradient_difference_worst_parameter": max(gaps.values()),
    }


def contexts_that_differ(batch: Batch, policy: Policy) -> int:
    """Rows in which AgentRL's chat layer, fed what TRL sampled, arrives at other token ids than TRL."""
    chat, env = ChatFormat(policy.tokenizer), Chain()
    questions = [p.question for p in islice(problems(0), len(batch["prompt_ids"]) // GROUP)]
    said = json.loads(str(batch["completions"]))
    different = 0
    for row in range(len(batch["prompt_ids"])):
        dialogue = Dialogue(chat, env.tool_schemas())
        dialogue.start([Message("system", SYSTEM), Message("user", questions[row // GROUP])])
        results = iter([message["content"] for message in said[row] if message["role"] == "tool"])
        ids, spoken = completion_of(batch, row)
        same = bool(np.array_equal(ids_of(dialogue.context), prompt_of(batch, row)))
        for start, stop, sampled in runs(spoken):
            if sampled:
                n = stop - start
                zeros, version = as_floats(np.zeros(n)), (VersionRun(0, 0, n),)
                span = Span(as_ids(ids[start:stop]), "assistant", "sampled", logprobs=zeros, versions=version)
                dialogue.heard(span, dialogue.parse(span.ids))
            else:
                dialogue.extend([Message("tool", next(results), name="calc")])
                expected = np.concatenate([prompt_of(batch, row), ids[:stop]])
                same = same and bool(np.array_equal(ids_of(dialogue.context), expected))
        different += not same
    return different


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--batch", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tolerance", type=float, default=1e-4)
    given = parser.parse_args()
    with np.load(given.batch) as stored:
        batch = dict(stored)
    policy = Policy.from_folder(given.model)
    found: dict[str, Any] = {"contexts_that_differ": contexts_that_differ(batch, policy), "rows": len(batch["rewards"])}
    found |= update_differences(batch, policy)
    checked = ("advantage_difference", "loss_difference", "gradient_difference", "gradient_difference_worst_parameter")
    found["same"] = not found["contexts_that_differ"] and all(found[name] <= given.tolerance for name in checked)
    text = json.dumps({"tolerance": given.tolerance, **found, "machine": machine.describe()}, indent=1)
    sys.stdout.write(text + "\n")
    if given.json is not None:
        given.json.write_text(text + "\n", encoding="utf-8")
    return 0 if found["same"] else 1


if __name__ == "__main__":
    sys.exit(main())
