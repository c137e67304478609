"""One seed, one result: whatever the tools' latencies, and wherever the run was killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import agentrl
from agentrl.metrics import canonical_metrics
from agentrl.store import StoreReader, differences, fingerprint

ENV = f"{Path(__file__).parent / 'jittery.py'}:Jittery"


def same(a: Path, b: Path) -> None:
    assert canonical_metrics(a / "metrics.jsonl") == canonical_metrics(b / "metrics.jsonl")
    assert differences(a, b) == []
    assert fingerprint(a) == fingerprint(b)
    evals = [json.loads((run / "summary.json").read_text())["eval"] for run in (a, b)]
    assert evals[0] == evals[1]


@pytest.fixture
def config(small: Any) -> Any:
    return lambda **keys: small(env=ENV, deterministic=True, **keys)


def test_two_runs_with_one_seed_are_byte_identical(config: Any, tmp_path: Path) -> None:
    for name in ("a", "b"):
        agentrl.train(config(name=name))
    same(tmp_path / "runs" / "a", tmp_path / "runs" / "b")


KILL = """
import os, signal, sys, json
import agentrl
from agentrl.rollout.episode import LiveEpisode
from agentrl.train import reinforce, supervised, checkpoint

config, where, count = json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3])
seen = 0

def after(module, name):
    real = getattr(module, name)
    def wrapped(*args, **keys):
        global seen
        out = real(*args, **keys)
        seen += where != "turn" or args[0].key.stage == "rl"
        if seen == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return out
    setattr(module, name, wrapped)

after({"sft": supervised, "turn": LiveEpisode, "update": reinforce, "checkpoint": checkpoint}[where],
      {"sft": "imitate", "turn": "_record", "update": "update", "checkpoint": "save"}[where])
agentrl.train(config)
"""


@pytest.mark.parametrize(
    ("where", "count"),
    [
        ("sft", 35),  # between two checkpoints of the supervised stage
        ("turn", 110),  # in the middle of a rollout, episodes in flight
        ("update", 3),  # after an update, before its checkpoint
    ],
)
def test_killed_and_resumed_is_as_if_never_killed(config: Any, tmp_path: Path, where: str, count: int) -> None:
    whole, killed = tmp_path / "runs" / "whole", tmp_path / "runs" / "killed"
    agentrl.train(config(name="whole"))
    script = tmp_path / "kill.py"
    script.write_text(KILL)
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(config(name="killed")), where, str(count)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    agentrl.train(config(name="killed"), resume=True)
    same(whole, killed)


def test_a_killed_rollout_leaves_episodes_in_flight_and_replays_them(config: Any, tmp_path: Path) -> None:
    """The kill inside a rollout really leaves turns behind, and the resumed run takes them over."""
    script = tmp_path / "kill.py"
    script.write_text(KILL)
    values = config(name="killed", rl={"steps": 2}, eval=None)
    process = subprocess.Popen([sys.executable, str(script), json.dumps(values), "update", "1"], stderr=subprocess.PIPE)
    assert process.wait(300) == -signal.SIGKILL
    run = tmp_path / "runs" / "killed"
    with StoreReader(run) as reader:
        finished = reader.finished(0, "rl")
    assert len(finished) == 24
    before = {id: (run / "index.sqlite").stat().st_mtime for id in finished}
    agentrl.train(values, resume=True)
    with StoreReader(run) as reader:
        assert all(reader.attempt(id) == 0 for id in before), "finished episodes are taken over, not played again"


def test_ctrl_c_is_a_clean_end(config: Any, tmp_path: Path) -> None:
    values = config(name="stopped", sft={"steps": 5000})
    # A shell that starts jobs in the background lets them ignore the interrupt; this one shall not.
    code = (
        "import json, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import agentrl; agentrl.train(json.loads(sys.argv[1]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, json.dumps(values)], stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "runs" / "stopped" / "metrics.jsonl"
    until = time.monotonic() + 120
    while time.monotonic() < until and not (metrics.exists() and len(metrics.read_text().splitlines()) > 5):
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGINT)
    try:
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode != 0
    assert json.loads((tmp_path / "runs" / "stopped" / "summary.json").read_text())["status"] == "cancelled"
