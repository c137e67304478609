"""Engines turn token ids into token ids. The protocol; `local` runs transformers in process.

Token ids in, token ids out, always: an engine never sees text and never re-tokenises.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from agentrl.content import Image
from agentrl.trajectory import Entropy, FinishReason, Floats, Ids, Sampling, VersionRun

if TYPE_CHECKING:
    import torch

InFlight: TypeAlias = Literal["retract", "in_place"]
"""What becomes of running requests at an update, and so what their later log-probs mean.

`retract`: their keys and values are dropped and computed anew, so every log-prob is that of one forward pass under the
weights that its token names. `in_place`: they go on over the keys and values that older weights left. A later log-prob
is then that of the distribution its token was really drawn from (new weights attending to old keys and values: the
behaviour policy's own, fit for an importance ratio), but no forward pass of any one set of weights gives it again.
"""
Crossing: TypeAlias = Literal[InFlight, "finish"]
"""`finish`: they end under the weights that they began with (adapters)."""


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One turn to generate.

    `session` names the episode whose keys and values may be kept between turns; `group` names
    requests that probably share a prompt. `forced` are output ids already known from a record: the
    engine feeds them as if it had sampled them and returns their log-probs, so that an episode
    rebuilt after a crash continues with the very same numbers. `images` are the pictures of the whole context in order,
    and `places` where in `ids` the placeholders of each stand, [start, stop): as many as its size asks for.
    `priority`: of the requests that wait for a place to run, the one with the largest number starts first, and of equal
    ones the one that came first. It stops nothing that runs, and changes no request's numbers.
    """

    ids: Ids
    sampling: Sampling
    session: str
    group: str = ""
    forced: Ids | None = None
    images: tuple[Image, ...] = ()
    places: tuple[tuple[int, int], ...] = ()
    priority: int = 0

    def __post_init__(self) -> None:
        if len(self.images) != len(self.places):
            raise ValueError(f"a request with {len(self.images)} pictures names {len(self.places)} places of them")

    @property
    def folded(self) -> list[int]:
        """`ids` with one placeholder for each picture: what servers take, which repeat it themselves."""
        ids: list[int] = self.ids.tolist()
        for start, stop in reversed(self.places):
            del ids[start + 1 : stop]
        return ids


@dataclass(frozen=True, slots=True, eq=False)
class Generation:
    """An engine's reply. Arrays are [n], n = number of output ids (the stop id included).

    `logprobs` are of the full softmax at the request's temperature, before top-k and top-p.
    `entropies` are of the same distribution, in nats; `entropy` says whether they are exact.
    """

    ids: Ids
    logprobs: Floats
    finish: FinishReason
    versions: tuple[VersionRun, ...]
    entropies: Floats | None = None
    entropy: Entropy = "none"
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an engine can do; checked when the configuration is read. `forced`: it takes `Request.forced`.
    `images`: its model takes pictures. `score_temperature`: it scores at other temperatures than 1. `truncation`: it
    takes top-k and top-p. `cache_block`: tokens that its prefix cache keeps together. `priorities`: it heeds
    `Request.priority`. `in_flight`: what becomes of running requests at an update. `max_context` 0: it has no limit
    of its own."""

    token_ids: bool = True
    logprobs: bool = True
    entropy: Entropy = "exact"
    images: bool = False
    seeds: bool = True
    forced: bool = True
    deterministic: bool = True
    score_temperature: bool = True
    truncation: bool = True
    cache_block: int = 1
    priorities: bool = True
    in_flight: Crossing = "retract"
    max_context: int = 0


@dataclass(slots=True)
class EngineStats:
    """Counters since the start; the trainer logs their differences."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    forwards: int = 0
    busy_seconds: float = 0.0
    extra: dict[str, float] = field(default_factory=dict)


class Engine(Protocol):
    """What the rollout manager and the trainer ask of an engine. All coroutines may run concurrently."""

    capabilities: Capabilities
    stats: EngineStats

    async def generate(self, request: Request) -> Generation:
        """Sample one turn. Raises `UsageError` for ids outside the vocabulary or a context that is
        too long, `InfraError` when the engine broke."""

    async def score(self, ids: Ids, start: int, temperature: float = 1.0) -> Floats:
        """Log-probs of ids[start:] given what stands before each. Shape [len(ids) - start], start >= 1."""

    async def scores(self, ids: Ids, start: int) -> Mapping[str, Floats]:
        """`score` at temperature 1 by every replica that serves now, by its name."""

    async def fork(self, parent: str, child: str) -> None:
        """Let session `child` share what is cached of `parent` now. A hint: never changes a number."""

    async def release(self, session: str) -> None:
        """The episode ended: what was kept for it may go. Unknown sessions are ignored."""

    async def abort(self, session: str | None = None) -> None:
        """End running requests of `session` (all where None): they finish with reason "abort"."""

    async def pause(self) -> None:
        """Stop sampling between two tokens; running requests stay."""

    async def resume(self) -> None:
        """Go on after `pause`."""

    async def update_weights(
        self, weights: Iterable[tuple[str, torch.Tensor]] | Mapping[str, torch.Tensor] | str, version: int
    ) -> None:
        """Take new weights (named tensors, or a folder) as `version`. Cached keys and values of older
        weights are never mixed with newer ones silently: they are dropped."""

    async def sleep(self) -> None:
        """Give the accelerator's memory back to the trainer."""

    async def wake(self) -> None:
        """Undo `sleep`."""

    async def health(self) -> dict[str, Any]:
        """A small report: version, running, waiting, held sessions."""

    def where(self, session: str) -> str:
        """Where a session's requests go, for people."""

    @property
    def trouble(self) -> str | None:
        """Why no request can be served now; None where one can."""

    async def close(self) -> None:
        """End everything. Idempotent."""
