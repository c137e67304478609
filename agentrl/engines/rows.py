"""The decoding rows: one array per fact, one entry per row, advanced together.

A row is what one running request occupies. Rows enter and leave one by one, but a step touches arrays only. `active`
lists the rows in the order of their tokens at the end of a packed step: by pool, then by slot.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from agentrl.engines import Request
from agentrl.engines.kv import Cache, Kept
from agentrl.engines.sampler import Draws, uniforms
from agentrl.trajectory import Floats, Ids, as_floats, as_ids


@dataclass(slots=True, eq=False)
class Progress:
    """A request and what it has put out so far: [n] ids, log-probs and entropies, current while it has no row."""

    request: Request
    kept: Kept = field(default_factory=lambda: Kept(""))
    ids: Ids = field(default_factory=lambda: as_ids([]))
    logprobs: Floats = field(default_factory=lambda: as_floats([]))
    entropies: Floats = field(default_factory=lambda: as_floats([]))
    row: int = -1


class Rows:
    """`capacity` rows, of which `active` decode."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.capacity = capacity
        self.device = device
        self.holders: list[Progress | None] = [None] * capacity
        self.free = list(range(capacity))[::-1]
        self.position = np.zeros(capacity, dtype=np.int64)  # where the newest token stands; it has no keys yet
        self.current = np.zeros(capacity, dtype=np.int64)  # the newest token
        self.made = np.zeros(capacity, dtype=np.int64)  # tokens put out
        self.limit = np.zeros(capacity, dtype=np.int64)
        self.pool = np.zeros(capacity, dtype=np.int64)
        self.slot = np.zeros(capacity, dtype=np.int64)
        self.room = np.zeros(capacity, dtype=np.int64)  # the pool's capacity
        self.temperature = np.ones(capacity, dtype=np.float32)
        self.top_k = np.zeros(capacity, dtype=np.int64)
        self.top_p = np.ones(capacity, dtype=np.float32)
        self.stops = np.full((capacity, 1), -1, dtype=np.int64)
        self.uniform = np.zeros((capacity, 64), dtype=np.float64)
        self.forced = np.full((capacity, 64), -1, dtype=np.int64)
        self.out_ids = np.zeros((capacity, 64), dtype=np.int32)
        self.out_logprobs = np.zeros((capacity, 64), dtype=np.float32)
        self.out_entropies = np.zeros((capacity, 64), dtype=np.float32)
        self._active: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._stale = False
        self._any: dict[str, bool] = {}

    @property
    def count(self) -> int:
        return self.capacity - len(self.free)

    @property
    def active(self) -> NDArray[np.int64]:
        """Rows in packed order. Shape [count]."""
        if self._stale:
            rows = np.array([r for r, holder in enumerate(self.holders) if holder is not None], dtype=np.int64)
            self._active = rows[np.lexsort((self.slot[rows], self.pool[rows]))]
            a = self._active
            self._any = {
                "temperature": bool(((self.temperature[a] != 1) & (self.temperature[a] > 0)).any()),
                "greedy": bool((self.temperature[a] == 0).any()),
                "top_k": bool(self.top_k[a].any()),
                "top_p": bool((self.top_p[a] < 1).any()),
                "forced": any(h is not None and h.request.forced is not None for h in self.holders),
            }
            self._stale = False
        return self._active

    def holder(self, row: int) -> Progress:
        """Who has `row`."""
        progress = self.holders[row]
        assert progress is not None
        return progress

    def running(self) -> list[Progress]:
        return [holder for holder in self.holders if holder is not None]

    def enter(self, progress: Progress, cache: Cache, limit: int) -> None:
        """Give `progress` a row; it may put out `limit` tokens in all."""
        request, sampling = progress.request, progress.request.sampling
        row = self.free.pop()
        self.holders[row], progress.row = progress, row
        made = int(progress.ids.size)
        self._widen(limit, len(sampling.stop_ids))
        self.position[row] = request.ids.size + made - 1
        self.current[row] = progress.ids[-1] if made else request.ids[-1]
        self.made[row], self.limit[row] = made, limit
        self.temperature[row] = sampling.temperature
        self.top_k[row], self.top_p[row] = sampling.top_k, sampling.top_p
        self.stops[row] = -1
        self.stops[row, : len(sampling.stop_ids)] = sampling.stop_ids
        self.uniform[row, :limit] = uniforms(sampling.seed, limit)
        self.forced[row] = -1
        if request.forced is not None:
            n = min(limit, int(request.forced.size))
            self.forced[row, :n] = request.forced[:n]
        self.out_ids[row, :made], self.out_logprobs[row, :made] = progress.ids, progress.logprobs
        self.out_entropies[row, :made] = progress.entropies
        self.seat(row, progress.kept, cache)

    def seat(self, row: int, kept: Kept, cache: Cache) -> None:
        """Note where the row's keys and values stand now."""
        assert kept.pool is not None
        self.pool[row], self.slot[row], self.room[row] = cache.pools.index(kept.pool), kept.slot, kept.pool.capacity
        self._stale = True

    def leave(self, row: int) -> Progress:
        """Free the row; its output goes to its holder, and what is cached of it is written down."""
        progress = self.holder(row)
        self.read(progress)
        self.holders[row] = None
        self.free.append(row)
        progress.row = -1
        self._stale = True
        return progress

    def read(self, progress: Progress) -> None:
        """Bring the output of a running `progress`, and the ids of its keys and values, up to date."""
        row, n = progress.row, int(self.made[progress.row])
        progress.ids = self.out_ids[row, :n].copy()
        progress.logprobs = self.out_logprobs[row, :n].copy()
        progress.entropies = self.out_entropies[row, :n].copy()
        progress.kept.ids = np.concatenate([progress.request.ids, progress.ids])[:-1]
        progress.kept.n = int(progress.kept.ids.size)

    def outgrown(self) -> list[int]:
        """Rows whose next token does not fit in their pool."""
        active = self.active
        return [int(row) for row in active[self.position[active] >= self.room[active]]]

    def draws(self, padded: int) -> Draws:
        """What the rows ask of the sampler, in packed order, at the end of `padded` entries."""
        a = self.active
        pad = padded - a.size
        made = self.made[a]

        def tensor(values: NDArray[np.generic], fill: float) -> torch.Tensor:
            if pad:
                values = np.concatenate([np.full(pad, fill, dtype=values.dtype), values])
            return torch.from_numpy(values).to(self.device)

        draws = Draws(tensor(self.uniform[a, made], 0.5))
        if self._any["temperature"]:
            draws.temperature = tensor(np.where(self.temperature[a] > 0, self.temperature[a], np.float32(1)), 1.0)
        if self._any["greedy"]:
            draws.greedy = tensor(self.temperature[a] == 0, 0)
        if self._any["top_k"]:
            draws.top_k = tensor(self.top_k[a], 0)
        if self._any["top_p"]:
            draws.top_p = tensor(self.top_p[a], 1.0)
        if self._any["forced"]:
            draws.forced = tensor(self.forced[a, made], -1)
        return draws

    def advance(
        self, ids: NDArray[np.int64], logprobs: NDArray[np.float32], entropies: NDArray[np.float32]
    ) -> list[tuple[int, bool]]:
        """Append one token to every row (packed order, [count]). Returns the rows that end, True where by a stop id."""
        a = self.active
        made = self.made[a]
        self.out_ids[a, made], self.out_logprobs[a, made], self.out_entropies[a, made] = ids, logprobs, entropies
        made += 1
        self.made[a] = made
        self.position[a] += 1
        self.current[a] = ids
        stopped = (self.stops[a] == ids[:, None]).any(axis=1)
        ended = np.flatnonzero(stopped | (made >= self.limit[a]))
        return [(int(a[i]), bool(stopped[i])) for i in ended]

    def _widen(self, width: int, stops: int) -> None:
        if stops > self.stops.shape[1]:
            self.stops = np.pad(self.stops, ((0, 0), (0, stops - self.stops.shape[1])), constant_values=-1)
        more = width - self.uniform.shape[1]
        if more > 0:
            grow = ((0, 0), (0, max(more, self.uniform.shape[1])))
            self.uniform, self.out_ids = np.pad(self.uniform, grow), np.pad(self.out_ids, grow)
            self.out_logprobs, self.out_entropies = np.pad(self.out_logprobs, grow), np.pad(self.out_entropies, grow)
            self.forced = np.pad(self.forced, grow, constant_values=-1)
