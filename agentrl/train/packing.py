"""Rows as a prefix tree: tokens that rows share stand once, and nothing is padded but attention.

The rows of a group begin with the same prompt, and all rows of a task with the same system turn; a
causal model gives a shared token the same hidden state in every row, so it is forwarded once. Rows
are sorted by their ids: the longest prefix that a row shares with *any* earlier row is then the one
it shares with its predecessor, so every row owns a contiguous tail, and its head points into what
earlier rows own. Exact duplicates own nothing.

Linear layers see the owned tokens of all rows as one sequence [1, T]. Attention gathers them into
padded blocks: the owned tail as queries, the whole row as keys. Pure numpy; `attention` reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from agentrl.trajectory import Ids, Row

Index: TypeAlias = NDArray[np.int64]
Share: TypeAlias = bool | Literal["auto"]

WORTH_SHARING = 0.95
"""Sharing pays below this ratio of distinct to given tokens (see tests/benchmarks/bench_forward.py)."""

_BLOCK_KEYS = 1 << 16  # padded keys in one attention block: bounds its memory
_SMALL_BLOCK = 1 << 16  # queries x keys below which one more block costs more than its padding
_CUT_COST = 64  # what one more micro-batch costs, in tokens


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Rows whose attention is computed together. Padding repeats flat index 0.

    `queries` [R, Q] and `keys` [R, K] are flat token indices; query i of row r stands at
    `starts[r] + i` of its row, which has `lengths[r]` tokens.
    """

    queries: Index
    keys: Index
    starts: Index
    lengths: Index


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """One micro-batch. T distinct tokens, M targets in row order, U distinct (token, next id) pairs.

    `place` [T]: where each flat token stands among the queries of all blocks, concatenated.
    `at` [U]: the flat token whose logits predict `next_ids` [U]; `pairs` [M]: each target's pair.
    """

    ids: Index
    positions: Index
    blocks: tuple[Block, ...]
    place: Index
    at: Index
    next_ids: Index
    pairs: Index


def needed(row: Row) -> int:
    """How many of a row's tokens must be forwarded: nothing is predicted from the last target on."""
    return int(row.targets[-1]) if row.targets.size else 0


def by_prefix(rows: Sequence[Ids]) -> tuple[list[int], Index]:
    """Sort rows by their ids. Returns the order, and how many ids each shares with its predecessor."""
    keys = [ids.astype(">i4").tobytes() for ids in rows]  # big-endian bytes compare as the ids do
    order = sorted(range(len(rows)), key=keys.__getitem__)
    shared = np.zeros(len(rows), dtype=np.int64)
    for rank in range(1, len(order)):
        before, here = rows[order[rank - 1]], rows[order[rank]]
        size = min(before.size, here.size)
        differs = before[:size] != here[:size]
        shared[rank] = int(differs.argmax()) if differs.any() else size
    return order, shared


def plan(rows: Sequence[Row], *, token_budget: int, share_prompts: Share = "auto") -> list[list[int]]:
    """Cut rows into micro-batches of at most `token_budget` tokens (a longer row gets its own).

    With sharing, rows stand in prefix order, only distinct tokens count, and the cuts are those that
    recompute fewest shared tokens. Without, rows are sorted by length and padding counts. Returns
    indices into `rows`: every row once, the same for the same rows.
    """
    if token_budget < 1:
        raise ValueError(f"token_budget must be positive, got {token_budget}")
    inputs = [row.ids[: needed(row)] for row in rows]
    order, shared = by_prefix(inputs)
    lengths = np.array([inputs[i].size for i in order], dtype=np.int64)
    if not _shares(share_prompts, int(lengths.sum()), int(shared.sum())):
        return _by_length([ids.size for ids in inputs], token_budget)
    total = np.concatenate([[0], np.cumsum(lengths - shared)])
    count = len(order)
    best = np.full(count + 1, np.iinfo(np.int64).max)
    best[0] = 0
    cut = np.zeros(count + 1, dtype=np.int64)
    first = 0
    for stop in range(1, count + 1):
        # A batch [start, stop) forwards its own tokens and, again, the head that `start` shares.
        while first < stop - 1 and total[stop] - total[first] + shared[first] > token_budget:
            first += 1
        starts = np.arange(first, stop)
        fits = total[stop] - total[starts] + shared[starts] <= token_budget
        fits[-1] = True
        costs = np.where(fits, best[starts] + shared[starts] + _CUT_COST, np.iinfo(np.int64).max)
        cut[stop] = first + int(costs.argmin())
        best[stop] = costs.min()
    batches: list[list[int]] = []
    stop = count
    while stop:
        start = int(cut[stop])
        batches.append(order[start:stop])
        stop = start
    return batches[::-1]


def _by_length(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= token_budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def _shares(share: Share, given: int, shared: int) -> bool:
    return shared > 0 and given - shared <= WORTH_SHARING * given if share == "auto" else share


def lay_out(rows: Sequence[Row], share_prompts: Share = "auto") -> Layout:
    """The layout of one micro-batch of `rows` (at least one target among them)."""
    inputs = [row.ids[: needed(row)] for row in rows]
    order, shared = by_prefix(inputs)
    if not _shares(share_prompts, sum(ids.size for ids in inputs), int(shared.sum())):
        shared = np.zeros_like(shared)
    flat: list[Index] = []  # by rank: the flat index of every token of the row
    size = 0
    for rank, index in enumerate(order):
        own = np.arange(size, size + inputs[index].size - shared[rank])
        flat.append(np.concatenate([flat[rank - 1][: shared[rank]], own]) if shared[rank] else own)
        size += own.size
    ids = np.concatenate([inputs[i][s:] for i, s in zip(order, shared, strict=True)]).astype(np.int64)
    positions = np.concatenate([np.arange(s, inputs[i].size) for i, s in zip(order, shared, strict=True)])
    blocks, place = _blocks(flat, shared, size)

    where: list[Index] = [np.empty(0, np.int64)] * len(rows)
    for rank, index in enumerate(order):
        where[index] = flat[rank][rows[index].targets - 1]
    at = np.concatenate(where)
    next_ids = np.concatenate([row.ids[row.targets] for row in rows]).astype(np.int64)
    _, first, pairs = np.unique(np.stack([at, next_ids]), axis=1, return_index=True, return_inverse=True)
    return Layout(ids, positions, blocks, place, at[first], next_ids[first], pairs.reshape(-1))


def _blocks(flat: Sequence[Index], shared: Index, size: int) -> tuple[tuple[Block, ...], Index]:
    """Attention blocks over rows of similar shape: whole rows first, then tails by falling length."""
    tails = np.array([row.size for row in flat], dtype=np.int64) - shared
    ranks = [rank for rank in range(len(flat)) if tails[rank]]
    ranks.sort(key=lambda rank: (bool(shared[rank]), -tails[rank], -flat[rank].size, rank))
    parts: list[list[int]] = []
    longest = queries = 0
    for rank in ranks:
        row, tail = flat[rank].size, int(tails[rank])
        if parts:
            part = parts[-1]
            wide = max(longest, row)
            roomy = tail * row < 0.6 * queries * wide and len(part) * queries * wide > _SMALL_BLOCK
            mixed = bool(shared[rank]) != bool(shared[part[0]])
            if not (mixed or roomy or (len(part) + 1) * wide > _BLOCK_KEYS):
                part.append(rank)
                longest = wide
                continue
        parts.append([rank])
        longest, queries = row, tail
    blocks = []
    place = np.empty(size, dtype=np.int64)
    base = 0
    for part in parts:
        width = int(tails[part].max())
        query = np.zeros((len(part), width), dtype=np.int64)
        key = np.zeros((len(part), max(flat[rank].size for rank in part)), dtype=np.int64)
        for line, rank in enumerate(part):
            own = flat[rank][shared[rank] :]
            query[line, : own.size] = own
            key[line, : flat[rank].size] = flat[rank]
            place[own] = base + line * width + np.arange(own.size)
        base += query.size
        blocks.append(Block(query, key, shared[part], shared[part] + tails[part]))
    return tuple(blocks), place
