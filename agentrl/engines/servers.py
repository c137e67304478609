"""What a model server can be asked, whichever it is. `sglang` and `vllm` speak to theirs; `remote` uses them."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from agentrl.engines import Generation, InFlight, Request
from agentrl.errors import UsageError
from agentrl.trajectory import Floats, Ids, VersionRun, as_floats


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What a server says of itself. `max_context` is in tokens; `version` is the server's own, such as 0.5.23.
    `truncation`: log-probs are of the whole softmax under top-k and top-p too. `cache_block`: tokens that are cached
    together. `images`: its model takes pictures. `priorities`: it was started so that it heeds them."""

    kind: str
    version: str
    model: str
    max_context: int
    truncation: bool = True
    cache_block: int = 1
    images: bool = False
    priorities: bool = False


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

    async def pause(self, in_flight: InFlight = "retract") -> None:
        """Stop sampling; running requests stay, and what is cached of them is computed anew after `resume` or kept."""
        ...

    async def resume(self) -> None: ...

    async def load(self, folder: Path, version: int) -> None:
        """Take the safetensors in `folder` as weights `version`. To be called between `pause` and `resume`.

        No later request uses what older weights computed, however the server was paused.
        """
        ...

    async def sleep(self) -> None:
        """Give the accelerator's memory back, and pause. Harmless where there is none to give. What is cached is lost,
        and the weights may be. Raises `UsageError` where the server was not started for it."""
        ...

    async def wake(self) -> None:
        """Take the memory again; the server stays paused, for it may need its weights first."""
        ...

    async def health(self) -> dict[str, Any]:
        """A small report: running and waiting requests."""
        ...

    async def close(self) -> None:
        """Close the connections; the server goes on."""
        ...


@runtime_checkable
class TakesTensors(Protocol):
    """A server whose weights can be sent in pieces: `open_update`, then `take` or `receive` for each bucket, then
    `close_update`, all between `pause` and `resume`. All raise `InfraError` where a step fails."""

    @property
    def url(self) -> str: ...

    async def ranks(self) -> int:
        """How many processes hold the model. Raises `UsageError` where they are more than tensor parallel."""
        ...

    async def open_update(self) -> None: ...

    async def take(self, pickles: Sequence[bytes], version: int | None) -> None:
        """One bucket of named tensors for each rank, as handles that a process of this machine can open. A `version`
        says that this was the last one."""
        ...

    async def receive(self, bucket: Bucket, group: str, version: int | None) -> None:
        """One bucket that rank 0 of `group` broadcasts as one array of bytes."""
        ...

    async def close_update(self) -> None: ...

    async def join(self, host: str, port: int, rank: int, world: int, group: str, backend: str) -> None:
        """Enter a group of processes, the first of this server's as `rank`. Returns when all have."""
        ...

    async def leave(self, group: str) -> None: ...


@runtime_checkable
class TakesAdapters(Protocol):
    """A server that holds several LoRA adapters over one base model. Raises `UsageError` where one does not fit."""

    @property
    def url(self) -> str: ...

    async def load_adapter(self, name: str, folder: Path) -> None: ...

    async def unload_adapter(self, name: str) -> None: ...

    def use(self, name: str, version: int) -> None:
        """New requests are for this adapter, and their tokens of `version`; those that run stay with theirs."""
        ...

    def using(self, name: str) -> int:
        """How many requests are running under it."""
        ...


@dataclass(frozen=True, slots=True)
class Bucket:
    """What stands in one array of bytes, in order and without gaps: names, one dtype such as "float32", shapes."""

    names: tuple[str, ...]
    dtype: str
    shapes: tuple[tuple[int, ...], ...]


class Adapters:
    """Which adapter new requests of one server are for, and how many run under each."""

    def __init__(self) -> None:
        self.current: tuple[str, int] | None = None
        self._running: Counter[str] = Counter()

    def use(self, name: str, version: int) -> None:
        self.current = name, version

    def using(self, name: str) -> int:
        return self._running[name]

    @contextlib.contextmanager
    def held(self) -> Iterator[tuple[str, int] | None]:
        """The present adapter, in use until the end."""
        held = self.current
        self._running[held[0] if held else ""] += 1
        try:
            yield held
        finally:
            self._running[held[0] if held else ""] -= 1


def check_seen(request: Request, seen: object, name: str) -> None:
    """Raises `UsageError` where a server that was sent pictures read other ids than the record says."""
    if not isinstance(seen, list):
        raise UsageError(f"{name} does not say which ids it read for a picture; it is too old for vision models")
    if seen != request.ids.tolist():
        raise UsageError(
            f"{name} read {len(seen)} ids where the record has {request.ids.size}, or others, for a context with "
            f"{len(request.images)} pictures: it must serve the very folder of the policy, with its own "
            "preprocessor_config.json and no limit of pixels of its own"
        )


def labelled(reply: Generation, adapter: tuple[str, int] | None) -> Generation:
    """The reply with the version of the adapter that sampled it: servers number base weights only."""
    if adapter is None:
        return reply
    return replace(reply, versions=(VersionRun(adapter[1], 0, reply.ids.size),) if reply.ids.size else ())


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


def logprobs_of(values: Iterable[Any]) -> Floats:
    """Log-probs of sampled tokens, at most 0. Raises `ValueError` for one that is no number, as a sick server gives."""
    found = [min(float(value), 0.0) for value in values]
    if not all(map(math.isfinite, found)):
        raise ValueError("log-probs that are not finite")
    return as_floats(found)


def entropy_of(logprobs: Sequence[float]) -> float:
    """The entropy in nats of the likeliest tokens and of one more that has all the rest: at most the exact one."""
    rest = max(1.0 - sum(math.exp(log) for log in logprobs), 0.0)
    return -sum(math.exp(log) * log for log in logprobs) - (rest * math.log(rest) if rest > 1e-12 else 0.0)
