"""Overlapping training through the real thing: equal to taking turns at bound 0, clean if stopped, whole if killed."""

from __future__ import annotations

import asyncio
import json
import random
import runpy
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import agentrl
from agentrl.algo import staleness
from agentrl.api import as_config as config_of
from agentrl.console import make_reporter
from agentrl.errors import RunFailed
from agentrl.loader import as_text
from agentrl.metrics import canonical_metrics, read_metrics
from agentrl.rollout.stream import GroupStream
from agentrl.store import RunFolder, StoreReader, differences, fingerprint
from agentrl.train import checkpoint, reinforce
from agentrl.train.parts import make_env, take
from agentrl.train.supply import Supply
from agentrl.train.trainer import Trainer
from agentrl.trajectory import Group

ENV = f"{Path(__file__).with_name('sluggish.py')}:Sluggish"


def base(out: Path, **keys: Any) -> dict[str, Any]:
    return {
        "name": "small",
        "out": str(out),
        "threads": 1,
        "env": ENV,
        "engine": {"rows": 64, "max_context": 320},
        "rollout": {"max_tokens": 24, "episodes": 64, "deadlines": {"tool": 30, "turn": 60, "episode": 300}},
        "eval": None,
        "checkpoint": {"every": 2, "keep": 2},
    } | keys


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory, arch: dict[str, Any], muon: dict[str, Any]) -> Path:
    """A policy that calls its tool, made once."""
    folder = tmp_path_factory.mktemp("warm")
    optimizer = {**muon, "lr": 8e-3}
    stage = {"type": "sft", "demonstrations": 1500, "steps": 120, "batch": 32, "optimizer": optimizer}
    model = {"type": "scratch", "arch": arch, "tokenizer": {"texts": 100}}
    agentrl.train(base(folder, model=model, stages=[stage]))
    return agentrl.export(folder / "small", folder / "model", checkpoint="last")


@pytest.fixture
def config(warm: Path, tmp_path: Path, muon: dict[str, Any]) -> Any:
    def make(rl: dict[str, Any] | None = None, **keys: Any) -> dict[str, Any]:
        stage = {"type": "rl", "steps": 8, "prompts": 4, "samples": 3, "editors": []}
        stage |= {"optimizer": {**muon, "lr": 1e-3}} | (rl or {})
        return base(tmp_path / "runs", model=str(warm), stages=[stage], **keys)

    return make


def lines(run: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run / "metrics.jsonl") if line["stage"] == "rl"]


def trained(run: Path) -> dict[str, int]:
    """Which update trained each group, from the credit records; no group may be there twice."""
    with StoreReader(run) as reader:
        found: dict[str, set[int]] = {}
        for credit in reader.credits(stage="rl"):
            found.setdefault(credit.group_id, set()).add(credit.step)
    assert all(len(steps) == 1 for steps in found.values()), found
    return {group: steps.pop() for group, steps in found.items()}


class TakingTurns(Supply):
    """The synchronous loop, spelled out: draw a batch, play it, wait for all of it."""

    async def take(self, step: int) -> list[Group]:
        stage = self._stage
        draws = stage.sampler.draw(step, stage.prompts, stage.samples, self._tasks, self._store)
        flights = self._stream.submit(draws, self._actor(stage), strategy=stage.strategy, context=stage.context)
        await asyncio.gather(*(flight.task for flight in flights))
        return [flight.group for flight in flights]


def test_bound_0_is_the_synchronous_loop(config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = config(deterministic=True, eval={"tasks": 4, "every": 2})
    agentrl.train(values | {"name": "overlap"})
    monkeypatch.setattr(reinforce, "Supply", TakingTurns)
    agentrl.train(values | {"name": "turns"})
    a, b = (tmp_path / "runs" / name for name in ("overlap", "turns"))
    assert canonical_metrics(a / "metrics.jsonl") == canonical_metrics(b / "metrics.jsonl")
    assert differences(a, b) == [] and fingerprint(a) == fingerprint(b)


@pytest.mark.parametrize("bound", [1, 3])
def test_an_overlapping_run_trains_every_task_once_within_the_bound(config: Any, tmp_path: Path, bound: int) -> None:
    summary = agentrl.train(config(rl={"max_staleness": bound, "steps": 10}, eval={"tasks": 4, "every": 3}))
    run = tmp_path / "runs" / "small"
    assert summary.status == "completed"
    groups = trained(run)
    assert Counter(groups.values()) == Counter({step: 4 for step in range(10)})
    metrics = lines(run)
    assert max(line["staleness/max"] for line in metrics) <= bound
    assert max(line["staleness/mean"] for line in metrics) > 0, "nothing overlapped"
    for line in metrics:
        assert sum(line[f"staleness/age_{n}"] for n in range(bound + 1)) == pytest.approx(1.0)
        assert ("gap/max_abs" in line) == (line["staleness/age_0"] > 0)
        assert line.get("gap/max_abs", 0.0) < 1e-4, "where no update lies between, engine and trainer agree"
    with StoreReader(run) as reader:
        drawn = Counter(entry.step for entry in reader.trajectories(stage="rl", limit=1000).entries)
        assert drawn == Counter({step: 12 for step in range(10)}), "no more was drawn than trained"
        ages = [
            age
            for c in reader.credits(stage="rl")
            for per_turn in c.arrays[staleness.AGES]
            for age in per_turn.tolist()
        ]
    assert ages and min(ages) >= 0 and max(ages) <= bound


def test_evaluation_sees_one_version_while_rollouts_go_on(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flying: list[int] = []
    submit = GroupStream.submit
    streams: list[GroupStream] = []

    def watched(self: GroupStream, draws: Any, *args: Any, **keys: Any) -> Any:
        if self not in streams:
            streams.append(self)
        flying.append(len(streams[0].flying) if self is not streams[0] else -1)
        return submit(self, draws, *args, **keys)

    monkeypatch.setattr(GroupStream, "submit", watched)
    agentrl.train(config(rl={"max_staleness": 2, "steps": 6}, eval={"tasks": 6, "every": 2}))
    during = [n for n in flying if n >= 0]
    assert max(during[:-2]) > 0, "rollouts of later steps were at play during an evaluation"
    assert during[-1] == 0, "and none at the stage's end"
    with StoreReader(tmp_path / "runs" / "small") as reader:
        for step in (2, 4, 6):
            for stage in ("rl-sampled", "rl-greedy"):
                ids = reader.finished(step, stage)
                versions = {
                    run.version
                    for id in ids
                    for turn in reader.get(id).turns
                    for span in turn.sampled
                    for run in span.versions
                }
                assert versions == {step}


def test_max_age_and_corrections_are_reported(config: Any, tmp_path: Path, muon: dict[str, Any]) -> None:
    rl = {
        "max_staleness": 2,
        "annotators": ["old_logprobs"],
        "behaviour": {"type": "old", "correction": "mis", "level": "sequence", "low": 0.9, "cap": 1.1},
        "transforms": [{"type": "max_age", "updates": 1}],
        "optimizer": {**muon, "lr": 2e-2},
    }
    agentrl.train(config(rl=rl))
    metrics = lines(tmp_path / "runs" / "small")
    assert all(line["correction/too_old"] == pytest.approx(line["staleness/age_2"]) for line in metrics)
    assert all(line["correction/mean_weight"] == pytest.approx(1 - line["correction/masked"]) for line in metrics)
    assert max(line["correction/too_old"] for line in metrics) > 0


def test_a_stage_that_ends_early_leaves_nothing_at_play(config: Any, tmp_path: Path) -> None:
    until = {"metric": "episodes", "at_least": 1}
    agentrl.train(config(rl={"max_staleness": 2, "until": until}))
    run = tmp_path / "runs" / "small"
    assert len(lines(run)) == 1
    with StoreReader(run) as reader:
        assert reader.inflight(stage="rl") == {}


def test_an_overdue_group_is_dropped_and_named(config: Any, tmp_path: Path) -> None:
    agentrl.train(config(rl={"max_staleness": 1, "overdue": "drop", "steps": 10}))
    run = tmp_path / "runs" / "small"
    metrics = lines(run)
    assert Counter(trained(run).values()) == Counter({step: 4 for step in range(10)})
    assert max(line["staleness/max"] for line in metrics) <= 1
    dropped = sum(line["staleness/dropped_groups"] for line in metrics)
    newest = checkpoint.latest(run / "checkpoints")
    assert newest is not None
    assert checkpoint.progress_of(newest).tasks_taken == 40 + dropped, "one task more for each that was dropped"


def test_a_broken_environment_stops_the_run(config: Any, tmp_path: Path) -> None:
    broken = ENV.replace(":Sluggish", ":Falling")
    with pytest.raises(RunFailed, match="broke in the environment"):
        agentrl.train(config(rl={"max_staleness": 2}, env=broken))
    assert json.loads((tmp_path / "runs" / "small" / "summary.json").read_text())["status"] == "failed"


KILL = """
import json, os, random, signal, sys, threading
import agentrl
config, seconds = json.loads(sys.argv[1]), float(sys.argv[2])
from agentrl.train import reinforce
taken = reinforce.Supply.take
armed = False

async def take(self, step):
    global armed
    if not armed:  # the clock starts with the first batch: loading is no part of the run
        armed = True
        threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
    return await taken(self, step)

reinforce.Supply.take = take
agentrl.train(config, resume=len(sys.argv) > 3)
"""


@pytest.mark.parametrize(("seed", "bound", "overdue"), [(0, 2, "wait"), (1, 1, "drop")])
def test_killed_again_and_again_every_task_is_trained_once(
    config: Any, tmp_path: Path, seed: int, bound: int, overdue: str
) -> None:
    rng = random.Random(seed)
    values = config(rl={"max_staleness": bound, "overdue": overdue, "steps": 14})
    script = tmp_path / "kill.py"
    script.write_text(KILL)
    killed = 0
    for attempt in range(4):
        words = [
            sys.executable,
            str(script),
            json.dumps(values),
            str(rng.uniform(0.2, 1.2)),
            *(["go on"] * (attempt > 0)),
        ]
        done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr[-2000:]
        killed += done.returncode != 0
        if not done.returncode:
            break
    assert killed >= 2, "the run was too fast to be killed"
    agentrl.train(values, resume=True)
    check_whole(tmp_path / "runs" / "small", steps=14, bound=bound)


def test_cancelled_again_and_again_every_task_is_trained_once(config: Any, tmp_path: Path) -> None:
    """In one process: what a cancelled run left open would show."""
    rng = random.Random(5)
    loaded = config_of(config(rl={"max_staleness": 2, "steps": 12}))
    path = tmp_path / "runs" / "small"

    async def run(resume: bool, seconds: float) -> bool:
        with RunFolder.create(path, as_text(loaded), config_version=1, command=["test"], resume=resume) as folder:
            task = asyncio.create_task(Trainer(loaded, folder, make_reporter()).run())
            done, _ = await asyncio.wait([task], timeout=seconds)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        left = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
        assert not left, left
        return bool(done) and task.exception() is None

    cancelled = 0
    while not asyncio.run(run(cancelled > 0, rng.uniform(0.3, 1.0) + 0.3 * cancelled)):
        cancelled += 1
    assert cancelled >= 2
    check_whole(path, steps=12, bound=2)


def check_whole(run: Path, *, steps: int, bound: int) -> None:
    """Every task that was drawn, and not dropped, is trained by one update, on trajectories that are stored."""
    groups = trained(run)
    assert Counter(groups.values()) == Counter({step: 4 for step in range(steps)})
    with StoreReader(run) as reader:
        tasks = [credit.task_id for credit in reader.credits(stage="rl") if credit.member == 0]
        for credit in reader.credits(stage="rl"):
            assert reader.get(credit.id, credit.attempt).task_id == credit.task_id
        assert reader.inflight(stage="rl") == {}
    metrics = lines(run)
    dropped = int(sum(line["staleness/dropped_groups"] for line in metrics))
    drawn = Counter(_first_tasks(run, 4 * steps + dropped))
    assert Counter(tasks) <= drawn and drawn.total() == len(tasks) + dropped
    assert [line["step"] for line in metrics] == list(range(1, steps + 1))
    assert max(line["staleness/max"] for line in metrics) <= bound


def _first_tasks(run: Path, n: int) -> list[str]:
    loaded = config_of(run / "config.resolved.yaml")
    return [task.id for task in take(make_env(loaded), n, seed=loaded.seed)]


def test_the_benchmarks_simulation_takes_groups_as_the_supply_does(monkeypatch: pytest.MonkeyPatch) -> None:
    benchmarks = Path(__file__).parents[1] / "benchmarks"
    monkeypatch.syspath_prepend(str(benchmarks))
    simulate = runpy.run_path(str(benchmarks / "bench_async.py"))["simulate"]
    groups = [[1.0, 5.0], [1.0, 1.0], [1.0, 1.0]]
    assert simulate(groups, 1.0, 0) == (5 + 1) + (1 + 1) + (1 + 1)
    # update 0 at 1 s takes what has finished; the slow group is due at update 1, at 5 s; batch 2 waits since 3 s
    assert simulate(groups, 1.0, 1) == 7.0
    assert simulate(groups, 1.0, 2) == 6.0  # only the last update waits for the slow group
