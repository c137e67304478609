"""Training steps of TRL's GRPOTrainer with a tool: the peer of benchmark (a). Run by TRL's own Python.

    python tests/benchmarks/peers/trl_step.py --model FOLDER --json OUT [--steps 3] [--dump batch.npz]

The trainer is TRL's, unchanged; a subclass only reads the clock and, with `--dump`, keeps the first generation batch,
its loss and the gradient of its update. What is fixed, and what each name in the files means, stands in README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")

import chain
import machine
import numpy as np
import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.chat_template_utils import qwen3_template

BATCH_FIELDS = (
    "prompt_ids",
    "prompt_mask",
    "completion_ids",
    "completion_mask",
    "tool_mask",
    "advantages",
    "old_per_token_logps",
    "num_items_in_batch",
)


class TimedTrainer(GRPOTrainer):
    """GRPOTrainer with clocks around its own methods. It changes no number."""

    def __init__(self, *args: Any, keep_batch: bool = False, **kwargs: Any) -> None:
        self.clock: defaultdict[str, float] = defaultdict(float)
        self.counts: defaultdict[str, int] = defaultdict(int)
        self.keep_batch = keep_batch
        self.kept: dict[str, Any] = {"losses": []}
        super().__init__(*args, **kwargs)
        backward = self.accelerator.backward

        def timed_backward(*inner: Any, **options: Any) -> None:
            with self.timed("backward_s"):
                backward(*inner, **options)

        self.accelerator.backward = timed_backward

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.clock[name] += time.perf_counter() - started

    def _generate(self, prompts: list[Any]) -> Any:
        with self.timed("generation_s"):
            made = super()._generate(prompts)
        prompt_ids, completion_ids, tool_mask, completions = made[:4]
        self.counts["sampled_tokens"] += sum(map(sum, tool_mask))
        self.counts["prompt_tokens"] += sum(map(len, prompt_ids))
        self.counts["completion_tokens"] += sum(map(len, completion_ids))
        self.counts["turns"] += sum(m["role"] == "assistant" for c in completions for m in c)
        self.counts["tool_calls"] += sum(m["role"] == "tool" for c in completions for m in c)
        if self.keep_batch and "completions" not in self.kept:
            self.kept["completions"] = completions
        return made

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        with self.timed("logprob_s"):
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        batch = super()._generate_and_score_completions(inputs)
        if self.keep_batch and "batch" not in self.kept:
            self.kept["batch"] = {k: batch[k].clone() for k in BATCH_FIELDS if batch.get(k) is not None}
            self.kept["rewards"] = list(self._logs["rewards"]["closeness"])[-len(inputs) :]
            self.kept["answers"] = [example["answer"] for example in inputs]
        return batch

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.counts["micro_batches"] += 1
        if self.keep_batch and "gradient" not in self.kept:
            self.kept["losses"].append(float(loss))
            if self._step % self.args.gradient_accumulation_steps == 0:
                named = [(n, p) for n, p in self.model.named_parameters() if p.grad is not None]
                self.kept["gradient"] = {n: p.grad.detach().float().numpy().copy() for n, p in named}
        return loss


class StepClock(TrainerCallback):
    """Cuts the run into optimiser steps: what the clocks and counts gained in each."""

    def __init__(self) -> None:
        self.trainer: TimedTrainer | None = None
        self.steps: list[dict[str, float]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        if self.trainer.counts["micro_batches"] == 0:
            self.started, self.started_cpu = time.perf_counter(), time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        wall, cpu = time.perf_counter() - self.started, time.process_time() - self.started_cpu
        step: dict[str, float] = {"wall_s": wall, "cpu_s": cpu, **self.trainer.clock, **self.trainer.counts}
        step["rest_s"] = step["wall_s"] - step["generation_s"] - step["logprob_s"] - step["backward_s"]
        step["tokens_per_s"] = step["sampled_tokens"] / step["wall_s"]
        step["peak_rss_mb"] = machine.peak_rss_mb()
        self.steps.append({k: round(v, 4) if isinstance(v, float) else v for k, v in step.items()})
        self.trainer.clock.clear()
        self.trainer.counts.clear()
        self.started, self.started_cpu = time.perf_counter(), time.process_time()


def closeness(completions: list[list[dict[str, Any]]], answer: list[int], **kwargs: Any) -> list[float]:
    """The task's reward, called as TRL calls reward functions."""
    return [
        chain.reward(messages[-1].get("content") or "", right)
        for messages, right in zip(completions, answer, strict=True)
    ]


def settings(given: argparse.Namespace, folder: str) -> GRPOConfig:
    """TRL's defaults, but for what the benchmark fixes."""
    episodes = given.prompts * given.samples
    return GRPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=given.checkpointing,
        per_device_train_batch_size=given.micro_batch,
        gradient_accumulation_steps=episodes // given.micro_batch,
        num_generations=given.samples,
        max_tool_calling_iterations=chain.TOOL_TURNS,
        max_completion_length=512,
        generation_kwargs={"max_new_tokens": given.turn_tokens},
        max_steps=given.steps,
        shuffle_dataset=False,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to="none",
        logging_strategy="no",
        disable_tqdm=True,
        seed=given.seed,
    )


def record(trainer: TimedTrainer) -> dict[str, Any]:
    """TRL's loss settings as it resolved them, so that another trainer can compute the same update."""
    args = trainer.args
    return {
        "loss_type": trainer.loss_type,
        "epsilon_low": trainer.epsilon_low,
        "epsilon_high": trainer.epsilon_high,
        "delta": args.delta,
        "beta": trainer.beta,
        "scale_rewards": trainer.scale_rewards,
        "num_iterations": trainer.num_iterations,
        "importance_sampling_level": trainer.importance_sampling_level,
        "temperature": trainer.temperature,
        "top_p": trainer.top_p,
        "top_k": trainer.top_k,
        "mask_truncated_completions": trainer.mask_truncated_completions,
        "entropy_coef": trainer.entropy_coef,
        "learning_rate": args.learning_rate,
        "optim": str(args.optim),
        "max_grad_norm": args.max_grad_norm,
        "weight_decay": args.weight_decay,
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "gradient_checkpointing": args.gradient_checkpointing,
        "max_completion_length": args.max_completion_length,
        "max_new_tokens_per_turn": trainer.generation_config.max_new_tokens,
        "max_tool_calling_iterations": trainer.max_tool_calling_iterations,
    }


def dump(path: Path, trainer: TimedTrainer, said: dict[str, Any]) -> None:
    """The first generation batch in its order of groups, its loss, and its gradient before clipping."""
    kept = trainer.kept
    arrays = {name: value.numpy() for name, value in kept["batch"].items()}
    arrays["rewards"] = np.asarray(kept["rewards"], dtype=np.float32)
    arrays["answers"] = np.asarray(kept["answers"], dtype=np.int64)
    arrays["loss"] = np.asarray(sum(kept["losses"]), dtype=np.float64)
    arrays["settings"] = np.asarray(json.dumps(said))
    arrays["completions"] = np.asarray(json.dumps(kept["completions"]))
    for name, gradient in kept["gradient"].items():
        arrays[f"grad/{name}"] = gradient.reshape(-1)
    np.savez_compressed(path, **arrays)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the folder that make_model.py wrote")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--dump", type=Path, help="write the first batch, its loss and its gradient to this .npz file")
    parser.add_argument("--steps", type=int, default=3, help="optimiser steps; the first one also warms up")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--turn-tokens", type=int, default=64)
    parser.add_argument("--micro-batch", type=int, default=64, help="rows of a forward pass of the update")
    parser.add_argument("--checkpointing", action="store_true", help="TRL's default: less memory, more time")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)

    tokenizer = AutoTokenizer.from_pretrained(given.model)
    tokenizer.response_template = qwen3_template
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    asked = list(islice(chain.problems(given.seed), given.prompts * given.steps))
    data = Dataset.from_list([{"prompt": chain.opening(p), "answer": p.answer} for p in asked])
    clock = StepClock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = TimedTrainer(
            model=model,
            reward_funcs=closeness,
            args=settings(given, folder),
            train_dataset=data,
            processing_class=tokenizer,
            tools=[chain.calc],
            callbacks=[clock],
            keep_batch=given.dump is not None,
        )
        clock.trainer = trainer
        before = machine.rss_mb()
        trainer.train()
    said = record(trainer)
    result = {
        "system": f"trl {trl.__version__} GRPOTrainer",
        "machine": machine.describe(),
        "load_average": machine.load_average(),
        "settings": said,
        "steps": clock.steps,
        "rss_before_training_mb": before,
        "peak_rss_mb": machine.peak_rss_mb(),
    }
    if given.dump is not None:
        result["loss"] = sum(trainer.kept["losses"])
        dump(given.dump, trainer, said)
    given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
