"""Many sessions, sandboxes killed at random, the Docker daemon restarted once: nothing may hang, nothing may leak, and
every failure must say whose it was.

    python tests/benchmarks/soak_sandbox.py bubblewrap
    python tests/benchmarks/soak_sandbox.py docker --restart-command 'systemctl restart docker'

A session leases a sandbox from the pool and runs three programs. One in twenty is killed from outside, half of those
while a program runs (its `Result` must say "died") and half while nothing does (the next call must raise `InfraError`).
A lease or a program that fails while the daemon is down must say so (`InfraError`), and is tried again.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import os
import random
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from agentrl.errors import InfraError
from agentrl.sandbox import Limits
from agentrl.sandbox.pool import Pool
from agentrl.sandboxes import backend, cgroup

LIMITS = Limits.model_validate({"seconds": 5})
HANGS = 60.0  # seconds after which a session counts as hung


def kill_from_outside(name: str) -> bool:
    """SIGKILL everything in the sandbox `name`; False where nothing was found."""
    found: list[int] = []
    for top in set(cgroup.parents().values()):
        if (top / name).is_dir():
            found += [int(pid) for pid in (top / name / "cgroup.procs").read_text().split()]
    if not found:
        done = subprocess.run(["docker", "kill", name], capture_output=True, check=False)
        return done.returncode == 0
    for pid in set(found):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return True


async def session(pool: Pool, rng: random.Random, down: asyncio.Event, counts: collections.Counter[str]) -> None:
    """One session; counts how it went."""
    how = rng.random()
    box = await pool.lease()
    try:
        if (await box.exec("x = 1")).status != "ok":
            raise InfraError("the first program did not run")
        if how < 0.025:
            running = asyncio.ensure_future(box.exec("import time; time.sleep(4)"))
            await asyncio.sleep(0.05)
            killed = await asyncio.to_thread(kill_from_outside, box.name)
            result = await running
            right = result.status == "died" and result.lost
            counts["killed while it ran: " + ("died" if right else f"WRONG: {result.status}, killed {killed}")] += 1
            return
        if how < 0.05:
            await asyncio.to_thread(kill_from_outside, box.name)
            await asyncio.sleep(0.3)
            try:
                await box.exec("x")
            except InfraError:
                counts["killed idle: infra"] += 1
            else:
                counts["killed idle: WRONG: it answered"] += 1
            return
        for _ in range(2):
            result = await box.exec("x")
            if result.value != "1":
                counts[f"not killed: WRONG: {result.status}"] += 1
                return
        counts["ok"] += 1
    finally:
        pool.give_back(box)


async def soak(name: str, sessions: int, restart: str | None) -> collections.Counter[str]:
    made = backend(name)
    counts: collections.Counter[str] = collections.Counter()
    down = asyncio.Event()
    rng = random.Random(0)
    async with Pool(made, LIMITS, warm=8, most=32, patience=120) as pool:
        left = iter(range(sessions))

        async def worker() -> None:
            for _ in left:
                for _ in range(10):
                    try:
                        await asyncio.wait_for(session(pool, rng, down, counts), HANGS)
                        break
                    except InfraError as error:
                        counts["tried again: the daemon" if down.is_set() else f"infra: {str(error)[:80]}"] += 1
                    except TimeoutError:
                        counts["HUNG"] += 1
                        break

        async def restarts() -> None:
            while sum(counts.values()) < sessions // 2:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
            down.set()
            await asyncio.to_thread(subprocess.run, restart, shell=True, check=True)
            await asyncio.sleep(20)
            down.clear()

        extra = [asyncio.ensure_future(restarts())] if restart else []
        await asyncio.gather(*(worker() for _ in range(16)))
        await asyncio.gather(*extra)
        counts["leases that waited for a start"] = pool.stats.failed
    return counts


def leaked() -> dict[str, Any]:
    """What is left of this process's sandboxes."""
    mine = f"agentrl-{os.getpid()}-"
    groups = [p.name for top in set(cgroup.parents().values()) for p in top.glob(f"{mine}*")]
    boxes = subprocess.run(
        ["docker", "ps", "-aq", "--filter", f"name={mine}"], capture_output=True, text=True, check=False
    )
    bubbles = subprocess.run(["pgrep", "-P", str(os.getpid()), "bwrap"], capture_output=True, text=True, check=False)
    folders = list(Path(tempfile.gettempdir()).glob(f"{mine}*"))
    return {
        "groups": len(groups),
        "containers": len(boxes.stdout.split()),
        "processes": len(bubbles.stdout.split()),
        "folders": len(folders),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backend", choices=["bubblewrap", "docker"])
    parser.add_argument("--sessions", type=int, default=2000)
    parser.add_argument("--restart-command", help="what restarts the Docker daemon, once, half-way")
    given = parser.parse_args()
    console, begun = Console(), time.monotonic()
    counts = asyncio.run(soak(given.backend, given.sessions, given.restart_command))
    time.sleep(2)
    console.print(f"{given.backend}: {given.sessions} sessions in {time.monotonic() - begun:.0f} s")
    for what, count in sorted(counts.items()):
        console.print(f"  {count:5} {what}")
    console.print(f"  left behind: {leaked()}")


if __name__ == "__main__":
    main()
