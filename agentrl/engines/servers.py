"""What a model server can be asked, whichever it is. `sglang` and `vllm` speak to theirs; `remote` uses them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from agentrl.engines import Generation, Request
from agentrl.trajectory import Floats, Ids, VersionRun


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What a server says of itself. `max_context` is in tokens; `version` is the server's own, such as 0.5.23.
    `truncation`: log-probs are of the whole softmax under top-k and top-p too. `cache_block`: tokens that are cached
    together."""

    kind: str
    version: str
    model: str
    max_context: int
    truncation: bool = True
    cache_block: int = 1


class ModelServer(Protocol):
    """One server with the policy's weights. Calls may run concurrently.

    All raise `InfraError` where the server does not answer, and `Refused` (`agentrl.engines.http`) for what it refuses.
    """

    @property
    def url(self) -> str: ...

    @property
    def name(self) -> str:
        """What it is and where, for people."""
        ...

    async def alive(self, seconds: float) -> None:
        """Get a sign of life from what computes, not only from what listens. Raises `InfraError`, `Refused`."""
        ...

    async def info(self) -> ServerInfo:
        """Raises `UsageError` where something else is at the URL, or a server that is too old."""
        ...

    async def generate(self, request: Request, rid: str, max_tokens: int) -> Generation:
        """Sample at most `max_tokens` tokens. `rid` names the request for `abort`."""
        ...

    async def score(self, ids: Ids, start: int) -> Floats:
        """Log-probs of ids[start:] given what stands before each, at temperature 1. Shape [len(ids) - start]."""
        ...

    async def abort(self, rid: str) -> None:
        """End a request; one that is unknown or over is ignored."""
        ...

    async def pause(self) -> None:
        """Stop sampling; running requests stay, and what is cached of them is computed anew after `resume`."""
        ...

    async def resume(self) -> None: ...

    async def load(self, folder: Path, version: int) -> None:
        """Take the safetensors in `folder` as weights `version`. To be called between `pause` and `resume`."""
        ...

    async def sleep(self) -> None:
        """Give the accelerator's memory back."""
        ...

    async def wake(self) -> None: ...

    async def health(self) -> dict[str, Any]:
        """A small report: running and waiting requests."""
        ...

    async def close(self) -> None:
        """Close the connections; the server goes on."""
        ...


def runs_of(spans: Sequence[dict[str, Any]], n: int) -> tuple[VersionRun, ...]:
    """Weight versions over `n` output tokens, as both servers report them; -1 for weights that nobody numbered.

    Raises `ValueError` where they do not tile the output.
    """
    runs: list[VersionRun] = []
    for span in spans:
        start, stop, version = int(span["start"]), int(span["end"]), -1
        with contextlib.suppress(ValueError):
            version = int(span["version"])
        if stop > start:
            runs.append(VersionRun(version, start, stop))
    if not runs and n:
        runs.append(VersionRun(-1, 0, n))
    if [run.start for run in runs] != [0, *(run.stop for run in runs[:-1])][: len(runs)] or (n and runs[-1].stop != n):
        raise ValueError(f"weight versions {spans} do not tile {n} tokens")
    return tuple(runs)


def entropy_of(logprobs: Sequence[float]) -> float:
    """The entropy in nats of the likeliest tokens and of one more that has all the rest: at most the exact one."""
    rest = max(1.0 - sum(math.exp(log) for log in logprobs), 0.0)
    return -sum(math.exp(log) * log for log in logprobs) - (rest * math.log(rest) if rest > 1e-12 else 0.0)
