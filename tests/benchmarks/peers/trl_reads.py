"""Shows that TRL's GRPOTrainer takes what `agentrl export --format trl` writes, and scores the same tokens.

    agentrl export RUN batches --format trl --stage rl
    agentrl export hf RUN/checkpoints/CHECKPOINT model
    python tests/benchmarks/peers/trl_reads.py model batches/*.safetensors

Runs in an environment that holds TRL 1.16; needs nothing of AgentRL. Each file goes into the trainer's own loss: with
ratios of 1 it must be minus the mean of the advantages over the trained tokens. TRL's log-probs of these tokens under
`model` are compared with those of the record: equal, but for rounding, where `model` sampled them. Exit 1 where the
loss differs.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer


def main() -> None:
    folder, *files = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with tempfile.TemporaryDirectory() as out:
        trainer = GRPOTrainer(
            model,
            reward_funcs=lambda completions, **rest: [0.0] * len(completions),
            args=GRPOConfig(out, use_cpu=True, loss_type="dapo", beta=0.0, report_to=[], bf16=False),
            train_dataset=Dataset.from_dict({"prompt": ["x"]}),
            processing_class=tokenizer,
        )
        trainer.model.eval()
        trainer.current_gradient_accumulation_steps = 1
        for name in files:
            inputs = load_file(name)
            mask = inputs["completion_mask"] * inputs["tool_mask"]
            with torch.no_grad():
                loss = trainer.compute_loss(trainer.model, dict(inputs))
                ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
                seen = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
                width = inputs["completion_ids"].shape[1]
                logprobs, *_ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, seen, width)
            wanted = -(inputs["advantages"] * mask).sum() / mask.sum()
            off = ((logprobs - inputs["sampling_per_token_logps"]).abs() * mask).max().item()
            assert int(inputs["num_items_in_batch"]) == int(mask.sum())
            assert torch.allclose(loss, wanted, atol=1e-5), (loss, wanted)
            sys.stdout.write(
                f"{Path(name).name}: {len(ids)} rows, {int(mask.sum())} trained tokens, loss {loss:.6f} as it must be; "
                f"log-probs differ by {off:.1e} at most\n"
            )


if __name__ == "__main__":
    main()
