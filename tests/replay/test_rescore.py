"""New scores: from the record where that is sound, by acting out where it is not, and the command says which."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import agentrl
from agentrl.replay.rescore import rescorings
from agentrl.store import StoreReader

SPEC = f"{Path(__file__).parent / 'wayward.py'}:Wayward"
BONUS = "env.options.bonus=0.5"


def test_a_changed_scorer_is_applied_to_the_record(record: Any, said: Any) -> None:
    run = record(SPEC, 4)
    before = _bytes(run)
    code, text = said("replay", run, "--rescore", BONUS)
    assert code == 0
    assert "Wayward: 4 scored from the record, which is all that score reads; 3 were acted out besides" in text
    assert "sft-0-demo/train0/0 .200 → .700" in text
    assert "sft reward 4 .200 → .700" in text
    assert _bytes(run) == before, "nothing of the record is overwritten"
    ((head, episodes),) = rescorings(run)
    assert head["how"] == {"record": 4}
    assert [(each.old.reward, each.new.reward if each.new else None) for each in episodes] == [(0.2, 0.7)] * 4
    assert all(each.changed and each.new is not None and each.new.success for each in episodes)
    said("replay", run, "--rescore")
    assert [head["how"] for head, _ in rescorings(run)] == [{"record": 4}] * 2


def _bytes(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run / "seg").iterdir())}


def test_no_tool_is_called_for_a_score_of_the_record(record: Any, wayward: ModuleType) -> None:
    run = record(SPEC, 3)
    wayward.CLOSED.add("look")
    wayward.GONE.add("reset")
    found = agentrl.rescore(run, overrides=[BONUS], tools="recorded", keep=False)
    assert found.how == {"record": 3} and found.compared == 0
    found = agentrl.rescore(run, overrides=[BONUS], keep=False)
    assert found.how == {"record": 3} and found.compared == 0, "what cannot be acted out cannot be compared"


@pytest.mark.parametrize(("reads", "name"), [("state", "looked"), ("class", "weight"), ("guarded", "looked")])
def test_a_score_that_reads_live_state_is_acted_out(reads: str, name: str, record: Any, said: Any) -> None:
    run = record({"id": SPEC, "options": {"reads": reads}}, 3)
    code, text = said("replay", run, "--rescore", BONUS)
    assert code == 0
    assert f"Wayward: 3 scored by acting the episode out again (score reads self.{name})" in text
    old = {"state": 2.2, "class": 1.2, "guarded": 2.2}[reads]
    ((_, episodes),) = rescorings(run)
    assert [(e.how, e.old.reward, e.new and e.new.reward) for e in episodes] == [("acted", old, old + 0.5)] * 3


def test_recorded_tools_cannot_bring_live_state_about(record: Any, said: Any) -> None:
    run = record({"id": SPEC, "options": {"reads": "state"}}, 2)
    code, text = said("replay", run, "--rescore", "--tools", "recorded")
    assert code == 1 and "score reads self.looked, which recorded tools do not bring about" in text
    code, text = said("replay", run, "--tools", "recorded")
    assert code == 1 and "score reads self.looked, which only a live episode has" in text


def test_a_score_that_reads_a_global_is_found_out_by_comparison(record: Any, said: Any) -> None:
    run = record({"id": SPEC, "options": {"reads": "global"}}, 4)
    code, text = said("replay", run, "--rescore")
    assert code == 0
    assert "4 scored by acting the episode out again (acted out, sft-0-demo/train0/0 has another score" in text


def test_live_tools_act_every_episode_out(record: Any) -> None:
    found = agentrl.rescore(record(SPEC, 2), tools="live", keep=False)
    assert found.how == {"acted": 2} and found.because == [("asked for", 2)]


def test_an_episode_that_goes_another_way_is_not_scored_for_it(record: Any, said: Any) -> None:
    run = record({"id": SPEC, "options": {"kind": "count", "reads": "state"}}, 2)
    code, text = said("replay", run, "--rescore")
    assert code == 1 and "it goes another way now: result at turn 1, call 1 (count)" in text


def test_turn_rewards_may_change_with_the_scorer(record: Any) -> None:
    run = record({"id": SPEC, "options": {"kind": "earn", "reads": "state"}}, 1)
    (each,) = agentrl.rescore(run, keep=False).episodes
    assert each.how == "acted" and each.new is not None and each.new.parts == each.old.parts
    assert each.new.reward != each.old.reward


def test_a_missing_reward_stays_missing(record: Any) -> None:
    run = record({"id": SPEC, "options": {"kind": "service"}}, 1, rollout={"retries": 0})
    (each,) = agentrl.rescore(run, overrides=[BONUS], keep=False).episodes
    assert each.how == "kept" and each.new == each.old and each.old.reward is None


def test_a_whole_run_keeps_its_scores(trained: Path, said: Any) -> None:
    code, text = said("replay", trained, "--rescore", "--json")
    lines = [json.loads(line) for line in text.replace('} {"event"', '}\n{"event"').splitlines()]
    with StoreReader(trained) as reader:
        entries = reader.trajectories(limit=1000).entries
    episodes = [line for line in lines if line["event"] == "rescored"]
    assert code == 0 and [line["id"] for line in episodes] == [entry.id for entry in entries]
    assert all(line["new"] == line["old"] for line in episodes)
    assert Path(lines[-1]["file"]).parent == trained / "rescored"


def test_what_was_not_compared_is_not_claimed(record: Any, said: Any) -> None:
    run = record({"id": SPEC, "options": {"reads": "global", "kind": "count"}}, 4)  # acted out, it goes another way
    for words in ((), ("--tools", "recorded")):
        code, text = said("replay", run, "--rescore", *words)
        assert code == 0 and "all that score reads" not in text
        assert "4 scored from the record; not compared with a live episode (globals, files and clocks are not" in text
    code, text = said("replay", record(SPEC, 4, name="sound"), "--rescore")
    assert "4 scored from the record, which is all that score reads; 3 were acted out besides" in text
