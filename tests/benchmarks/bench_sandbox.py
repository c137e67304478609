"""Sandboxes: how long a session takes, how many a second, and which limits hold, beside peers.

    make bench-sandbox                                    every backend that works here
    make bench-sandbox ARGS="--peers PYTHON"              and swe-rex, llm-sandbox, inspect-ai from another environment

A *session* is fresh: open, `x = 41`, `x + 1` (the state must have stayed), close. All figures of one call come from one
run, systems in turn. Latencies are medians in milliseconds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from machine import describe
from rich.console import Console
from rich.table import Table

from agentrl.sandbox import Backend, Limits, Sandbox
from agentrl.sandbox.pool import Pool
from agentrl.sandboxes import backend

HERE = Path(__file__).parent
LIMITS = Limits.model_validate({"seconds": 5})


async def session(made: Backend) -> tuple[float, float]:
    """Milliseconds to the second answer, and to the end of close."""
    begun = time.perf_counter()
    box = await made.open(LIMITS)
    await two_cells(box)
    answered = time.perf_counter()
    await box.close()
    return 1e3 * (answered - begun), 1e3 * (time.perf_counter() - begun)


async def two_cells(box: Sandbox) -> None:
    await box.exec("x = 41")
    result = await box.exec("x + 1")
    if result.value != "42":
        raise SystemExit(f"the session did not keep its state: {result}")


async def sustained(work: Callable[[], Awaitable[Any]], sessions: int, at_once: int) -> float:
    """Sessions a second with `at_once` in flight, destroying included."""
    left = iter(range(sessions))

    async def worker() -> None:
        for _ in left:
            await work()

    begun = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(at_once)))
    return sessions / (time.perf_counter() - begun)


async def measure(name: str, sessions: int) -> dict[str, float]:
    made = backend(name)
    await session(made)
    lives = [await session(made) for _ in range(15)]
    out = {
        "cold_to_second_answer_ms": statistics.median(first for first, _ in lives),
        "cold_life_ms": statistics.median(whole for _, whole in lives),
    }
    out["sessions_per_s_at_16"] = await sustained(lambda: session(made), sessions, 16)
    pool = Pool(made, LIMITS, warm=8, most=32)
    await pool.start()
    warm = []
    for _ in range(20):
        while pool.metrics()["ready"] < 8:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        begun = time.perf_counter()
        box = await pool.lease()
        await two_cells(box)
        warm.append(1e3 * (time.perf_counter() - begun))
        pool.give_back(box)
    out["warm_to_second_answer_ms"] = statistics.median(warm)

    async def leased() -> None:
        async with pool.leased() as box:
            await two_cells(box)

    out["pool_sessions_per_s_at_16"] = await sustained(leased, sessions, 16)
    box = await pool.lease()
    out["exec_ms"] = await median_ms(lambda: box.exec("x = 1"), 1000)
    out["reset_ms"] = await median_ms(box.reset, 50)
    boxes = [box, *[await pool.lease() for _ in range(31)]]
    begun = time.perf_counter()
    await asyncio.gather(*(many(each, 100) for each in boxes))
    out["execs_per_s_over_32"] = 3200 / (time.perf_counter() - begun)
    await pool.close()
    return out


async def many(box: Sandbox, count: int) -> None:
    for _ in range(count):
        await box.exec("x = 1")


async def median_ms(work: Callable[[], Awaitable[Any]], count: int) -> float:
    taken = []
    for _ in range(count):
        begun = time.perf_counter()
        await work()
        taken.append(1e3 * (time.perf_counter() - begun))
    return statistics.median(taken)


class Responsiveness:
    """How long `sh -c true` takes on this machine meanwhile, asked for ten times a second."""

    def __enter__(self) -> Responsiveness:
        self.taken: list[float] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._ask)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _ask(self) -> None:
        while not self._over.wait(0.1):
            begun = time.perf_counter()
            subprocess.run(["sh", "-c", "true"], check=True)
            self.taken.append(1e3 * (time.perf_counter() - begun))


async def attacked(name: str) -> dict[str, Any]:
    """Run the attack suite's programs one after another and watch the host."""
    sys.path.insert(0, str(HERE.parent / "sandboxes"))
    from attacks import ALL

    limits = Limits.model_validate(
        {"seconds": 2, "memory_mb": 192, "processes": 48, "disk_mb": 16, "inodes": 1000, "read_mb": 16}
    )
    made, odd = backend(name), []
    with Responsiveness() as host:
        for attack in ALL:
            box = await made.open(limits)
            result = await (box.shell if attack.shell else box.exec)(attack.code)
            said = f"{result.stdout}{result.stderr}{result.value}"
            if result.status not in attack.ends or (attack.forbidden and attack.forbidden in said):
                odd.append(f"{attack.name}: {result.status}")
            await box.close()
    await made.close()
    return {
        "programs": len(ALL),
        "not_contained": odd,
        "host_ms_median": statistics.median(host.taken),
        "host_ms_p99": sorted(host.taken)[int(0.99 * (len(host.taken) - 1))],
        "host_ms_worst": max(host.taken),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", default="bubblewrap,docker")
    parser.add_argument("--sessions", type=int, default=100)
    parser.add_argument("--peers", help="the Python of an environment with swe-rex, llm-sandbox and inspect-ai")
    parser.add_argument("--no-attacks", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    console = Console()
    report: dict[str, Any] = {"ours": {}, "attacks": {}, "peers": {}}
    for name in given.backends.split(","):
        if why := asyncio.run(backend(name).missing()):
            console.print(f"{name}: {why}")
            continue
        report["ours"][name] = asyncio.run(measure(name, given.sessions))
        if not given.no_attacks:
            report["attacks"][name] = asyncio.run(attacked(name))
    if given.peers:
        for system in (
            "swe-rex local",
            "swe-rex docker",
            "llm-sandbox docker",
            "inspect-ai local",
            "inspect-ai docker",
        ):
            words = [given.peers, str(HERE / "peers" / "sandboxes.py"), system]
            done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=600)
            lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
            report["peers"][system] = json.loads(lines[-1]) if lines else {"failed": last(done.stderr)}
    show(console, report)
    if given.json:
        given.json.write_text(json.dumps(report | {"machine": describe()}, indent=2) + "\n")


def last(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1][:200] if lines else "it said nothing"


def show(console: Console, report: dict[str, Any]) -> None:
    table = Table(title="sandboxes")
    table.add_column("")
    for name in report["ours"]:
        table.add_column(name, justify="right")
    for figure in next(iter(report["ours"].values()), {}):
        table.add_row(figure, *(f"{facts[figure]:.2f}" for facts in report["ours"].values()))
    for figure in ("host_ms_median", "host_ms_p99", "host_ms_worst"):
        if report["attacks"]:
            table.add_row(f"attacks: {figure}", *(f"{facts[figure]:.1f}" for facts in report["attacks"].values()))
    console.print(table)
    for name, facts in report["attacks"].items():
        odd = ", ".join(facts["not_contained"]) or "none"
        console.print(f"{name}: {facts['programs']} hostile programs, not contained: {odd}")
    if report["peers"]:
        peers = Table(title="peers: the same session")
        for title in ("", "life ms", "sessions/s at 16", "keeps state", "limits that held"):
            peers.add_column(title)
        for system, facts in report["peers"].items():
            if "failed" in facts:
                peers.add_row(system, f"did not run: {facts['failed']}")
            else:
                rate = facts["sessions_per_s"]
                peers.add_row(
                    system,
                    f"{facts['life_ms']:.0f}",
                    "–" if rate is None else f"{rate:.1f}",
                    "yes" if facts["keeps_state"] else "no",
                    ", ".join(facts["limits"]) or "none",
                )
        console.print(peers)


if __name__ == "__main__":
    main()
