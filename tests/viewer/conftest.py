"""Real runs of seconds, one for each of several recipes, and the viewer of all of them, by HTTP and in a browser.

Every page that `see` opens is watched: an error of a script, a violation of the content security policy, a dialog, or a
request to another host fails the test.
"""

from __future__ import annotations

import importlib.util
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from starlette.testclient import TestClient

import agentrl
from agentrl.content import Image
from agentrl.store import RunFolder, StoreWriter
from agentrl.viewer.app import make_app

MUON = {"name": "muon", "momentum": 0.95, "betas": [0.9, 0.95], "clip": 1.0, "lr": 1e-3}
ARCH = {
    "model_type": "qwen3",
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 24,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "initializer_range": 0.06,
}
ENVS = {
    "otc": {"id": "calculator", "options": {"kind": "mixed", "lazy": None}},
    "flow": "agentrl.envs.workflow:Arithmetic",
}
RECIPES: dict[str, dict[str, Any]] = {
    "grpo": {"minibatches": 2, "annotators": ["old_logprobs"], "behaviour": {"type": "old", "correction": "tis"}},
    "otc": {
        "shapers": [{"type": "otc_grpo", "c": 4.0}, {"type": "tool_cost", "weight": 0.1}],
        "aggregator": "unit_mean",
    },
    "arpo": {
        "strategy": {"type": "arpo_agentic", "initial": 3, "beam": 2, "probability": 1.0},
        "transforms": [{"type": "shared_prefix", "mode": "hard", "count": "once"}],
    },
    "flow": {
        "context": {"type": "memory"},
        "estimator": {"type": "grpo", "stats_unit": "row"},
        "aggregator": "turn_trajectory",
        "annotators": ["reference_logprobs"],
        "aux": [{"type": "kl", "coef": 0.001}],
    },
}  # fmt: skip


def config_of(name: str, out: Path) -> dict[str, Any]:
    rl = {"type": "rl", "steps": 2, "prompts": 3, "samples": 6, "optimizer": MUON, "editors": [], **RECIPES[name]}
    sft = {"type": "sft", "demonstrations": 400, "steps": 120, "batch": 32, "optimizer": {**MUON, "lr": 8e-3}}
    return {
        "name": name,
        "out": str(out),
        "threads": 1,
        "env": ENVS.get(name, "calculator"),
        "model": {"type": "scratch", "arch": ARCH, "tokenizer": {"texts": 100}},
        "engine": {"rows": 32, "max_context": 320},
        "rollout": {"max_tokens": 24, "episodes": 32, "deadlines": {"tool": 5, "turn": 60, "episode": 300}},
        "stages": [sft, rl],
        "eval": {"tasks": 8, "every": 2},
    }


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of four real runs, one a recipe."""
    out = tmp_path_factory.mktemp("viewed") / "runs"
    for name in RECIPES:
        agentrl.train(config_of(name, out))
    return out


@pytest.fixture(scope="session")
def client(runs: Path) -> Iterator[TestClient]:
    """The viewer of these runs."""
    with TestClient(make_app([runs]), base_url="http://127.0.0.1:7860") as found:
        yield found


@pytest.fixture(scope="session")
def keys(client: TestClient) -> dict[str, str]:
    """Each recipe's number in the viewer's list."""
    return {run["name"]: run["run"] for run in client.get("/api/runs").json()["runs"]}


# -- the pages --------------------------------------------------------------------------------------

HERE = Path(__file__).parent
CHROMIUM = "/usr/bin/chromium"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SCREEN = """<body style="margin:0;font:14px sans-serif;background:#eef0f3"><div
 style="background:#37474f;color:#fff;padding:10px 16px">Mail</div><div style="display:flex"><div
 style="width:130px;padding:12px">Inbox<br><br>Archive{count}<br><br>Bin</div>
<div style="flex:1;background:#fff;height:350px">{rows}</div></div></body>"""

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
def browser(runs: Path) -> Iterator[Any]:
    """Chromium. While it lives this thread has an event loop, so that the runs must have been made before."""
    if not Path(CHROMIUM).exists():
        pytest.skip(f"the pages' tests need {CHROMIUM}")
    sync_api = pytest.importorskip("playwright.sync_api", reason="the pages' tests need playwright")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield found
        found.close()


def screens(browser: Any) -> list[Image]:
    """Three states of a small mail client, as it really looks."""
    page = browser.new_page(viewport={"width": 640, "height": 400})
    row = (
        '<div style="padding:11px 16px;border-bottom:1px solid #dde;background:{colour}">'
        '{who}<span style="float:right">{act}</span></div>'
    )
    names = ["Marlow & Sons: your invoice", "Brightwell: where is our order?", "Halden Ltd: thank you"]
    found = []
    for state in range(3):
        kept = [name for i, name in enumerate(names) if not (state == 2 and i == 1)]
        rows = "".join(
            row.format(
                colour="#e3ecfd" if state == 1 and "Bright" in name else "#fff",
                who=name,
                act="[Archive]" if state == 1 and "Bright" in name else "",
            )
            for name in kept
        )
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


@contextmanager
def served(*folders: Path, before: Sequence[str] = ()) -> Iterator[str]:
    """The address of `agentrl view` on these folders; `before` stands before the command."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [*before, sys.executable, "-m", "agentrl", "view", *map(str, folders), "--port", str(port), "--no-browser"]
    server = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
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


@pytest.fixture(scope="session")
def serving() -> Callable[..., Any]:
    return served


@pytest.fixture(scope="module")
def base(folder: Path, runs: Path) -> Iterator[str]:
    """The address of the viewer of the gallery and of the real runs."""
    with served(folder, runs) as address:
        yield address


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
        page.on("dialog", lambda dialog: (wrong.append(f"{page.url}: {dialog.message}"), dialog.dismiss()))
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
