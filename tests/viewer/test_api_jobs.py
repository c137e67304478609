"""What a page hears of a replay."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from agentrl.viewer.jobs import AT_ONCE, Jobs, table_of
from agentrl.viewer.params import BadRequest
from agentrl.viewer.replays import replay_command
from agentrl.viewer.runs import Runs

ALIKE = {"event": "replayed", "turns": 2, "difference": None}
APART = {**ALIKE, "difference": {"what": "result", "turn": 1, "recorded": "4", "now": "5"}}


def ended(jobs: Jobs, name: str) -> dict[str, object]:
    deadline = time.monotonic() + 20
    while (job := jobs.get(name)) is not None and job.state == "running" and time.monotonic() < deadline:
        time.sleep(0.02)
    assert job is not None
    return job.json()


def test_the_table_ends_where_they_part() -> None:
    assert [row["same"] for row in table_of(ALIKE)] == [True, True]
    same, other = table_of(APART)
    assert same["same"] and other == {"turn": 1, "same": False, "field": "result", "recorded": "4", "replayed": "5"}
    assert [row["turn"] for row in table_of({**APART, "difference": {"what": "environment", "turn": None}})] == [0]
    for what in ("outcome", "score"):  # no turn of its own: the end
        rows = table_of({**APART, "difference": {"what": what, "turn": None, "recorded": 1, "now": 0}})
        assert [(row["turn"], row["same"]) for row in rows] == [(0, True), (1, True), (None, False)]


def test_a_divergence_is_an_answer_and_a_failure_is_none() -> None:
    jobs = Jobs()
    said = 'import json, sys; print(json.dumps(%r)); print("{}"); sys.exit(%d)'
    found = ended(jobs, jobs.start([sys.executable, "-c", said % (APART, 1)]))
    assert found["state"] == "done" and found["code"] == 1
    assert found["result"]["turns"][1]["replayed"] == "5"  # type: ignore[index]
    found = ended(jobs, jobs.start([sys.executable, "-c", "raise SystemExit('no such thing')"]))
    assert found["state"] == "failed" and found["said"] == ["no such thing"] and found["result"] is None


def test_few_run_at_once_and_all_end_with_the_server() -> None:
    jobs = Jobs()
    names = [jobs.start([sys.executable, "-c", "import time; time.sleep(60)"]) for _ in range(AT_ONCE)]
    with pytest.raises(BadRequest, match="jobs run already"):
        jobs.start(["true"])
    jobs.close()
    assert [ended(jobs, name)["state"] for name in names] == ["failed"] * AT_ONCE


def test_the_commands(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    assert list(replay_command(run, "rl-1/t/0", None, None, None))[3:] == [
        "replay", f"{run}/rl-1/t/0", "--json", "--check",
    ]  # fmt: skip
    runs = Runs([tmp_path])
    first, second = runs.fork_of(run), runs.fork_of(run)
    assert (first.name, second.name) == ("run-fork-1", "run-fork-2")
    words = replay_command(run, "rl-1/t/0", 2, "--out=/etc", first)
    assert list(words)[-3:] == ["--from-turn=2", f"--out={first}", "--say=--out=/etc"]
