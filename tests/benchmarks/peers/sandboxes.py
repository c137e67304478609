"""One peer's session, measured in its own environment: `python sandboxes.py "swe-rex local"` prints one JSON line.

A session is fresh: open, set x, use x, close. Then harmless probes, each in a session: is a program stopped that runs
beyond the time it was given, and may one take a gigabyte, start three hundred processes, or read a file of the host?
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

IMAGE = "agentrl/sandbox"
SECRET = Path(tempfile.gettempdir()) / "agentrl-bench-secret"
Run = Callable[[str, float], str]  # a Python program and its seconds -> what it printed
PROBES = {
    "memory": "b = bytearray(1 << 30); print('GOT' + 'IT')",
    "processes": "import subprocess as s; p = [s.Popen(['sleep', '5']) for _ in range(300)]; print('GOT' + 'IT')",
    "host files": f"print('GOT' + 'IT' if open('{SECRET}').read() == 'secret' else '')",
    "time": "import time; time.sleep(6); print('GOT' + 'IT')",
}


@contextlib.contextmanager
def swe_rex(where: str) -> Any:
    import asyncio

    from swerex.deployment.docker import DockerDeployment
    from swerex.runtime.abstract import BashAction, Command, CreateBashSessionRequest
    from swerex.runtime.local import LocalRuntime

    loop = asyncio.new_event_loop()
    deployment = DockerDeployment(image=IMAGE, pull="never", startup_timeout=60) if where == "docker" else None
    if deployment is not None:
        loop.run_until_complete(deployment.start())
    runtime = deployment.runtime if deployment is not None else LocalRuntime()
    loop.run_until_complete(runtime.create_session(CreateBashSessionRequest()))

    def two_cells() -> bool:
        loop.run_until_complete(runtime.run_in_session(BashAction(command="x=41")))
        return "42" in loop.run_until_complete(runtime.run_in_session(BashAction(command="echo $((x+1))"))).output

    def run(code: str, seconds: float) -> str:
        return loop.run_until_complete(
            runtime.execute(Command(command=["python3", "-c", code], timeout=seconds))
        ).stdout

    yield two_cells, run
    loop.run_until_complete(runtime.close())
    if deployment is not None:
        loop.run_until_complete(deployment.stop())
    loop.close()


@contextlib.contextmanager
def llm_sandbox(where: str) -> Any:
    from llm_sandbox import SandboxSession

    # Its images' own environment would be made through pip, which the sandbox's image has no network for.
    with SandboxSession(lang="python", image=IMAGE, backend=where, skip_environment_setup=True) as session:

        def two_cells() -> bool:
            session.run("x = 41")
            return "42" in session.run("print(x + 1)").stdout

        yield two_cells, lambda code, seconds: session.run(code, timeout=seconds).stdout


@contextlib.contextmanager
def inspect_ai(where: str) -> Any:
    import asyncio

    from inspect_ai.util._sandbox.local import LocalSandboxEnvironment

    if where == "docker":
        subprocess.run(["docker", "compose", "version"], check=True, capture_output=True)
    loop = asyncio.new_event_loop()
    box = LocalSandboxEnvironment()

    def execute(code: str, seconds: float) -> str:
        return str(loop.run_until_complete(box.exec(["python3", "-c", code], timeout=int(seconds))).stdout)

    def two_cells() -> bool:
        execute("x = 41", 5)
        return "42" in execute("print(x + 1)", 5)

    yield two_cells, execute
    box.directory.cleanup()
    loop.close()


SYSTEMS = {"swe-rex": swe_rex, "llm-sandbox": llm_sandbox, "inspect-ai": inspect_ai}


def life(_: int = 0) -> tuple[float, bool]:
    """One session of the system that the command line names: milliseconds, and whether it kept its state."""
    name, where = sys.argv[1].split()
    begun = time.perf_counter()
    with SYSTEMS[name](where) as (two_cells, _run):
        kept = two_cells()
    return 1e3 * (time.perf_counter() - begun), kept


def main() -> None:
    name, where = sys.argv[1].split()
    make = SYSTEMS[name]

    life()
    lives = [life() for _ in range(5)]
    rate = None
    if statistics.median(ms for ms, _ in lives) < 3000:
        # Processes, for the peers' event loops do not bear threads; those that do not bear company have no rate.
        with contextlib.suppress(Exception), multiprocessing.get_context("fork").Pool(16) as workers:
            workers.map_async(life, range(16)).get(60)
            begun = time.perf_counter()
            workers.map_async(life, range(64), chunksize=1).get(60)
            rate = 64 / (time.perf_counter() - begun)
    SECRET.write_text("secret")
    held = []
    for limit, code in PROBES.items():
        said = ""
        with contextlib.suppress(Exception), make(where) as (_cells, run):  # a refusal is what is hoped for
            said = run(code, 3.0 if limit == "time" else 20.0)
        if "GOTIT" not in said:
            held.append(limit)
    SECRET.unlink()
    facts = {
        "life_ms": statistics.median(ms for ms, _ in lives),
        "sessions_per_s": rate,
        "keeps_state": all(kept for _, kept in lives),
        "limits": held,
    }
    print(json.dumps(facts))  # noqa: T201


if __name__ == "__main__":
    main()
