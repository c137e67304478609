"""The viewer's pages in a real browser, on a real server, over real runs and the gallery of test_pages_gallery.py.

Every page of every test is watched: an error of a script, a violation of the content security policy or a request
to another host fails the test. `AGENTRL_SHOTS=FOLDER` keeps pictures of all pages there, for the guide.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import quote

import pytest

from agentrl.content import Image
from agentrl.store import RunFolder, StoreWriter

sync_api = pytest.importorskip("playwright.sync_api", reason="the pages' tests need playwright")
CHROMIUM = "/usr/bin/chromium"
pytestmark = pytest.mark.skipif(not Path(CHROMIUM).exists(), reason=f"the pages' tests need {CHROMIUM}")

HERE = Path(__file__).parent
AXE = HERE.parents[1] / "agentrl/viewer/web/node_modules/axe-core/axe.min.js"
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
SCREEN = """<body style="margin:0;font:14px sans-serif;background:#eef0f3"><div style="background:#37474f;color:#fff;padding:10px
 16px">Mail</div><div style="display:flex"><div style="width:130px;padding:12px">Inbox<br><br>Archive{count}<br><br>Bin</div>
<div style="flex:1;background:#fff;height:350px">{rows}</div></div></body>"""
SIBLING = "rl-12/orders-0317/0"
GROUP = "rl-12/orders-0317"

Open = Callable[..., Any]


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[name] = found
    spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="module")
def gallery() -> ModuleType:
    return module("test_pages_gallery")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield found
        found.close()


def screens(browser: Any) -> list[Image]:
    """Three states of a small mail client, as it really looks."""
    page = browser.new_page(viewport={"width": 640, "height": 400})
    row = '<div style="padding:11px 16px;border-bottom:1px solid #dde;background:{colour}">{who}<span style="float:right">{act}</span></div>'
    names = ["Marlow & Sons: your invoice", "Brightwell: where is our order?", "Halden Ltd: thank you"]
    found = []
    for state in range(3):
        kept = [name for i, name in enumerate(names) if not (state == 2 and i == 1)]
        rows = "".join(
            row.format(colour="#e3ecfd" if state == 1 and "Bright" in name else "#fff", who=name,
                       act="[Archive]" if state == 1 and "Bright" in name else "")
            for name in kept
        )  # fmt: skip
        page.set_content(SCREEN.format(rows=rows, count=" (1)" if state == 2 else ""))
        found.append(Image(page.screenshot()))
    page.close()
    return found


@pytest.fixture(scope="module")
def folder(gallery: ModuleType, browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The gallery beside runs that lack something: one empty, one damaged, one whose tokens were not kept."""
    out = tmp_path_factory.mktemp("gallery")
    gallery.make(out, screens(browser), [(300, 96), (604, 96)])
    with RunFolder.create(out / "fresh", gallery.CONFIG, config_version=1):
        pass
    desk = gallery.Desk(5)
    with (
        RunFolder.create(out / "forgetful", gallery.CONFIG, config_version=1),
        StoreWriter(out / "forgetful", pieces=desk.words.pieces, tokens="last_k", n=1) as writer,
    ):
        for step in range(2):
            t = desk.play(f"rl-{step}/t", "0", "Say.", [gallery.Step("", "Said.")], score={"answer": 1.0}, success=True)
            writer.add([t], step=step, stage="rl")
    shutil.copytree(out / "desk", out / "damaged")
    (out / "damaged/summary.json").write_text("{")
    (out / "damaged/metrics.jsonl").write_text(
        '{"stage": "rl", "step": 1, "time": 1.0, "reward": 0.5}\nnot json\n{"sta'
    )
    return out


@pytest.fixture(scope="module")
def base(folder: Path, runs: Path) -> Iterator[str]:
    """The address of `agentrl view` on the gallery and on the real runs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "agentrl", "view", str(folder), str(runs), "--port", str(port), "--no-browser"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(f"{address}/api/runs", timeout=5).close()
            break
        except OSError:
            assert server.poll() is None and time.monotonic() < deadline, "the viewer did not start"
            time.sleep(0.1)
    yield address
    server.send_signal(signal.SIGINT)
    server.wait(timeout=20)


@pytest.fixture
def see(browser: Any, base: str) -> Iterator[Open]:
    """Open a page by its hash; at the end nothing may have gone wrong on any of them."""
    wrong: list[str] = []
    contexts = []

    def open_page(hash: str, theme: str = "light", width: int = 1440, height: int = 900) -> Any:
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=theme, reduced_motion="reduce"
        )
        contexts.append(context)
        page = context.new_page()
        page.add_init_script(
            "window.violations = []; document.addEventListener('securitypolicyviolation',"
            " e => window.violations.push(e.violatedDirective + ' ' + e.blockedURI + ' ' + e.sourceFile))"
        )
        page.on("pageerror", lambda error: wrong.append(f"{page.url}: {error}"))
        page.on(
            "request",
            lambda request: None if request.url.startswith((base, "data:", "blob:")) else wrong.append(request.url),
        )
        page.goto(f"{base}/#{hash}")
        page.wait_for_selector("main :is(h1, h2)", state="attached")
        return page

    yield open_page
    for context in contexts:
        for page in context.pages:
            wrong += page.evaluate("window.violations")
        context.close()
    assert wrong == []


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
}  # fmt: skip


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
