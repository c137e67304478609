"""All benchmarks, one after another: each prints a table and writes JSON with the machine's description.

make bench                                    without peers: nothing else has to be installed
make bench ARGS="--trl PYTHON --vllm PYTHON"  with the peers, in environments made as peers/README.md says
make bench ARGS="--pages"                     with the viewer's pages in a browser: playwright and chromium
make bench ARGS="--servers sglang,vllm"       with the client of these servers, as `agentrl engine install` made them
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from rich.console import Console

HERE = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench"), help="where the JSON goes")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--trl", help="the Python of TRL's environment")
    parser.add_argument("--vllm", help="the Python of vLLM's environment")
    parser.add_argument("--servers", default="", help="sglang,vllm: measure the client of these servers too")
    parser.add_argument("--pages", action="store_true", help="measure the viewer's pages, too: needs chromium")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    model, runs = given.out / "model", ["--runs", str(given.runs)]
    python = sys.executable

    def script(name: str, *words: str) -> list[str]:
        return [python, str(HERE / name), *words]

    def result(name: str) -> list[str]:
        return ["--json", str(given.out / f"{name}.json")]

    jobs: list[tuple[str, list[str]]] = []
    if not (model / "config.json").is_file():
        jobs.append(("the model of the training step", script("peers/make_model.py", str(model))))
    trl = ["--trl", given.trl] if given.trl else []
    jobs += [
        ("rollout manager", script("bench_rollout.py", *runs, *result("rollout"))),
        ("local engine", script("bench_engine.py", *runs, *result("engine"))),
        ("overlapping training", script("bench_async.py", *result("async"))),
        ("one training step", script("bench_step.py", "--model", str(model), *runs, *trl, *result("step"))),
        ("the store's share of a step", script("bench_share.py", *runs, *result("share"))),
    ]
    if given.pages:
        jobs.append(("the viewer's pages", script("bench_pages.py", *result("pages"))))
    for kind in filter(None, given.servers.split(",")):
        client = script("bench_client.py", "--kind", kind, *runs, *result(f"client_{kind}"))
        jobs.append((f"the client of {kind}", client))
    if "sglang" in given.servers.split(","):
        jobs.append(("several servers", script("bench_router.py", *runs, *result("router"))))
    if given.vllm:
        serve = script("peers/vllm_serve.py", "--python", given.vllm, "--model", str(model), "--")
        trace = [given.vllm, str(HERE / "peers/vllm_trace.py"), "--url", "{url}", *result("vllm")]
        jobs.append(("vLLM on the trace", [*serve, *trace]))
    console, failed = Console(), 0
    for title, words in jobs:
        console.rule(title)
        failed += subprocess.run(words, check=False).returncode != 0
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
