"""The row view: a trajectory's tokens one after the other, each shown once, with whatever is known of each.

The first turn's context, its output, then what each later context adds to what stood there before, and its
output. Where a context does not go on from the turn before (dropped thinking, an evolving memory), it is shown
from the first token in which it differs.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from agentrl.algo.loss import LOSS_WEIGHTS
from agentrl.store import Credit
from agentrl.trajectory import Floats, Ids, Span, Trajectory

Array = NDArray[Any]
_FROM_CREDIT = ("old", "reference", "age")


@dataclass(frozen=True, slots=True)
class Block:
    """Tokens [start, stop) of the row: a run of one span, before (`context`) or in (`output`) a turn."""

    turn: int
    where: Literal["context", "output"]
    role: str
    origin: str
    actor: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """`ids` [n]; `blocks` tile them; `contexts[k]` is the length of turn k's whole context;
    `outputs[k]` = [start, stop) of its output; `sampled` [m] are the places of sampled tokens, turn after turn.
    """

    ids: Ids
    blocks: tuple[Block, ...]
    contexts: tuple[int, ...]
    outputs: tuple[tuple[int, int], ...]
    sampled: NDArray[np.int64]
    spans: tuple[tuple[Span, int], ...]  # sampled spans and where they stand

    def place(self, at: int) -> dict[str, int] | None:
        """Where token `at` stands: its turn, and how many sampled tokens of that turn stand before it (-1 in a
        context); None at the end."""
        if at >= self.ids.size:
            return None
        for turn, (start, stop) in enumerate(self.outputs):
            if at < stop:
                before = np.count_nonzero((self.sampled >= start) & (self.sampled < at))
                return {"turn": turn, "token": int(before) if at >= start else -1, "at": at}
        return {"turn": max(0, len(self.outputs) - 1), "token": -1, "at": at}

    def turns_within(self, n: int) -> int:
        """How many turns end within the first `n` tokens."""
        return sum(stop <= n for _, stop in self.outputs)


def view_of(trajectory: Trajectory) -> View | None:
    """The row view, None where no turn has tokens (they were not kept, or nobody counted them)."""
    if not any(turn.output or turn.context for turn in trajectory.turns):
        return None
    parts: list[Ids] = []
    blocks: list[Block] = []
    contexts: list[int] = []
    outputs: list[tuple[int, int]] = []
    places: list[Array] = []
    spans: list[tuple[Span, int]] = []
    before = np.zeros(0, np.int32)
    end = 0
    for index, turn in enumerate(trajectory.turns):
        context = np.concatenate([piece.ids for piece in turn.context]) if turn.context else np.zeros(0, np.int32)
        skip = common(before, context)
        passed = 0
        for piece in turn.context:
            fresh = piece.ids[max(0, skip - passed) :]
            passed += len(piece)
            if fresh.size:
                s = piece.span
                blocks.append(Block(index, "context", s.role, s.origin, s.actor, end, end + fresh.size))
                parts.append(fresh)
                end += fresh.size
        contexts.append(int(context.size))
        start = end
        for span in turn.output:
            if len(span):
                blocks.append(Block(index, "output", span.role, span.origin, span.actor, end, end + len(span)))
                parts.append(span.ids)
                if span.origin == "sampled":
                    places.append(np.arange(end, end + len(span)))
                    spans.append((span, end))
                end += len(span)
        outputs.append((start, end))
        before = np.concatenate([context, *(span.ids for span in turn.output)])
    ids = np.concatenate(parts) if parts else np.zeros(0, np.int32)
    sampled = np.concatenate(places) if places else np.zeros(0, np.int64)
    return View(ids, tuple(blocks), tuple(contexts), tuple(outputs), sampled, tuple(spans))


def common(a: Ids, b: Ids) -> int:
    """The length of the longest common prefix."""
    n = min(a.size, b.size)
    differs = np.flatnonzero(a[:n] != b[:n])
    return int(differs[0]) if differs.size else n


def shared(rows: Sequence[Ids | None]) -> tuple[int, list[int | None]]:
    """(how many tokens all rows begin with, for each row where it leaves the row that goes with it longest)."""
    known = [i for i, row in enumerate(rows) if row is not None]
    splits: list[int | None] = [None] * len(rows)
    if len(known) < 2:
        return 0, splits
    got = {i: row for i in known if (row := rows[i]) is not None}
    order = sorted(known, key=lambda i: got[i].astype(">i4").tobytes())  # neighbours share the longest prefixes
    near = [common(got[a], got[b]) for a, b in pairwise(order)]
    for place, i in enumerate(order):
        splits[i] = max(near[max(0, place - 1) : place + 1])
    return min(near), splits


def arrays_of(view: View, credit: Credit | None) -> dict[str, Array]:
    """What is known of each token, by name; all arrays are [n], NaN (or -1) where a token has no such number.

    `mask` says which tokens the policy sampled, `trained` which of them the loss looked at, where that was recorded.
    """
    n = view.ids.size
    mask = np.zeros(n, np.uint8)
    mask[view.sampled] = 1
    out: dict[str, Array] = {"ids": np.asarray(view.ids, np.int32), "mask": mask}
    logprob, entropy = np.full(n, np.nan, np.float32), np.full(n, np.nan, np.float32)
    version = np.full(n, -1, np.int32)
    for span, at in view.spans:
        if span.logprobs is not None:
            logprob[at : at + len(span)] = span.logprobs
        if span.entropies is not None:
            entropy[at : at + len(span)] = span.entropies
        for run in span.versions:
            version[at + run.start : at + run.stop] = run.version
    out |= {"logprob": logprob, "version": version}
    if any(span.entropies is not None for span, _ in view.spans):
        out["entropy"] = entropy
    if credit is not None:
        named: dict[str, list[Floats] | None] = {"advantage": credit.advantages, "weight": credit.weights}
        named |= {name: credit.arrays.get(name) for name in _FROM_CREDIT}
        for name, values in named.items():
            if values is not None and sum(part.size for part in values) == view.sampled.size:
                out[name] = np.full(n, np.nan, np.float32)
                out[name][view.sampled] = np.concatenate(values) if values else []
        which = trained(credit, view.sampled.size)
        if which is not None:
            out["trained"] = np.zeros(n, np.uint8)
            out["trained"][view.sampled] = which
        if "old" in out:
            out["ratio"] = np.exp(np.clip(out["old"] - logprob, -20, 20)).astype(np.float32)
    return out


def trained(credit: Credit, n: int) -> Array | None:
    """Which of all turns' `n` sampled tokens the loss looked at, [n]; None where the record does not say (it is of an
    earlier version)."""
    if credit.advantages is None:
        return np.zeros(n, bool)  # dropped, or without a reward
    loss = credit.arrays.get(LOSS_WEIGHTS)
    if not loss or sum(part.size for part in loss) != n:
        return None
    which = np.concatenate(loss) > 0
    return which if credit.weights is None else which & (np.concatenate(credit.weights) != 0)


def packed(view: View, arrays: Mapping[str, Array], pieces: Mapping[int, str], span: tuple[int, int]) -> bytes:
    """The bytes of /api/tokens for tokens [start, stop): length of the header, the header, the arrays."""
    start, stop = span
    layout: list[dict[str, Any]] = []
    body: list[bytes] = []
    end = 0
    for name, array in arrays.items():
        data = np.ascontiguousarray(array[start:stop]).astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
        dtype = f"{array.dtype.kind}{array.dtype.itemsize}"
        layout.append({"name": name, "dtype": dtype, "offset": end, "length": stop - start})
        data += b"\0" * (-len(data) % 4)
        body.append(data)
        end += len(data)
    blocks = [asdict(block) for block in view.blocks if block.stop > start and block.start < stop]
    for block in blocks:
        block["start"], block["stop"] = max(block["start"], start) - start, min(block["stop"], stop) - start
    exact = all(span.entropy == "exact" for span, _ in view.spans)
    header = {
        "blocks": blocks, "n": stop - start, "arrays": layout,
        "pieces": {str(token): piece for token, piece in pieces.items()}, "exact_entropy": exact,
    }  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 4) % 4)
    return struct.pack("<I", len(text)) + text + b"".join(body)
