"""`agentrl engine`: install a model server, serve a model with it, and check that it does what training needs."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import tempfile
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Parameter
from rich.console import Console
from rich.table import Table
from rich.text import Text

from agentrl.cli import shown, steps
from agentrl.errors import InfraError, UsageError

if TYPE_CHECKING:
    from agentrl.engines.remote import RemoteEngine

app = App(name="engine", help="Install and serve model servers; check and measure engines.", version_flags=[])
Kind = Literal["sglang", "vllm"]
Flag = Annotated[bool, Parameter(negative="")]


def _device(wanted: Literal["auto", "cpu", "cuda"]) -> Literal["cpu", "cuda"]:
    if wanted != "auto":
        return wanted
    return "cuda" if Path("/dev/nvidiactl").exists() else "cpu"


@app.command
def install(kind: Kind, /, *, device: Literal["auto", "cpu", "cuda"] = "auto", force: Flag = False) -> None:
    """Make a server's own environment in the cache. What is there already is left alone.

    Args:
        kind: sglang or vllm.
        device: what the server will compute on; auto is CUDA where this machine has it.
        force: make it again.
    """
    from agentrl.engines.install import install as make

    console = Console(highlight=False)
    with steps(console) as say:
        python = make(kind, _device(device), say, force=force)
    console.print(f"{kind} is installed: {shown(python)}", markup=False, soft_wrap=True)


@app.command
def serve(
    kind: Kind,
    model: Path,
    /,
    *flags: Annotated[str, Parameter(allow_leading_hyphen=True)],
    port: int | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: str = "auto",
    cores: int = 1,
    python: Path | None = None,
    log: Path | None = None,
) -> None:
    """Serve a model folder on the loopback until interrupted, with the flags that training needs.

    Example: agentrl engine serve sglang ./Qwen3-0.6B --port 30000

    Args:
        kind: sglang or vllm.
        model: a Hugging Face folder.
        flags: more flags for the server, after --.
        port: where to listen; default: a free one.
        device: what to compute on.
        dtype: float32, bfloat16, …; auto: float32 on a CPU, bfloat16 on CUDA.
        cores: how many cores a server on a CPU computes on, the last ones of this process.
        python: the Python of the server's environment; default: the one that was installed.
        log: where its output goes; default: a file in the temporary folder.
    """
    from agentrl.engines.install import python_of
    from agentrl.engines.launch import Launch, ServerProcess, free_port

    if not (model / "config.json").is_file():
        raise UsageError(f"{model} is no Hugging Face model folder (it has no config.json)")
    if cores < 1:
        raise UsageError(f"--cores is a whole number above 0, not {cores}")
    where = _device(device)
    found = python or python_of(kind, where)
    if found is None:
        raise UsageError(f"{kind} is not installed for {where}; run: agentrl engine install {kind}")
    launch = Launch(
        kind=kind,
        python=found.absolute(),
        model=model.absolute(),
        port=free_port() if port is None else port,
        device=where,
        dtype=("float32" if where == "cpu" else "bfloat16") if dtype == "auto" else dtype,
        cores=tuple(sorted(os.sched_getaffinity(0))[-cores:]),
        flags=tuple(flag for flag in flags if flag != "--"),
    )
    console = Console(highlight=False)

    async def run() -> None:
        file = log or Path(tempfile.mkdtemp(prefix=f"agentrl-{kind}-")) / "server.log"
        server = ServerProcess.start(launch, file)
        over = asyncio.Event()
        for name in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(name, over.set)
        waiting = asyncio.ensure_future(over.wait())
        try:
            with console.status(f"starting {kind}; its log is {file}"):
                starting = asyncio.ensure_future(server.ready())
                await asyncio.wait({starting, waiting}, return_when="FIRST_COMPLETED")
                if over.is_set():
                    starting.cancel()
                    return
                starting.result()
            console.print(f"{kind} answers at {launch.url}", markup=False)
            while not over.is_set() and server.running:
                with suppress(TimeoutError):
                    await asyncio.wait_for(asyncio.shield(waiting), 1.0)
            if not over.is_set():
                raise UsageError(f"the server ended: {server.last_words()}")
        finally:
            waiting.cancel()
            await server.stop()

    asyncio.run(run())


@app.command
def check(
    *,
    url: str,
    kind: Kind,
    model: Path,
    tolerance: float = 1e-5,
    sync_folder: Path | None = None,
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> int:
    """Check a running server against a forward pass of the model that it serves. Exit code 1 where it is wrong.

    Its weights are changed on the way and put back. Example:
    agentrl engine check --kind sglang --url http://127.0.0.1:30000 --model ./Qwen3-0.6B

    Args:
        url: where the server listens.
        kind: what it is.
        model: the Hugging Face folder that it serves.
        tolerance: largest difference of two log-probs, in nats: 1e-5 for fp32, 0.1 for bf16.
        sync_folder: where weights are written for the server, a folder that it sees under the same path; default: a
            temporary one of this machine.
        as_json: one JSON object a check.
    """
    from agentrl.engines.conformance import Finding, examine
    from agentrl.engines.exam import Exam
    from agentrl.train.policy import Policy

    console = Console(highlight=False)

    def report(finding: Finding) -> None:
        if as_json:
            fields: dict[str, Any] = {"check": finding.name, "passed": finding.passed, "said": finding.said}
            print(json.dumps(fields | {"seconds": round(finding.seconds, 3)}))  # noqa: T201
            return
        mark = Text("✓ ", "green") if finding.passed else Text("✗ ", "red")
        console.print(Text.assemble(mark, (f"{finding.name}: ", "bold"), finding.said), soft_wrap=True)

    async def run() -> int:
        policy = Policy.from_folder(model)
        policy.base.train(False)
        vocab = policy.vocab_size
        engine = await _connect(kind, url, vocab, sync_folder)
        try:
            await engine.update_weights(policy.weights(), 0)
            findings = await examine(Exam.of(engine, policy.base, vocab, tolerance, policy.pictures), report)
        finally:
            await engine.close()
        return int(not all(finding.passed for finding in findings))

    return asyncio.run(run())


@app.command
def bench(
    *,
    url: str,
    kind: Kind,
    model: Path,
    concurrency: str = "1,8,32,128",
    prompt: int = 64,
    output: int = 128,
    weights: Path | None = None,
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Measure a running server: tokens a second, seconds a turn, reuse of prompts, seconds of a change of weights.

    The model's own weights are loaded once more, so do not run it while something trains. Example:
    agentrl engine bench --kind sglang --url http://127.0.0.1:30000 --model ./Qwen3-0.6B --concurrency 1,32

    Args:
        url: where the server listens.
        kind: what it is.
        model: the Hugging Face folder that it serves.
        concurrency: how many requests are sent at once, a list.
        prompt: tokens of a prompt.
        output: tokens that are sampled a turn; fewer where the model ends it.
        weights: the same folder as the server sees it, where that is another path; default: the model's.
        as_json: one JSON object a figure.
    """
    import dataclasses

    from agentrl.engines.bench import TURNS, Load, Reuse, Speed, Update, concurrencies, measure, vocab_of

    load = Load(concurrencies(concurrency), prompt, output)
    vocab = vocab_of(model)
    load.check(0)
    folder = weights or model.absolute()
    console = Console(highlight=False)
    found: list[Speed | Reuse | Update] = []

    async def run() -> None:
        engine = await _connect(kind, url, vocab)
        try:
            version = str((await engine.servers[0].health())["version"])
            named = int(version) if version.lstrip("-").isdigit() else 0
            async for figure in measure(engine, vocab, load, folder, version=named):
                found.append(figure)
                if as_json:
                    fields = {"figure": type(figure).__name__.lower()} | dataclasses.asdict(figure)
                    print(json.dumps(fields), flush=True)  # noqa: T201
        finally:
            await engine.close()

    with console.status(f"measuring {url}") if not as_json else nullcontext():
        asyncio.run(run())
    if as_json:
        return
    console.print(f"{kind} at {url}: prompts of {prompt}, outputs of {output} tokens", soft_wrap=True)
    table = Table()
    for title in ("at once", "sampled tok/s", "turn, median s", "turn, p95 s", "turns"):
        table.add_column(title, justify="right")
    for figure in found:
        if isinstance(figure, Speed):
            cells = (f"{figure.tok_s:.0f}", f"{figure.median_s:.2f}", f"{figure.p95_s:.2f}", str(figure.turns))
            table.add_row(str(figure.concurrency), *cells)
    console.print(table)
    for figure in found:
        if isinstance(figure, Reuse):
            said = f"{figure.share:.1%} of what earlier turns computed, {figure.of_all:.1%} of all prompt tokens"
            console.print(f"used again over {TURNS} turns: {said}", soft_wrap=True)
        if isinstance(figure, Update):
            parts = f"pause {figure.pause_s:.3f}, load {figure.load_s:.3f}, resume {figure.resume_s:.3f}"
            console.print(f"a change of weights: {parts} s", soft_wrap=True)


async def _connect(kind: Kind, url: str, vocab: int, sync_folder: Path | None = None) -> RemoteEngine:
    """An engine over the server that the user named. Raises `UsageError` where none answers there."""
    from agentrl.engines.remote import RemoteEngine
    from agentrl.engines.sglang import SGLangServer
    from agentrl.engines.vllm import VLLMServer

    server = SGLangServer(url) if kind == "sglang" else VLLMServer(url)
    try:
        return await RemoteEngine.connect([server], vocab=vocab, sync_folder=sync_folder)
    except InfraError as error:
        await server.close()
        raise UsageError(f"{error}; start one: agentrl engine serve {kind} MODEL") from error
