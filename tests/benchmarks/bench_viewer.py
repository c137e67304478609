"""The viewer's server: pages of long lists, search, and what a live run costs those who watch it.

    python tests/benchmarks/bench_viewer.py [--n 100000] [--rows 1000000] [--json FILE]

"stored" trajectories (--n) are written by the store's writer, search included: 3 turns and 60 tokens, words of a
vocabulary of 30 000 by Zipf's law. "indexed" ones (--rows) are index rows without segments, which lists and
searches never open (snippets do, so they are left out there). Every request goes through the application, JSON
included; the worst of the repeats is the first one, before the index's pages are in memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from bench_store import episode
from machine import describe
from starlette.testclient import TestClient

from agentrl.store import EpisodeKey, StoreReader, StoreWriter, index
from agentrl.viewer.app import make_app
from agentrl.viewer.live import Watch
from agentrl.viewer.runs import Run

VOCABULARY = 30_000
EARLY = 195  # steps whose rewards are low
QUERIES: dict[str, dict[str, Any]] = {
    "newest": {"desc": 1},
    "oldest of a stage": {"stage": "rl-eval"},
    "newest of a rare outcome": {"outcome": "failed", "desc": 1},
    "by reward": {"sort": "reward", "desc": 1},
    "by seconds": {"sort": "seconds", "desc": 1},
    "by cost, a step": {"sort": "tool_cost", "step": 7},
    "by calls, failures of a split": {"sort": "n_calls", "success": 0, "split": "train"},
    "by tokens, successes from step 10": {"sort": "n_tokens", "success": 1, "step_min": 10},
    "by seconds, rare stage": {"sort": "seconds", "stage": "rl-eval", "desc": 1},
    "by reward, errors only": {"sort": "reward", "errors": 1},
    "by reward, cut off and won": {"sort": "reward", "success": 1, "outcome": "truncated", "desc": 1},
    "by seconds, done and lost": {"sort": "seconds", "success": 0, "outcome": "completed"},
    "by reward, a reason that is absent": {"sort": "reward", "why": "deadline", "desc": 1},
    "by cost, high rewards of early steps": {"sort": "tool_cost", "reward_min": 0.85, "step_max": EARLY - 1},
    "late, some reward": {"reward_min": 0.2, "step_min": 3500},
    "a task": {"task": "t17"},
    "search, a rare word": {"q": "w29000"},
    "search, a common word": {"q": "w3"},
    "search, two words, by reward": {"q": "w40 w55", "sort": "reward", "desc": 1},
    "search, in 9 of 10, by reward": {"q": "w0 ", "sort": "reward", "desc": 1},
    "search, in 9 of 10, a task": {"q": "w0 ", "task": "t17"},
    "search, in 9 of 10, a late step": {"q": "w0 ", "step": 380},
    "search, in 9 of 10, a rare outcome": {"q": "w0 ", "outcome": "failed", "desc": 1},
    "search, in 9 of 10, none of early steps": {"q": "w0 ", "reward_min": 0.85, "step_max": EARLY - 1},
}


def words(rng: np.random.Generator, n: int) -> list[str]:
    """`n` texts of 24 words."""
    share = 1 / np.arange(1, VOCABULARY + 1)
    drawn = rng.choice(VOCABULARY, size=(n, 24), p=share / share.sum())
    return [" ".join([f"w{word}" for word in row]) for row in drawn.tolist()]


def indexed(folder: Path, n: int) -> float:
    """Fill an index with `n` rows; returns seconds."""
    rng = np.random.default_rng(0)
    (folder / "seg").mkdir(parents=True, exist_ok=True)
    connection = index.connect(folder)
    begun = time.perf_counter()
    for start in range(0, n, 10_000):
        size = min(10_000, n - start)
        reward, seconds, luck = rng.random(size), rng.exponential(2.0, size), rng.random(size)
        calls, tokens = rng.integers(0, 9, size), rng.integers(20, 2000, size)
        rows = []
        for i in range(size):
            at = start + i
            step, task = at // 256, at % 997
            stage = "rl-eval" if luck[i] < 0.02 else "rl"
            failed = luck[i] > 0.9995
            earned = float(reward[i]) * (0.8 if step < EARLY else 1.0)
            ending = ("failed", "policy") if failed else ("completed", None) if earned > 0.4 else ("truncated", "turns")
            rows.append(
                (
                    f"{stage}-{step}/t{task}/{at}", 0, stage, step, "test" if stage == "rl-eval" else "train",
                    f"{stage}-{step}/t{task}", f"t{task}", "e65d0d125a2026f2", "policy", None,
                    *ending, earned,
                    earned > 0.4, int(calls[i]) + 1, int(calls[i]), int(tokens[i]), int(luck[i] > 0.99),
                    float(calls[i]), 0.0, float(seconds[i]), "", -1, 0, 0, 0, "main-0.bin", 0, 0,
                )
            )  # fmt: skip
        connection.execute("BEGIN")
        index.insert(connection, trajectories=rows, texts=words(rng, size))
        connection.execute("COMMIT")
    connection.close()
    return time.perf_counter() - begun


def stored(folder: Path, n: int) -> float:
    """Write `n` trajectories; returns trajectories per second of CPU."""
    rng = np.random.default_rng(1)
    cpu = 0.0
    with StoreWriter(folder) as store:
        for step in range(0, n, 256):
            made = [
                episode(rng, EpisodeKey("rl", step // 256, "train", f"t{(step + i) % 997}", i), 3, 60)
                for i in range(min(256, n - step))
            ]
            begun = time.process_time()
            store.add(made, step=step // 256, stage="rl")
            cpu += time.process_time() - begun
    return n / cpu


def pages(folder: Path, repeats: int, queries: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    out = {}
    with TestClient(make_app([folder]), base_url="http://127.0.0.1") as client:
        client.get("/api/runs")
        for name, asked in queries.items():
            times = []
            rows = 0
            for _ in range(repeats):
                begun = time.perf_counter()
                found = client.get("/api/trajectories", params={"run": "r0", **asked})
                times.append(1e3 * (time.perf_counter() - begun))
                rows = len(found.json()["entries"])
            following = found.json()["next"]
            begun = time.perf_counter()
            if following:
                client.get("/api/trajectories", params={"run": "r0", **asked, "after": following})
            second = 1e3 * (time.perf_counter() - begun)
            out[name] = {
                "median_ms": statistics.median(times), "worst_ms": max(times), "next_ms": second, "rows": float(rows),
            }  # fmt: skip
    with StoreReader(folder) as reader:
        for name, ask in (("count", reader.count), ("facets", reader.facets)):
            times = []
            for _ in range(repeats):
                begun = time.perf_counter()
                ask()
                times.append(1e3 * (time.perf_counter() - begun))
            out[name] = {"median_ms": statistics.median(times), "worst_ms": max(times)}
    return out


def live(folder: Path, seconds: float, rate: int) -> dict[str, float]:
    """A run that writes `rate` trajectories a second: how late a page hears of them, and what lists cost meanwhile."""
    rng = np.random.default_rng(2)
    pool = [
        [episode(rng, EpisodeKey("rl", step, "train", f"t{i}", 0), 3, 60) for i in range(rate // 4)]
        for step in range(int(4 * seconds))
    ]
    written: dict[int, float] = {}
    with StoreWriter(folder) as store:
        store.add(pool[0], step=0, stage="rl")
        watch = Watch(Run(0, folder), 0)
        watch.look()
        done = threading.Event()

        def write() -> None:
            begun = time.perf_counter()
            total = len(pool[0])
            for step, made in enumerate(pool[1:], 1):
                time.sleep(max(0.0, begun + step / 4 - time.perf_counter()))
                store.add(made, step=step, stage="rl")
                total += len(made)
                written[total] = time.perf_counter()
            done.set()

        late: list[float] = []
        times: list[float] = []
        thread = threading.Thread(target=write)
        thread.start()
        with TestClient(make_app([folder]), base_url="http://127.0.0.1") as client:
            while not done.is_set():
                time.sleep(0.5)  # as the server does between looks
                for name, body in watch.look():
                    if name == "entries":
                        seen, now = int(body["last"].partition(":")[2]), time.perf_counter()
                        late += [now - at for total, at in list(written.items()) if total <= seen]
                        for total in [total for total in written if total <= seen]:
                            del written[total]
                begun = time.perf_counter()
                client.get("/api/trajectories", params={"run": "r0", "sort": "reward", "desc": 1})
                times.append(1e3 * (time.perf_counter() - begun))
        thread.join()
    return {
        "per_second": rate, "late_s_median": statistics.median(late), "late_s_worst": max(late),
        "page_ms_median": statistics.median(times), "page_ms_worst": max(times),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=100_000, help="trajectories to store")
    parser.add_argument("--rows", type=int, default=1_000_000, help="index rows")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path, default=None, help="also write the figures here")
    asked = parser.parse_args()
    result: dict[str, Any] = {"machine": describe()}
    say = sys.stdout.write
    plain = {name: query for name, query in QUERIES.items() if "q" not in query}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result["live"] = live(folder / "live", 15, 500)
        say("live  " + "  ".join(f"{key} {value:.3g}" for key, value in result["live"].items()) + "\n")
        rate = stored(folder / "stored", asked.n)
        result["stored"] = {"trajectories_per_cpu_s": rate, "pages": pages(folder / "stored", asked.repeats, plain)}
        say(f"stored {asked.n}: {rate:.0f} trajectories a CPU second\n")
        for rows in (100_000, asked.rows):
            place = folder / f"rows{rows}"
            took = indexed(place, rows)
            from agentrl.viewer import views

            keep, views.snippets = views.snippets, lambda _, entries, *__: [None] * len(entries)  # nothing to open
            found = pages(place, asked.repeats, QUERIES)
            views.snippets = keep
            result[f"indexed {rows}"] = {"insert_us": 1e6 * took / rows, "pages": found}
            size = sum(path.stat().st_size for path in place.glob("index.sqlite*")) / rows
            say(f"indexed {rows}: {1e6 * took / rows:.0f} us a row with its search text, {size:.0f} bytes\n")
            for query, row in found.items():
                say(f"  {query:36}" + "  ".join(f"{key} {value:.4g}" for key, value in row.items()) + "\n")
        for query, row in result["stored"]["pages"].items():
            say(f"  stored: {query:28}" + "  ".join(f"{key} {value:.4g}" for key, value in row.items()) + "\n")
    if asked.json is not None:
        asked.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
