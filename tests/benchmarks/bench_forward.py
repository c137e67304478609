"""Log-probs and their gradient over one step's rows: padded, sorted by length, and with shared prompts.

    python tests/benchmarks/bench_forward.py [--case step quickstart] [--budget 2048 4096] [--json PATH]

`padded`   micro-batches in the given order, padded, the model's own forward, all logits
`sorted`   packed rows sorted by length, logits at targets only
`shared`   the same with every shared token forwarded once
Figures are medians over runs, variants alternating; a token is a token of a row, however few are forwarded.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from agentrl.train.forward import Network, plan, token_logprobs
from agentrl.trajectory import Row, as_ids

sys.path.insert(0, str(Path(__file__).parent))
from machine import describe, peak_rss_mb, rss_mb


@dataclass(frozen=True)
class Case:
    """A Qwen3 and one step's rows: `groups` x `samples`, up to `turns` turns of up to `sampled` tokens."""

    vocab: int
    hidden: int
    layers: int
    dim: int
    ff: int
    groups: int
    samples: int
    prompt: int
    turns: int
    sampled: int
    tool: int


CASES = {
    "step": Case(4096, 256, 4, 64, 768, groups=8, samples=8, prompt=300, turns=3, sampled=64, tool=20),
    "quickstart": Case(642, 96, 2, 24, 288, groups=16, samples=16, prompt=27, turns=2, sampled=12, tool=6),
}


def model_of(case: Case) -> PreTrainedModel:
    config = Qwen3Config(
        vocab_size=case.vocab,
        hidden_size=case.hidden,
        num_hidden_layers=case.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=case.dim,
        intermediate_size=case.ff,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Qwen3ForCausalLM(config).eval()


def rows_of(case: Case) -> list[Row]:
    """Groups of rows: a prompt, then turns of sampled ids (some end early) and tool results."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(case.groups):
        prompt = rng.integers(0, case.vocab, int(case.prompt * rng.uniform(0.8, 1.2)))
        for _ in range(case.samples):
            ids, targets = [prompt], []
            position = prompt.size
            for turn in range(int(rng.integers(1, case.turns + 1))):
                if turn:
                    ids.append(rng.integers(0, case.vocab, case.tool))
                    position += case.tool
                count = int(rng.integers(case.sampled // 2, case.sampled + 1))
                ids.append(rng.integers(0, case.vocab, count))
                targets.append(np.arange(position, position + count))
                position += count
            where = np.concatenate(targets)
            rows.append(Row(as_ids(np.concatenate(ids)), where, np.zeros_like(where), np.arange(where.size)))
    return [rows[index] for index in rng.permutation(len(rows))]


def padded(network: Network, rows: list[Row], budget: int, train: bool) -> None:
    width = max(len(row) for row in rows)
    size = max(1, budget // width)
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        ids = torch.zeros(len(part), width, dtype=torch.int64)
        seen = torch.zeros_like(ids)
        for line, row in enumerate(part):
            ids[line, : len(row)] = torch.from_numpy(row.ids.astype(np.int64))
            seen[line, : len(row)] = 1
        with torch.set_grad_enabled(train):
            logits = network.model(input_ids=ids, attention_mask=seen, use_cache=False).logits[:, :-1]
            logprobs = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
            mask = torch.zeros_like(logprobs)
            for line, row in enumerate(part):
                mask[line, torch.from_numpy(row.targets) - 1] = 1
            if train:
                (logprobs * mask).sum().backward()


def packed(share: bool) -> Callable[[Network, list[Row], int, bool], None]:
    def run(network: Network, rows: list[Row], budget: int, train: bool) -> None:
        for part in plan(rows, token_budget=budget, share_prompts=share):
            with torch.set_grad_enabled(train):
                out = token_logprobs(network, [rows[i] for i in part], share_prompts=share)
                if train:
                    out.logprobs.sum().backward()

    return run


VARIANTS = {"padded": padded, "sorted": packed(False), "shared": packed(True)}


def peak(case: str, variant: str, budget: int, threads: int) -> float:
    """MiB that one step with gradients holds at most, beyond the model (run in a process of its own)."""
    torch.set_num_threads(threads)
    network, rows = Network(model_of(CASES[case])), rows_of(CASES[case])
    before = rss_mb() or 0.0
    VARIANTS[variant](network, rows, budget, True)
    return peak_rss_mb() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--budget", nargs="+", type=int, default=[2048, 4096])
    parser.add_argument("--variant", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    table = Table("case", "variant", "budget", "log-probs s", "with gradient s", "CPU-s", "tokens/s", "peak MiB")
    results = []
    for name in args.case:
        network, rows = Network(model_of(CASES[name])), rows_of(CASES[name])
        tokens = sum(len(row) for row in rows)
        runs = [(variant, budget) for variant in args.variant for budget in args.budget]
        times: dict[tuple[str, int, bool], list[tuple[float, float]]] = {}
        for _ in range(args.runs + 1):
            for variant, budget in runs:
                for train in (False, True):
                    wall, cpu = time.perf_counter(), time.process_time()
                    VARIANTS[variant](network, rows, budget, train)
                    took = time.perf_counter() - wall, time.process_time() - cpu
                    times.setdefault((variant, budget, train), []).append(took)
        for variant, budget in runs:
            score, _ = (statistics.median(column) for column in zip(*times[variant, budget, False][1:], strict=True))
            step, cpu = (statistics.median(column) for column in zip(*times[variant, budget, True][1:], strict=True))
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                held = pool.submit(peak, name, variant, budget, args.threads).result()
            results.append(
                {
                    "case": name,
                    "variant": variant,
                    "budget": budget,
                    "tokens": tokens,
                    "score_s": score,
                    "train_s": step,
                    "train_cpu_s": cpu,
                    "peak_mb": held,
                }
            )
            figures = (f"{score:.3f}", f"{step:.3f}", f"{cpu:.2f}", f"{tokens / step:,.0f}", f"{held:.0f}")
            table.add_row(name, variant, str(budget), *figures)
    Console(width=120).print(table)
    if args.json:
        args.json.write_text(json.dumps({"machine": describe(), "results": results}, indent=2))


if __name__ == "__main__":
    main()
