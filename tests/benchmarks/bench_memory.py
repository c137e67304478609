"""Memory over a long run: 2 000 steps of 16 short episodes, trainer and servers apart.

    python tests/benchmarks/bench_memory.py [--engine local|sglang|vllm] [--steps 2000] [--json FILE]

Trains the quickstart's policy in a process of its own, reads how much anonymous memory it and its servers hold
(RssAnon of /proc, MiB) at every step that its metrics name, and compares the last tenth with the tenth after step 200.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
SETTLED = 200  # steps after which nothing may grow


def anonymous(pid: int) -> float:
    """MiB of a process's own memory; 0 where it has gone."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    return 0.0


def descendants(root: int) -> list[int]:
    """All processes below `root`."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found, fringe = [], [root]
    while fringe:
        above = fringe.pop()
        below = [pid for pid, parent in parents.items() if parent == above]
        found += below
        fringe += below
    return found


def last_step(metrics: Path) -> int:
    """The newest RL step that is logged."""
    if not metrics.exists():
        return 0
    lines = metrics.read_bytes().split(b"\n")[:-1]
    return max((line["step"] for line in map(json.loads, lines[-3:]) if line["stage"] == "rl"), default=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", default="local", choices=("local", "sglang", "vllm"))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="agentrl-memory-") as folder:
        words = [
            *(sys.executable, "-c", "from agentrl.cli import main; main()", "train", str(CONFIG)),
            *(f"out={folder}", "name=run", f"engine.type={arguments.engine}", "eval=null", "checkpoint.every=100"),
            *("stages.0.steps=20", "stages.0.demonstrations=200", "stages.1.prompts=2", "stages.1.samples=8"),
            *(f"stages.1.steps={arguments.steps}", "stages.1.max_tokens=16", "env.options.kind=mixed"),
            *("env.options.lazy=null", "stages.1.editors=[]", "store.tokens=last_k", "store.n=10"),
        ]
        with (Path(folder) / "log").open("wb") as log:
            process = subprocess.Popen(words, stdout=log, stderr=log)
        metrics, seen = Path(folder) / "run" / "metrics.jsonl", []
        while process.poll() is None:
            time.sleep(0.5)
            step = last_step(metrics)
            if step and (not seen or seen[-1][0] != step):
                servers = sum(anonymous(pid) for pid in descendants(process.pid))
                seen.append((step, anonymous(process.pid), servers))
        if process.returncode:
            sys.exit(f"the run failed: {(Path(folder) / 'log').read_text()[-500:]}")
    tenth = (arguments.steps - SETTLED) // 10
    early = [entry for entry in seen if SETTLED <= entry[0] < SETTLED + tenth]
    late = [entry for entry in seen if entry[0] >= arguments.steps - tenth]
    found = {"engine": arguments.engine, "steps": arguments.steps, "samples": len(seen)}
    console = Console(highlight=False)
    console.print(f"{arguments.engine}: {arguments.steps} steps of 16 episodes, {len(seen)} readings; MiB, medians")
    for name, at in (("trainer", 1), ("servers", 2)):
        before, after = (statistics.median(entry[at] for entry in part) for part in (early, late))
        if not before:
            continue
        console.print(
            f"  {name:8} {before:8.1f} after step {SETTLED}, {after:8.1f} at the end: {after / before - 1:+.1%}"
        )
        found |= {f"{name}_before": before, f"{name}_after": after}
    if arguments.json:
        arguments.json.write_text(json.dumps(found | {"readings": seen}) + "\n")


if __name__ == "__main__":
    main()
