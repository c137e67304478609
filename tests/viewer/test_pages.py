"""The viewer's pages in a real browser, on a real server, over real runs and the gallery of test_pages_gallery.py.

Every page of every test is watched (`see` in conftest.py). `AGENTRL_SHOTS=FOLDER` keeps pictures of all pages there, for the guide.
"""

from __future__ import annotations

import json
import os
import re
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import quote

import pytest

from agentrl.store import RunFolder, StoreWriter
from agentrl.store.key import EpisodeKey

sync_api = pytest.importorskip("playwright.sync_api", reason="the pages' tests need playwright")
CHROMIUM = "/usr/bin/chromium"
NEEDED = "AGENTRL_NEED_CHROMIUM" in os.environ  # then what lacks is an error
pytestmark = pytest.mark.skipif(not (NEEDED or Path(CHROMIUM).exists()), reason=f"the pages' tests need {CHROMIUM}")

HERE = Path(__file__).parent
AXE = HERE.parents[1] / "agentrl/viewer/web/node_modules/axe-core/axe.min.js"
SIBLING = "rl-12/orders-0317/0"
GROUP = "rl-12/orders-0317"

Open = Callable[..., Any]


def at(run: str, page: str = "", **query: Any) -> str:
    asked = "&".join(f"{name}={quote(str(value))}" for name, value in query.items())
    return f"/r/{run}{'/' + page if page else ''}{'?' + asked if asked else ''}"


PAGES = {
    "runs": "/",
    "compare": "/compare?runs=arpo,grpo",
    "run": at("desk"),
    "rollouts": at("desk", "rollouts", stage="rl"),
    "search": at("desk", "rollouts", q="carrier"),
    "trajectory": at("desk", "t", id=SIBLING),
    "tokens": at("desk", "t", id=SIBLING, view="tokens", m="entropy", turn=0, token=9),
    "advantage": at("desk", "t", id="rl-12/orders-0317/1", view="tokens", m="advantage", turn=1, token=3),
    "group": at("desk", "group", id=GROUP, step=12),
    "tree": at("desk", "tree", id=GROUP),
    "diff": at("desk", "diff", a=SIBLING, b="rl-12/orders-0317/1"),
    "screens": at("desk", "t", id="rl-12/inbox-0004/0", view="screens", screen=1),
    "live": at("desk", "live"),
}


def settle(page: Any) -> None:
    page.wait_for_load_state("networkidle")
    page.evaluate("document.fonts.ready.then(() => null)")
    page.wait_for_timeout(250)


@pytest.mark.skipif("AGENTRL_SHOTS" not in os.environ, reason="pictures are kept on demand")
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_pictures(see: Open, theme: str) -> None:
    out = Path(os.environ["AGENTRL_SHOTS"])
    for name, hash in {**PAGES, "long": at("desk", "t", id="rl-12/archive-0002/0", view="tokens")}.items():
        page = see(hash, theme)
        settle(page)
        page.screenshot(path=str(out / f"viewer-{name}-{theme}.png"))
    page = see(PAGES["trajectory"], theme)
    page.keyboard.press("?")
    settle(page)
    page.screenshot(path=str(out / f"viewer-keys-{theme}.png"))


# -- accessibility ----------------------------------------------------------------------------------


def serious(page: Any) -> list[str]:
    """What axe finds serious or critical."""
    # The policy of the page forbids foreign scripts, so axe is evaluated by the debugger, which is above it.
    page.evaluate(AXE.read_text())
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return [
        f"{v['id']} ({v['impact']}): {[node['target'] for node in v['nodes']][:3]} "
        f"{v['nodes'][0]['failureSummary'][:300]}"
        for v in found["violations"]
        if v["impact"] in ("serious", "critical")
    ]


@pytest.mark.skipif(not (NEEDED or AXE.exists()), reason="axe-core comes with npm ci in agentrl/viewer/web")
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", [*PAGES, "choice", "narrow", "long", "hostile", "fresh", "keys", "fork"])
def test_axe_finds_nothing_serious(see: Open, name: str, theme: str) -> None:
    more = {
        "long": at("desk", "t", id="rl-12/archive-0002/0", view="tokens", m="version"),
        "hostile": at("desk", "t", id="rl-12/<script>alert(1)</script>/0"),
        "fresh": at("fresh"),
        "choice": at("desk", "diff", a=SIBLING, task="orders-0317"),
        "narrow": PAGES["tokens"],
        "keys": PAGES["trajectory"],
        "fork": PAGES["trajectory"],
    }
    page = see({**PAGES, **more}[name], theme, width=390 if name == "narrow" else 1440)
    settle(page)
    if name == "narrow":
        page.keyboard.press("s")
    if name == "keys":
        page.keyboard.press("?")
    if name == "fork":
        page.keyboard.press("F")
    assert serious(page) == []


def test_focus_is_seen_and_motion_can_be_reduced(see: Open) -> None:
    page = see("/")
    seen = set()
    for _ in range(8):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.outerHTML.slice(0, 400)"))
        style = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert style == "solid", page.evaluate("document.activeElement.outerHTML")
    assert len(seen) >= 6
    assert page.evaluate("matchMedia('(prefers-reduced-motion: reduce)').matches")


# -- the pages --------------------------------------------------------------------------------------


def test_runs_are_listed_and_compared(see: Open) -> None:
    page = see("/")
    table = page.locator("table")
    for name in ("arpo", "desk", "flow", "grpo", "otc"):
        assert table.get_by_role("link", name=name, exact=True).count() >= 1
    table.locator("tr", has=page.get_by_role("link", name="arpo", exact=True)).get_by_role("checkbox").check()
    table.locator("tr", has=page.get_by_role("link", name="grpo", exact=True)).get_by_role("checkbox").check()
    page.keyboard.press("c")
    page.wait_for_url("**/compare**")
    page.get_by_role("heading", name="Compare 2 runs").wait_for()
    chart = page.get_by_role("slider", name="Reward", exact=True)
    assert "arpo" in chart.get_attribute("aria-valuetext") and "grpo" in chart.get_attribute("aria-valuetext")


def test_a_point_of_a_curve_opens_its_rollouts(see: Open) -> None:
    page = see(at("grpo"))
    chart = page.get_by_role("slider", name="Reward", exact=True)
    chart.locator("canvas").wait_for()
    box = chart.locator(".u-over").bounding_box()
    page.mouse.move(box["x"] + 3, box["y"] + 30)
    page.mouse.click(box["x"] + 3, box["y"] + 30)
    page.wait_for_url("**/rollouts**")
    assert "step=1" in page.url and "stage=rl" in page.url
    page.locator("tbody tr[aria-rowindex]").first.wait_for()
    assert {cell.inner_text() for cell in page.locator("tbody tr[aria-rowindex] td:nth-child(12)").all()} == {"1"}


def test_curves_are_found_smoothed_and_read_by_keys(see: Open) -> None:
    page = see(at("desk"))
    page.keyboard.press("/")
    page.keyboard.type("entropy")
    assert page.get_by_role("slider", name="Entropy").count() == 1
    assert page.get_by_role("slider", name="Reward", exact=True).count() == 0
    page.keyboard.press("Escape")
    page.keyboard.press("s")
    page.wait_for_url("**smooth=0.3**")
    chart = page.get_by_role("slider", name="Entropy")
    chart.focus()
    page.keyboard.press("Home")
    assert "at step 1" in chart.get_attribute("aria-valuetext")


def test_config_and_versions_are_folded(see: Open) -> None:
    page = see(at("grpo"))
    page.get_by_text("Configuration").click()
    assert page.get_by_text("stages:").first.is_visible()
    page.get_by_text("Command and versions").click()
    assert page.get_by_text("agentrl-framework").first.is_visible()


def test_rollouts_scroll_filter_and_sort_on_the_server(see: Open) -> None:
    page = see(at("desk", "rollouts"))
    page.locator("tbody tr[aria-rowindex]").first.wait_for()
    region = page.get_by_role("region", name="Rollouts")
    seen: set[str] = set()
    for _ in range(40):
        rows = page.locator("tbody tr[aria-rowindex]")
        assert rows.count() <= 45
        seen |= set(page.locator("tbody td.task a").evaluate_all("all => all.map(a => a.title)"))
        region.evaluate("node => node.scrollBy(0, 250)")
        page.wait_for_timeout(60)
    assert len(seen) == 192
    page.get_by_label("Outcome").select_option(label="truncated · tokens (1)")
    page.wait_for_url("**outcome=truncated&why=tokens**")
    page.get_by_text("orders-0317").first.wait_for()
    assert page.locator("tbody tr[aria-rowindex]").count() == 1
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Reward").click()
    page.wait_for_url("**sort=reward**")
    best = page.locator("tbody td.num").first
    sync_api.expect(best).to_have_text("1.1")
    page.reload()
    sync_api.expect(best).to_have_text("1.1")
    assert page.locator("th[aria-sort=descending]").inner_text().startswith("Reward")


def test_full_text_is_searched(see: Open) -> None:
    page = see(at("desk", "rollouts"))
    page.keyboard.press("/")
    page.keyboard.type("carrier")
    page.locator("mark").first.wait_for()
    assert page.locator("tbody tr[aria-rowindex]").count() == 1
    page.locator("input[type=search]").fill("nowhere to be found")
    page.get_by_text("Nothing matches").wait_for()


def test_the_keyboard_goes_from_list_to_trajectory_to_sibling(see: Open) -> None:
    page = see(at("desk", "rollouts", group=GROUP))
    page.locator("tbody tr[aria-rowindex]").nth(7).wait_for()
    page.get_by_role("button", name="Step", exact=True).focus()
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("j")
    page.keyboard.press("j")
    title = page.locator("tr[aria-selected=true] td.task a").get_attribute("title")
    page.keyboard.press("Enter")
    page.wait_for_url("**/t?**")
    page.get_by_role("region", name="Turns").wait_for()
    assert page.locator("h1").get_attribute("title") == title
    page.goto(page.url.split("#")[0] + "#" + PAGES["trajectory"])
    page.locator(f"h1[title='{SIBLING}']").wait_for()
    page.keyboard.press("ArrowRight")
    page.locator(f"h1:not([title='{SIBLING}'])").wait_for()
    page.keyboard.press("ArrowLeft")
    page.locator(f"h1[title='{SIBLING}']").wait_for()


def test_a_trajectory_shows_turns_calls_rewards_and_hints(see: Open) -> None:
    page = see(PAGES["trajectory"])
    calls = page.get_by_role("article")
    assert [call.get_attribute("aria-label") for call in calls.all()] == [
        "Tool call search_orders",
        "Tool call refunds",
        "Tool call python",
    ]
    assert calls.first.locator("td").first.inner_text() == "1042"
    calls.first.get_by_role("button", name="Show text").click()
    assert calls.first.locator("pre").count() == 1
    assert not page.get_by_text("I let Python add them up").first.is_visible()
    page.keyboard.press("w")
    assert page.get_by_text("I let Python add them up").first.is_visible()
    assert page.locator(".big").inner_text().startswith("1.1")
    assert page.get_by_role("button", name=re.compile(r"Turn\s+3\s*:")).is_visible()
    page.keyboard.press("j")
    page.keyboard.press("j")
    page.wait_for_url("**turn=2**")
    failed = see(at("desk", "t", id="rl-12/orders-0317/2"))
    assert failed.locator("article .tag.bad").all_inner_texts() == ["arguments", "timeout"]
    board = see(at("desk", "t", id="rl-12/board-0001/0"))
    assert board.get_by_label("board").locator("td").count() == 25
    assert board.locator(".diff .add").inner_text().startswith("+    return max(items)")
    assert board.get_by_text("the sandbox did not answer").is_visible()
    assert board.get_by_text("enters no statistics").is_visible()


def test_export_downloads_the_trajectory(see: Open) -> None:
    page = see(PAGES["trajectory"])
    page.locator("summary", has_text="Export").click()
    with page.expect_download() as download:
        page.get_by_role("link", name="JSON", exact=True).click()
    assert SIBLING in Path(download.value.path()).read_text()


def test_tokens_have_ids_colours_and_an_explanation(see: Open) -> None:
    page = see(PAGES["tokens"])
    chosen = page.locator(".tk.at")
    chosen.wait_for()
    assert chosen.inner_text().strip() == "refunds"
    page.get_by_text("group baseline").wait_for()
    assert page.get_by_text("shaped reward", exact=True).is_visible()
    colours = set()
    for key in "12345678":
        page.keyboard.press(key)
        page.wait_for_timeout(40)
        kind = page.locator(".toks").get_attribute("data-scale")
        counts = page.evaluate("[...document.querySelectorAll('.tk')].filter(t => /q[0-8]/.test(t.className)).length")
        assert counts > 100, key
        colours.add((kind, page.evaluate("[...document.querySelectorAll('.tk')].map(t => t.className).join()")))
    assert len(colours) >= 7
    before = page.url
    page.keyboard.press("l")
    page.wait_for_url("**token=10**")
    page.keyboard.press("h")
    page.wait_for_url(before)  # the address follows the keys a moment later
    page.keyboard.press("2")
    page.keyboard.press("n")
    page.wait_for_url(lambda url: "token=9" not in url)
    token = page.locator(".tk").nth(40)
    token.hover()
    assert page.get_by_role("tooltip").get_by_text("position").is_visible()


def test_a_link_to_a_token_far_down_finds_it(see: Open) -> None:
    page = see(at("desk", "t", id="rl-12/archive-0002/0", view="tokens", turn=20, token=300))
    chosen = page.locator(".tk.at")
    chosen.wait_for()
    assert chosen.evaluate("n => { const b = n.getBoundingClientRect(); return b.top > 100 && b.bottom < innerHeight }")
    assert page.locator(".tk").count() < 6000
    region = page.get_by_role("region", name="Tokens")
    region.evaluate("node => node.scrollTo(0, node.scrollHeight)")
    page.get_by_text("late", exact=False).last.wait_for()
    covered = region.evaluate(
        "n => { const w = n.querySelector('.tk-window').getBoundingClientRect(), b = n.getBoundingClientRect();"
        " return w.top <= b.top && w.bottom >= b.bottom - 40 }"
    )
    assert covered


def test_no_frame_of_a_scroll_lacks_tokens(see: Open) -> None:
    page = see(at("desk", "t", id="rl-12/archive-0002/0", view="tokens"))
    page.emulate_media(reduced_motion="no-preference")  # the browser animates what keys scroll
    page.locator(".tk").first.wait_for()
    page.evaluate(
        """() => {
          const view = document.querySelector('.toks')
          const channel = new MessageChannel()
          window.painted = []
          channel.port1.onmessage = () => {
            const parts = [...view.querySelectorAll('.tk-chunk')].map((node) => node.getBoundingClientRect())
            const box = view.getBoundingClientRect()
            window.painted.push([view.scrollTop, parts[0].top <= box.top + 9, parts.at(-1).bottom >= box.bottom - 24])
          }
          const frame = () => {
            channel.port2.postMessage(0) // heard once this frame is painted
            requestAnimationFrame(frame)
          }
          requestAnimationFrame(frame)
        }"""
    )
    page.locator(".toks").focus()
    for _ in range(25):
        page.keyboard.press("PageDown")
    page.wait_for_function("() => window.painted.at(-1)[0] > 9000")
    page.keyboard.press("Home")
    page.wait_for_function("() => window.painted.at(-1)[0] === 0")
    painted = page.evaluate("window.painted")
    assert len({top for top, _, _ in painted}) >= 4
    assert [line for line in painted if not (line[1] and line[2])] == []


def test_a_group_shows_siblings_side_by_side(see: Open) -> None:
    page = see(PAGES["group"])
    assert page.locator("section.col").count() == 8
    page.get_by_text("leaves at token 37").wait_for()
    page.get_by_label("Select sibling 0").check()
    page.get_by_label("Select sibling 1").check()
    page.keyboard.press("d")
    page.wait_for_url("**/diff?**")
    page.get_by_role("heading", name="Difference").wait_for()
    assert page.locator(".del").count() and page.locator(".add").count()
    one = see(at("desk", "group", id="rl-12/archive-0002", step=12))
    assert one.locator("section.col").count() == 1


def test_a_group_of_a_real_run_opens_from_its_rollouts(see: Open) -> None:
    page = see(at("arpo", "rollouts", stage="rl", step=1, split="train"))
    page.locator("tbody tr[aria-rowindex]").first.wait_for()
    page.keyboard.press("o")
    page.wait_for_url("**/group?**")
    page.locator("section.col").nth(2).wait_for()
    page.keyboard.press("b")
    page.wait_for_url("**/tree?**")
    page.get_by_role("heading", name="Branch tree").wait_for()
    assert page.locator("svg .join").count() >= 1


def test_the_tree_joins_forks_to_their_parents(see: Open) -> None:
    page = see(PAGES["tree"])
    assert page.get_by_text("3 forks").is_visible()
    assert page.locator("svg .join").count() == 3
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    page.wait_for_url("**/t?**")
    page.get_by_text("forked from").wait_for()


def test_a_difference_of_prompts_is_one(see: Open, base: str) -> None:
    with urllib.request.urlopen(f"{base}/api/runs", timeout=30) as reply:
        run = next(run for run in json.load(reply)["runs"] if run["name"] == "grpo")
    asked = f"{base}/api/trajectories?run={run['run']}&stage=rl&limit=100"
    with urllib.request.urlopen(asked, timeout=30) as reply:
        entries = json.load(reply)["entries"]
    other = next(entry for entry in entries if entry["task_id"] != entries[0]["task_id"])
    page = see(at(run["run"], "diff", a=entries[0]["id"], b=other["id"]))
    page.get_by_role("link", name="first at turn 1, in its prompt").wait_for()
    first = page.get_by_role("region", name="Turn 1", exact=True)
    assert "another prompt" in first.inner_text()
    assert first.locator("pre .del").first.inner_text() != first.locator("pre .add").first.inner_text()
    page.get_by_role("link", name="first at turn 1, in its prompt").click()
    page.get_by_role("grid").or_(page.locator("aside")).first.wait_for()
    page.wait_for_url(lambda url: "view=tokens" in url and "turn=0" in url)


def test_screens_have_click_marks(see: Open) -> None:
    page = see(PAGES["screens"])
    mark = page.locator(".click")
    mark.wait_for()
    picture = page.locator(".stage img").bounding_box()
    dot = mark.bounding_box()
    assert abs((dot["x"] + dot["width"] / 2 - picture["x"]) / picture["width"] - 604 / 640) < 0.01
    assert abs((dot["y"] + dot["height"] / 2 - picture["y"]) / picture["height"] - 96 / 400) < 0.01
    page.keyboard.press(",")
    page.wait_for_url("**screen=0**")
    page.keyboard.press(".")
    page.keyboard.press(".")
    page.wait_for_url("**screen=2**")
    assert page.locator(".click").count() == 0


def test_the_sheet_of_keys_and_the_switch_of_colours(see: Open) -> None:
    page = see(PAGES["tokens"])
    page.keyboard.press("?")
    sheet = page.get_by_role("dialog")
    assert sheet.get_by_text("next sampled token").is_visible() and sheet.get_by_text("replay and compare").is_visible()
    page.keyboard.press("Escape")
    assert page.get_by_role("dialog").count() == 0
    assert page.locator("html").get_attribute("data-theme") == "light"
    page.keyboard.press("D")
    assert page.locator("html").get_attribute("data-theme") == "dark"
    page.reload()
    assert page.locator("html").get_attribute("data-theme") == "dark"
    page.keyboard.press("g")
    page.keyboard.press("h")
    page.get_by_role("heading", name="Runs").wait_for()


def test_replay_answers_with_a_table_or_a_sentence(see: Open) -> None:
    page = see(at("grpo", "rollouts", stage="rl", step=1))
    page.locator("tbody tr[aria-rowindex]").first.wait_for()
    page.keyboard.press("Enter")
    page.get_by_role("region", name="Turns").wait_for()
    page.keyboard.press("R")
    dialog = page.get_by_role("dialog")
    dialog.locator(".tag:not(.accent), [role=alert]").first.wait_for(timeout=60_000)
    page.keyboard.press("Escape")
    page.keyboard.press("F")
    assert page.get_by_role("dialog").get_by_label("Fork before turn").is_visible()


# -- what is missing, and what is hostile ---------------------------------------------------------------


def test_states_say_what_is_the_matter(see: Open) -> None:
    page = see(at("fresh"))
    page.get_by_text("No numbers yet").wait_for()
    page = see(at("fresh", "rollouts"))
    page.get_by_text("No rollouts stored yet").wait_for()
    page = see(at("damaged"))
    assert page.get_by_text("summary.json cannot be read").is_visible()
    assert page.get_by_role("slider", name="Reward", exact=True).count() == 1
    page = see(at("forgetful", "t", id="rl-0/t/0", view="tokens"))
    page.get_by_text("No tokens to show").wait_for()
    page = see(at("forgetful", "t", id="rl-0/t/0"))
    assert page.get_by_text("were not kept").is_visible() and page.get_by_text("Said.").is_visible()
    page = see(at("desk", "t", id="rl-12/none/0"))
    page.get_by_text("could not be shown").wait_for()
    page = see(at("gone"))
    page.get_by_text("No such run").wait_for()


@pytest.mark.parametrize("view", ["turns", "tokens"])
def test_hostile_content_is_text(see: Open, view: str) -> None:
    page = see(at("desk", "t", id="rl-12/<script>alert(1)</script>/0", view=view))
    settle(page)
    assert page.evaluate("window.pwned") is None
    assert page.locator("main script, main img[src=x], main style").count() == 0
    assert "<script>alert(1)</script>" in page.locator("h1").inner_text()
    if view == "turns":
        text = page.get_by_role("region", name="Turns")
        for mark in ("ESC", "RLO", "NUL", "BEL", "U+D800"):
            assert text.locator(".mark", has_text=mark).count() >= 1
        assert "<svg onload=" in text.inner_text()
        huge = page.get_by_role("article", name="Tool call dump")
        assert len(huge.inner_text()) < 10_000
        huge.get_by_role("button", name="Show").click()
        assert 60_000 < len(huge.inner_text()) < 80_000
    else:
        assert page.locator(".tk", has_text="‹ESC›").count() >= 1
    for other in ("group", "tree"):
        again = see(at("desk", other, id="rl-12/<script>alert(1)</script>"))
        settle(again)
        assert again.evaluate("window.pwned") is None
    again = see(at("desk", "rollouts", q="pwned"))
    again.locator("mark").first.wait_for()
    assert again.evaluate("window.pwned") is None


def test_nothing_but_the_server_is_asked_and_the_policy_is_strict(base: str) -> None:
    with urllib.request.urlopen(base, timeout=10) as reply:
        policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "require-trusted-types-for 'script'" in policy and "unsafe" not in policy


# -- a run at work --------------------------------------------------------------------------------------


def test_a_running_run_is_followed(see: Open, folder: Path, gallery: ModuleType) -> None:
    desk = gallery.Desk(11)
    path = folder / "working"
    with (
        RunFolder.create(path, gallery.CONFIG, config_version=1),
        StoreWriter(path, pieces=desk.words.pieces) as writer,
    ):
        done = desk.play("rl-0/a", "0", "Say.", [gallery.Step("", "Said.")], score={"answer": 1.0}, success=True)
        writer.add([done], step=0, stage="rl")
        (path / "metrics.jsonl").write_text(json.dumps({"stage": "rl", "step": 1, "time": 1.0, "reward": 0.5}) + "\n")
        page = see("/")
        page.get_by_role("link", name="desk").first.wait_for()
        page.goto(page.url.split("#")[0] + "#" + at("working", "live"))
        page.reload()
        page.get_by_text("running").first.wait_for()
        flying = desk.play(
            "rl-0/b",
            "0",
            "Say.",
            [gallery.Step("", "One."), gallery.Step("", "Two.")],
            score={"answer": 1.0},
            success=True,
        )
        key = EpisodeKey("rl", 0, "train", "b", 0)
        writer.turn(key, 0, flying.turns[0])
        page.locator("[aria-label='In flight'] td a", has_text="rl-0/b/0").wait_for(timeout=10_000)
        open_one = see(at("working", "t", id="rl-0/b/0"))
        assert open_one.get_by_text("in flight").is_visible()
        many = [
            desk.play(
                "rl-0/c", str(i), "Say.", [gallery.Step("", f"Number {i}.")], score={"answer": 0.0}, success=False
            )
            for i in range(300)
        ]
        writer.add([flying, *many], step=0, stage="rl")
        with (path / "metrics.jsonl").open("a") as lines:
            lines.write(json.dumps({"stage": "rl", "step": 2, "time": 2.0, "reward": 0.75}) + "\n")
        page.locator("[aria-label=Finished] td a", has_text="rl-0/c/299").wait_for(timeout=10_000)
        page.locator("[role=slider][aria-valuetext*='0.75']").first.wait_for(timeout=10_000)
        open_one.locator("header .tag.accent").wait_for(state="detached", timeout=10_000)
        page.get_by_role("button", name="Hold").click()
        assert page.locator("[aria-label=Finished] tbody tr").count() == 40


# -- the build ------------------------------------------------------------------------------------------


def test_what_is_shipped_is_small_and_holds_no_map() -> None:
    import gzip

    static = HERE.parents[1] / "agentrl/viewer/static"
    files = [path for path in static.rglob("*") if path.is_file()]
    sizes = {path.name: len(gzip.compress(path.read_bytes(), 9)) for path in files if "LICENSE" not in path.name}
    assert sum(sizes.values()) <= 200 * 1024, sizes
    assert not [path for path in files if path.suffix == ".map"]
    assert {path.suffix for path in files} <= {".html", ".js", ".css", ".woff2", ".txt"}
