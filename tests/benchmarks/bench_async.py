"""Training that overlaps with rollouts against training that takes turns, on tools with heavy-tailed latencies.

Each call of the calculator waits as long as a cloud function runs: log-normal with log mean -0.38 and sigma 2.36
(seconds), the fit of Shahrad et al., "Serverless in the Wild" (USENIX ATC 2020, section 3.4, figure 7) to the average
execution times of all functions of a cloud provider. Waits are cut at 600 s, the cut being this benchmark's own, and
scaled down by `--scale` so that a run takes minutes. Held-out episodes do not wait: they only say what was learnt.

Both modes start from the same warm policy, play the same number of episodes, and update equally often. The wall time
is that of the reinforcement learning stage. `simulate` predicts both from the same latencies (by the same seeds), the
calls that the episodes of the synchronous run made, and that run's median seconds of a turn's generation and of an
update: what no implementation could beat without a faster engine or trainer. The share of the gain is
(measured ratio - 1) / (predicted ratio - 1).

    python tests/benchmarks/bench_async.py [--steps 30] [--seeds 0 1 2] [--max-staleness 2] [--json OUT] [--keep FOLDER]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import statistics
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from machine import describe, load_average
from rich.console import Console
from rich.table import Table

import agentrl
from agentrl import Task, tool
from agentrl.envs.calculator import Calculator, apply
from agentrl.instance import generator
from agentrl.loader import load
from agentrl.metrics import read_metrics
from agentrl.rollout.seeds import seed_of
from agentrl.store import StoreReader

LOG_MEAN, SIGMA, LONGEST = -0.38, 2.36, 600.0  # seconds; see above
MOST_CALLS = 16
QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


def latencies(rng: np.random.Generator) -> list[float]:
    """The seconds that an episode's calls take, one after another, at scale 1."""
    return np.minimum(rng.lognormal(LOG_MEAN, SIGMA, MOST_CALLS), LONGEST).tolist()  # type: ignore[no-any-return]


class Slow(Calculator):
    """The calculator on a busy cloud."""

    class Options(Calculator.Options):
        scale: float = 0.01

    def tasks(self, split: str, seed: int) -> Iterable[Task]:
        quick = split == "test"
        return (replace(task, data={**task.data, "quick": quick}) for task in super().tasks(split, seed))

    def reset(self, task: Task, rng: np.random.Generator) -> None:
        self.waits = [0.0] * MOST_CALLS if task.data["quick"] else latencies(rng)
        super().reset(task, rng)

    @tool(cost=1.0, timeout=60)
    async def calc(self, a: int, op: Literal["+", "-", "*"], b: int) -> str:
        """Do one operation on two integers.

        Args:
            a: the left operand.
            op: the operation.
            b: the right operand.
        """
        await asyncio.sleep(self.options.scale * self.waits.pop(0))
        return str(apply(a, op, b))


@dataclass(frozen=True, slots=True)
class Measured:
    """One run: seconds of its stage, medians of its parts in seconds, and what its policy can do."""

    wall: float
    turn: float
    update: float
    success: float
    low: float
    high: float
    age: float


def simulate(groups: Sequence[Sequence[float]], update: float, bound: int) -> float:
    """Seconds that a stage takes with no overhead at all.

    `groups[b][i]` are the seconds that group i of batch b is at play, whatever plays beside it. Batch b goes to play
    when b <= updates done + `bound`; an update takes as many groups as a batch has, first those that were submitted
    `bound` updates ago (it waits for them), then others in the order in which they finished; but as many of older ones
    as the updates up to their last one have no place for (`agentrl.train.supply`).
    """
    now, admitted = 0.0, 0
    at_play: list[tuple[int, float]] = []  # updates done at submission, and when it finishes
    for step, batch in enumerate(groups):
        while admitted <= min(step + bound, len(groups) - 1):
            at_play += [(step, now + seconds) for seconds in groups[admitted]]
            admitted += 1
        chosen: list[tuple[int, float]] = []
        for ahead in range(bound + 1):  # of those that have so many updates left
            places = sum(map(len, groups[step + 1 : step + 1 + ahead]))
            urgent = sorted((f for f in at_play if f[0] <= step - bound + ahead), key=lambda flight: flight[1])
            left = [flight for flight in urgent if flight not in chosen]
            chosen += left[: max(len(urgent) - places - (len(urgent) - len(left)), 0)]
        left = sorted((flight for flight in at_play if flight not in chosen), key=lambda flight: flight[1])
        chosen += left[: len(batch) - len(chosen)]
        now = max(now, *(end for _, end in chosen)) + update
        for flight in chosen:
            at_play.remove(flight)
    return now


def durations(run: Path, seed: int, scale: float, turn: float, prompts: int, steps: int) -> list[list[float]]:
    """Seconds of every group of a run, batch by batch: as long as its longest episode."""
    batches: list[list[float]] = []
    with StoreReader(run) as reader:
        for step in range(steps):
            longest: dict[str, float] = {}
            for id in reader.finished(step, "rl"):
                entry = reader.entry(id)
                waits = latencies(generator((seed_of(seed, id, "env"),)))[: entry.n_calls]
                seconds = turn * entry.n_turns + scale * math.fsum(waits)
                longest[entry.group_id] = max(seconds, longest.get(entry.group_id, 0.0))
            assert len(longest) == prompts, f"batch {step} of {run} has {len(longest)} groups"
            batches.append(list(longest.values()))
    return batches


def warm(folder: Path, scale: float) -> Path:
    """The quickstart's policy as its demonstrators left it, made once."""
    model = folder / "warm"
    if not model.is_dir():
        values = _base(folder, scale) | {"name": "warming", "eval": None}
        values["stages"] = values["stages"][:1]
        agentrl.train(values)
        agentrl.export(folder / "warming", model, checkpoint="last")
    return model


def train(folder: Path, name: str, given: argparse.Namespace, *, seed: int, bound: int) -> Measured:
    """One run of the reinforcement learning stage."""
    run = folder / name
    values = _base(folder, given.scale) | {"name": name, "seed": seed, "model": str(folder / "warm")}
    values["eval"] = {"tasks": given.tasks, "decode": ["sampled"]}
    values["stages"] = [
        values["stages"][1]
        | {"steps": given.steps, "prompts": given.prompts, "samples": given.samples, "max_staleness": bound}
    ]
    in_flight = (bound + 1) * given.prompts * given.samples
    values["rollout"] |= {"episodes": in_flight}
    values["engine"] |= {"rows": in_flight}
    if not (run / "summary.json").is_file():
        agentrl.train(values)
    lines = [line for line in read_metrics(run / "metrics.jsonl") if line["stage"] == "rl"]
    parts = ("time/rollout",) if bound else ("time/rollout", "time/update", "time/store")
    wall = lines[-1]["time"] - lines[0]["time"] + sum(lines[0][part] for part in parts)
    with StoreReader(run) as reader:
        played = [reader.get(id, tokens=False) for step in range(given.steps) for id in reader.finished(step, "rl")]
    turns = [
        turn.seconds - sum(use.result.seconds for use in turn.tools) for episode in played for turn in episode.turns
    ]
    updates = [line["time/update"] + line["time/store"] for line in lines]
    (record,) = json.loads((run / "summary.json").read_text())["eval"]
    ages = [line.get("staleness/mean", 0.0) for line in lines]
    return Measured(
        wall,
        statistics.median(turns),
        statistics.median(updates),
        record["success"],
        *record["ci95"],
        statistics.fmean(ages),
    )


def _base(folder: Path, scale: float) -> dict[str, Any]:
    values: dict[str, Any] = load([QUICKSTART]).config.model_dump(mode="json", exclude_unset=True)
    values |= {"out": str(folder), "env": {"id": f"{__file__}:Slow", "options": {"lazy": 0.8, "scale": scale}}}
    values["rollout"] |= {"deadlines": {"tool": 60, "turn": 120, "episode": 600}}
    return values | {"checkpoint": {"every": 1000}}


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95 % interval (Student's t) of a few values."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan, math.nan
    quantile = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}.get(len(values), 2.0)
    half = quantile * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tasks", type=int, default=512, help="held-out tasks")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--max-staleness", type=int, default=2)
    parser.add_argument("--scale", type=float, default=0.01, help="seconds here per second of the published trace")
    parser.add_argument("--keep", type=Path, help="the runs' folder; runs that are there already are not run again")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        report(given.keep or Path(temporary), given)


def report(folder: Path, given: argparse.Namespace) -> None:
    """Run everything and print the table."""
    warm(folder, given.scale)
    rows = []
    for seed in given.seeds:
        turns = train(folder, f"sync-{seed}", given, seed=seed, bound=0)
        overlap = train(folder, f"async-{seed}", given, seed=seed, bound=given.max_staleness)
        groups = durations(folder / f"sync-{seed}", seed, given.scale, turns.turn, given.prompts, given.steps)
        bounds = [simulate(groups, turns.update, bound) for bound in (0, given.max_staleness)]
        predicted, measured = bounds[0] / bounds[1], turns.wall / overlap.wall
        rows.append(
            {
                "seed": seed,
                "sync_s": turns.wall,
                "async_s": overlap.wall,
                "ratio": measured,
                "simulated_sync_s": bounds[0],
                "simulated_async_s": bounds[1],
                "predicted_ratio": predicted,
                "share_of_gain": (measured - 1) / (predicted - 1),
                "sync": _as_dict(turns),
                "async": _as_dict(overlap),
            }
        )
    successes = {mode: interval([row[mode]["success"] for row in rows]) for mode in ("sync", "async")}
    gaps = interval([row["async"]["success"] - row["sync"]["success"] for row in rows])
    size = f"{given.steps} updates of {given.prompts} x {given.samples} episodes"
    table = Table(title=f"{size}, at most {given.max_staleness} updates behind")
    for column in ("seed", "sync s", "async s", "ratio", "simulated s", "predicted", "share of gain", "success, 95 %"):
        table.add_column(column, justify="right")
    for row in rows:
        success = " / ".join(
            f"{100 * row[mode]['success']:.1f} [{100 * row[mode]['low']:.0f}-{100 * row[mode]['high']:.0f}]"
            for mode in ("sync", "async")
        )
        table.add_row(
            str(row["seed"]),
            f"{row['sync_s']:.1f}",
            f"{row['async_s']:.1f}",
            f"{row['ratio']:.2f}",
            f"{row['simulated_sync_s']:.1f} / {row['simulated_async_s']:.1f}",
            f"{row['predicted_ratio']:.2f}",
            f"{100 * row['share_of_gain']:.0f} %",
            success,
        )
    console = Console(width=140)
    console.print(table)
    for mode, (mean, low, high) in successes.items():
        console.print(f"{mode}: success {100 * mean:.1f} % [{100 * low:.1f}, {100 * high:.1f}] over seeds")
    console.print(f"async - sync: {100 * gaps[0]:+.1f} points [{100 * gaps[1]:+.1f}, {100 * gaps[2]:+.1f}]")
    if given.json:
        result = {"rows": rows, "success": successes, "difference": gaps, "machine": describe(), "load": load_average()}
        given.json.write_text(json.dumps(result, indent=2) + "\n")


def _as_dict(measured: Measured) -> dict[str, float]:
    return {name: getattr(measured, name) for name in Measured.__dataclass_fields__}


if __name__ == "__main__":
    main()
