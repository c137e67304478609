"""Whatever models, tools, tasks and configurations say is text, on every page that shows any of it.

`see` fails a test on a violation of the page's policy, on a dialog and on a script's error; here pages are also asked
whether anything of the content ran, was made into elements, or turned the direction of what stands around it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import quote

import pytest

from agentrl.store import RunFolder, StoreWriter
from agentrl.store.key import EpisodeKey

pytest.importorskip("playwright.sync_api", reason="the pages' tests need playwright")
Open = Callable[..., Any]
GROUP = "rl-0/<img src=x onerror=alert(1)>\u202e"
ID = f"{GROUP}/0"
MANY = 10_000_000


@pytest.fixture(scope="module")
def hostile(folder: Path, gallery: ModuleType) -> Iterator[Path]:
    """A run at work all of whose texts are hostile: configuration, command, metrics, tasks, outputs, results."""
    path = folder / "hostile"
    desk = gallery.Desk(13)
    bad = gallery.HOSTILE
    safe = bad.encode("utf-8", "replace").decode()
    huge = ("<script>alert(1)</script>\u202e\x1b[31m" * 400_000)[:MANY]
    config = gallery.CONFIG.replace("name: desk", "name: hostile") + "".join(
        f"# {line}\n" for line in safe.replace("\x00", "").splitlines()
    )
    config += 'note: "<script>alert(1)</script><svg onload=alert(2)>"\n'

    def play(sample: str, right: float, **more: Any) -> Any:
        script = [
            gallery.Step(bad, bad, [("<script>x</script>", {"<b>": bad}, gallery.ok(bad, hint=hint))])
            for hint in ("markdown", "table", "board", "diff", "json", None)
        ]
        script += [gallery.Step("", "", [("dump", {}, gallery.ok(huge))]), gallery.Step("", bad + sample)]
        return desk.play(GROUP, sample, safe, script, score={"<i>x</i>": right}, success=bool(right), **more)

    one, two = play("0", 1.0), play("1", 0.0)
    fork = desk.play(
        GROUP, "0.1", safe, [gallery.Step("", bad)], score={"<i>x</i>": 0.0}, success=False, parent=one, at=1
    )
    words = ("agentrl", "train", bad.encode("utf-8", "replace").decode().replace("\x00", ""))
    with (
        RunFolder.create(path, config, config_version=1, command=words),
        StoreWriter(path, pieces=desk.words.pieces) as writer,
    ):
        group = gallery.credited(desk, GROUP, [one, two, fork], 0)
        writer.add([one, two, fork], step=0, stage="rl")
        writer.credit(group, step=0)
        writer.flush()
        lines = [
            {"stage": "<script>alert(1)</script>", "step": 1, "time": 1.0, "reward": 0.5, "<svg onload=alert(1)>": 2.0},
            {"stage": "rl", "step": 1, "time": 2.0, "reward": 0.5, safe: 1.0},
        ]
        (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (path / "rescored").mkdir()
        head = {"created": "<script>alert(1)</script>", "env": bad, "how": {"not": 1}}
        line = {"id": ID, "attempt": 0, "how": "not", "old": {"parts": {}, "reward": 1.0, "success": True}, "new": None}
        text = f"{json.dumps(head)}\n{json.dumps({**line, 'why': bad})}\n"
        (path / "rescored/20260101-000000-abcdef.jsonl").write_text(text)
        writer.turn(EpisodeKey("rl", 1, "train", "<script>alert(1)</script>\u202e", 0), 0, one.turns[0])
        yield path


def at(page: str, **query: Any) -> str:
    asked = "&".join(f"{name}={quote(str(value))}" for name, value in query.items())
    return f"/r/hostile/{page}?{asked}"


PAGES = {
    "runs": ("/", "hostile"),
    "compare": ("/compare?runs=hostile,desk", "Compare 2 runs"),
    "run": ("/r/hostile", "window.pwned"),
    "rollouts": (at("rollouts"), "<img src=x onerror=alert(1)>"),
    "search": (at("rollouts", q="pwned"), "window.pwned"),
    "trajectory": (at("t", id=ID), "<svg onload="),
    "tokens": (at("t", id=ID, view="tokens", m="advantage", turn=0, token=3), "shaped reward"),
    "group": (at("group", id=GROUP), "<script>x</script>"),
    "tree": (at("tree", id=GROUP), "Branch tree"),
    "diff": (at("diff", a=ID, b=f"{GROUP}/1"), "window.pwned"),
    "choice": (at("diff", a=ID, task=GROUP[5:]), "onerror"),
    "live": (at("live"), "<script>alert(1)</script>"),
    "flight": (at("t", id="rl-1/<script>alert(1)</script>\u202e/0"), "in flight"),
    "unknown": (at("t", id="<script>alert(1)</script>"), "could not be shown"),
}
FOUND = """() => ({
  pwned: window.pwned ?? null,
  made: document.querySelectorAll('main script, main style, main iframe, main object, main embed, main base, main link,'
    + ' main svg[onload], main [onerror], main [onclick], main [onload], main img[src=x]').length,
  raw: /[\\u0000\\u001b\\u0007]/.test(document.body.innerText),
  turned: [...document.querySelectorAll('main *')].filter(n => n.childNodes.length && [...n.childNodes].some(c =>
    c.nodeType === 3 && /[\\u202a-\\u202e\\u2066-\\u2069]/.test(c.data))).map(n => n.outerHTML.slice(0, 200)),
  title: /[\\u202a-\\u202e]/.test(document.title),
})"""


@pytest.mark.parametrize("name", list(PAGES))
def test_content_is_text_on_every_page(see: Open, hostile: Path, name: str) -> None:
    hash, shown = PAGES[name]
    page = see("/")
    page.goto(page.url.split("#")[0] + "#" + hash)
    page.reload()
    page.get_by_text(shown).first.wait_for()
    page.wait_for_timeout(400)
    if name == "run":
        page.keyboard.press("c")
        page.keyboard.press("v")
        page.get_by_text("estimator: {type: grpo}").wait_for()
    if name == "trajectory":
        page.keyboard.press("w")
        page.get_by_text("Could not be scored again").wait_for()
        dump = page.get_by_role("article", name="Tool call dump")
        assert len(dump.inner_text()) < 20_000
        dump.get_by_role("button", name="Show").click()
        page.get_by_role("button", name="raw").first.click()
    if name == "tokens":
        page.get_by_text("reward parts").wait_for()
        page.locator(".tk").nth(5).hover()
    page.wait_for_timeout(150)
    found = page.evaluate(FOUND)
    assert found == {"pwned": None, "made": 0, "raw": False, "turned": [], "title": False}


def test_the_downloaded_page_runs_nothing(see: Open, hostile: Path, browser: Any) -> None:
    page = see(at("t", id=f"{GROUP}/0.1"))
    page.get_by_role("region", name="Turns").wait_for()
    page.keyboard.press("e")
    with page.expect_download() as download:
        page.get_by_role("link", name="HTML", exact=True).click()
    kept = browser.new_page()
    told: list[str] = []
    kept.on("dialog", lambda dialog: (told.append(dialog.message), dialog.dismiss()))
    kept.set_content(Path(download.value.path()).read_text(errors="replace"))
    assert kept.evaluate("window.pwned ?? null") is None and told == []
    assert kept.locator("script, img[src=x], svg[onload]").count() == 0
    kept.close()
