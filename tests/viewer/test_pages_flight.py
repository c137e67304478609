"""Episodes at play in the pages: their turns and tokens so far, growing, until they are finished or given up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from agentrl.algo.advantage import GRPO
from agentrl.store import RunFolder, StoreReader, StoreWriter
from agentrl.store.key import EpisodeKey
from agentrl.trajectory import Group, Member

sync_api = pytest.importorskip("playwright.sync_api", reason="the pages' tests need playwright")
Open = Callable[..., Any]


@pytest.fixture
def work(folder: Path, gallery: ModuleType, request: pytest.FixtureRequest) -> Iterator[tuple[Path, Any, StoreWriter]]:
    """A run at work that has stored nothing yet, so that no token has a text but in the journal."""
    path = folder / request.node.name.replace("test_", "")[:40]
    desk = gallery.Desk(23)
    with (
        RunFolder.create(path, gallery.CONFIG, config_version=1),
        StoreWriter(path, pieces=desk.words.pieces) as writer,
    ):
        yield path, desk, writer


def played(desk: Any, gallery: ModuleType, sample: str = "0") -> Any:
    look = ("search_orders", {"month": "2026-03"}, gallery.ok(gallery.TABLE, hint="table"))
    script = [gallery.Step("Which orders?", "I look.", [look]), gallery.Step("", "Second."), gallery.Step("", "Third.")]
    return desk.play("rl-0/fly", sample, "Unheard zebra?", script, score={"answer": 1.0}, success=True)


def live(see: Open, path: Path) -> Any:
    """The live page of a run that the server may not have listed yet."""
    page = see("/")
    page.goto(page.url.split("#")[0] + f"#/r/{path.name}/live")
    page.reload()
    page.get_by_role("heading", name="Live").wait_for()
    return page


def test_an_episode_grows_in_turns_and_tokens_until_it_ends(
    see: Open, gallery: ModuleType, work: tuple[Path, Any, StoreWriter]
) -> None:
    path, desk, writer = work
    made, other = played(desk, gallery), played(desk, gallery, "1")
    key = EpisodeKey("rl", 0, "train", "fly", 0)
    page = live(see, path)
    writer.turn(key, 0, made.turns[0])
    page.locator("[aria-label='In flight'] td a", has_text="rl-0/fly/0").click(timeout=10_000)
    page.get_by_text("in flight", exact=True).wait_for()
    assert page.get_by_role("article", name="Tool call search_orders").locator("td").first.inner_text() == "1042"
    assert page.locator("section.turn").count() == 1 and "zebra" in page.locator("section.turn").inner_text()
    assert page.get_by_role("button", name="Replay").count() == 0
    tokens = see(page.url.split("#")[1] + "&view=tokens")
    tokens.locator(".tk", has_text="zebra").first.wait_for()
    assert tokens.locator(".tk", has_text="⟨").count() == 0
    before = tokens.locator(".tk").count()
    tokens.keyboard.press("l")
    chosen = tokens.locator(".tk.at").inner_text()
    writer.turn(key, 1, made.turns[1])
    page.locator("section.turn").nth(1).wait_for(timeout=10_000)
    tokens.locator(".tk", has_text="Second").first.wait_for(timeout=10_000)
    assert tokens.locator(".tk").count() > before and tokens.locator(".tk.at").inner_text() == chosen
    page.get_by_text("turn 3 is being played").wait_for()
    writer.add([made, other], step=0, stage="rl")
    page.get_by_text("✓").first.wait_for(timeout=10_000)
    sync_api.expect(page.locator("section.turn")).to_have_count(3)
    assert page.locator(".big").inner_text().startswith("1") and page.get_by_role("button", name="Replay").count() == 1
    tokens.locator(".tk", has_text="Third").first.wait_for(timeout=10_000)
    assert tokens.get_by_role("radio", name="advantage").is_disabled()
    group = Group("rl-0/fly", "fly", [Member(made), Member(other)], 0)
    group.members[1].reward = 0.0
    GRPO().estimate([group])
    writer.credit(group, step=0)
    writer.flush()
    (path / "metrics.jsonl").write_text(json.dumps({"stage": "rl", "step": 1, "time": 1.0, "reward": 0.5}) + "\n")
    sync_api.expect(tokens.get_by_role("radio", name="advantage")).to_be_enabled(timeout=10_000)
    page.get_by_text("advantage", exact=True).wait_for(timeout=10_000)


def test_an_episode_that_was_given_up_says_so(
    see: Open, gallery: ModuleType, work: tuple[Path, Any, StoreWriter]
) -> None:
    path, desk, writer = work
    made = played(desk, gallery)
    key = EpisodeKey("rl", 0, "train", "fly", 0)
    writer.turn(key, 0, made.turns[0])
    page = live(see, path)
    page.locator("[aria-label='In flight'] td a", has_text="rl-0/fly/0").click(timeout=10_000)
    page.get_by_text("in flight", exact=True).wait_for()
    writer.forget(key)
    page.get_by_text("given up before it ended").wait_for(timeout=10_000)
    assert page.locator("section.turn").count() == 1


MUON = {"name": "muon", "momentum": 0.95, "betas": [0.9, 0.95], "clip": 1.0, "lr": 1e-4}
SLOW = """
import time

from agentrl import Env, Obs, Say, Task, tool


class Slow(Env):
    \"\"\"Ask the clock.\"\"\"

    max_turns = 4

    def tasks(self, split, seed):
        for n in range(64):
            yield Task(f"slow={n}", f"Count to {n}.")

    @tool
    def wait(self, n: int = 1) -> str:
        \"\"\"Wait a moment.

        Args:
            n: how long.
        \"\"\"
        return "done"

    def reply(self, text):
        time.sleep(1.0)
        return Obs("Go on.")

    def score(self, episode):
        return 1.0

    def demonstrate(self, task, rng):
        for _ in range(4):
            yield Say("One.")
"""


def test_a_training_run_shows_its_episodes_while_they_are_played(see: Open, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    config = {
        "name": "training", "out": str(folder), "threads": 1, "env": f"{tmp_path}/slow.py:Slow",
        "model": {"type": "scratch", "arch": {"model_type": "qwen3", "hidden_size": 32, "num_hidden_layers": 1,
                  "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 32,
                  "max_position_embeddings": 1024, "tie_word_embeddings": True}, "tokenizer": {"texts": 50}},
        "engine": {"rows": 8, "max_context": 1024},
        "rollout": {"max_tokens": 8, "episodes": 16, "deadlines": {"tool": 5, "turn": 60, "episode": 300}},
        "stages": [{"type": "sft", "demonstrations": 16, "steps": 60, "batch": 8, "optimizer": {**MUON, "lr": 8e-3}},
                   {"type": "rl", "steps": 2, "prompts": 2, "samples": 2, "editors": [], "optimizer": MUON}],
        "eval": {"tasks": 4},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    child = subprocess.Popen(
        [sys.executable, "-m", "agentrl", "train", str(tmp_path / "run.yaml")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=(tmp_path / "said").open("w"),
        stderr=subprocess.STDOUT,
    )
    try:
        run = folder / "training"
        for _ in range(600):
            if (run / "index.sqlite").exists() or child.poll() is not None:
                break
            time.sleep(0.1)
        assert child.poll() is None, (tmp_path / "said").read_text()
        page = live(see, run)
        page.locator("[aria-label='In flight'] td a").first.click(timeout=60_000)
        page.get_by_text("in flight", exact=True).wait_for()
        id = str(page.locator("h1").get_attribute("title"))
        tokens = see(page.url.split("#")[1] + "&view=tokens")
        tokens.locator(".tk", has_text="Count").first.wait_for()
        page.locator("section.turn").nth(2).wait_for(timeout=30_000)
        assert tokens.locator(".tk", has_text="⟨").count() == 0
        page.get_by_role("button", name="Replay").wait_for(timeout=60_000)
        assert child.wait(120) == 0, (tmp_path / "said").read_text()
    finally:
        if child.poll() is None:
            child.terminate()
            child.wait(30)
    with StoreReader(run) as reader:
        assert reader.entry(id).n_turns == page.locator("section.turn").count() == 4
