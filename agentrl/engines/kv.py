"""Keys and values live in slots; a slot belongs to a pool, a pool has one capacity.

A sequence stands in the pool with the smallest capacity that holds it, and moves to the next one when it outgrows it.
Capacities go up in steps of a third to a half, so memory follows length, and attention over one pool wastes little of
its reads on padding. Slots in use by running rows are kept near the bottom of their pool (`Pool.settle`): a decode step
then attends over plain views.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from agentrl.trajectory import Ids


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one attention layer caches for a token: `heads` keys of `key_dim` and values of `value_dim` numbers."""

    heads: int
    key_dim: int
    value_dim: int


class Kept:
    """What is cached of one sequence: `ids[:n]` have keys and values in `slot` of `pool`.

    `coming` are the ids that a request is about to cache here (those of a prompt not yet computed).
    """

    __slots__ = ("coming", "ids", "n", "pool", "running", "session", "slot", "used")

    def __init__(self, session: str) -> None:
        self.session = session
        self.ids: Ids = np.empty(0, dtype=np.int32)
        self.coming: Ids = self.ids
        self.n = 0
        self.pool: Pool | None = None
        self.slot = -1
        self.running = False
        self.used = 0

    def overlap(self, ids: Ids) -> int:
        """How many leading `ids` are cached here."""
        n = min(self.n, int(ids.size))
        differs = np.flatnonzero(self.ids[:n] != ids[:n])
        return int(differs[0]) if differs.size else n


class Pool:
    """Slots of one capacity. Per layer: keys [slots * heads, capacity, key_dim], values likewise."""

    def __init__(self, capacity: int, shapes: Sequence[LayerShape], device: torch.device, dtype: torch.dtype) -> None:
        self.capacity = capacity
        self.shapes = tuple(shapes)
        self.device = device
        self.dtype = dtype
        self.clear()

    def clear(self) -> None:
        """Forget every slot and give the memory back."""
        self.slots = 0
        self.keys = [self._empty(0, s.heads, s.key_dim) for s in self.shapes]
        self.values = [self._empty(0, s.heads, s.value_dim) for s in self.shapes]
        self.owners: list[Kept | None] = []
        self.changed = False  # since slots were settled last
        self._free: list[int] = []

    def _empty(self, slots: int, heads: int, dim: int) -> torch.Tensor:
        # Zeros, not garbage: masked positions are multiplied by an exact 0, which would keep a NaN alive.
        return torch.zeros(slots * heads, self.capacity, dim, device=self.device, dtype=self.dtype)

    def take(self, kept: Kept) -> None:
        """Give `kept` the lowest free slot here (its old slot, if any, is not touched)."""
        if not self._free:
            self._grow(max(4, self.slots + self.slots // 2))
        kept.pool, kept.slot = self, heapq.heappop(self._free)
        self.owners[kept.slot] = kept
        self.changed = True

    def give(self, slot: int) -> None:
        """The slot is free again."""
        self.owners[slot] = None
        self.changed = True
        heapq.heappush(self._free, slot)

    def _grow(self, slots: int) -> None:
        for tensors, dims in (
            (self.keys, [s.key_dim for s in self.shapes]),
            (self.values, [s.value_dim for s in self.shapes]),
        ):
            for layer, (old, shape, dim) in enumerate(zip(tensors, self.shapes, dims, strict=True)):
                new = self._empty(slots, shape.heads, dim)
                new[: old.shape[0]] = old
                tensors[layer] = new
        for slot in range(self.slots, slots):
            heapq.heappush(self._free, slot)
        self.owners.extend([None] * (slots - self.slots))
        self.slots = slots

    def by_slot(self, tensor: torch.Tensor) -> torch.Tensor:
        """[slots * heads, capacity, dim] seen as [slots, heads, capacity, dim]."""
        return tensor.view(self.slots, -1, self.capacity, tensor.shape[-1])

    def tensors(self) -> list[torch.Tensor]:
        """All keys and values, each as [slots, heads, capacity, dim]."""
        return [self.by_slot(t) for t in (*self.keys, *self.values)]

    def settle(self) -> int:
        """Move running slots down into slots that are free or wait. Returns how many moved.

        Only where more than a third of the span of running slots would be attended over in vain.
        """
        if not self.changed:
            return 0
        self.changed = False
        running = [slot for slot, kept in enumerate(self.owners) if kept is not None and kept.running]
        count = len(running)
        if not count or running[-1] + 1 <= count + max(4, count // 2):
            return 0
        low = [slot for slot in range(count) if (kept := self.owners[slot]) is None or not kept.running]
        high = [slot for slot in running if slot >= count]
        for target, source in zip(low, high, strict=True):
            for tensor in self.tensors():
                if self.owners[target] is None:
                    tensor[target] = tensor[source]
                else:
                    tensor[[target, source]] = tensor[[source, target]]
            self._exchange(target, source)
        return len(low)

    def _exchange(self, target: int, source: int) -> None:
        mover, other = self.owners[source], self.owners[target]
        assert mover is not None
        mover.slot = target
        self.owners[target], self.owners[source] = mover, other
        if other is not None:
            other.slot = source
        else:
            self._free.remove(target)
            self._free.append(source)
            heapq.heapify(self._free)


class Cache:
    """The pools of one engine: `base` tokens a slot, then 1, 1½, 2, 3, 4, 6, 8, … times that."""

    def __init__(
        self, shapes: Sequence[LayerShape], base: int, max_context: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        capacities = [base]
        while capacities[-1] < max_context:
            double = capacities[-2] * 2 if len(capacities) > 1 else base * 3 // 2
            capacities.append(double)
        self.capacities = tuple(capacities)
        self.pools = [Pool(capacity, shapes, device, dtype) for capacity in capacities]

    def rank(self, tokens: int) -> int:
        """Index of the smallest pool that holds `tokens` tokens."""
        return next(i for i, capacity in enumerate(self.capacities) if capacity >= tokens)

    def seat(self, kept: Kept, tokens: int) -> None:
        """See to it that `kept` stands in the smallest pool for `tokens` tokens; what is cached moves along."""
        pool = self.pools[self.rank(tokens)]
        old, slot = kept.pool, kept.slot
        if old is pool:
            return
        pool.take(kept)
        if old is not None:
            if kept.n:
                copy_slots(old, slot, pool, [kept.slot], kept.n)
            old.give(slot)

    def grow(self, several: Sequence[Kept]) -> None:
        """Move full slots to the next pool, those of one pool together."""
        by_pool: dict[int, list[Kept]] = {}
        for kept in several:
            assert kept.pool is not None
            by_pool.setdefault(kept.pool.capacity, []).append(kept)
        for capacity, members in by_pool.items():
            old, slots = self.pools[self.rank(capacity)], [kept.slot for kept in members]
            new = self.pools[self.rank(capacity + 1)]
            for kept in members:
                new.take(kept)
            source = torch.tensor(slots, device=old.device)
            target = torch.tensor([kept.slot for kept in members], device=new.device)
            for full, wide in zip(old.tensors(), new.tensors(), strict=True):
                wide[target, :, :capacity] = full.index_select(0, source)
            for slot in slots:
                old.give(slot)

    def drop(self, kept: Kept) -> None:
        """Free the slot of `kept`; nothing of it is cached any more."""
        if kept.pool is not None:
            kept.pool.give(kept.slot)
        kept.pool, kept.slot, kept.n = None, -1, 0

    def clear(self) -> None:
        """Forget everything and give the memory back."""
        for pool in self.pools:
            for kept in pool.owners:
                if kept is not None:
                    kept.pool, kept.slot, kept.n = None, -1, 0
            pool.clear()

    def bytes(self) -> int:
        """Memory held now."""
        return sum(t.numel() * t.element_size() for pool in self.pools for t in (*pool.keys, *pool.values))


def copy_slots(source: Pool, slot: int, target: Pool, slots: Sequence[int], tokens: int) -> None:
    """Copy the first `tokens` tokens of one slot into each of `slots`."""
    where: int | torch.Tensor = slots[0] if len(slots) == 1 else torch.tensor(list(slots), device=target.device)
    for old, new in zip(source.tensors(), target.tensors(), strict=True):
        new[where, :, :tokens] = old[slot, :, :tokens]
