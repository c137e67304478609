"""Folders that are not as they should be, in the browser: each opens as far as it can and says what is missing."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from agentrl.store import StoreReader
from agentrl.store.key import EpisodeKey

sync_api = pytest.importorskip("playwright.sync_api", reason="the pages' tests need playwright")
Open = Callable[..., Any]
ID = "rl-12/orders-0317/0"

LOCKED = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-dac_override,-dac_read_search"]


@pytest.fixture(scope="module")
def broken(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Copies of a run, each with another damage."""
    out = tmp_path_factory.mktemp("broken")
    for name in ("cut", "noindex", "badindex", "nosegments", "newer", "newindex", "locked", "bitrot"):
        shutil.copytree(folder / "desk", out / name)
    (out / "cut/summary.json").unlink()
    with (out / "cut/metrics.jsonl").open("a") as lines:
        lines.write('{"stage": "rl", "st')
    (out / "noindex/index.sqlite").unlink()
    (out / "badindex/index.sqlite").write_bytes(b"no database" * 1000)
    shutil.rmtree(out / "nosegments/seg")
    info = (out / "newer/run.json").read_text().replace('"config_version": 1', '"config_version": 7, "moon": "full"')
    (out / "newer/run.json").write_text(info)
    with sqlite3.connect(out / "newindex/index.sqlite") as index:
        index.execute("PRAGMA user_version = 99")
    segment = next((out / "bitrot/seg").glob("*.bin"))
    data = bytearray(segment.read_bytes())
    with StoreReader(folder / "desk") as reader:
        (at, length), *_ = reader._rows("SELECT offset, length FROM trajectories WHERE id = ?", ID)
    data[at + length - 20 : at + length - 10] = b"\xff" * 10
    segment.write_bytes(bytes(data))
    (out / "photos").mkdir()
    (out / "photos/cat.jpg").write_bytes(b"no cat")
    for path in [out / "locked", *(out / "locked").rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield out
    for path in [out / "locked", *(out / "locked").rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)


@pytest.fixture(scope="module")
def base(broken: Path, serving: Callable[..., Any]) -> Iterator[str]:
    """A server of its own, which may not write where the folders' modes forbid it, also when it is root's."""
    names = ("cut", "noindex", "badindex", "nosegments", "newer", "newindex", "locked", "bitrot", "photos")
    before: list[str] = []
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root may write anywhere, and there is no setpriv to take that from the server")
        before = LOCKED
    with serving(*[broken / name for name in names], before=before) as address:
        yield address


def words(page: Any) -> str:
    return str(page.locator("main").inner_text())


def open_run(see: Open, name: str, more: str = "") -> Any:
    return see(f"/r/{name}{more}")


@pytest.mark.parametrize(
    "name, said",
    [
        ("cut", "the run was cut off: it wrote no summary.json"),
        ("noindex", "index.sqlite is missing, so that no trajectory can be listed"),
        ("badindex", "damaged"),
        ("nosegments", "missing or cut short in seg/: main-0.bin"),
        ("newer", "made by a newer version of agentrl (configuration schema 7, this one knows 1)"),
        ("newindex", "has format 99"),
        ("photos", "holds no run: none of run.json"),
    ],
)
def test_a_folder_says_what_is_missing(see: Open, name: str, said: str) -> None:
    page = see("/")
    row = page.locator("tbody tr", has=page.get_by_role("link", name="desk" if name != "photos" else "photos")).filter(
        has=page.locator(f"a[href='#/r/{name}']")
    )
    row.locator(".tag.warn", has_text="problem").wait_for()
    page = open_run(see, name)
    page.locator(".problem", has_text=said).wait_for()
    if name != "photos":
        assert page.get_by_role("slider", name="Reward", exact=True).count() == 1
        page.get_by_role("heading", name="Configuration").click()
        assert page.get_by_text("estimator: {type: grpo}").is_visible()
    else:
        assert page.get_by_text("No numbers yet").is_visible()
    for other in ("/rollouts", "/live", f"/t?id={ID}", f"/group?id={ID[:-2]}", f"/tree?id={ID[:-2]}"):
        more = open_run(see, name, other)
        more.wait_for_load_state("networkidle")
        assert "unexpected" not in words(more) and "undefined" not in words(more)


def test_what_can_be_read_is_shown(see: Open) -> None:
    for name in ("cut", "newer"):
        page = open_run(see, name, f"/t?id={ID}")
        page.get_by_role("article", name="Tool call python").wait_for()
    page = open_run(see, "nosegments", "/rollouts")
    page.locator("tbody tr[aria-rowindex]").first.wait_for()
    page.keyboard.press("Enter")
    page.get_by_role("alert").wait_for()
    assert "seg" in words(page) or "missing" in words(page)
    page = open_run(see, "bitrot", f"/t?id={ID}")
    page.get_by_role("alert").wait_for()
    assert "damaged" in words(page) or "checksum" in words(page)
    page = open_run(see, "bitrot", "/t?id=rl-12/orders-0317/1")
    page.get_by_role("article", name="Tool call refunds").wait_for()
    page = open_run(see, "noindex", "/rollouts")
    page.get_by_role("alert").wait_for()
    assert "index.sqlite is missing" in words(page)


def test_a_protected_run_is_read_only_and_says_why(see: Open, broken: Path, base: str) -> None:
    before = sorted(str(p) for p in (broken / "locked").rglob("*"))
    page = see("/")
    row = page.locator("tr", has=page.locator("a[href='#/r/locked']"))
    row.get_by_text("read-only").wait_for()
    page = open_run(see, "locked")
    page.get_by_text("The folder is write-protected").wait_for()
    assert page.locator(".problem").count() == 0
    page = open_run(see, "locked", f"/t?id={ID}")
    page.get_by_role("article", name="Tool call python").wait_for()
    assert page.get_by_text("Read-only.").is_visible()
    replay = page.get_by_role("button", name="Replay")
    assert replay.get_attribute("aria-disabled") == "true" and "write-protected" in replay.get_attribute("title")
    replay.click(force=True)
    page.keyboard.press("R")
    page.keyboard.press("F")
    page.get_by_role("button", name="fork").first.click(force=True)
    assert page.get_by_role("dialog").count() == 0
    page.keyboard.press("t")
    page.locator(".tk").first.wait_for()
    # The server refuses, too, whatever a page asks.
    refused = page.evaluate(
        """async id => { const run = (await (await fetch('api/runs')).json()).runs
          .find(r => r.folder.endsWith('locked')).run
        const reply = await fetch('api/replay', {method: 'POST', headers: {'content-type': 'application/json'},
          body: JSON.stringify({run, id, mode: 'check'})}); return [reply.status, (await reply.json()).error] }""",
        ID,
    )
    assert refused[0] == 409 and "write-protected" in refused[1]
    assert sorted(str(p) for p in (broken / "locked").rglob("*")) == before


def test_half_written_runs_are_live_ones(see: Open, broken: Path, gallery: ModuleType) -> None:
    """A run that a crash cut off in the middle of an episode: its turns in flight can still be read."""
    path = broken / "cut"
    desk = gallery.Desk(3)
    script = [gallery.Step("", "Halfway."), gallery.Step("", "Never said.")]
    made = desk.play("rl-13/t", "0", "Say.", script, score={"answer": 1.0}, success=True)
    code = (
        "import os, pickle, sys; from pathlib import Path; from agentrl.store import StoreWriter\n"
        "key, turn = pickle.load(sys.stdin.buffer)\n"
        "StoreWriter(Path(sys.argv[1])).turn(key, 0, turn); os._exit(9)"
    )
    import pickle

    subprocess.run(
        [sys.executable, "-c", code, str(path)],
        input=pickle.dumps((EpisodeKey("rl", 13, "train", "t", 0), made.turns[0])),
        check=False,
    )
    page = open_run(see, "cut", "/t?id=rl-13/t/0")
    page.get_by_text("Halfway.").wait_for()
