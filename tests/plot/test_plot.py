"""The learning curve as a picture: what it reads, and what it says where it cannot."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest

from agentrl import plot
from agentrl.errors import UsageError


def record(stage: str, step: int, decode: str, success: float | None) -> dict[str, Any]:
    ci95 = None if success is None else [max(0.0, success - 0.05), min(1.0, success + 0.04)]
    return {"stage": stage, "step": step, "decode": decode, "n": 256, "success": success, "ci95": ci95}


def run_folder(path: Path, records: list[dict[str, Any]], rewards: list[float]) -> Path:
    path.mkdir()
    lines = [{"stage": "sft", "step": 1, "time": 0, "loss": 2.0}]
    lines += [{"stage": "rl", "step": step, "time": 0, "reward": value} for step, value in enumerate(rewards, 1)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "summary.json").write_text(json.dumps({"status": "completed", "eval": records}))
    return path


RECORDS = [
    record("sft", 350, "sampled", 0.28), record("sft", 350, "greedy", 0.0),
    record("rl", 10, "sampled", 0.88), record("rl", 10, "greedy", 0.91),
    record("rl", 20, "sampled", 0.93), record("rl", 20, "greedy", 0.98),
]  # fmt: skip


def test_the_warm_start_lies_at_zero_and_steps_follow(tmp_path: Path) -> None:
    data = plot.read_curve(run_folder(tmp_path / "run", RECORDS, [0.3, 0.5, 0.9]))
    assert [point[:2] for point in data.points["sampled"]] == [(0.0, 0.28), (10.0, 0.88), (20.0, 0.93)]
    assert data.points["greedy"][0] == (0.0, 0.0, 0.0, 0.04)
    assert data.reward == [(1.0, 0.3), (2.0, 0.5), (3.0, 0.9)]
    assert data.warm == 0.0


def test_a_second_rl_stage_goes_on_where_the_first_ended(tmp_path: Path) -> None:
    records = [record("rl", 10, "greedy", 0.1), record("rl", 20, "greedy", 0.2), record("rl", 5, "greedy", 0.3)]
    data = plot.read_curve(run_folder(tmp_path / "run", records, []))
    assert [point[0] for point in data.points["greedy"]] == [10.0, 20.0, 25.0]
    assert data.warm is None


def test_a_picture_is_written(tmp_path: Path) -> None:
    out = plot.curve(run_folder(tmp_path / "run", RECORDS, [0.3, 0.5, 0.9]), tmp_path / "pictures" / "curve.png")
    assert out.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_what_cannot_be_drawn_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is no finished run: it has no summary\.json"):
        plot.read_curve(tmp_path)
    with pytest.raises(UsageError, match="no evaluation to draw"):
        plot.read_curve(run_folder(tmp_path / "empty", [record("rl", 1, "greedy", None)], []))
    broken = run_folder(tmp_path / "broken", RECORDS, [])
    (broken / "summary.json").write_text("{")
    with pytest.raises(UsageError, match="cannot be read"):
        plot.read_curve(broken)


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=r"pip install \"agentrl-framework\[plot\]\""):
        plot.curve(run_folder(tmp_path / "run", RECORDS, []), tmp_path / "curve.png")
