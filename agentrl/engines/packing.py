"""From the tokens of one step to its `Plan`: one packed row of ids and positions, where to write, what to attend over.

In deterministic mode a token's answer is computed in a shape that follows from its position alone: one query against as
many keys as the smallest pool for that position holds, be it a prompt's token or a sampled one. So it does not matter
how a prompt was cut into chunks, whether it was shared, or whether it had been cached or had to be computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from agentrl.engines.attention import Block, Plan, Write, ask, pad_queries
from agentrl.engines.kv import Cache, Kept, Pool
from agentrl.engines.rows import Rows
from agentrl.trajectory import Ids

Index = NDArray[np.int64]
_LONG = 32  # queries from which a prompt chunk gets a block of its own
_QUERIES = 256  # at most so many in one block: bounds the size of its mask and scores
_FIXED = 16  # slots a block where the bits of a batched product depend on its size


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [begin, end) of `ids`, to be written to the slot of `kept`."""

    kept: Kept
    ids: Ids
    begin: int
    end: int


class Packer:
    """Builds the plans of one engine."""

    def __init__(self, cache: Cache, device: torch.device, deterministic: bool) -> None:
        self.cache = cache
        self.device = device
        self.deterministic = deterministic
        self.fixed = False

    def pack(self, chunks: Sequence[Chunk], rows: Rows | None, total: int) -> tuple[torch.Tensor, torch.Tensor, Plan]:
        """ids [total], positions [total] and the plan. Order: padding, chunks, decoding rows."""
        count = 0 if rows is None else rows.count
        filled = sum(chunk.end - chunk.begin for chunk in chunks)
        ids, positions = np.zeros(total, dtype=np.int64), np.zeros(total, dtype=np.int64)
        back = np.zeros(total, dtype=np.int64)
        builder = _Builder(self, positions, back)
        start = total - count - filled
        spans: list[tuple[int, Chunk]] = []
        for chunk in chunks:
            n = chunk.end - chunk.begin
            ids[start : start + n] = chunk.ids[chunk.begin : chunk.end]
            positions[start : start + n] = np.arange(chunk.begin, chunk.end)
            spans.append((start, chunk))
            start += n
        if spans:
            builder.add_chunks(spans)
        if rows is not None and count:
            active = rows.active
            ids[start:], positions[start:] = rows.current[active], rows.position[active]
            pools, slots = rows.pool[active], rows.slot[active]
            edges = [0, *(int(i) + 1 for i in np.flatnonzero(np.diff(pools))), count]
            for a, b in pairwise(edges):
                builder.add_rows(self.cache.pools[int(pools[a])], slots[a:b], start + a)
        return self.tensor(ids), self.tensor(positions), builder.plan(total)

    def tensor(self, values: NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(values).to(self.device)

    def probe(self) -> None:
        """Find out whether a batched product's bits depend on the size of its batch; if so, fix that size."""
        shape = self.cache.pools[0].shapes[0]
        pool = Pool(self.cache.capacities[0], self.cache.pools[0].shapes[:1], self.device, self.cache.pools[0].dtype)
        for _ in range(64):
            pool.take(Kept(""))
        generator = torch.Generator(device="cpu").manual_seed(0)
        for tensor in (*pool.keys, *pool.values):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        query = torch.randn(64, 2 * shape.heads, shape.key_dim, generator=generator).to(self.device, pool.dtype)
        positions = torch.arange(64, device=self.device)[:, None] % pool.capacity

        def answers(size: int, gather: bool) -> torch.Tensor:
            out = []
            for a in range(0, 64, size):
                b = min(64, a + size)
                where = torch.arange(a, b, device=self.device) if gather else slice(a, b)
                block = Block(pool, where, slice(a, b), positions[a:b], pool.capacity)
                out.append(ask(block, 0, query, shape.heads, 0.1, None, None))
            return torch.cat(out)

        reference = answers(_FIXED, True)
        self.fixed = not all(
            torch.equal(answers(size, gather), reference)
            for size in (1, 2, 3, 5, 8, 16, 31, 64)
            for gather in (True, False)
        )


class _Builder:
    """Collects writes and blocks; `back[token]` becomes the token's line in the joined answers."""

    def __init__(self, packer: Packer, positions: Index, back: Index) -> None:
        self.packer = packer
        self.positions = positions
        self.back = back
        self.lines = 0
        self.writes: list[Write] = []
        self.blocks: list[Block] = []
        self.ordered = True

    def plan(self, total: int) -> Plan:
        straight = self.lines == total and bool((self.back == np.arange(total)).all())
        return Plan(self.writes, self.blocks, None if straight else self.packer.tensor(self.back))

    def _block(self, pool: Pool, slots: slice | Index, take: slice | Index, positions: Index, length: int) -> None:
        tensor = self.packer.tensor
        where = slots if isinstance(slots, slice) else tensor(slots)
        self.blocks.append(
            Block(pool, where, take if isinstance(take, slice) else tensor(take), tensor(positions), length)
        )
        self.lines += positions.size

    def _write(self, pool: Pool, take: slice | Index, slots: Index, positions: Index) -> None:
        tensor = self.packer.tensor
        index = take if isinstance(take, slice) else tensor(take)
        self.writes.append(Write(pool, index, tensor(slots), tensor(positions)))

    def _length(self, pool: Pool, last: int) -> int:
        if self.packer.deterministic:
            return pool.capacity
        return min(pool.capacity, -(-(last + 1) // 32) * 32)

    def add_rows(self, pool: Pool, slots: Index, first: int) -> None:
        """Tokens from `first` on, one for each of `slots` (ascending)."""
        n = slots.size
        tokens = slice(first, first + n)
        positions = self.positions[tokens]
        self._write(pool, tokens, slots, positions)
        if self.packer.fixed:
            self._add_single(np.arange(first, first + n), slots, pool, pool.capacity)
            return
        low, high = int(slots[0]), int(slots[-1]) + 1
        length = self._length(pool, int(positions.max()))
        self.back[tokens] = self.lines + slots - low
        if high - low == n:
            self._block(pool, slice(low, high), tokens, positions[:, None], length)
        else:
            take, where = np.full(high - low, first, dtype=np.int64), np.zeros(high - low, dtype=np.int64)
            take[slots - low], where[slots - low] = np.arange(first, first + n), positions
            self._block(pool, slice(low, high), take, where[:, None], length)

    def add_chunks(self, spans: Sequence[tuple[int, Chunk]]) -> None:
        """Prompt chunks, each with the index of its first token."""
        by_pool: dict[int, list[tuple[int, Chunk]]] = {}
        for start, chunk in spans:
            assert chunk.kept.pool is not None
            by_pool.setdefault(chunk.kept.pool.capacity, []).append((start, chunk))
        for members in by_pool.values():
            pool = members[0][1].kept.pool
            assert pool is not None
            starts = np.array([start for start, _ in members])
            lengths = np.array([chunk.end - chunk.begin for _, chunk in members])
            slots = np.array([chunk.kept.slot for _, chunk in members])
            tokens = np.concatenate([np.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)])
            self._write(pool, tokens, np.repeat(slots, lengths), self.positions[tokens])
            if self.packer.deterministic:
                self._add_exact(tokens, np.repeat(slots, lengths), pool)
                continue
            long = lengths > _LONG
            for start, n, slot in zip(starts[long], lengths[long], slots[long], strict=True):
                for a in range(int(start), int(start + n), _QUERIES):
                    self._add_long(pool, int(slot), a, min(a + _QUERIES, int(start + n)))
            if not long.all():
                self._add_short(pool, slots[~long], starts[~long], lengths[~long])

    def _add_long(self, pool: Pool, slot: int, a: int, b: int) -> None:
        positions = self.positions[a:b]
        self.back[a:b] = self.lines + np.arange(b - a)
        self._block(pool, slice(slot, slot + 1), slice(a, b), positions[None], self._length(pool, int(positions[-1])))

    def _add_short(self, pool: Pool, slots: Index, starts: Index, lengths: Index) -> None:
        offsets, real = pad_queries(lengths)
        take = starts[:, None] + offsets
        self.back[take[real]] = self.lines + np.flatnonzero(real)
        positions = self.positions[take]
        self._block(pool, slots, take.ravel(), positions, self._length(pool, int(positions.max())))

    def _add_exact(self, tokens: Index, slots: Index, pool: Pool) -> None:
        """One query a token, against the keys that the smallest pool for its position holds."""
        capacities = np.array(self.packer.cache.capacities)
        lengths = capacities[np.searchsorted(capacities, self.positions[tokens] + 1)]
        for length in np.unique(lengths):
            chosen = lengths == length
            self._add_single(tokens[chosen], slots[chosen], pool, int(length))

    def _add_single(self, tokens: Index, slots: Index, pool: Pool, length: int) -> None:
        size = _FIXED if self.packer.fixed else 64
        for a in range(0, tokens.size, size):
            some, where = tokens[a : a + size], slots[a : a + size]
            self.back[some] = self.lines + np.arange(some.size)
            if self.packer.fixed and some.size < size:
                some, where = np.resize(some, size), np.resize(where, size)
            self._block(pool, where, some, self.positions[some][:, None], length)
