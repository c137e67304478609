"""What the trajectory store takes of a training step: CPU seconds of its writes against those of the whole step.

    python tests/benchmarks/bench_share.py [--runs 3] [--steps 20] [--json FILE]

Each run is a process of its own that trains configs/quickstart.yaml on the local engine, with a record of every turn
and full-text search, as the file has it; only the number of RL steps is given, and there are no evaluations. Every
call of the store's writer (turns ahead, trajectories, credit, flush) is timed by the CPU clock of the thread that makes
it, a step by that of the process, all threads included. The store has no process of its own: nothing else writes.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from machine import describe, load_average

CONFIG = Path(__file__).parents[2] / "configs/quickstart.yaml"
CALLS = ("turn", "forget", "add", "credit", "image", "rewind", "flush", "_write_due")


def one(steps: int, out: Path) -> dict[str, Any]:
    """Train, and return CPU seconds: of the steps, and of each of the store's calls within them."""
    from agentrl import train
    from agentrl.store import StoreWriter
    from agentrl.train.reinforce import ReinforceRunner

    spent: Counter[str] = Counter()
    times: Counter[str] = Counter()
    deep = threading.local()
    lock = threading.Lock()

    def timed(name: str) -> None:
        plain = getattr(StoreWriter, name)

        @functools.wraps(plain)
        def call(*words: Any, **named: Any) -> Any:
            if getattr(deep, "inside", False):  # a call that another of them makes
                return plain(*words, **named)
            deep.inside, begun = True, time.thread_time()
            try:
                return plain(*words, **named)
            finally:
                took = time.thread_time() - begun
                deep.inside = False
                with lock:
                    spent[name] += took
                    times[name] += 1

        setattr(StoreWriter, name, call)

    for name in CALLS:
        timed(name)
    plain_step = ReinforceRunner.step
    whole: list[float] = []
    store: list[float] = []
    within: Counter[str] = Counter()

    async def step(self: Any, number: int) -> Any:
        before, begun = Counter(spent), time.process_time()
        values = await plain_step(self, number)
        whole.append(time.process_time() - begun)
        store.append(sum(spent.values()) - sum(before.values()))
        for name in CALLS:
            within[name] += spent[name] - before[name]
        return values

    ReinforceRunner.step = step  # type: ignore[method-assign]
    train(CONFIG, overrides=[f"out={out}", f"stages.1.steps={steps}", "eval=null", "checkpoint.every=1000"])
    return {
        "steps": len(whole), "step_cpu_s": sum(whole), "store_cpu_s": sum(store),
        "share": sum(store) / sum(whole), "worst_step": max(s / w for s, w in zip(store, whole, strict=True)),
        "calls_cpu_s": {name: within[name] for name in CALLS if within[name]}, "calls": dict(times),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help="RL steps of a run")
    parser.add_argument("--json", type=Path, default=None, help="also write the figures here")
    parser.add_argument("--one", type=Path, default=None, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one is not None:
        with tempfile.TemporaryDirectory() as out:
            asked.one.write_text(json.dumps(one(asked.steps, Path(out))), encoding="utf-8")
        return
    rows = []
    for number in range(asked.runs):
        with tempfile.TemporaryDirectory() as name:
            result = Path(name) / "run.json"
            words = [sys.executable, __file__, "--one", str(result), "--steps", str(asked.steps)]
            subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
            row = json.loads(result.read_text(encoding="utf-8"))
        row["load"] = load_average()
        rows.append(row)
        parts = "  ".join(f"{call} {1e3 * took / row['steps']:.1f}" for call, took in row["calls_cpu_s"].items())
        sys.stdout.write(
            f"run {number}: {row['steps']} steps, {1e3 * row['step_cpu_s'] / row['steps']:.0f} CPU-ms each, store "
            f"{1e3 * row['store_cpu_s'] / row['steps']:.1f} ({parts}): {100 * row['share']:.2f} %, "
            f"worst step {100 * row['worst_step']:.2f} %; load {row['load']}\n"
        )
        sys.stdout.flush()
    shares = [100 * row["share"] for row in rows]
    sys.stdout.write(f"share of the step's CPU: median {statistics.median(shares):.2f} %, worst {max(shares):.2f} %\n")
    if asked.json is not None:
        asked.json.write_text(json.dumps({"machine": describe(), "runs": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
