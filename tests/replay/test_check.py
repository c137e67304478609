"""The check: real environments come out the same, broken ones are named at the turn where they part."""

from __future__ import annotations

import asyncio
import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import agentrl
from agentrl import Obs
from agentrl.errors import UsageError
from agentrl.rollout import opening
from agentrl.sandboxes import backend
from agentrl.store import StoreReader

WAYWARD = Path(__file__).parent / "wayward.py"
SPEC = f"{WAYWARD}:Wayward"


@pytest.mark.parametrize("env", ["calculator", "guess", {"id": "calculator", "options": {"kind": "mixed"}}])
def test_demonstrations_of_real_environments_come_out_the_same(env: Any, record: Any, said: Any) -> None:
    run = record(env, 12)
    code, text = said("replay", run)
    assert code == 0, text
    report = agentrl.replay(run)
    assert report.counts["same"] == 12 == report.counts["episodes"] and report.first is None
    with StoreReader(run) as reader:
        turns = sum(entry.n_turns for entry in reader.trajectories().entries)
    assert report.counts["turns"] == turns > 12


def test_a_policys_run_comes_out_the_same_in_every_stage_branches_included(trained: Path, said: Any) -> None:
    code, text = said("replay", trained)
    assert code == 0 and "0 0 0" in text, text
    with StoreReader(trained) as reader:
        branches = [entry for entry in reader.trajectories(stage="rl", limit=1000).entries if entry.parent]
    assert branches, "the run was to branch"
    report = agentrl.replay(trained, branches[0].id)
    assert [each.status for each in report.episodes] == ["same"]


def test_filters_choose(trained: Path) -> None:
    with StoreReader(trained) as reader:
        entries = reader.trajectories(limit=1000).entries
    rl = [entry for entry in entries if entry.stage == "rl"]
    assert len(agentrl.replay(trained, stage="rl").episodes) == len(rl)
    assert {each.step for each in agentrl.replay(trained, stage="rl", step=1).episodes} == {1}
    assert {each.split for each in agentrl.replay(trained, split="test").episodes} == {"test"}
    assert {each.id.rpartition("/")[2][0] for each in agentrl.replay(trained, stage="rl", sample=2).episodes} == {"2"}
    few = agentrl.replay(trained, n=7).episodes
    assert len(few) == 7 and len({each.stage for each in few}) > 1, "few are spread over the run"
    group = agentrl.replay(trained, rl[0].group_id).episodes
    assert [each.id for each in group] == [entry.id for entry in rl if entry.group_id == rl[0].group_id]


@pytest.mark.parametrize(
    ("kind", "turn", "what", "place"),
    [
        ("count", 1, "result", "turn 1, call 1 (count)"),
        ("earn", 1, "reward", "turn 1"),
        ("hide", 2, "state", "turn 2"),
    ],
)
def test_the_first_divergence_is_named(kind: str, turn: int, what: str, place: str, record: Any, said: Any) -> None:
    run = record({"id": SPEC, "options": {"kind": kind}}, 2)
    code, text = said("replay", run)
    assert code == 1
    assert f"first divergence: sft-0-demo/train0/0, {place}: {what}" in text
    first = agentrl.replay(run).first
    assert first is not None and first.difference is not None
    assert (first.difference.turn, first.difference.what, first.turns) == (turn, what, turn)


def test_both_sides_are_shown_short_and_in_json_whole(record: Any, said: Any) -> None:
    run = record({"id": SPEC, "options": {"kind": "count"}}, 1)
    _, text = said("replay", run)
    assert "recorded call 1 of a tool" in text and "now call 2 of a tool" in text
    code, text = said("replay", run, "--json")
    assert code == 1
    different = json.loads(text[text.index('{"event": "replayed"') : text.index('{"event": "summary"')])["difference"]
    assert (different["turn"], different["call"], different["name"]) == (1, 1, "count")
    assert different["recorded"] == "call 1 of a tool that remembers other episodes"


def test_a_score_that_reads_the_clock_diverges_at_the_end(record: Any, said: Any) -> None:
    run = record({"id": SPEC, "options": {"reads": "clock"}}, 1)
    code, text = said("replay", run)
    assert code == 1 and "the end: score" in text


def test_an_episode_that_ends_by_a_tool_comes_out_the_same(record: Any) -> None:
    report = agentrl.replay(record({"id": SPEC, "options": {"kind": "leave"}}, 2))
    assert report.counts["same"] == 2


@pytest.mark.parametrize(
    ("kind", "turns", "why"),
    [
        ("sleep", 3, "sleep had timed out and was not called again"),
        ("service", 1, "failed(infra) in turn 1"),
        ("linger", 1, "truncated(deadline) in turn 1"),
    ],
)
def test_what_hangs_on_time_or_machinery_is_named_and_is_no_divergence(
    kind: str, turns: int, why: str, record: Any, said: Any
) -> None:
    rollout = {"retries": 0, "deadlines": {"tool": 60, "turn": 61, "episode": 62}}
    if kind == "linger":
        rollout["deadlines"] = {"tool": 0.2, "turn": 0.3, "episode": 5, "watchdog": 2}
    run = record({"id": SPEC, "options": {"kind": kind}}, 1, rollout=rollout)
    code, text = said("replay", run, "rollout.deadlines={tool: 5, turn: 20, episode: 60}")
    assert code == 0 and why in text, text
    (each,) = agentrl.replay(run).episodes
    assert (each.status, each.turns) == ("partly", turns)


def test_a_service_that_is_away_now_is_said_and_nothing_replayed_is_a_failure(
    record: Any, said: Any, wayward: ModuleType
) -> None:
    run = record(SPEC, 3)
    wayward.GONE.add("reset")
    code, text = said("replay", run)
    assert code == 1 and "none of 3 episodes could be replayed" in text and "the service is away" in text


def test_recorded_tools_are_not_called(record: Any, said: Any, wayward: ModuleType) -> None:
    run = record(SPEC, 3)
    wayward.CLOSED.add("look")
    assert said("replay", run)[0] == 1, "live, the tool is called and fails"
    code, text = said("replay", run, "--tools", "recorded")
    assert code == 0, text
    code, text = said("replay", run, "--tools", "recorded", "env.options.bonus=0.5")
    assert code == 1 and "the end: score" in text


def test_a_changed_environment_is_said_and_replayed(record: Any, said: Any) -> None:
    run = record(SPEC, 2)
    code, text = said("replay", run, "env.options.tasks=1")
    assert code == 0
    assert "Wayward has changed since: its spec is" in text
    assert "1 × Wayward has no task 'train1' in split 'train' any more" in text


def test_an_environment_that_is_gone_is_bad_input(record: Any, said: Any, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(WAYWARD.read_text())
    run = record(f"{path}:Wayward", 1)
    path.unlink()
    code, text = said("replay", run)
    assert code == 2 and f"there is no file {path}" in text


def test_a_damaged_trajectory_is_named_and_the_others_are_replayed(record: Any, said: Any) -> None:
    run = record("calculator", 4)
    with StoreReader(run) as reader:
        segment, offset = reader._rows("SELECT segment, read_offset FROM trajectories ORDER BY rowid LIMIT 1")[0]
    path = run / "seg" / segment
    data = bytearray(path.read_bytes())
    data[offset + 30] ^= 0xFF
    path.write_bytes(bytes(data))
    code, text = said("replay", run)
    assert code == 0 and "1 × its record is damaged" in text
    assert agentrl.replay(run).counts["same"] == 3


def test_the_attempt_that_was_asked_for_is_replayed(record: Any, said: Any) -> None:
    from dataclasses import replace

    from agentrl.store import StoreWriter

    run = record("calculator", 1)
    with StoreReader(run) as reader:
        (entry,) = reader.trajectories().entries
        whole = reader.get(entry.id)
    wrong = replace(whole, attempt=1, reward=0.5)
    with StoreWriter(run) as writer:
        writer.add([wrong], step=0, stage="sft", split="demo")
    assert said("replay", run)[0] == 1
    assert said("replay", run, "--attempt", 0)[0] == 0
    assert said("replay", run, "--attempt", 2)[0] == 2


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "name one run"),
        (("nowhere",), "is not (in) a run folder"),
        (("RUN/sft-0-demo/none/0",), "no trajectory 'sft-0-demo/none/0' is stored; ids look like"),
        (("RUN", "--stage", "rl"), "no trajectory is stored with --stage rl"),
        (("RUN", "--check", "--rescore"), "--check and --rescore are different things"),
        (("RUN", "--say", "x"), "--say belongs to --from-turn"),
        (("RUN", "--from-turn", 0, "--step", 1), "--step does not go with --from-turn"),
        (("RUN", "--from-turn", 0), "--from-turn needs --out"),
        (("RUN", "--from-turn", 0, "--out", "x"), "name RUN/TRAJECTORY"),
        (("RUN", "-n", 0), "n must be at least 1"),
        (("RUN", "env.options.tasks=many"), "env.options.tasks"),
        (("RUN", "rollout.episode=2"), "did you mean"),
    ],
)
def test_bad_input_is_one_sentence(words: tuple[Any, ...], sentence: str, record: Any, said: Any) -> None:
    run = record(SPEC, 1)
    code, text = said("replay", *[str(word).replace("RUN", str(run)) for word in words])
    assert code == 2 and sentence in text, text


def test_a_trajectory_named_twice_is_refused(record: Any) -> None:
    run = record("calculator", 1)
    with pytest.raises(UsageError, match="names a trajectory already"):
        agentrl.replay(f"{run}/sft-0-demo/x/0", "sft-0-demo/y/0")


def test_the_package_is_the_verb(record: Any) -> None:
    run = record("guess", 1)
    assert importlib.import_module("agentrl.replay") is sys.modules["agentrl.replay"]
    assert sys.modules["agentrl.replay"](run).counts["same"] == 1  # type: ignore[operator]


def test_programs_run_again_in_a_fresh_sandbox(record: Any) -> None:
    why = asyncio.run(backend("bubblewrap").missing())
    if why is not None:
        pytest.skip(why)
    env = {"id": "code_interpreter", "options": {"sandbox": {"backend": "bubblewrap", "warm": 1}}}
    rollout = {"episodes": 4, "deadlines": {"tool": 60, "turn": 120, "episode": 300}}
    run = record(env, 4, rollout=rollout)
    report = agentrl.replay(run)
    assert report.counts["same"] == 4 and report.counts["calls"] > 0
    assert agentrl.rescore(run, keep=False).how == {"record": 4}


def _rewritten(module: ModuleType, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """The environment with another prompt, or another first observation; calls and scores stay as they were."""
    if what == "prompt":
        posed = module.Wayward.tasks

        def tasks(self: Any, split: str, seed: int) -> Any:
            return (replace(task, prompt=f"Another {task.prompt}") for task in posed(self, split, seed))

        monkeypatch.setattr(module.Wayward, "tasks", tasks)
        return

    def reset(self: Any, task: Any, rng: Any) -> Obs:
        shown = begun(self, task, rng)
        return Obs(f"Other rules. {shown.content}")

    begun = module.Wayward.reset
    monkeypatch.setattr(module.Wayward, "reset", reset)


@pytest.mark.parametrize("what", ["prompt", "observation"])
@pytest.mark.parametrize("older", [False, True], ids=["with its hashes", "with its words alone"])
def test_another_prompt_or_first_observation_is_a_divergence(
    what: str, older: bool, record: Any, said: Any, wayward: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as before:
        if older:
            before.setattr(opening, "KEY", "something else")
        run = record(SPEC, 3, pieces=older)
    assert agentrl.replay(run).counts["same"] == 3
    _rewritten(wayward, monkeypatch, what)
    code, text = said("replay", run)
    assert code == 1 and f"first divergence: sft-0-demo/train0/0, reset: {what}" in text, text
    assert ("now Another Question 0" if what == "prompt" else "now Other rules. Luck") in text
    assert agentrl.replay(run).counts["diverged"] == 3


def test_a_prompt_that_was_not_compared_is_said(record: Any, said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as before:
        before.setattr(opening, "KEY", "something else")  # a record of before, and no words of its tokens
        run = record(SPEC, 3)
    code, text = said("replay", run)
    assert code == 0 and "3 × the prompt was not compared" in text
    assert agentrl.replay(run).counts["partly"] == 3


PRICES = '''
from agentrl import Env, Say, Task, ToolCall, tool


class Prices(Env):
    """Look a price up."""

    isolation = "{isolation}"

    def tasks(self, split, seed):
        for n in range(20):
            yield Task(f"{{split}}{{n}}", f"What does order {{n}} cost?", answer=7 * n, data={{"order": n}})

    def reset(self, task, rng):
        self.seen = int(rng.integers(1000))

    @tool
    def lookup(self, order: int) -> str:
        """Look up what an order costs.

        Args:
            order: its number.
        """
        self.seen += 1
        return str(7 * order{surcharge}) + f" ({{self.seen}})"

    def score(self, episode):
        return float(str(episode.task.answer) in episode.final_text)

    def demonstrate(self, task, rng):
        price = yield Say(calls=(ToolCall("lookup", {{"order": task.data["order"]}}),))
        yield Say(price.content)
'''


def told(*words: object) -> tuple[int, str]:
    """The command in a process of its own, which reads the environment's file as it is now."""
    command = [sys.executable, "-m", "agentrl", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    return done.returncode, " ".join((done.stdout + done.stderr).split())


def test_an_environment_that_was_changed_since_is_caught_at_the_call(record: Any, tmp_path: Path) -> None:
    path = tmp_path / "prices.py"
    path.write_text(PRICES.format(isolation="thread", surcharge=""))
    run = record(f"{path}:Prices", 6)
    assert told("replay", run, "--check")[0] == 0
    path.write_text(PRICES.format(isolation="thread", surcharge=" + (order > 3)"))
    code, text = told("replay", run, "--check")
    assert code == 1 and "sft 6 8 4 4 0 2" in text, text
    assert "first divergence: sft-0-demo/train4/0, turn 0, call 0 (lookup): result" in text
    assert "recorded 28 (" in text and "now 29 (" in text


def test_environments_in_processes_of_their_own_are_replayed(record: Any, tmp_path: Path) -> None:
    path = tmp_path / "prices.py"
    path.write_text(PRICES.format(isolation="process", surcharge=""))
    run = record(f"{path}:Prices", 3)
    code, text = told("replay", run, "--check")
    assert code == 0 and "sft 3 6 3 3 0" in text, text
    path.write_text(PRICES.format(isolation="process", surcharge=" + 1"))
    code, text = told("replay", run, "--check")
    assert code == 1 and "turn 0, call 0 (lookup): result" in text
