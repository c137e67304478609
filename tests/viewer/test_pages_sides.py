"""Side by side: differences across runs, siblings that are the same, small curves, and narrow screens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from agentrl.store import RunFolder, StoreWriter

sync_api = pytest.importorskip("playwright.sync_api", reason="the pages' tests need playwright")
Open = Callable[..., Any]
SIBLING = "rl-12/orders-0317/0"


@pytest.fixture(scope="module")
def twins(folder: Path, gallery: ModuleType) -> Path:
    """A run with a group of which two members are the same, and one begins like them and ends earlier."""
    path = folder / "twins"
    desk = gallery.Desk(31)

    def play(sample: str, *said: str) -> Any:
        look = ("search_orders", {"month": "2026-03"}, gallery.ok("nothing"))
        script = [gallery.Step("", "I look.", [look]), *(gallery.Step("", text) for text in said)]
        return desk.play("rl-0/orders-0317", sample, gallery.QUESTION, script, score={"answer": 1.0}, success=True)

    with (
        RunFolder.create(path, gallery.CONFIG, config_version=1),
        StoreWriter(path, pieces=desk.words.pieces) as writer,
    ):
        writer.add([play("0", "One."), play("1", "One."), play("2", "Two.")], step=0, stage="rl")
    return path


def test_identical_siblings_say_so_and_leave_nowhere(see: Open, twins: Path) -> None:
    page = see("/r/twins/group?id=rl-0/orders-0317")
    columns = page.locator("section.col")
    columns.nth(2).get_by_text("leaves at token").wait_for()
    assert columns.nth(1).get_by_text("identical to 0").is_visible()
    assert [columns.nth(i).locator(".leaves").count() for i in range(3)] == [0, 0, 1]
    found = page.evaluate(
        "async () => { const run = (await (await fetch('api/runs')).json()).runs.find(r => r.folder.endsWith('twins'));"
        " return (await fetch(`api/group?run=${run.run}&group=rl-0/orders-0317`)).json() }"
    )
    at = found["first_divergence"]
    assert at["rl-0/orders-0317/0"] is None and at["rl-0/orders-0317/1"] is None
    assert at["rl-0/orders-0317/2"]["turn"] == 1 and at["rl-0/orders-0317/2"]["token"] == 0
    assert found["identical"] == {"rl-0/orders-0317/1": "rl-0/orders-0317/0"}


def test_any_trajectory_of_any_run_can_be_the_other_side(see: Open, twins: Path) -> None:
    page = see(f"/r/desk/t?id={SIBLING}")
    page.get_by_role("region", name="Turns").wait_for()
    page.keyboard.press("d")
    side = page.get_by_role("region", name="The other side")
    side.get_by_label("Run").select_option("twins")
    side.get_by_role("link", name="rl-0/orders-0317/2", exact=True).click()
    page.get_by_role("heading", name="Difference").wait_for()
    page.locator(".names .tag", has_text="twins").wait_for()
    assert "run_b=twins" in page.url and page.locator(".del").count() and page.locator(".add").count()
    # The two runs have vocabularies of their own: ids are not compared.
    assert page.get_by_text("other vocabulary").is_visible() and page.get_by_text("first at turn 1").is_visible()
    again = see(page.url.split("#")[1])
    again.locator(".names .tag", has_text="twins").wait_for()
    again.keyboard.press("x")
    again.locator(".names .tag", has_text="desk").wait_for()
    assert "/r/twins/diff" in again.url
    again.locator(".names a").nth(1).click()
    again.locator(f"h1[title='{SIBLING}']").wait_for()
    # Another task of another run, found by its words; a run that is not there.
    page.keyboard.press("c")
    side.get_by_label("Run").select_option("grpo")
    if side.get_by_label("the same task only").count():
        side.get_by_label("the same task only").uncheck()
    side.get_by_label("Search in the text").fill("calc")
    side.locator("tbody a").first.click()
    page.locator(".names .tag", has_text="grpo").wait_for()
    gone = see(f"/r/desk/diff?a={SIBLING}&b=x&run_b=nowhere")
    gone.get_by_text("No such run").wait_for()


def test_the_same_vocabulary_names_the_token_across_runs(see: Open, folder: Path) -> None:
    page = see(f"/r/desk/diff?a={SIBLING}&b=rl-12/orders-0317/1&run_b=damaged")
    page.get_by_text("first at turn 1, token 37").wait_for()
    assert page.get_by_text("other vocabulary").count() == 0


def test_the_list_of_runs_has_small_curves(see: Open) -> None:
    asked: list[str] = []
    page = see("/")
    page.on("request", lambda request: asked.append(request.url))
    row = page.locator("tbody tr", has=page.locator("a[href='#/r/desk']"))
    for name in ("success", "reward"):
        assert row.get_by_role("img", name=f"{name} over steps").locator("path").count() == 1
    page.reload()
    row.get_by_role("img", name="reward over steps").wait_for()
    page.wait_for_load_state("networkidle")
    assert [url for url in asked if "/api/" in url and "/api/runs" not in url] == []  # they come with the list


NARROW = {
    "runs": "/", "compare": "/compare?runs=arpo,grpo", "run": "/r/desk", "rollouts": "/r/desk/rollouts",
    "trajectory": f"/r/desk/t?id={SIBLING}", "tokens": f"/r/desk/t?id={SIBLING}&view=tokens",
    "screens": "/r/desk/t?id=rl-12/inbox-0004/0&view=screens", "group": "/r/desk/group?id=rl-12/orders-0317&step=12",
    "tree": "/r/desk/tree?id=rl-12/orders-0317", "diff": f"/r/desk/diff?a={SIBLING}&b=rl-12/orders-0317/1",
    "choice": f"/r/desk/diff?a={SIBLING}", "live": "/r/desk/live",
}  # fmt: skip


@pytest.mark.parametrize("width", [900, 390])
@pytest.mark.parametrize("name", list(NARROW))
def test_pages_fit_narrow_screens(see: Open, name: str, width: int) -> None:
    page = see(NARROW[name], width=width, height=800)
    page.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for label in ("Keys", "Switch to dark colours"):
        box = page.get_by_role("button", name=label).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width


@pytest.mark.parametrize("width", [900, 390])
def test_the_panels_are_sheets_on_narrow_screens(see: Open, width: int) -> None:
    page = see(f"/r/desk/t?id={SIBLING}&view=tokens&turn=0&token=9", width=width, height=800)
    page.locator(".tk.at").wait_for()
    assert not page.get_by_text("group baseline").is_visible()
    page.get_by_role("button", name="how its credit came about").click()
    page.get_by_text("group baseline").wait_for()
    panel = page.get_by_label("The selected token").bounding_box()
    assert panel["y"] + panel["height"] <= 800 and panel["height"] > 250
    page.keyboard.press("s")
    assert not page.get_by_text("group baseline").is_visible()
    page.keyboard.press("t")
    waterfall = page.get_by_role("list", name="Time and cost of each turn")
    page.get_by_role("region", name="Turns").wait_for()
    assert not waterfall.is_visible()
    page.keyboard.press("s")
    waterfall.wait_for()
