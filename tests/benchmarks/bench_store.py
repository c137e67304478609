"""The trajectory store on one core: writing, write-ahead, a small training step, and reading back.

    python tests/benchmarks/bench_store.py [--n 2000] [--json FILE]

Shapes: "long" is 4 to 12 turns and 2 000 tokens with ids, log-probs and entropies; "small" is 3 turns and 60 tokens.
"long, few words" has a vocabulary of 20, the others one of 30 000 by Zipf's law: what full-text search costs.
Making the records is not timed. CPU time is this process's own; wall time includes waiting for the disk.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe

from agentrl.store import EpisodeKey, StoreReader, StoreWriter
from agentrl.trajectory import (
    Group,
    Member,
    Outcome,
    Sampling,
    Span,
    ToolCall,
    ToolResult,
    ToolUse,
    Trajectory,
    Turn,
    VersionRun,
    as_floats,
    as_ids,
)

# An array: to choose from a list, numpy makes one of it each time.
FEW = np.array([
    "the", "tool", "says", "that", "this", "order", "number", "is", "priced", "at",
    "about", "seven", "and", "then", "the", "agent", "looks", "it", "up", "again",
])  # fmt: skip
words = FEW  # of which texts are made


def episode(rng: np.random.Generator, key: EpisodeKey, turns: int, tokens: int) -> Trajectory:
    """An append-only episode: prompt, then per turn a sampled span and a tool's answer; `tokens` in all."""
    per = tokens // (2 * turns)
    prompt = Span(as_ids(rng.integers(0, 30_000, per)), "user", "template")
    context = [prompt[:]]
    made = []
    for _ in range(turns):
        ids = as_ids(rng.integers(0, 30_000, per))
        out = Span(
            ids, "assistant", "sampled", "policy",
            as_floats(-rng.exponential(1.0, per)), as_floats(rng.exponential(1.0, per)), "exact",
            (VersionRun(3, 0, per),),
        )  # fmt: skip
        text = " ".join(rng.choice(words, max(1, per // 2)))
        answer = " ".join(rng.choice(words, max(1, per // 3)))
        use = ToolUse(ToolCall("lookup", {"order_id": "A-17", "field": "price"}), ToolResult(answer, seconds=0.01))
        sampling = Sampling(max_tokens=per, stop_ids=(7,), seed=int(rng.integers(1 << 31)))
        made.append(Turn(tuple(context), (out,), text, text, sampling, "stop", tools=(use,), observation=answer))
        result = Span(as_ids(rng.integers(0, 30_000, per)), "tool", "tool")
        context += [out[:], result[:]]
    return Trajectory(
        key.id, key.group_id, key.task_id, tuple(made), Outcome("completed"), 7,
        env="bench", score={"score": 1.0}, reward=float(rng.random()), success=True,
    )  # fmt: skip


def varied(rng: np.random.Generator, size: int = 30_000) -> Any:
    """Words of a vocabulary of `size`, as often as Zipf's law has them: what full-text search has to take."""
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    known = np.array(["".join(rng.choice(letters, int(rng.integers(3, 9)))) for _ in range(size)])
    share = 1 / np.arange(1, size + 1)
    return known[rng.choice(size, 200_000, p=share / share.sum())]


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """(CPU seconds, wall seconds) of `work`."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def long_writes(folder: Path, n: int, batch: int) -> dict[str, float]:
    rng = np.random.default_rng(0)
    pool = [
        episode(rng, EpisodeKey("rl", i // batch, "train", f"t{i}", 0), int(rng.integers(4, 13)), 2000)
        for i in range(n)
    ]

    def work() -> None:
        with StoreWriter(folder) as store:
            for start in range(0, n, batch):
                store.add(pool[start : start + batch], step=start // batch, stage="rl")

    cpu, wall = timed(work)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    row = {"trajectories_per_cpu_s": n / cpu, "trajectories_per_s": n / wall, "kb_each": size / n / 1e3}
    with StoreReader(folder) as reader:
        ids = [reader.ids()[int(i)][0] for i in rng.integers(0, n, 300)]
        row["get_ms"] = 1e3 * timed(lambda: [reader.get(id) for id in ids])[1] / len(ids)
        row["get_text_ms"] = 1e3 * timed(lambda: [reader.get(id, tokens=False) for id in ids])[1] / len(ids)
        row["page_ms"] = 1e3 * min(timed(lambda: reader.trajectories(env="bench", sort="reward"))[1] for _ in range(20))
    return row


def turns_ahead(folder: Path, n: int) -> dict[str, float]:
    rng = np.random.default_rng(1)
    keys = [EpisodeKey("rl", 0, "train", f"t{i}", 0) for i in range(n)]
    pool = [episode(rng, key, 3, 60) for key in keys]
    with StoreWriter(folder) as store:

        def work() -> None:
            for index in range(3):
                for key, trajectory in zip(keys, pool, strict=True):
                    store.turn(key, index, trajectory.turns[index])

        cpu, wall = timed(work)
        store.add(pool, step=0, stage="rl")
    return {"cpu_us": 1e6 * cpu / (3 * n), "wall_us": 1e6 * wall / (3 * n)}


def small_steps(folder: Path, steps: int, members: int = 256, size: int = 16) -> dict[str, float]:
    rng = np.random.default_rng(2)
    cpus, walls = [], []
    with StoreWriter(folder, pieces=lambda ids: [f"<{token}>" for token in ids]) as store:
        for step in range(steps):
            keys = [EpisodeKey("rl", step, "train", f"t{i // size}", i % size) for i in range(members)]
            pool = [episode(rng, key, 3, 60) for key in keys]
            groups = []
            for start in range(0, members, size):
                part = [Member(trajectory) for trajectory in pool[start : start + size]]
                for member in part:
                    member.advantages = member.spread([0.5] * 3)
                    member.weights = member.spread([1.0] * 3)
                groups.append(Group(keys[start].group_id, keys[start].task_id, part, step))

            def work(pool: list[Trajectory] = pool, groups: list[Group] = groups, step: int = step) -> None:
                store.add(pool, step=step, stage="rl")
                for group in groups:
                    store.credit(group, step=step)
                store.flush()

            cpu, wall = timed(work)
            cpus.append(1e3 * cpu)
            walls.append(1e3 * wall)
    return {"cpu_ms": float(np.median(cpus)), "wall_ms": float(np.median(walls)), "wall_ms_max": max(walls)}


def main() -> None:
    global words
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=2000, help="long trajectories to write")
    parser.add_argument("--batch", type=int, default=256, help="long trajectories per add()")
    parser.add_argument("--folder", type=Path, default=None, help="where to write; a temporary folder by default")
    parser.add_argument("--json", type=Path, default=None, help="also write the figures here")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as name:
        folder = Path(name)
        few = long_writes(folder / "few", asked.n, asked.batch)
        words = varied(np.random.default_rng(9))
        rows = {
            "long, few words": few,
            "long": long_writes(folder / "long", asked.n, asked.batch),
            "turn": turns_ahead(folder / "turn", 2000),
            "small_step_256": small_steps(folder / "small", 20),
        }
    for shape, row in rows.items():
        sys.stdout.write(f"{shape:16}" + "  ".join(f"{name} {value:.3g}" for name, value in row.items()) + "\n")
    if asked.json is not None:
        asked.json.write_text(json.dumps({"machine": describe(), "rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
