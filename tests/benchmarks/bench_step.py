"""One training step, side by side with TRL's GRPOTrainer: same model folder, task, settings and threads.

Each run is a process of its own, in turn: ours, TRL's, ours, … A process takes `--steps` steps and the
first, which warms up, is left out. What is the same on both sides is in peers/README.md.

    python tests/benchmarks/bench_step.py --model MODEL --trl TRL_PYTHON [--runs 3] [--json OUT]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import describe, peak_rss_mb
from rich.console import Console
from rich.table import Table

PEERS = Path(__file__).parent / "peers"


def ours(model: str, steps: int, threads: int, out: Path) -> None:
    """The measured process: `steps` RL steps through the framework's own manager, engine and update."""
    sys.path.insert(0, str(PEERS))
    import torch
    from chain_env import Chain

    from agentrl.algo.editor import DropConstant
    from agentrl.algo.loss import PPOClip, RolloutBehaviour, TokenMean
    from agentrl.algo.sampler import TaskStream
    from agentrl.algo.state import StateStore
    from agentrl.chat import ChatFormat
    from agentrl.engines.local import LocalEngine
    from agentrl.rollout.actors import PolicyActor
    from agentrl.rollout.manager import RolloutLimits, RolloutManager
    from agentrl.train.optim import build_optimizer
    from agentrl.train.options import OptimizerOptions
    from agentrl.train.policy import Policy
    from agentrl.train.reinforce import iterate
    from agentrl.train.stages import RLStage
    from agentrl.train.update import Objective, update
    from agentrl.trajectory import Sampling

    torch.set_num_threads(threads)
    options = OptimizerOptions(name="adamw", lr=1e-6)
    stage = RLStage(steps=steps, prompts=8, samples=8, optimizer=options, editors=(DropConstant(),))
    objective = Objective(RolloutBehaviour(), PPOClip(low=0.2, high=0.2), TokenMean())

    async def main() -> list[dict[str, float]]:
        env = Chain()
        policy = Policy.from_folder(model)
        chat = ChatFormat(policy.tokenizer)
        engine = LocalEngine(policy.model_for_engine(), rows=64, max_context=1024)
        await engine.update_weights(policy.weights(), 0)
        manager = RolloutManager(env, limits=RolloutLimits(max_tokens=64, episodes=64), seed=0)
        actor = PolicyActor(engine, chat, Sampling(temperature=1.0))
        optimizer = build_optimizer(policy, options, total_steps=steps)
        tasks, store = TaskStream(lambda: env.tasks("train", 0)), StateStore()
        measured = []
        for step in range(steps):
            started = time.perf_counter()

            async def rollout(prompts: int, step: int = step) -> Any:
                draws = stage.sampler.draw(step, prompts, stage.samples, tasks, store)
                return await manager.run(draws, actor, stage="bench", strategy=stage.strategy)

            async def forward(members: Any, which: Any) -> Any:
                raise AssertionError("nothing annotates here")

            iteration = await iterate(stage, step, store, rollout, forward, seed=0)
            rolled = time.perf_counter()
            update(
                policy, optimizer, iteration.members, objective, temperature=1.0, minibatches=1, tokens_per_batch=2048
            )
            updated = time.perf_counter()
            await engine.update_weights(policy.weights(), step + 1)
            done = time.perf_counter()
            trajectories = [member.trajectory for group in iteration.played for member in group.members]
            measured.append(
                {
                    "wall_s": done - started,
                    "generation_s": rolled - started,
                    "update_s": updated - rolled,
                    "sync_s": done - updated,
                    "sampled_tokens": float(sum(t.n_sampled for t in trajectories)),
                    "tool_calls": float(sum(t.n_tool_calls for t in trajectories)),
                    "trained_rows": float(len(iteration.members)),
                }
            )
        await engine.close()
        return measured

    steps_measured = asyncio.run(main())[1:]
    report = {name: statistics.median(step[name] for step in steps_measured) for name in steps_measured[0]}
    report["peak_rss_mb"] = peak_rss_mb()
    out.write_text(json.dumps(report))


def of_trl(report: dict[str, Any]) -> dict[str, float]:
    """TRL's report in our words: medians over its steps after the first."""
    steps = report["steps"][1:]
    names = ("wall_s", "generation_s", "sampled_tokens", "tool_calls")
    return {name: statistics.median(step[name] for step in steps) for name in names} | {
        "peak_rss_mb": report["peak_rss_mb"]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the folder that peers/make_model.py wrote")
    parser.add_argument("--trl", help="the Python of TRL's environment; without it only ours runs")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--ours", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.ours:
        ours(given.model, given.steps, given.threads, given.ours)
        return
    environment = os.environ | {"OMP_NUM_THREADS": str(given.threads)}
    reports: dict[str, list[dict[str, float]]] = {"agentrl": [], "trl": []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(given.runs):
            out = Path(folder) / "out.json"
            mine = [sys.executable, __file__, "--model", given.model, "--steps", str(given.steps)]
            subprocess.run([*mine, "--threads", str(given.threads), "--ours", str(out)], env=environment, check=True)
            reports["agentrl"].append(json.loads(out.read_text()))
            if given.trl:
                theirs = [given.trl, str(PEERS / "trl_step.py"), "--model", given.model, "--json", str(out)]
                words = [*theirs, "--steps", str(given.steps), "--threads", str(given.threads)]
                subprocess.run(words, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                reports["trl"].append(of_trl(json.loads(out.read_text())))
    names = ("wall_s", "generation_s", "sampled_tokens", "tool_calls", "peak_rss_mb")
    medians = {
        side: {name: statistics.median(r[name] for r in found) for name in names}
        for side, found in reports.items()
        if found
    }
    table = Table(title=f"one training step, medians of {given.runs} runs, {given.threads} threads")
    table.add_column("")
    for side in medians:
        table.add_column(side, justify="right")
    if "trl" in medians:
        table.add_column("ratio", justify="right")
    for name in names:
        row = [name, *(f"{medians[side][name]:.1f}" for side in medians)]
        table.add_row(*row, *([f"{medians['trl'][name] / medians['agentrl'][name]:.2f}"] if "trl" in medians else []))
    Console().print(table)
    if given.json:
        given.json.write_text(json.dumps({"medians": medians, "runs": reports, "machine": describe()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
