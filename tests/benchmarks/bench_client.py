"""A real model server behind the rollout manager: what the client costs, and how much of the prompts is cached.

Starts SGLang or vLLM on this machine, with a random model without an end token, and plays episodes of a small
environment through `RolloutManager`, `PolicyActor` and `RemoteEngine`. Every turn samples the same number of tokens and
is then taken for a call of an instant tool, whatever it says; words are parsed, tools dispatched and records kept as
always.

overhead  One run's requests are recorded. A bare load generator then sends the very same bodies: httpx and nothing
          else, each turn as soon as the turn before has its reply, as many episodes at once. The sampled part of a
          context is what the server sampled for the generator, so that it finds as much in the cache as the client
          does. Runs alternate; each begins with an empty cache.
prefix    Of the prompt tokens whose keys and values an earlier request computed (of the same episode, a sibling, or
          another group: the request was sent earlier; whole blocks for vLLM; never the last token of a prompt, whose
          logits are needed), the share that the server says it used again.

    python tests/benchmarks/bench_client.py [--kind vllm] [--python SERVER_PYTHON] [--runs 5] [--json OUT]
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from machine import describe, load_average
from reuse import reusable
from rich.console import Console
from rich.table import Table
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging

from agentrl import Env, Episode, Task, tool
from agentrl.algo.sampler import TaskDraw
from agentrl.chat import ChatFormat, Parsed
from agentrl.engines.install import python_of
from agentrl.engines.launch import Launch, ServerProcess, free_port
from agentrl.engines.remote import RemoteEngine
from agentrl.engines.sglang import SGLangServer
from agentrl.engines.vllm import VLLMServer
from agentrl.errors import UsageError
from agentrl.rollout.actors import PolicyActor
from agentrl.rollout.manager import RolloutLimits, RolloutManager
from agentrl.rollout.strategy import FlatRollouts
from agentrl.train.options import ScratchTokenizer
from agentrl.train.tokenizer import bootstrap_tokenizer
from agentrl.trajectory import Sampling, ToolCall

CONTEXT = 2048
WORDS = ["river", "stone", "lamp", "window", "garden", "market", "letter", "bridge", "winter", "harbour", "mirror"]


class Notes(Env):
    """A notebook that answers at once."""

    max_turns = 6

    def tasks(self, split: str, seed: int) -> Iterable[Task]:
        rng = np.random.default_rng(seed)
        while True:
            words = " ".join(str(word) for word in rng.choice(WORDS, 16))
            yield Task(f"{rng.integers(1 << 40):x}", f"Look these words up in the notebook, one by one: {words}.")

    @tool
    def look_up(self, word: str) -> str:
        """Look a word up in the notebook.

        Args:
            word: what to look for.
        """
        return f"The notebook has three lines about {word}."

    def score(self, episode: Episode) -> float:
        return float(len(episode.turns) == self.max_turns)


class Calling(ChatFormat):
    """Parses what was said, and takes it for a call all the same: a random policy would never make one."""

    def parse(self, ids: Any, parameters: Any = None) -> Parsed:
        parsed = super().parse(ids, parameters or {})
        return replace(parsed, calls=(ToolCall("look_up", {"word": WORDS[ids.size % len(WORDS)]}),), error=None)


def make_model(folder: Path, tokenizer: Any) -> None:
    """A random model of the quickstart's size, as a folder that servers read. Nothing in it ends a turn."""
    import torch

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,  # what vLLM's kernels take
        intermediate_size=288,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.06,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)


@dataclass(slots=True)
class Sent:
    """One request as it went over the wire, in the order of sending. `output`, `cached`: what the reply said."""

    path: str
    body: dict[str, Any]
    session: str
    output: list[int]
    cached: int = 0


class Tape:
    """Records the requests of a server's client."""

    def __init__(self, server: SGLangServer | VLLMServer) -> None:
        self.sent: list[Sent] = []
        self._ids = "input_ids" if isinstance(server, SGLangServer) else "token_ids"
        self._http, self._server = server._http, server
        self._post, self._generate = server._http.post, server.generate
        self._session: dict[str, str] = {}

    def __enter__(self) -> Tape:
        async def post(path: str, body: dict[str, Any] | None = None, **named: Any) -> Any:
            if body is None or self._ids not in body:
                return await self._post(path, body, **named)
            sent = Sent(path, body, self._session[body.get("rid") or body["request_id"]], [])
            self.sent.append(sent)
            reply = await self._post(path, body, **named)
            sent.output = output_of(reply)
            return reply

        async def generate(request: Any, rid: str, max_tokens: int) -> Any:
            self._session[rid] = request.session
            at = len(self.sent)
            reply = await self._generate(request, rid, max_tokens)
            next(
                s for s in self.sent[at:] if (s.body.get("rid") or s.body["request_id"]) == rid
            ).cached = reply.cached_tokens
            return reply

        self._http.post, self._server.generate = post, generate  # type: ignore[method-assign, assignment]
        return self

    def __exit__(self, *_: object) -> None:
        self._http.post, self._server.generate = self._post, self._generate  # type: ignore[method-assign]

    def prompt(self, sent: Sent) -> list[int]:
        ids: list[int] = sent.body[self._ids]
        return ids

    def episodes(self) -> list[list[Sent]]:
        """The requests of each episode, in order."""
        found: dict[str, list[Sent]] = {}
        for sent in self.sent:
            found.setdefault(sent.session, []).append(sent)
        return list(found.values())


def output_of(reply: Mapping[str, Any]) -> list[int]:
    ids: list[int] = reply["output_ids"] if "output_ids" in reply else reply["choices"][0]["token_ids"]
    return ids


# -- the two sides ---------------------------------------------------------------------------------------------------


async def play(
    engine: RemoteEngine, chat: ChatFormat, tasks: int, samples: int, tokens: int, temperature: float, seed: int
) -> tuple[float, int]:
    """Seconds and sampled tokens of one run through the rollout manager, all episodes at once."""
    env = Notes()
    limits = RolloutLimits(max_tokens=tokens, episodes=tasks * samples)
    actor = PolicyActor(engine, chat, Sampling(temperature=temperature, max_tokens=tokens))
    actor.sampling = replace(actor.sampling, stop_ids=())  # lengths are fixed
    draws = [TaskDraw(task, samples, 0, i) for i, task in zip(range(tasks), env.tasks("train", seed), strict=False)]
    manager = RolloutManager(env, limits=limits, seed=seed)
    begun = time.perf_counter()
    groups = await manager.run(draws, actor, stage="bench", strategy=FlatRollouts())
    seconds = time.perf_counter() - begun
    trajectories = [member.trajectory for group in groups for member in group.members]
    sampled = sum(turn.n_sampled for trajectory in trajectories for turn in trajectory.turns)
    wanted = tasks * samples * env.max_turns * tokens
    assert sampled == wanted, f"{sampled} tokens were sampled, not {wanted}; {trajectories[0].outcome.detail}"
    return seconds, sampled


async def bare(url: str, tape: Tape, run: int) -> tuple[float, int]:
    """Seconds and sampled tokens of the tape, sent by a load generator that does nothing else."""
    plans: list[list[tuple[str, dict[str, Any], list[int]]]] = []
    for number, episode in enumerate(tape.episodes()):
        plan, known = [], 0
        for turn, sent in enumerate(episode):
            name = "rid" if "rid" in sent.body else "request_id"
            prompt = tape.prompt(sent)
            plan.append((sent.path, {**sent.body, name: f"bare-{run}-{number}-{turn}"}, prompt[known:]))
            known = len(prompt) + len(sent.output)
        plans.append(plan)
    limits = httpx.Limits(max_connections=1024, max_keepalive_connections=1024)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=None) as client:

        async def episode(plan: list[tuple[str, dict[str, Any], list[int]]]) -> int:
            context: list[int] = []
            sampled = 0
            for path, body, fresh in plan:
                context = context + fresh
                reply = await client.post(path, json={**body, tape._ids: context})
                reply.raise_for_status()
                output = output_of(reply.json())
                sampled += len(output)
                context = context + output
            return sampled

        begun = time.perf_counter()
        sampled = sum(await asyncio.gather(*(episode(plan) for plan in plans)))
        return time.perf_counter() - begun, sampled


# -- what could be cached --------------------------------------------------------------------------------------------


def share(tape: Tape, block: int) -> dict[str, float]:
    """What could be reused over a tape, what was, and the same for first turns alone."""
    could = reusable([(tape.prompt(sent), sent.output) for sent in tape.sent], block)
    firsts = {id(episode[0]) for episode in tape.episodes()}
    totals = {"could": 0, "did": 0, "first_could": 0, "first_did": 0}
    for sent, most in zip(tape.sent, could, strict=True):
        did = min(sent.cached, most)
        for name in ("", "first_") if id(sent) in firsts else ("",):
            totals[f"{name}could"] += most
            totals[f"{name}did"] += did
    return {
        "prompt_tokens": float(sum(len(tape.prompt(sent)) for sent in tape.sent)),
        "could_be_cached": float(totals["could"]),
        "cached": float(totals["did"]),
        "share": totals["did"] / totals["could"],
        "first_turns": totals["first_did"] / max(totals["first_could"], 1),
        "later_turns": (totals["did"] - totals["first_did"]) / max(totals["could"] - totals["first_could"], 1),
    }


# -- the benchmark ---------------------------------------------------------------------------------------------------


async def flush(kind: str, url: str) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        path = "/flush_cache?timeout=30" if kind == "sglang" else "/reset_prefix_cache"
        (await client.post(path)).raise_for_status()


async def measure(given: argparse.Namespace, url: str, chat: ChatFormat, console: Console) -> dict[str, Any]:
    server = SGLangServer(url) if given.kind == "sglang" else VLLMServer(url)
    engine = await RemoteEngine.connect([server], vocab=chat.vocab_size)
    result: dict[str, Any] = {}
    try:
        if "overhead" in given.parts:
            result["overhead"] = await _overhead(given, engine, server, chat, console)
        if "prefix" in given.parts:
            result["prefix"] = await _prefix(given, engine, server, chat, console)
    finally:
        await engine.close()
    return result


async def _overhead(
    given: argparse.Namespace, engine: RemoteEngine, server: Any, chat: ChatFormat, console: Console
) -> dict[str, Any]:
    tasks, samples = given.episodes // 8, 8
    settings = (tasks, samples, given.tokens, 1.0)
    await flush(given.kind, server.url)
    with Tape(server) as tape:
        await play(engine, chat, *settings, 1)  # also warms templates and connections
    await flush(given.kind, server.url)
    await bare(server.url, tape, 0)
    rates: dict[str, list[float]] = {"client": [], "bare": []}
    for run in range(1, given.runs + 1):
        for side in ("client", "bare") if run % 2 else ("bare", "client"):
            await flush(given.kind, server.url)
            gc.collect()
            cpu = time.process_time()
            if side == "client":
                seconds, sampled = await play(engine, chat, *settings, 1)
            else:
                seconds, sampled = await bare(server.url, tape, run)
            rates[side].append(sampled / seconds)
            console.log(
                f"run {run}, {side}: {sampled / seconds:.0f} tok/s, {time.process_time() - cpu:.1f} CPU-s",
                highlight=False,
            )
    medians = {side: statistics.median(found) for side, found in rates.items()}
    ratio = medians["client"] / medians["bare"]
    table = Table(title=f"{given.kind}: {given.episodes} episodes at once, 6 turns of {given.tokens} tokens")
    for column in ("", "tok/s, median", "all runs"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("through the rollout manager", f"{medians['client']:.0f}", _listed(rates["client"]))
    table.add_row("bare httpx", f"{medians['bare']:.0f}", _listed(rates["bare"]))
    table.add_row("ratio", f"{ratio:.3f}", "")
    console.print(table)
    return {"tok_s": medians, "runs": rates, "ratio": ratio, "episodes": given.episodes, "tokens": given.tokens}


async def _prefix(
    given: argparse.Namespace, engine: RemoteEngine, server: Any, chat: ChatFormat, console: Console
) -> dict[str, Any]:
    found = []
    for run in range(given.runs):
        await flush(given.kind, server.url)
        with Tape(server) as tape:
            seconds, sampled = await play(engine, chat, 16, 8, given.tokens, 1.0, 2 + run)
        found.append(share(tape, engine.capabilities.cache_block) | {"tok_s": sampled / seconds})
    median = {name: statistics.median(one[name] for one in found) for name in found[0]}
    table = Table(title=f"{given.kind}: 16 tasks x 8 samples at once, 6 turns of {given.tokens} tokens, medians")
    for column in ("", "share of the prompt tokens that could be cached"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("all turns", f"{100 * median['share']:.1f} %")
    table.add_row("first turns", f"{100 * median['first_turns']:.1f} %")
    table.add_row("later turns", f"{100 * median['later_turns']:.1f} %")
    table.add_row("prompt tokens a run", f"{median['prompt_tokens']:.0f}")
    table.add_row("tok/s", f"{median['tok_s']:.0f}")
    console.print(table)
    return {"median": median, "runs": found}


def _listed(rates: Sequence[float]) -> str:
    return " ".join(f"{rate:.0f}" for rate in rates)


async def serve(given: argparse.Namespace, folder: Path, console: Console) -> dict[str, Any]:
    chat = Calling(bootstrap_tokenizer(ScratchTokenizer()))
    model = folder / "model"
    make_model(model, bootstrap_tokenizer(ScratchTokenizer()))
    cores = tuple(sorted(os.sched_getaffinity(0))[-given.cores :])
    python = given.python or python_of(given.kind, "cpu")
    if python is None:
        raise UsageError(f"{given.kind} is not installed for cpu; run: agentrl engine install {given.kind}")
    launch = Launch(given.kind, python.absolute(), model, free_port(), cores=cores, flags=tuple(given.flags.split()))
    with console.status(f"starting {given.kind}"):
        process = ServerProcess.start(launch, given.log or folder / "server.log")
        try:
            await process.ready()
        except BaseException:
            await process.stop()
            raise
    try:
        return await measure(given, launch.url, chat, console)
    finally:
        await process.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("sglang", "vllm"), default="sglang")
    parser.add_argument("--python", type=Path, help="of the server's environment; default: the one that was installed")
    parser.add_argument("--parts", type=lambda text: text.split(","), default=["overhead", "prefix"])
    parser.add_argument("--episodes", type=int, default=64, help="at once, a multiple of 8")
    parser.add_argument("--tokens", type=int, default=32, help="sampled a turn")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--cores", type=int, default=1, help="that the server computes on")
    parser.add_argument("--flags", default="", help="more flags for the server, in one word")
    parser.add_argument("--log", type=Path, help="where the server's output goes; default: nowhere that stays")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    transformers_logging.disable_progress_bar()
    console = Console()
    before = load_average()
    with tempfile.TemporaryDirectory(prefix="agentrl-bench-") as folder:
        result = asyncio.run(serve(given, Path(folder), console))
    result |= {"kind": given.kind, "flags": given.flags, "machine": describe()}
    result["load_average"] = [before, load_average()]
    if given.json:
        given.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
