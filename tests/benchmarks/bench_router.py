"""Several SGLang servers: the client's own routes against sglang-router, by either of its policies.

Starts SGLang servers and routers on this machine, with a random model without an end token, and plays the same episodes
of a small environment (`bench_client`: groups of 8 that share a prompt, 6 turns, an instant tool) through the rollout
manager. Lengths are fixed, so every run sends as many tokens. The ways take turns, in an order that changes with each
run; each begins with empty caches, and a router anew, for it remembers what it sent where.

cached  the share of the prompt tokens whose keys and values a server says it used again.
wall    seconds from the first request to the last.

    python tests/benchmarks/bench_router.py [--python SERVER_PYTHON] [--servers 2] [--runs 5] [--json OUT]
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from bench_client import Calling, flush, make_model, play
from machine import describe, load_average
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from agentrl.engines.install import python_of
from agentrl.engines.keeper import start
from agentrl.engines.launch import Launch, ServerProcess, free_port
from agentrl.engines.remote import RemoteEngine
from agentrl.engines.router import Router, RouterLaunch, check_installed
from agentrl.engines.sglang import SGLangServer
from agentrl.errors import UsageError
from agentrl.train.options import ScratchTokenizer
from agentrl.train.tokenizer import bootstrap_tokenizer

WAYS = ("client", "cache_aware", "manual")


async def one(given: argparse.Namespace, way: Any, urls: list[str], python: Path, folder: Path, run: int) -> Any:
    """Seconds, sampled tokens and cached share of one run, with a client and a router of its own."""
    chat = Calling(bootstrap_tokenizer(ScratchTokenizer()))
    servers = [SGLangServer(url) for url in urls]
    for url in urls:
        await flush("sglang", url)
    engine = await RemoteEngine.connect(servers, vocab=chat.vocab_size)
    process = None
    try:
        if way != "client":
            process = ServerProcess.start(RouterLaunch(python, free_port(), free_port(), way), folder / f"{way}.log")
            router = Router(process.launch.url, servers, lambda: engine.up)
            await process.ready()
            await router.match(urls)
            engine.attach(router)
        gc.collect()
        seconds, sampled = await play(engine, chat, given.tasks, 8, given.tokens, 1.0, 100 + run)
        return {
            "seconds": seconds,
            "tok_s": sampled / seconds,
            "cached": engine.stats.cached_tokens / engine.stats.prompt_tokens,
            "prompt_tokens": engine.stats.prompt_tokens,
        }
    finally:
        await engine.close()
        if process is not None:
            await process.stop(gently=False)


async def measure(given: argparse.Namespace, folder: Path, console: Console) -> dict[str, Any]:
    make_model(folder / "model", bootstrap_tokenizer(ScratchTokenizer()))
    python = given.python or python_of("sglang", "cpu")
    if python is None:
        raise UsageError("sglang is not installed for cpu; run: agentrl engine install sglang")
    python = python.absolute()
    check_installed(python)
    cores = sorted(os.sched_getaffinity(0))
    launches = [
        Launch("sglang", python, folder / "model", free_port(), cores=(cores[-1 - number % len(cores)],))
        for number in range(given.servers)
    ]
    with console.status(f"starting {given.servers} servers"):
        processes = await start(launches, folder)
    found: dict[str, list[Any]] = {way: [] for way in given.ways}
    try:
        urls = [process.launch.url for process in processes]
        for run in range(given.runs + 1):  # the first warms everything, and is not counted
            for way in given.ways[run % len(given.ways) :] + given.ways[: run % len(given.ways)]:
                result = await one(given, way, urls, python, folder, run)
                if run:
                    found[way].append(result)
                said = f"{result['cached']:.1%} cached, {result['seconds']:.1f} s, {result['tok_s']:.0f} tok/s"
                console.log(f"{'run ' + str(run) if run else 'to warm up'}, {way}: {said}", highlight=False)
    finally:
        await asyncio.gather(*(process.stop() for process in processes))
    return report(found, given, console)


def report(found: dict[str, list[Any]], given: argparse.Namespace, console: Console) -> dict[str, Any]:
    episodes = 8 * given.tasks
    table = Table(title=f"{given.servers} servers, {episodes} episodes at once, 6 turns of {given.tokens} tokens")
    for column in ("", "cached, median", "all runs", "wall s, median", "all runs"):
        table.add_column(column, justify="left" if not column else "right")
    medians = {}
    for way, runs in found.items():
        medians[way] = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        table.add_row(
            way,
            f"{medians[way]['cached']:.1%}",
            " ".join(f"{100 * run['cached']:.1f}" for run in runs),
            f"{medians[way]['seconds']:.1f}",
            " ".join(f"{run['seconds']:.1f}" for run in runs),
        )
    console.print(table)
    return {"median": medians, "runs": found, "servers": given.servers, "episodes": episodes, "tokens": given.tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, help="of the server's environment; default: the one that was installed")
    parser.add_argument("--servers", type=int, default=2)
    parser.add_argument("--ways", type=lambda text: text.split(","), default=list(WAYS))
    parser.add_argument("--tasks", type=int, default=16, help="groups of 8 episodes, all at once")
    parser.add_argument("--tokens", type=int, default=32, help="sampled a turn")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    transformers_logging.disable_progress_bar()
    console = Console()
    before = load_average()
    with tempfile.TemporaryDirectory(prefix="agentrl-bench-") as folder:
        result = asyncio.run(measure(given, Path(folder), console))
    result |= {"machine": describe(), "load_average": [before, load_average()]}
    if given.json:
        given.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
