"""Who holds, or will soon hold, the beginning of a new prompt.

Prompts are known by a running hash at every `SHARE` ids and at their end. A hash only proposes: ids are compared before
anything is shared. Of the requests of a group that come together the first is computed, the others copy it.
"""

from __future__ import annotations

import numpy as np

from agentrl.engines.kv import Kept
from agentrl.trajectory import Ids

SHARE = 16  # prompts that agree on a multiple of so many ids share their keys and values


class Prefixes:
    """An index of sequences by their beginnings. Entries leave with their sequence (`forget`)."""

    def __init__(self) -> None:
        self._index: dict[int, Kept] = {}
        self._keys: dict[int, list[int]] = {}

    def clear(self) -> None:
        self._index.clear()
        self._keys.clear()

    def forget(self, kept: Kept) -> None:
        """`kept` is gone."""
        for key in self._keys.pop(id(kept), ()):
            if self._index.get(key) is kept:
                del self._index[key]

    def propose(self, kept: Kept, ids: Ids) -> tuple[Kept, int] | None:
        """The sequence with the longest common beginning of `ids`, and how long that is. `kept` joins the index."""
        found: tuple[Kept, int] | None = None
        for n, key in reversed(_keys(ids)):
            holder = self._index.get(key)
            if holder is not None and holder is not kept and leads(holder, ids[:n]):
                found = found or (holder, n)
                continue
            self._index[key] = kept
            self._keys.setdefault(id(kept), []).append(key)
        return found


def leads(holder: Kept, ids: Ids) -> bool:
    """True where `ids` are cached in `holder` or are among those it is about to compute."""
    if holder.pool is None:
        return False
    n = int(ids.size)
    return holder.overlap(ids) == n or (holder.coming.size >= n and np.array_equal(holder.coming[:n], ids))


def _keys(ids: Ids) -> list[tuple[int, int]]:
    raw, size = ids.tobytes(), int(ids.size)
    keys, running = [], 0
    for n in [*range(SHARE, size, SHARE), size]:
        running = hash((running, raw[4 * (n - (n - 1) % SHARE - 1) : 4 * n]))
        keys.append((n, running))
    return keys if size else []
