"""Replay and fork from the page by the real `agentrl replay`, on a small run with a policy of its own.

Ids hold whatever a task may be called: they travel from the page to the command and back.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from agentrl.store import StoreReader

sync_api = pytest.importorskip("playwright.sync_api", reason="the pages' tests need playwright")
Open = Callable[..., Any]

TASK = """order={n}&x ~1+2%20?#'q"ü: [{n}]"""
ORDERS = '''
from agentrl import Env, Say, Task, ToolCall, tool

PRICES = 7


class Orders(Env):
    """Answer questions about an order book."""

    max_turns = 3

    def tasks(self, split, seed):
        for n in range(1000, 1040):
            yield Task(TASK.replace("{n}", str(n)), f"Price of {n}?", answer=7 * n % 100, data={"order": n})

    @tool
    def lookup(self, order: int) -> str:
        """Look up what an order costs.

        Args:
            order: its number.
        """
        return str(PRICES * order % 100)

    def score(self, episode):
        return float(episode.final_text == str(episode.task.answer))

    def demonstrate(self, task, rng):
        price = yield Say(calls=(ToolCall("lookup", {"order": task.data["order"]}),))
        yield Say(price.content)
'''.replace("PRICES = 7", f"PRICES = 7\nTASK = {TASK!r}")
ARCH = {
    "model_type": "qwen3", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 32, "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def orders(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """(the run, the file of its environment). Trained by the command: this thread has the browser's event loop."""
    at = tmp_path_factory.mktemp("orders")
    (at / "orders.py").write_text(ORDERS)
    config = {
        "name": "orders", "out": str(folder / "x=1"), "threads": 1, "env": f"{at}/orders.py:Orders",
        "model": {"type": "scratch", "arch": ARCH, "tokenizer": {"texts": 60}},
        "engine": {"rows": 8, "max_context": 1024},
        "rollout": {"max_tokens": 24, "episodes": 8, "deadlines": {"tool": 5, "turn": 60, "episode": 300}},
        "stages": [{"type": "sft", "demonstrations": 32, "steps": 40, "batch": 16, "optimizer": {
            "name": "muon", "lr": 8e-3, "momentum": 0.95, "betas": [0.9, 0.95], "clip": 1.0}}],
        "eval": {"tasks": 4},
    }  # fmt: skip
    (at / "run.yaml").write_text(json.dumps(config))
    words = [sys.executable, "-m", "agentrl", "train", str(at / "run.yaml")]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    yield folder / "x=1" / "orders", at / "orders.py"


def first(run: Path) -> str:
    with StoreReader(run) as reader:
        entries = reader.trajectories(split="demo", limit=1).entries or reader.trajectories(limit=1).entries
        assert "=" in entries[0].id and "%20" in entries[0].id
        return entries[0].id


def look(see: Open, run: Path, id: str, view: str = "t") -> Any:
    page = see("/")
    page.goto(page.url.split("#")[0] + f"#/r/{quote(run.name)}/{view}?id={quote(id)}")
    page.reload()
    page.wait_for_selector("main :is(h1, h2)", state="attached")
    return page


def test_an_episode_that_comes_out_the_same(see: Open, orders: tuple[Path, Path]) -> None:
    run, _ = orders
    page = look(see, run, first(run))
    page.get_by_role("region", name="Turns").wait_for()
    page.keyboard.press("R")
    dialog = page.get_by_role("dialog")
    dialog.get_by_text("came out as recorded").wait_for(timeout=120_000)
    assert dialog.locator("tbody tr").count() == 2 and dialog.locator("tbody .bad").count() == 0


def fork(page: Any, turn: int, say: str) -> str:
    """Fork on the page, open the branch, and return its run's name in links."""
    page.get_by_role("region", name="Turns").wait_for()
    page.keyboard.press("F")
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Fork before turn").fill(str(turn))
    dialog.get_by_label("What is said there").fill(say)
    dialog.get_by_role("button", name="Fork", exact=True).click()
    link = dialog.get_by_role("link", name=re.compile("^Open"))
    link.or_(dialog.get_by_text("failed", exact=True)).first.wait_for(timeout=120_000)
    assert link.count() == 1, dialog.inner_text()
    link.click()
    page.get_by_text("forked from").wait_for()
    return re.search(r"#/r/([^/]+)/", page.url)[1]  # type: ignore[index]


def test_forks_by_a_person_and_by_the_checkpoint_stand_in_the_tree(see: Open, orders: tuple[Path, Path]) -> None:
    run, _ = orders
    id = first(run)
    page = look(see, run, id)
    before = page.get_by_role("article").count()
    mine = fork(page, 2, "lookup(order=1003)")
    assert before == 1 and page.get_by_role("article").count() == 2
    assert page.get_by_role("article").nth(1).locator(".out").inner_text().strip() == str(7 * 1003 % 100)
    page.keyboard.press("b")
    page.get_by_role("heading", name="Branch tree").wait_for()
    assert page.locator("svg .join").count() == 1 and page.locator("tbody tr").count() == 2
    theirs = fork(look(see, run, id), 1, "")
    assert theirs != mine
    # The tree of the run that was forked has both, though they have the same id and lie in runs of their own.
    page = look(see, run, id)
    page.get_by_role("region", name="Turns").wait_for()
    page.keyboard.press("b")
    page.get_by_role("heading", name="Branch tree").wait_for()
    page.locator("svg .join").nth(1).wait_for()
    assert page.locator("tbody .tag").count() == 2
    assert {row.get_attribute("title") for row in page.locator("tbody td a").all()} == {id, f"{id}.1"}
    page.keyboard.press("j")
    page.keyboard.press("d")
    page.get_by_role("heading", name="Difference").wait_for()
    assert page.get_by_text("the same", exact=False).count() or page.locator(".tag.warn").count()
    assert page.locator(".names .tag").inner_text() in (mine, theirs)
    # And a branch can be replayed like any other.
    page.locator(".names a").nth(1).click()
    page.get_by_text("forked from").wait_for()
    page.keyboard.press("R")
    page.get_by_role("dialog").get_by_text("came out as recorded").wait_for(timeout=120_000)


def test_a_fork_that_cannot_begin_says_why(see: Open, orders: tuple[Path, Path]) -> None:
    run, _ = orders
    page = look(see, run, first(run))
    page.get_by_role("region", name="Turns").wait_for()
    page.keyboard.press("F")
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("What is said there").fill("  ")
    dialog.get_by_role("button", name="Fork", exact=True).click()
    dialog.get_by_text("failed", exact=True).wait_for(timeout=120_000)
    assert "--say is empty" in dialog.inner_text()


def test_an_environment_that_changed_diverges_in_a_table(see: Open, orders: tuple[Path, Path]) -> None:
    run, file = orders
    id = first(run)
    with StoreReader(run) as reader:
        recorded = reader.get(id).turns[0].tools[0].result.text
    file.write_text(ORDERS.replace("str(PRICES * order % 100)", "str(PRICES * order)"))
    page = look(see, run, id)
    page.get_by_role("region", name="Turns").wait_for()
    page.keyboard.press("R")
    dialog = page.get_by_role("dialog")
    dialog.get_by_text("diverges", exact=True).wait_for(timeout=120_000)
    row = dialog.locator("tr.off")
    assert row.count() == 1 and "first at turn 1: result" in dialog.inner_text()
    cells = [cell.strip() for cell in row.locator("td").all_inner_texts()]
    assert cells[2:4] == ["result", recorded] and cells[4] not in ("", recorded)
    file.write_text(ORDERS)


def test_new_scores_stand_beside_the_recorded_ones(see: Open, orders: tuple[Path, Path]) -> None:
    run, file = orders
    id = first(run)
    file.write_text(ORDERS.replace("return float(", "return 0.25 * float("))
    words = [sys.executable, "-m", "agentrl", "replay", str(run), "--rescore", "--split", "demo"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    page = look(see, run, id)
    panel = page.get_by_label("About the trajectory")
    panel.get_by_text("Rescored").wait_for()
    assert "1 → 0.25" in panel.locator(".again").inner_text()
    page = look(see, run, id, "run")
    row = page.get_by_label("Rescored").locator("tbody td")
    assert row.nth(3).inner_text() == "1" and row.nth(4).inner_text() == "0.25"
    # A file that was cut short is told of, and does not hide the others.
    (run / "rescored/20990101-000000-abcdef.jsonl").write_text('{"created": "2099-01-01T00:00:00+00:00"}\n{"id": ')
    page = look(see, run, id, "run")
    page.get_by_label("Rescored").get_by_text("damaged").wait_for()
    assert page.get_by_label("Rescored").locator("tbody tr").count() == 2
    file.write_text(ORDERS)
