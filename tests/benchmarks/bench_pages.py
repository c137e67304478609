"""The viewer's pages in a browser: long lists, long trajectories, a live run, and output of 10 MB.

    python tests/benchmarks/bench_pages.py [--repeats 5] [--rows 100000,1000000] [--folder FOLDER] [--json FILE]

Needs playwright and Debian's chromium. Runs are written by the store's writer: one of 100 000 short trajectories (a
list of a million is index rows under some stored ones, as in bench_viewer.py), one of 32 000 tokens with credit, one
with a tool result of 10 MB, and one that a process of its own writes at 500 trajectories a second, turns ahead of
them included, while the browser looks on. `agentrl view` is its own process, started anew for each repetition of the
lists; every repetition has a browser with a fresh profile.

Figures are taken inside the browser (probe.js): the presentation time of the first row or token (Element Timing), input
delay and duration (Event Timing and the events' own stamps), gaps between animation frames, and whether tokens stand
in the view in each of them. A row's age is the time between its writer's stamp, taken before it is stored, and a frame
in which it is the newest row of the page. --folder keeps the runs for the next call.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import bench_store
import numpy as np
from bench_store import episode, varied
from bench_viewer import indexed
from machine import describe, load_average

from agentrl.store import EpisodeKey, RunFolder, StoreWriter
from agentrl.trajectory import Group, Member, ToolCall, ToolResult, ToolUse, Trajectory

HERE = Path(__file__).parent
CONFIG = (HERE.parents[1] / "configs/quickstart.yaml").read_text(encoding="utf-8")
CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
ROW, TOKEN = "tbody tr:not(.pad) td.task a", ".toks .tk-flow"
LONG, HUGE = "rl-0/long/0", "rl-0/huge/0"
RATE, BATCHES = 500, 10  # trajectories, and calls of the writer's add(), a second

# (name of the figure, its bar in milliseconds)
BARS = {
    "first page on screen": 1000, "token view, key to tokens": 300, "token view, cold link": 300,
    "metric switch": 150, "longest blank": 100, "input delay": 100, "newest row's age": 2000,
}  # fmt: skip


# -- runs ---------------------------------------------------------------------------------------------


def pieces(ids: Any) -> list[str]:
    """Made-up text of token ids: words, a line end now and then."""
    return ["\n" if int(i) % 40 == 0 else f" {np.base_repr(int(i) * 7919 % 100_003, 36).lower()}" for i in ids]


def long_one(tokens: int = 32_000, turns: int = 24) -> Trajectory:
    return episode(np.random.default_rng(5), EpisodeKey("rl", 0, "train", "long", 0), turns, tokens)


def huge_one(size: int = 10_000_000) -> Trajectory:
    """An episode whose second tool result has `size` characters, lines of 80."""
    made = episode(np.random.default_rng(6), EpisodeKey("rl", 0, "train", "huge", 0), 4, 400)
    use = ToolUse(ToolCall("dump", {"table": "orders"}), ToolResult(("A7 " * 26 + "\n") * (size // 79), seconds=0.5))
    turns = list(made.turns)
    turns[1] = dataclasses.replace(turns[1], tools=(use,), observation="")
    return dataclasses.replace(made, turns=tuple(turns))


def credited(made: Trajectory) -> Group:
    """The trajectory's group with advantages, weights and old log-probs, so that all colours have something to show."""
    rng = np.random.default_rng(7)
    member = Member(made)
    member.advantages = member.spread([float(value) for value in rng.normal(size=len(made.turns))])
    member.weights = member.spread([1.0] * len(made.turns))
    member.arrays["old"] = [turn.logprobs + rng.normal(0, 0.06, turn.n_sampled) for turn in made.turns]
    member.arrays["age"] = member.spread([float(i % 3) for i in range(len(made.turns))])
    return Group(made.group_id, made.task_id, [member], 0)


def make_long(folder: Path) -> None:
    with RunFolder.create(folder, CONFIG, config_version=1), StoreWriter(folder, pieces=pieces) as store:
        made = long_one()
        store.add([made, huge_one()], step=0, stage="rl")
        store.credit(credited(made), step=0)


def make_list(folder: Path, n: int) -> None:
    """A run of `n` trajectories, of which the store's writer wrote all up to 100 000, else the newest 2 000."""
    with RunFolder.create(folder, CONFIG, config_version=1):
        below = 0 if n <= 100_000 else n - 2000
        if below:
            indexed(folder, below)
        rng, first = np.random.default_rng(1), below // 256 + 1
        with StoreWriter(folder, pieces=pieces) as store:
            for start in range(0, n - below, 256):
                step = first + start // 256
                size = min(256, n - below - start)
                made = [episode(rng, EpisodeKey("rl", step, "train", f"t{i}", 0), 3, 60) for i in range(size)]
                luck = rng.random(size)
                made = [
                    dataclasses.replace(each, turns=(dataclasses.replace(each.turns[0], error="made up"),))
                    if luck[i] < 0.01
                    else each
                    for i, each in enumerate(made)
                ]
                store.add(made, step=step, stage="rl")
        line = {"stage": "rl", "step": first, "time": 1.0, "reward": 0.5, "success": 0.5}
        (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")


def write_live(folder: Path) -> None:
    """The writer's process: `RATE` trajectories a second in `BATCHES` calls, their turns ahead of them, stamped; until
    it is told to end (SIGTERM)."""
    told: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    bench_store.words = varied(np.random.default_rng(9))[:2000]
    rng = np.random.default_rng(2)
    key = EpisodeKey("rl", 0, "train", "t", 0)
    pool = [episode(rng, key, 3, 60) for _ in range(2000)]
    size, made, late = RATE // BATCHES, 0, 0.0
    with RunFolder.create(folder, CONFIG, config_version=1), StoreWriter(folder, pieces=pieces) as store:
        sys.stdout.write("begun\n")
        sys.stdout.flush()
        begun = time.perf_counter()
        for call in itertools.count():
            if told:
                break
            wait = begun + call / BATCHES - time.perf_counter()
            late = max(late, -wait)
            time.sleep(max(0.0, wait))
            step, batch = made // 256, []
            stamp = int(1e3 * time.time())
            for i in range(size):
                own = EpisodeKey("rl", step, "train", f"t{stamp}-{i}", 0)
                each = pool[(made + i) % len(pool)]
                for number, turn in enumerate(each.turns):
                    store.turn(own, number, turn)
                batch.append(dataclasses.replace(each, id=own.id, group_id=own.group_id, task_id=own.task_id))
            store.add(batch, step=step, stage="rl")
            made += size
            if call % BATCHES == 0:
                line = {"stage": "rl", "step": step, "time": time.time(), "reward": 0.5, "success": 0.4, "tokens": 60.0}
                with (folder / "metrics.jsonl").open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps(line) + "\n")
        took = time.perf_counter() - begun
    sys.stdout.write(json.dumps({"per_second": made / took, "late_s_worst": late, "seconds": took}) + "\n")


# -- the server and the browser ------------------------------------------------------------------------


@contextlib.contextmanager
def viewer(folder: Path) -> Iterator[str]:
    """`agentrl view` as its own process; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "agentrl", "view", str(folder), "--port", str(port), "--no-browser"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                with socket.create_connection(("127.0.0.1", port), 1):
                    break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    sys.exit("agentrl view did not start; run it by hand on --folder to see why")
                time.sleep(0.05)
        yield address
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=30)


@contextlib.contextmanager
def page_of(playwright: Any, want: str = "") -> Iterator[Any]:
    """A page of a new browser with a fresh profile, watched by the probe."""
    browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
    try:
        page = browser.new_context(viewport={"width": 1440, "height": 900}).new_page()
        page.add_init_script(path=HERE / "probe.js")
        if want:
            page.add_init_script(f"window.__probe.want({json.dumps(want)})")
        yield page
    finally:
        browser.close()


def at(run: str, page: str, **query: Any) -> str:
    asked = "&".join(f"{name}={quote(str(value))}" for name, value in query.items())
    return f"#/r/{run}/{page}?{asked}"


def want(page: Any, selector: str) -> None:
    page.evaluate("selector => window.__probe.want(selector)", selector)


def shown(page: Any, since_press: bool = False) -> float:
    """When what was wanted came on screen: since navigation, or since the last key or click."""
    page.wait_for_function("() => window.__probe.shown() !== null", timeout=30_000)
    return float(page.evaluate(f"() => window.__probe.shown() - {'window.__probe.pressed()' if since_press else 0}"))


def take(page: Any) -> dict[str, list[Any]]:
    """What the probe noted since it was last asked."""
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => setTimeout(done, 50)))")
    return dict(page.evaluate("() => window.__probe.take()"))


class Figures:
    """Values by name, one a repetition; several values of a repetition count as their worst."""

    def __init__(self) -> None:
        self.all: dict[str, list[float]] = {}

    def add(self, name: str, value: float | Sequence[float]) -> None:
        values = [value] if isinstance(value, int | float) else list(value)
        if values:
            self.all.setdefault(name, []).append(max(values))

    def input(self, what: str, seen: dict[str, list[Any]]) -> None:
        """Delays and durations of one repetition's input, and its frames."""
        self.add(f"{what}: input delay", [*seen["delays"], *(event["delay"] for event in seen["events"])])
        self.add(f"{what}: input to next paint", [16.0, *(event["duration"] for event in seen["events"])])
        self.add(f"{what}: longest frame", seen["gaps"])

    def lines(self, known: Collection[str]) -> Iterator[str]:
        """A line for each that is not known yet."""
        for name, values in ((name, values) for name, values in self.all.items() if name not in known):
            bar = next((limit for part, limit in BARS.items() if part in name), None)
            said = "" if bar is None else f"  bar {bar}  {'met' if max(values) <= bar else 'MISSED'}"
            each = " ".join(f"{value:.0f}" for value in values)
            yield f"{name:58} median {statistics.median(values):7.0f}  worst {max(values):7.0f}{said}  [{each}]"


# -- what is measured ------------------------------------------------------------------------------------


def lists(playwright: Any, folder: Path, run: str, repeats: int, figures: Figures) -> None:
    """The first page from a cold link, on a server that has answered nothing yet; then sorting and filtering."""
    for _ in range(repeats):
        with viewer(folder) as address, page_of(playwright, ROW) as page:
            page.goto(f"{address}/{at(run, 'rollouts')}")
            figures.add(f"{run}: first page on screen, new server", shown(page))
            for name, press in (
                ("sort by reward", lambda: page.get_by_role("button", name="Reward").click()),
                ("filter by errors", lambda: page.get_by_label("with errors").click()),
            ):
                page.wait_for_timeout(300)
                want(page, ROW)
                press()
                figures.add(f"{run}: {name}, click to rows", shown(page, since_press=True))
            with page_of(playwright, ROW) as again:
                again.goto(f"{address}/{at(run, 'rollouts')}")
                figures.add(f"{run}: first page on screen, warm server", shown(again))


def tokens(playwright: Any, folder: Path, repeats: int, figures: Figures) -> None:
    with viewer(folder) as address:
        for _ in range(repeats):
            with page_of(playwright, TOKEN) as page:
                page.goto(f"{address}/{at('long', 't', id=LONG, view='tokens')}")
                figures.add("token view, cold link to tokens", shown(page))
            with page_of(playwright) as page:
                page.goto(f"{address}/{at('long', 't', id=LONG)}")
                page.locator("#turn-0").wait_for()
                page.wait_for_timeout(500)
                want(page, TOKEN)
                page.keyboard.press("t")
                figures.add("token view, key to tokens", shown(page, since_press=True))
                page.wait_for_timeout(300)
                take(page)
                durations = []
                for key in "123456780":
                    page.keyboard.press(key)
                    seen = take(page)
                    if key in "123458":  # those that recolour something here
                        durations += [*seen["recoloured"], *(e["duration"] for e in seen["events"])]
                figures.add("metric switch", durations)
                page.keyboard.press("2")
                scrolling(page, figures)


def scrolling(page: Any, figures: Figures) -> None:
    """Through the whole trajectory three ways; the pointer stands over the tokens."""
    page.evaluate("() => window.__probe.watch('.toks')")
    box = page.locator(".toks").bounding_box()
    strip = page.locator(".map").bounding_box()
    middle = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)

    def wheel() -> None:
        page.mouse.move(*middle)
        for _ in range(60):
            page.mouse.wheel(0, 480)
        for _ in range(20):
            page.mouse.wheel(0, -960)

    def keys() -> None:
        page.locator(".toks").focus()
        for _ in range(30):
            page.keyboard.press("PageDown")

    def jumps() -> None:
        for part in (0.1, 0.9, 0.3, 0.7, 0.5, 0.98, 0.02, 0.6):
            page.mouse.click(strip["x"] + 20, strip["y"] + part * strip["height"])
        page.mouse.down()
        for part in range(10, 90, 4):
            page.mouse.move(strip["x"] + 20, strip["y"] + part / 100 * strip["height"])
        page.mouse.up()

    for name, scroll in (("wheel", wheel), ("PageDown", keys), ("minimap", jumps)):
        page.evaluate("() => (document.querySelector('.toks').scrollTop = 0)")
        page.wait_for_timeout(200)
        take(page)
        scroll()
        page.wait_for_timeout(300)
        seen = take(page)
        figures.add(f"scroll by {name}: longest blank", [0.0, *seen["holes"]])
        figures.add(f"scroll by {name}: longest frame", seen["gaps"])
    page.evaluate("() => window.__probe.watch('#none')")


def huge(playwright: Any, folder: Path, repeats: int, figures: Figures) -> None:
    """An episode with 10 MB of tool output: opened by its link, read with keys and wheel, more of it asked for."""
    with viewer(folder) as address:
        for _ in range(repeats):
            with page_of(playwright, "#turn-0 pre") as page:
                page.goto(f"{address}/{at('long', 't', id=HUGE)}")
                figures.add("10 MB of output: turns on screen, cold link", shown(page))
                take(page)
                for key in ("j", "j", "w", "k", "j"):
                    page.keyboard.press(key)
                    page.wait_for_timeout(50)
                page.mouse.move(500, 500)
                for _ in range(10):
                    page.mouse.wheel(0, 300)
                figures.input("10 MB of output", take(page))
                more = page.get_by_role("button", name="more").first
                for _ in range(3):
                    more.click()
                    page.wait_for_timeout(100)
                figures.input("10 MB of output, 64 KB more three times", take(page))


def drive_list(page: Any) -> None:
    """Read, sort, filter and search as a hasty user does."""
    for _ in range(3):
        for key in ("j", "j", "j", "k", "PageDown"):
            page.keyboard.press(key)
            page.wait_for_timeout(60)
        page.mouse.move(700, 500)
        for _ in range(8):
            page.mouse.wheel(0, 400)
            page.wait_for_timeout(30)
        page.get_by_role("button", name="Reward").click()
        page.wait_for_timeout(300)
        page.get_by_label("Search in the text").click()
        page.keyboard.type("the order", delay=60)
        page.wait_for_timeout(400)
        page.keyboard.press("Escape")
        page.get_by_label("Search in the text").fill("")
        page.locator("h1").first.evaluate("() => document.activeElement.blur()")
        page.keyboard.press("n")
        page.wait_for_timeout(200)


def drive_live(page: Any) -> None:
    for _ in range(3):
        for key in ("j", "j", "k", "Space", "j", "Space"):
            page.keyboard.press(key)
            page.wait_for_timeout(80)
        page.mouse.move(700, 600)
        for _ in range(8):
            page.mouse.wheel(0, 200)
            page.wait_for_timeout(30)
        page.keyboard.press("D")
        page.wait_for_timeout(200)


def live(playwright: Any, folder: Path, repeats: int, figures: Figures) -> dict[str, float]:
    """A run at 500 trajectories a second, looked at by the list and by the live page."""
    words = [sys.executable, __file__, "--write", str(folder / "live")]
    writer = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    try:
        if writer.stdout.readline() != "begun\n":
            sys.exit("the writer's process failed; its error stands above")
        with viewer(folder) as address:
            time.sleep(3)
            for _ in range(repeats):
                for what, hash, first, row, drive in (
                    ("the list", at("live", "rollouts"), ROW, ROW, drive_list),
                    ("the live page", at("live", "live"), ".now dd", "[aria-label=Finished] td.id a", drive_live),
                ):
                    if writer.poll() is not None:
                        sys.exit("the writer's process ended before its time; its error stands above")
                    with page_of(playwright, first) as page:
                        page.goto(f"{address}/{hash}")
                        figures.add(f"live run, {what}: on screen", shown(page))
                        page.locator(row).first.scroll_into_view_if_needed()
                        page.wait_for_timeout(500)
                        take(page)
                        page.evaluate("row => window.__probe.follow(row)", row)
                        page.wait_for_timeout(4000)
                        for _ in range(10):
                            page.keyboard.press("j")
                            page.wait_for_timeout(100)
                        seen = take(page)
                        figures.add(f"live run, {what}: newest row's age", seen["ages"])
                        page.evaluate("() => window.__probe.follow('#none')")
                        drive(page)
                        both = take(page)
                        for name in ("delays", "events", "gaps"):
                            both[name] += seen[name]
                        figures.input(f"live run, {what}", both)
        writer.terminate()
        said, _ = writer.communicate(timeout=60)
        return dict(json.loads(said.splitlines()[-1]))
    finally:
        if writer.poll() is None:
            writer.kill()
            writer.wait(timeout=30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", default="100000,1000000", help="lengths of the lists")
    parser.add_argument("--only", default="lists,tokens,huge,live", help="which parts to measure")
    parser.add_argument("--folder", type=Path, default=None, help="where the runs are made, and kept for the next time")
    parser.add_argument("--json", type=Path, default=None, help="also write the figures here")
    parser.add_argument("--write", type=Path, default=None, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.write is not None:
        write_live(asked.write)
        return
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        sys.exit(
            "bench_pages.py needs playwright (pip install playwright) and Debian's chromium (apt install chromium)"
        )
    if not CHROMIUM.exists():
        sys.exit(f"bench_pages.py drives {CHROMIUM}, which is not there; run: apt install chromium")
    say = sys.stdout.write
    figures, parts = Figures(), set(asked.only.split(","))
    result: dict[str, Any] = {"machine": describe(), "repeats": asked.repeats}
    with contextlib.ExitStack() as stack:
        folder = asked.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        lengths = [int(n) for n in asked.rows.split(",")] if "lists" in parts else []
        for name, make, given in (
            *((f"rows{n}", make_list, (n,)) for n in lengths),
            *([("long", make_long, ())] if parts & {"tokens", "huge"} else []),
        ):
            if not (folder / "runs" / name / "run.json").is_file():
                begun = time.perf_counter()
                make(folder / "runs" / name, *given)
                say(f"made {name} in {time.perf_counter() - begun:.0f} s\n")
        loads: dict[str, list[float | None]] = {}

        def measure(part: str, work: Callable[[], Any]) -> Any:
            known, loads[part] = set(figures.all), [load_average()]
            found = work()
            loads[part].append(load_average())
            say(f"{part}: milliseconds, {asked.repeats} repetitions (of each its worst value); load before and after: ")
            say(" ".join(map(str, loads[part])) + "\n")
            for line in figures.lines(known):
                say(line + "\n")
            sys.stdout.flush()
            return found

        with sync_playwright() as playwright:
            runs = folder / "runs"
            for n in lengths:
                name = f"rows{n}"
                measure(name, functools.partial(lists, playwright, runs, name, asked.repeats, figures))
            if "tokens" in parts:
                measure("tokens", lambda: tokens(playwright, runs, asked.repeats, figures))
            if "huge" in parts:
                measure("huge", lambda: huge(playwright, runs, asked.repeats, figures))
            if "live" in parts:
                with tempfile.TemporaryDirectory(dir=asked.folder) as work:
                    writer = measure("live", lambda: live(playwright, Path(work), asked.repeats, figures))
                result["writer"] = writer
                say("the writer: " + "  ".join(f"{name} {value:.3g}" for name, value in writer.items()) + "\n")
        result["load"] = loads
    result["ms"] = figures.all
    if asked.json is not None:
        asked.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
