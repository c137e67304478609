"""What `agentrl engine bench` measures, on the local engine; and what it refuses."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agentrl.engines import Generation, Request
from agentrl.engines.bench import (
    FRESH,
    ROUNDS,
    SESSIONS,
    SPOKEN,
    TURNS,
    Load,
    Reuse,
    Speed,
    Update,
    concurrencies,
    measure,
    vocab_of,
)
from agentrl.engines.local import LocalEngine
from agentrl.errors import UsageError


class Noting(LocalEngine):
    """Notes what it is asked, and the most requests that were under way at once."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.requests: list[tuple[Request, Generation]] = []
        self.events: list[str] = []
        self.now, self.most = 0, 0

    async def generate(self, request: Request) -> Generation:
        self.now += 1
        self.most = max(self.most, self.now)
        reply = await super().generate(request)
        self.now -= 1
        self.requests.append((request, reply))
        return reply

    async def pause(self) -> None:
        self.events.append("pause")
        await super().pause()

    async def resume(self) -> None:
        self.events.append("resume")
        await super().resume()

    async def update_weights(
        self, weights: Iterable[tuple[str, torch.Tensor]] | Mapping[str, torch.Tensor] | str, version: int
    ) -> None:
        self.events.append(f"load {Path(str(weights)).name} as {version}")
        await super().update_weights(weights, version)


def test_every_figure_is_measured_and_the_model_stays_as_it_was(tools: Any, tmp_path: Path) -> None:
    model = tools.make("qwen3")
    model.save_pretrained(tmp_path / "model")
    load = Load((1, 4), prompt=12, output=7)

    async def main() -> tuple[list[Speed | Reuse | Update], Noting, np.ndarray, np.ndarray]:
        async with tools.engine(model) as plain:
            before = await plain.score(np.arange(9, dtype=np.int32), 1)
        engine = Noting(model)
        try:
            found = [
                figure
                async for figure in measure(engine, vocab_of(tmp_path / "model"), load, tmp_path / "model", version=3)
            ]
            return found, engine, before, await engine.score(np.arange(9, dtype=np.int32), 1)
        finally:
            await engine.close()

    found, engine, before, after = asyncio.run(main())
    one, four, reuse, update = found
    assert isinstance(one, Speed) and isinstance(four, Speed)
    assert (one.concurrency, one.turns, four.concurrency, four.turns) == (1, ROUNDS, 4, 4 * ROUNDS)
    for speed in (one, four):
        assert speed.tok_s > 0 and 0 < speed.median_s <= speed.p95_s
    assert isinstance(reuse, Reuse) and isinstance(update, Update)
    assert reuse.share == 1.0  # the local engine keeps whole sessions
    told = engine.requests[-SESSIONS * TURNS :]
    cached, sent = sum(reply.cached_tokens for _, reply in told), sum(request.ids.size for request, _ in told)
    assert reuse.of_all == cached / sent
    assert engine.most == SESSIONS
    assert engine.events == ["pause", "load model as 3", "resume"]
    assert np.array_equal(before, after)
    assert {reply.ids.size for _, reply in engine.requests[1 : -SESSIONS * TURNS]} == {7}
    assert {reply.ids.size for _, reply in told} == {SPOKEN}


class Forgetful(LocalEngine):
    """Computes everything anew."""

    async def generate(self, request: Request) -> Generation:
        reply = await super().generate(request)
        return Generation(reply.ids, reply.logprobs, reply.finish, reply.versions, reply.entropies, reply.entropy, 0)


def test_an_engine_that_reuses_nothing_is_found_out(tools: Any) -> None:
    model = tools.make("qwen3")

    async def main() -> list[Speed | Reuse | Update]:
        engine = Forgetful(model)
        try:
            return [figure async for figure in measure(engine, 97, Load((2,), 8, 4), None)]
        finally:
            await engine.close()

    speed, reuse = asyncio.run(main())
    assert isinstance(speed, Speed) and reuse == Reuse(0.0, 0.0)


def test_what_does_not_fit_is_said_before_anything_is_sent() -> None:
    longest = 64 + TURNS * SPOKEN + (TURNS - 1) * FRESH
    Load((1,), prompt=64, output=64).check(longest)
    with pytest.raises(UsageError, match=f"up to {longest} tokens do not fit in the server's context of {longest - 1}"):
        Load((1,), prompt=64, output=64).check(longest - 1)
    with pytest.raises(UsageError, match="up to 1064 tokens"):
        Load((1,), prompt=64, output=1000).check(1063)
    with pytest.raises(UsageError, match="above 0"):
        Load((1,), prompt=0).check(0)
    assert concurrencies("1, 8,32") == (1, 8, 32)
    for text in ("", "0", "8,", "a", "1.5"):
        with pytest.raises(UsageError, match="list of whole numbers"):
            concurrencies(text)


def test_the_vocabulary_is_read_from_the_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no config\.json"):
        vocab_of(tmp_path)
    config = tmp_path / "config.json"
    for text, size in (('{"vocab_size": 5}', 5), ('{"text_config": {"vocab_size": 7}}', 7)):
        config.write_text(text)
        assert vocab_of(tmp_path) == size
    for text in ("{}", "[]", "{"):
        config.write_text(text)
        with pytest.raises(UsageError, match="names no vocab_size"):
            vocab_of(tmp_path)
