"""How fast a running engine is: tokens at several loads, reuse over turns, a change of weights. `agentrl engine bench`.

Each measurement is a coroutine over any `Engine`; prompts are random ids. The weights loaded are those that the engine
serves already, so nothing about it is different afterwards but its cache.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from agentrl.engines import Engine, Generation, Request
from agentrl.errors import UsageError
from agentrl.trajectory import Ids, Sampling, as_ids

ROUNDS = 3  # requests that each caller sends, one after another
SESSIONS, TURNS = 8, 6  # episodes at once, and their turns
SPOKEN, FRESH = 32, 16  # tokens that such a turn samples, and that an environment adds after it


@dataclass(frozen=True, slots=True)
class Load:
    """What is measured: callers at once, and the tokens of a prompt and of an output."""

    concurrency: tuple[int, ...] = (1, 8, 32, 128)
    prompt: int = 64
    output: int = 128

    def check(self, most: int) -> None:
        """Raises `UsageError` for lengths that are none, or do not fit in a context of `most` tokens (0: no limit)."""
        if not self.concurrency or min(*self.concurrency, self.prompt, self.output) < 1:
            raise UsageError("--concurrency, --prompt and --output are whole numbers above 0")
        longest = self.prompt + max(self.output, TURNS * SPOKEN + (TURNS - 1) * FRESH)
        if most and longest > most:
            raise UsageError(
                f"turns of up to {longest} tokens do not fit in the server's context of {most}: lower --prompt or "
                "--output, or serve a longer context"
            )


@dataclass(frozen=True, slots=True)
class Speed:
    """Sampled tokens a second with `concurrency` callers, and the seconds that one turn takes."""

    concurrency: int
    tok_s: float
    median_s: float
    p95_s: float
    turns: int


@dataclass(frozen=True, slots=True)
class Reuse:
    """Of the prompt tokens that earlier turns computed, the share that was used again; and of all prompt tokens."""

    share: float
    of_all: float


@dataclass(frozen=True, slots=True)
class Update:
    """Seconds of a change of weights: requests held, weights loaded, requests let go on."""

    pause_s: float
    load_s: float
    resume_s: float


async def measure(
    engine: Engine, vocab: int, load: Load, weights: Path | None, *, version: int = 0, seed: int = 0
) -> AsyncIterator[Speed | Reuse | Update]:
    """Everything in turn, each figure as soon as it is there.

    `vocab` bounds the ids of prompts; `weights` is the folder that the engine serves (None: no update is measured) and
    `version` what its weights are called.
    """
    load.check(engine.capabilities.max_context)
    rng = np.random.default_rng(seed)
    sampling = Sampling(max_tokens=load.output)
    await _turn(engine, _prompt(rng, vocab, load.prompt), replace(sampling, max_tokens=1), "bench-warm")
    for concurrency in load.concurrency:
        yield await speed(engine, vocab, load, concurrency, rng)
    yield await reuse(engine, vocab, load, rng)
    if weights is not None:
        yield await update(engine, weights, version)


async def speed(engine: Engine, vocab: int, load: Load, concurrency: int, rng: np.random.Generator) -> Speed:
    """`concurrency` callers, each of whom sends its next request when the last one is answered. No prompt is shared."""
    sampling = Sampling(max_tokens=load.output)
    prompts = [[_prompt(rng, vocab, load.prompt) for _ in range(ROUNDS)] for _ in range(concurrency)]
    seconds: list[float] = []

    async def caller(number: int) -> int:
        sampled = 0
        for turn, ids in enumerate(prompts[number]):
            begun = time.perf_counter()
            sampled += (await _turn(engine, ids, sampling, f"bench-{concurrency}-{number}-{turn}")).ids.size
            seconds.append(time.perf_counter() - begun)
        return sampled

    begun = time.perf_counter()
    sampled = sum(await asyncio.gather(*map(caller, range(concurrency))))
    wall = time.perf_counter() - begun
    p95 = float(np.quantile(seconds, 0.95))
    return Speed(concurrency, sampled / wall, statistics.median(seconds), p95, len(seconds))


async def reuse(engine: Engine, vocab: int, load: Load, rng: np.random.Generator) -> Reuse:
    """Episodes whose every turn sends all that was said before, at once."""
    block, sampling = engine.capabilities.cache_block, Sampling(max_tokens=SPOKEN)
    prompts = [_prompt(rng, vocab, load.prompt) for _ in range(SESSIONS)]
    words = [[_prompt(rng, vocab, FRESH) for _ in range(TURNS)] for _ in range(SESSIONS)]

    async def episode(number: int) -> tuple[int, int, int]:
        ids, known, could, did, sent = prompts[number], 0, 0, 0, 0
        name = f"bench-turns-{number}"
        for turn in range(TURNS):
            reply = await engine.generate(Request(ids, sampling, name))
            whole = known // block * block
            could, did, sent = could + whole, did + min(reply.cached_tokens, whole), sent + ids.size
            known = ids.size + max(reply.ids.size - 1, 0)  # the last sampled token has no keys and values yet
            ids = as_ids(np.concatenate([ids, reply.ids, words[number][turn]]))
        await engine.release(name)
        return could, did, sent

    could, did, sent = (
        sum(column) for column in zip(*await asyncio.gather(*map(episode, range(SESSIONS))), strict=True)
    )
    return Reuse(did / max(could, 1), did / sent)


async def update(engine: Engine, weights: Path, version: int) -> Update:
    """The weights in `weights`, loaded once more as `version`."""
    marks = [time.perf_counter()]
    await engine.pause()
    try:
        marks.append(time.perf_counter())
        await engine.update_weights(str(weights), version)
        marks.append(time.perf_counter())
    finally:
        await engine.resume()
    marks.append(time.perf_counter())
    return Update(*(after - before for before, after in itertools.pairwise(marks)))


def vocab_of(folder: Path) -> int:
    """How many ids the model in a Hugging Face folder has. Raises `UsageError` where the folder does not say."""
    path = folder / "config.json"
    if not path.is_file():
        raise UsageError(f"{folder} is no Hugging Face model folder (it has no config.json)")
    try:
        found = json.loads(path.read_text("utf-8"))
        return int(found["vocab_size"] if "vocab_size" in found else found["text_config"]["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} names no vocab_size; copy the model folder anew") from error


async def _turn(engine: Engine, ids: Ids, sampling: Sampling, session: str) -> Generation:
    try:
        return await engine.generate(Request(ids, sampling, session))
    finally:
        await engine.release(session)


def _prompt(rng: np.random.Generator, vocab: int, n: int) -> Ids:
    return as_ids(rng.integers(0, vocab, n))


def concurrencies(text: str) -> tuple[int, ...]:
    """`1,8,32` as numbers. Raises `UsageError` for anything else."""
    parts: Sequence[str] = text.split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise UsageError(f"--concurrency {text!r} is no list of whole numbers above 0, such as 1,8,32")
    return tuple(int(part) for part in parts)
