"""A made-up run that drives a reporter: `python tests/console/fake_run.py [seconds a step]` shows the live view."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable

from agentrl.console import Reporter, make_reporter

BEFORE = [
    ("user", "Compute (53 * 40) - 76."),
    ("assistant", '<tool_call>\n{"name": "calc", "arguments": {"a": 53, "op": "*", "b": 40}}\n</tool_call>'),
    ("tool", "2120"),
    ("assistant", "The answer is 2120."),
]
AFTER = [
    *BEFORE[:3],
    ("assistant", '<tool_call>\n{"name": "calc", "arguments": {"a": 2120, "op": "-", "b": 76}}\n</tool_call>'),
    ("tool", "2044"),
    ("assistant", "The answer is 2044."),
]


def evaluation(stage: str, step: int, decode: str, success: float) -> dict[str, object]:
    ci95 = [max(success - 0.04, 0), min(success + 0.03, 1)]
    return {
        "stage": stage, "step": step, "decode": decode, "n": 256, "success": success, "ci95": ci95,
        "mean_reward": success, "tool_calls": 1 + success, "tokens": 40 + 20 * success,
    }  # fmt: skip


def play(reporter: Reporter, steps: int = 30, wait: Callable[[float], None] = time.sleep) -> None:
    """A supervised stage, then `steps` of RL in which success rises."""
    reporter.plan([("environment", "calculator"), ("model", "qwen3, 283 k parameters, random"), ("stages", "sft, rl")])
    reporter.stage("sft", 40)
    for step in range(1, 41):
        wait(0.02)
        reporter.step("sft", step, {"loss": 2 * math.exp(-step / 9), "lr": 8e-3})
    for decode, success in (("sampled", 0.31), ("greedy", 0.004)):
        reporter.evaluated(evaluation("sft", 40, decode, success))
    reporter.example("Before: a held-out question, greedy", BEFORE, 0.0)
    reporter.stage("rl", steps)
    for step in range(1, steps + 1):
        for done in range(0, 257, 64):
            wait(0.2)
            left = 256 - done
            reporter.progress("rl", done, 256, {"generating": left * 3 // 4, "in tools": left // 4, "other": 0})
        success = 0.95 - 0.64 * math.exp(-step / 5) + 0.03 * math.sin(step * 2.3)
        metrics = {"reward": success, "success": success, "tool_calls": 1.9, "loss": 0.01, "entropy": 0.12, "lr": 2e-3}
        reporter.step("rl", step, metrics)
        if step % 5 == 0:
            reporter.evaluated(evaluation("rl", step, "sampled", success))
            reporter.evaluated(evaluation("rl", step, "greedy", min(1.0, 1.05 * success)))
        if step == 7:
            reporter.stuck("episode 7-3/11 (task add-91) turn 2: running the tool calc for 61 s")
        if step == 9:
            reporter.warn("1 of 256 episodes had no reward: its environment broke")
    reporter.example("After: the same question", AFTER, 1.0)
    reporter.finished(
        {"status": "completed", "wall_s": 131.2, "folder": "runs/quickstart"},
        ["agentrl eval runs/quickstart", "agentrl env play calculator", "agentrl train configs/quickstart_cost.yaml"],
    )


if __name__ == "__main__":
    speed = float(sys.argv[1]) if len(sys.argv) > 1 else 1.0
    play(make_reporter(as_json="--json" in sys.argv), wait=lambda seconds: time.sleep(speed * seconds))
