"""The local engine passes what every engine must; the suite itself finds engines that are wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from agentrl.engines import Generation, Request
from agentrl.engines.conformance import CHECKS, Finding, examine
from agentrl.engines.exam import Exam
from agentrl.engines.local import LocalEngine
from agentrl.trajectory import Floats, Ids


def exam_of(engine_class: type[LocalEngine], tools: Any) -> list[Finding]:
    model = tools.make("qwen3")

    async def main() -> list[Finding]:
        engine = engine_class(model, rows=64)
        await engine.update_weights(dict(model.named_parameters()), 0)
        try:
            return await examine(Exam.of(engine, model, model.config.vocab_size))
        finally:
            await engine.close()

    return asyncio.run(main())


def test_the_local_engine_passes(tools: Any) -> None:
    findings = exam_of(LocalEngine, tools)
    assert [f.name for f in findings] == list(CHECKS)
    assert not [f for f in findings if not f.passed]


class Hotter(LocalEngine):
    """Samples at another temperature than it was asked for."""

    async def generate(self, request: Request) -> Generation:
        return await super().generate(
            replace(request, sampling=replace(request.sampling, temperature=request.sampling.temperature * 1.1))
        )


class Stale(LocalEngine):
    """Takes new version numbers and keeps the old weights."""

    async def update_weights(
        self, weights: Iterable[tuple[str, torch.Tensor]] | Mapping[str, torch.Tensor] | str, version: int
    ) -> None:
        await super().update_weights({}, version)


class Forgets(LocalEngine):
    """Wakes with the weights it had and takes no others until it runs."""

    async def update_weights(
        self, weights: Iterable[tuple[str, torch.Tensor]] | Mapping[str, torch.Tensor] | str, version: int
    ) -> None:
        paused = (await self.health())["paused"]
        await super().update_weights({} if paused else weights, version)


class Deaf(LocalEngine):
    """Ignores `abort`."""

    async def abort(self, session: str | None = None) -> None:
        pass


class Forgetful(LocalEngine):
    """Computes everything anew."""

    async def generate(self, request: Request) -> Generation:
        reply = await super().generate(request)
        await self.release(request.session)
        return Generation(reply.ids, reply.logprobs, reply.finish, reply.versions, reply.entropies, reply.entropy, 0)


class Fair(LocalEngine):
    """Serves everybody in turn."""

    async def generate(self, request: Request) -> Generation:
        return await super().generate(replace(request, priority=0))


class Rough(LocalEngine):
    """Scores with a little noise."""

    async def score(self, ids: Ids, start: int, temperature: float = 1.0) -> Floats:
        found = await super().score(ids, start, temperature)
        return found + np.float32(1e-3)


@pytest.mark.parametrize(
    ("engine", "wrong"),
    [
        (Hotter, {"exact log-probs", "top-k and top-p", "concurrent load"}),
        (Stale, {"stale keys and values", "update while serving", "sleep and wake"}),
        (Forgets, {"sleep and wake"}),
        (Deaf, {"abort while running", "abort while queued"}),
        (Forgetful, {"prefix reuse"}),
        (Fair, {"priorities"}),
        (Rough, {"score"}),
    ],
)
def test_the_suite_finds_what_is_wrong(engine: type[LocalEngine], wrong: set[str], tools: Any) -> None:
    failed = {f.name for f in exam_of(engine, tools) if not f.passed}
    assert wrong <= failed
