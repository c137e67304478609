"""Shows that verl reads what `agentrl export --format verl` writes, and computes AgentRL's advantages from it.

    agentrl export RUN batches --format verl --stage rl
    python tests/benchmarks/peers/verl_reads.py batches/*.safetensors

Runs in an environment that holds verl (0.8.0.dev, b178a3cd), with this repository on PYTHONPATH. For each file: the
tensors become a DataProto, which is split and joined again as verl does for its workers; the shapes, paddings and
masks are those that verl's agent loop makes; verl's GRPO, from the rewards, the masks and the `uid` of the file, gives
the advantages of the file (of runs whose estimator is GRPO with its standard deviation); verl's PPO loss takes it all.
Exit 1 where something differs.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from verl import DataProto
from verl.trainer.ppo.core_algos import agg_loss, compute_grpo_outcome_advantage, compute_policy_loss
from verl.utils.model import compute_position_id_with_mask

from agentrl.store.batches import load_batch


def read(path: Path) -> str:
    """A line on one file; raises `AssertionError` where verl sees something else."""
    tensors, texts = load_batch(path)
    data = DataProto.from_dict(
        tensors={name: torch.from_numpy(value) for name, value in tensors.items()},
        non_tensors={name: np.array(texts[name], dtype=object) for name in ("uid", "__num_turns__")},
    )
    data = DataProto.concat(data.chunk(2)) if len(data) % 2 == 0 else data
    batch = data.batch
    assert torch.equal(batch["input_ids"], torch.cat([batch["prompts"], batch["responses"]], dim=1))
    assert torch.equal(batch["position_ids"], compute_position_id_with_mask(batch["attention_mask"]))
    spoken = batch["attention_mask"][:, -batch["responses"].shape[1] :]  # ray_trainer.compute_response_mask
    assert torch.all(batch["response_mask"] <= spoken) and torch.all(batch["response_mask"].sum(dim=1) > 0)
    width = batch["prompts"].shape[1]
    assert torch.equal(batch["attention_mask"][:, :width].sort(dim=1).values, batch["attention_mask"][:, :width])
    last = spoken.sum(dim=1) - 1
    assert torch.equal(batch["rm_scores"].nonzero()[:, 1], last[batch["rm_scores"].sum(dim=1) != 0])
    again, _ = compute_grpo_outcome_advantage(
        batch["token_level_rewards"], batch["response_mask"].float(), data.non_tensor_batch["uid"]
    )
    off = (again - batch["advantages"] * batch["response_mask"]).abs().max().item()
    loss, *_ = compute_policy_loss(
        batch["old_log_probs"], batch["old_log_probs"], batch["advantages"], batch["response_mask"], 0.2, 0.2, 0.2
    )
    ours = agg_loss(-batch["advantages"], batch["response_mask"], "token-mean")
    assert torch.allclose(loss, ours, atol=1e-6), (loss, ours)
    rows, tokens = batch["responses"].shape[0], int(batch["response_mask"].sum())
    return f"{path.name}: {rows} rows, {tokens} trained tokens, advantages differ by {off:.1e} at most"


def main() -> None:
    for name in sys.argv[1:]:
        sys.stdout.write(read(Path(name)) + "\n")


if __name__ == "__main__":
    main()
