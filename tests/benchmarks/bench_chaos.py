"""A run that is broken on purpose: the engine killed, tools away, and what became of every episode.

    python tests/benchmarks/bench_chaos.py [--engine sglang|vllm|local] [--kills 5] [--json FILE]

Trains the quickstart for 32 steps of 32 episodes (1 024) after a short warm start, with 5 % of all tool calls failing
in their machinery and the engine killed with -9 so many times on the way; for servers also with half a per cent each
of errors, garbage and broken-off replies. Then counts, from the record: episodes missing, doubled, and stuck past
their deadline, and tasks trained once.
"""

from __future__ import annotations

import argparse
import collections
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from agentrl.store import StoreReader

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
STEPS, PROMPTS, SAMPLES = 32, 4, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="sglang", choices=("local", "sglang", "vllm"))
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    wanted = STEPS * PROMPTS * SAMPLES
    turns = int(3.4 * wanted)  # engine requests, those of episodes played again included
    chaos = f"tools=0.05,kill_every={turns // (given.kills + 1)}"
    if given.engine != "local":
        chaos += ",errors=0.005,garbage=0.005,halves=0.005"
    with tempfile.TemporaryDirectory(prefix="agentrl-chaos-") as folder:
        words = [
            *(sys.executable, "-c", "from agentrl.cli import main; main()", "train", str(CONFIG), "--chaos", chaos),
            *(f"out={folder}", "name=run", f"engine.type={given.engine}", "eval=null", "stages.0.steps=150"),
            *("stages.0.demonstrations=4000", f"stages.1.steps={STEPS}", f"stages.1.prompts={PROMPTS}"),
            *(f"stages.1.samples={SAMPLES}", "stages.1.editors=[]", "rollout.retries=6"),
            *("rollout.deadlines={tool: 5, turn: 240, episode: 600}",),
        ]
        log = Path(folder) / "log"
        with log.open("wb") as sink:
            code = subprocess.run(words, stdout=sink, stderr=sink, check=False).returncode
        said = log.read_text()
        if code:
            sys.exit(f"the run failed: {said[-1000:]}")
        found = account(Path(folder) / "run")
    struck = next(line for line in said.splitlines() if line.startswith("chaos:"))
    console = Console(highlight=False)
    console.print(f"{given.engine}: {struck}")
    console.print(f"servers lost {said.count('is lost:')} times, back {said.count('is back after')} times")
    for name, number in found.items():
        console.print(f"  {name:38} {number}")
    if given.json:
        given.json.write_text(json.dumps(found | {"engine": given.engine, "chaos": struck}) + "\n")
    expected = {"episodes": wanted, "lost": 0, "doubled": 0, "without a reward": 0, "past their deadline": 0}
    if any(found[name] != number for name, number in expected.items()):
        sys.exit(f"expected {expected}")


def account(run: Path) -> dict[str, int]:
    """What the record says became of the run's episodes."""
    with StoreReader(run) as reader:
        ids = [id for step in range(STEPS) for id in reader.finished(step, "rl")]
        trajectories = [reader.get(id) for id in ids]
        credited = sum(
            reader.credit(id, step) is not None for step in range(STEPS) for id in reader.finished(step, "rl")
        )
    groups = collections.Counter(trajectory.group_id for trajectory in trajectories)
    return {
        "episodes": len(set(ids)),
        "lost": STEPS * PROMPTS * SAMPLES - len(set(ids)),
        "doubled": len(ids) - len(set(ids)) + sum(n > SAMPLES for n in groups.values()),
        "without a reward": sum(trajectory.reward is None for trajectory in trajectories),
        "past their deadline": sum(trajectory.outcome.why == "deadline" for trajectory in trajectories),
        "played again": sum(trajectory.attempt > 0 for trajectory in trajectories),
        "trained once": credited,
    }


if __name__ == "__main__":
    main()
