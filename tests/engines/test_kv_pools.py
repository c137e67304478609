"""Slots and pools: what is cached survives every move."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from agentrl.engines.kv import Cache, Kept, LayerShape, copy_slots
from agentrl.engines.prefix import Prefixes

SHAPES = (LayerShape(2, 3, 3), LayerShape(1, 4, 5))


def cache_of(base: int = 4, most: int = 20) -> Cache:
    return Cache(SHAPES, base, most, torch.device("cpu"), torch.float32)


def fill(kept: Kept, n: int, mark: float) -> None:
    assert kept.pool is not None
    kept.ids, kept.n = np.arange(n, dtype=np.int32), n
    for tensor in kept.pool.tensors():
        tensor[kept.slot, :, :n] = mark


def marks(kept: Kept) -> set[float]:
    assert kept.pool is not None
    return {float(v) for tensor in kept.pool.tensors() for v in tensor[kept.slot, :, : kept.n].unique()}


def test_a_sequence_moves_to_the_pool_of_its_length() -> None:
    cache = cache_of()
    assert cache.capacities == (4, 6, 8, 12, 16, 24)
    kept = Kept("a")
    cache.seat(kept, 3)
    fill(kept, 3, 7.0)
    for tokens, capacity in ((5, 6), (16, 16), (17, 24), (2, 4)):
        kept.n = min(kept.n, tokens)
        cache.seat(kept, tokens)
        assert kept.pool is not None and kept.pool.capacity == capacity and marks(kept) == {7.0}
    assert sum(owner is not None for pool in cache.pools for owner in pool.owners) == 1


def test_full_slots_grow_together() -> None:
    cache = cache_of()
    held = [(i, Kept(str(i))) for i in range(9)]
    for i, kept in held:
        cache.seat(kept, 4 if i % 3 else 12)
        assert kept.pool is not None
        fill(kept, kept.pool.capacity, float(i))
    cache.grow([kept for i, kept in held if i != 5])
    for i, kept in held:
        assert kept.pool is not None and kept.pool.capacity == (4 if i == 5 else 6 if i % 3 else 16)
        assert marks(kept) == {float(i)} and kept.pool.owners[kept.slot] is kept


@pytest.mark.parametrize("seed", range(5))
def test_settling_keeps_every_sequence_and_brings_running_ones_down(seed: int) -> None:
    rng = np.random.default_rng(seed)
    cache = cache_of()
    pool = cache.pools[0]
    held = []
    for i in range(60):
        kept = Kept(str(i))
        cache.seat(kept, 4)
        fill(kept, 4, float(i))
        kept.running = bool(rng.random() < 0.3)
        held.append((i, kept))
    for i, kept in list(held):
        if rng.random() < 0.4:
            cache.drop(kept)
            held.remove((i, kept))
    pool.settle()
    running = [kept.slot for _, kept in held if kept.running]
    assert not running or max(running) + 1 <= len(running) + max(4, len(running) // 2)
    for i, kept in held:
        assert marks(kept) == {float(i)} and pool.owners[kept.slot] is kept
    free = [slot for slot, owner in enumerate(pool.owners) if owner is None]
    assert sorted(pool._free) == free


def test_copying_one_slot_to_many() -> None:
    cache = cache_of()
    source, twins = Kept("s"), [Kept("t"), Kept("u")]
    cache.seat(source, 4)
    fill(source, 4, 3.0)
    for twin in twins:
        cache.seat(twin, 7)
        twin.n = 4
    assert source.pool is not None and twins[0].pool is not None
    copy_slots(source.pool, source.slot, twins[0].pool, [twin.slot for twin in twins], 4)
    assert all(marks(twin) == {3.0} for twin in twins)


def test_prefixes_propose_the_longest_common_beginning() -> None:
    cache, index = cache_of(64, 64), Prefixes()
    ids = np.arange(50, dtype=np.int32)
    first, twin, cousin, stranger = Kept("a"), Kept("b"), Kept("c"), Kept("d")
    for kept in (first, twin, cousin, stranger):
        cache.seat(kept, 50)
    first.coming = ids
    assert index.propose(first, ids) is None
    assert index.propose(twin, ids) == (first, 50)
    other = ids.copy()
    other[40:] = 1
    assert index.propose(cousin, other) == (first, 32)
    assert index.propose(stranger, ids[1:]) is None
    index.forget(first)
    cache.drop(first)
    assert index.propose(Kept("e"), ids) is None
