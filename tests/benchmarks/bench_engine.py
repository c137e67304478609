"""The local engine beside transformers' `generate` and its continuous batching, on the published multi-turn trace.

    python tests/benchmarks/bench_engine.py [--rows 1,8,32,128] [--runs 3] [--threads 2] [--json PATH]
    python tests/benchmarks/bench_engine.py --quickstart [--runs 3]

Each engine is given the same contexts and must put out exactly the trace's number of tokens (no end token), sampled at
temperature 1, with log-probs where it can. Tool latencies are slept. An output token is one that the trace asks for.

`local`       LocalEngine: every episode goes on as soon as its tool answers; entropies too
`exact`       the same, deterministic=True
`generate`    a static batch of `rows` episodes, lock-step turns, left-padded, the whole context again each turn; a
              round's tools take as long as its slowest; rows that need fewer tokens than the longest wait for it
`continuous`  ContinuousBatchingManager with the parameters of its best known run on a CPU

All engines run with the framework's process settings (allocator and OpenMP, `agentrl.tuning`), which serve the peers
even more than the local engine. Runs alternate between engines; a cell is the median, with tokens per CPU-second beside
it, since other work may share the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import heapq
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from agentrl.engines import Request
from agentrl.engines.local import LocalEngine
from agentrl.trajectory import Sampling, as_ids
from agentrl.tuning import OPENMP, tune

sys.path.insert(0, str(Path(__file__).parent))
from trace import Trace, TraceEpisode, episodes_at, read_trace

from machine import describe, load_average
from models import random_qwen3

Outputs = dict[tuple[int, int], tuple[list[int], list[int], Any]]  # (episode, turn) -> context, output, log-probs
Serve = Callable[[PreTrainedModel, Trace, Sequence[TraceEpisode], int], Outputs]


async def _local(engine: LocalEngine, trace: Trace, episodes: Sequence[TraceEpisode], rows: int) -> Outputs:
    outputs: Outputs = {}
    free = asyncio.Semaphore(rows)

    async def play(episode: TraceEpisode) -> None:
        async with free:
            context = trace.prompt_ids(episode)
            name = f"episode-{episode.index}"
            for t, turn in enumerate(episode.turns):
                sampling = Sampling(max_tokens=turn.output, seed=episode.index * 8 + t)
                reply = await engine.generate(Request(as_ids(context), sampling, name, group=str(episode.group)))
                outputs[episode.index, t] = (context, reply.ids.tolist(), reply.logprobs)
                await asyncio.sleep(turn.latency)
                context = [*context, *reply.ids.tolist(), *trace.tool_ids(episode, t)]
            await engine.release(name)

    await asyncio.gather(*(play(episode) for episode in episodes))
    return outputs


def serve_local(deterministic: bool) -> Serve:
    def serve(model: PreTrainedModel, trace: Trace, episodes: Sequence[TraceEpisode], rows: int) -> Outputs:
        engine = LocalEngine(model, rows=rows, deterministic=deterministic)

        async def run() -> Outputs:
            with timed():
                outputs = await _local(engine, trace, episodes, rows)
            await engine.close()
            return outputs

        return asyncio.run(run())

    return serve


def serve_generate(model: PreTrainedModel, trace: Trace, episodes: Sequence[TraceEpisode], rows: int) -> Outputs:
    outputs: Outputs = {}
    torch.manual_seed(0)
    with timed():
        for start in range(0, len(episodes), rows):
            contexts = {episode.index: trace.prompt_ids(episode) for episode in episodes[start : start + rows]}
            alive = list(episodes[start : start + rows])
            for t in range(4):
                alive = [episode for episode in alive if len(episode.turns) > t]
                if not alive:
                    break
                _generate_round(model, trace, alive, t, contexts, outputs)
    return outputs


def _generate_round(
    model: PreTrainedModel,
    trace: Trace,
    alive: list[TraceEpisode],
    t: int,
    contexts: dict[int, list[int]],
    outputs: Outputs,
) -> None:
    width = max(len(contexts[episode.index]) for episode in alive)
    ids = torch.zeros(len(alive), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, episode in enumerate(alive):
        context = contexts[episode.index]
        ids[row, width - len(context) :] = torch.tensor(context)
        mask[row, width - len(context) :] = 1
    longest = max(episode.turns[t].output for episode in alive)
    sequences: Any = model.generate(  # type: ignore[operator]
        ids,
        attention_mask=mask,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=longest,
        pad_token_id=0,
    )
    for row, episode in enumerate(alive):
        turn = episode.turns[t]
        output = sequences[row, width : width + turn.output].tolist()
        outputs[episode.index, t] = (contexts[episode.index], output, None)
        contexts[episode.index] = [*contexts[episode.index], *output, *trace.tool_ids(episode, t)]
    time.sleep(max(episode.turns[t].latency for episode in alive))


def serve_continuous(model: PreTrainedModel, trace: Trace, episodes: Sequence[TraceEpisode], rows: int) -> Outputs:
    outputs: Outputs = {}
    config = ContinuousBatchingConfig(
        page_size=32, num_blocks=1024, max_batch_tokens=2048, return_logprobs=True, seed=0
    )
    generation = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=-1, max_new_tokens=128
    )
    manager = model.init_continuous_batching(generation_config=generation, continuous_batching_config=config)  # type: ignore[operator]
    manager.start()
    waiting = list(episodes)[::-1]
    sleeping: list[tuple[float, int, int, list[int]]] = []
    running = 0
    by_index = {episode.index: episode for episode in episodes}

    def add(index: int, t: int, context: list[int]) -> None:
        outputs[index, t] = (context, [], None)
        manager.add_request(context, request_id=f"{index}/{t}", max_new_tokens=by_index[index].turns[t].output)

    with timed():
        while waiting or running:
            while waiting and running < rows:
                episode = waiting.pop()
                running += 1
                add(episode.index, 0, trace.prompt_ids(episode))
            now = time.perf_counter()
            while sleeping and sleeping[0][0] <= now:
                _, index, t, context = heapq.heappop(sleeping)
                add(index, t, context)
            result = manager.get_result(timeout=max(0.0005, sleeping[0][0] - now) if sleeping else 0.05)
            if result is None:
                continue
            if result.error:
                raise RuntimeError(result.error)
            index, t = (int(part) for part in result.request_id.split("/"))
            episode, context = by_index[index], outputs[index, t][0]
            outputs[index, t] = (context, result.generated_tokens, np.array(result.logprobs))
            if t + 1 == len(episode.turns):
                running -= 1
                continue
            after = [*context, *result.generated_tokens, *trace.tool_ids(episode, t)]
            heapq.heappush(sleeping, (time.perf_counter() + episode.turns[t].latency, index, t + 1, after))
    manager.stop(block=True)
    model.destroy_cached_continuous_batching_manager()  # type: ignore[operator]
    return outputs


ENGINES: dict[str, Serve] = {
    "local": serve_local(False),
    "exact": serve_local(True),
    "generate": serve_generate,
    "continuous": serve_continuous,
}
_clock: dict[str, float] = {}


@contextmanager
def timed() -> Iterator[None]:
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    _clock["wall"], _clock["cpu"] = time.perf_counter() - wall, time.process_time() - cpu


def gap(model: PreTrainedModel, outputs: Outputs, limit: int = 64) -> float | None:
    """The largest difference of a reported log-prob from a plain forward pass, over up to `limit` turns."""
    worst = None
    for context, output, logprobs in list(outputs.values())[:limit]:
        if logprobs is None or not len(logprobs):
            return None
        ids = torch.tensor([*context, *output])[None]
        with torch.no_grad():
            plain = model(ids).logits[0, len(context) - 1 : -1].float().log_softmax(-1)
        wanted = plain.gather(1, torch.tensor(output)[:, None])[:, 0].numpy()
        worst = max(worst or 0.0, float(np.abs(wanted - np.asarray(logprobs)).max()))
    return worst


def measure(name: str, trace: Trace, rows: int, check: bool) -> dict[str, Any]:
    """One run: tokens per second of wall clock and of CPU time."""
    model = random_qwen3("bench")
    episodes = episodes_at(trace, rows)
    outputs = ENGINES[name](model, trace, episodes, rows)
    for episode in episodes:
        for t, turn in enumerate(episode.turns):
            if len(outputs[episode.index, t][1]) != turn.output:
                raise RuntimeError(f"{name} put out {len(outputs[episode.index, t][1])} tokens, not {turn.output}")
    tokens = sum(episode.output_tokens for episode in episodes)
    run: dict[str, Any] = {"tokens": tokens, "tok_s": tokens / _clock["wall"], "tok_cpu_s": tokens / _clock["cpu"]}
    if check:
        run["gap"] = gap(random_qwen3("bench"), outputs)
    del outputs, model
    gc.collect()
    return run


def bench_trace(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    trace = read_trace()
    runs: dict[str, dict[int, list[dict[str, Any]]]] = {name: {rows: [] for rows in args.rows} for name in args.engines}
    for index in range(args.runs):
        for rows in args.rows:
            for name in args.engines:
                run = measure(name, trace, rows, check=index == 0)
                runs[name][rows].append(run)
                console.log(f"run {index + 1}: {name} at {rows} rows: {run['tok_s']:.0f} tok/s", highlight=False)
    table = Table(title="output tokens per second (per CPU-second), medians")
    for heading in (
        "rows",
        *args.engines,
        *(f"local / {name}" for name in args.engines if name != "local"),
        "log-prob gap",
    ):
        table.add_column(heading, justify="right")
    summary: dict[str, Any] = {}
    for rows in args.rows:
        cells = {
            name: {key: statistics.median(r[key] for r in runs[name][rows]) for key in ("tok_s", "tok_cpu_s")}
            for name in args.engines
        }
        others = [name for name in args.engines if name != "local"]
        ratios = {name: cells["local"]["tok_s"] / cells[name]["tok_s"] for name in others if "local" in cells}
        worst = runs.get("local", runs[args.engines[0]])[rows][0]["gap"]
        table.add_row(
            str(rows),
            *(f"{cells[name]['tok_s']:.0f} ({cells[name]['tok_cpu_s']:.0f})" for name in args.engines),
            *(f"{ratios[name]:.2f}" if name in ratios else "-" for name in others),
            "-" if worst is None else f"{worst:.1e}",
        )  # fmt: skip
        summary[str(rows)] = {
            "engines": cells,
            "ratios": ratios,
            "gaps": {name: runs[name][rows][0]["gap"] for name in args.engines},
        }
    console.print(table)
    return {"summary": summary, "runs": {name: {str(k): v for k, v in by.items()} for name, by in runs.items()}}


def bench_quickstart(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """The quickstart's policy at 256 rows, as its episodes run: 16 prompts x 16 samples, ragged turns, tool results."""
    cells: dict[str, Any] = {}
    for deterministic in (False, True):
        runs = []
        for _ in range(args.runs + 1):
            engine = LocalEngine(random_qwen3("quickstart"), rows=256, deterministic=deterministic)
            runs.append(asyncio.run(_quickstart(engine)))
        cells["exact" if deterministic else "local"] = {
            key: statistics.median(run[key] for run in runs[1:]) for key in runs[0]
        }
    table = Table(title="quickstart policy, 256 rows")
    for heading in ("engine", *cells["local"]):
        table.add_column(heading, justify="right")
    for name, cell in cells.items():
        table.add_row(name, *(f"{value:.0f}" for value in cell.values()))
    console.print(table)
    return cells


async def _quickstart(engine: LocalEngine) -> dict[str, float]:
    rng = np.random.default_rng(0)
    system = rng.integers(0, 642, 12).tolist()
    prompts = [[*system, *rng.integers(0, 642, 14).tolist()] for _ in range(16)]
    plans = [
        [(int(rng.integers(6, 12)), int(rng.integers(5, 9))) for _ in range(int(rng.choice([2, 3, 3, 3, 4])))]
        for _ in range(256)
    ]

    async def play(index: int) -> int:
        context, total = prompts[index // 16], 0
        for t, (output, tool) in enumerate(plans[index]):
            reply = await engine.generate(
                Request(as_ids(context), Sampling(max_tokens=output, seed=index * 8 + t), f"e{index}")
            )
            total += len(reply.ids) + tool
            context = [*context, *reply.ids.tolist(), *([7] * tool)]
        await engine.release(f"e{index}")
        return total

    with timed():
        tokens = sum(await asyncio.gather(*(play(index) for index in range(256))))
    cpu, sampled = _clock["cpu"], engine.stats.output_tokens
    full = [[*prompts[i // 16], *([5] * 4)] for i in range(256)]
    with timed():
        await asyncio.gather(
            *(
                engine.generate(Request(as_ids(ids), Sampling(max_tokens=64, seed=i), f"d{i}"))
                for i, ids in enumerate(full)
            )
        )
    await engine.close()
    return {
        "episodes: sampled+forced tok/CPU-s": tokens / cpu,
        "episodes: sampled tok/CPU-s": sampled / cpu,
        "decode tok/CPU-s": 256 * 64 / _clock["cpu"],
        "decode tok/s": 256 * 64 / _clock["wall"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=lambda text: [int(part) for part in text.split(",")], default=[1, 8, 32, 128])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--engines", type=lambda text: text.split(","), default=list(ENGINES))
    parser.add_argument("--quickstart", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if any(name not in os.environ for name in OPENMP):  # read once, when torch was loaded: start again with them
        os.execve(sys.executable, [sys.executable, *sys.argv], {**OPENMP, **os.environ})
    tuned = tune() | OPENMP
    torch.set_num_threads(args.threads)
    transformers_logging.set_verbosity_error()
    console = Console()
    before = load_average()
    report = bench_quickstart(args, console) if args.quickstart else bench_trace(args, console)
    report |= {"machine": describe(), "tuned": tuned, "load_average": [before, load_average()]}
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
