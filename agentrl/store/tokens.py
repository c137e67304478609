"""A trajectory as a table of tokens: what a notebook, a plot or a check of the numbers wants."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from agentrl.store.credit import Credit
from agentrl.trajectory import Floats, Ids, Span, Trajectory, ids_of


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """The tokens of a trajectory in the order in which the engine saw and sampled them: arrays [n], one value a token.

    `turn` is the turn in which a token was new, `ids` its id, `pieces` its text ("" where it was not stored), `roles`
    and `origins` those of its span. Floats are NaN where there is nothing: `logprobs` of what was not sampled,
    `entropies` that the engine did not tell, `advantages` and `weights` of what has no credit.
    """

    turn: Ids
    ids: Ids
    pieces: tuple[str, ...]
    roles: tuple[str, ...]
    origins: tuple[str, ...]
    logprobs: Floats
    entropies: Floats
    advantages: Floats
    weights: Floats

    def __len__(self) -> int:
        return int(self.ids.size)


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """Tokens `start` to `stop` of a span, new in `turn`; `at` counts the turn's sampled tokens before (-1: context)."""

    turn: int
    span: Span
    start: int
    stop: int
    at: int

    def __len__(self) -> int:
        return self.stop - self.start


def tokens_of(
    trajectory: Trajectory, credit: Credit | None, pieces: Callable[[Iterable[int]], Mapping[int, str]]
) -> Tokens:
    """The table of a trajectory that was read whole. `pieces` gives the texts of ids, as far as they are known."""
    runs = list(_runs(trajectory))
    ids = _joined([run.span.ids[run.start : run.stop] for run in runs], np.int32)
    texts = pieces(ids.tolist())

    def own(name: str) -> Floats:
        arrays = [getattr(run.span, name) for run in runs]
        parts = [None if a is None else a[run.start : run.stop] for run, a in zip(runs, arrays, strict=True)]
        return _floats(runs, parts)

    def credited(turns: Sequence[Floats] | None) -> Floats:
        sampled = [turns is not None and run.at >= 0 and run.span.logprobs is not None for run in runs]
        parts = [
            turns[run.turn][run.at : run.at + len(run)] if there and turns is not None else None
            for run, there in zip(runs, sampled, strict=True)
        ]
        return _floats(runs, parts)

    return Tokens(
        turn=_joined([np.full(len(run), run.turn, np.int32) for run in runs], np.int32),
        ids=ids,
        pieces=tuple(texts.get(token, "") for token in ids.tolist()),
        roles=tuple(run.span.role for run in runs for _ in range(len(run))),
        origins=tuple(run.span.origin for run in runs for _ in range(len(run))),
        logprobs=own("logprobs"),
        entropies=own("entropies"),
        advantages=credited(credit.advantages if credit is not None else None),
        weights=credited(credit.weights if credit is not None else None),
    )


def _runs(trajectory: Trajectory) -> Iterator[_Run]:
    """What each turn adds to what the one before saw and said; all of its context where that does not go on."""
    seen = np.zeros(0, np.int32)
    for number, turn in enumerate(trajectory.turns):
        now = ids_of(turn.context)
        known = seen.size if np.array_equal(now[: seen.size], seen) else 0
        for piece in turn.context:
            start = min(piece.start + known, piece.stop)
            known -= start - piece.start
            if start < piece.stop:
                yield _Run(number, piece.span, start, piece.stop, -1)
        at = 0
        for span in turn.output:
            yield _Run(number, span, 0, len(span), at)
            at += len(span) if span.logprobs is not None else 0
        seen = np.concatenate([now, *[span.ids for span in turn.output]])


def _floats(runs: Sequence[_Run], parts: Sequence[Floats | None]) -> Floats:
    nothing = [np.full(len(run), np.nan, np.float32) for run in runs]
    floats: Floats = _joined([n if p is None else p for n, p in zip(nothing, parts, strict=True)], np.float32)
    return floats


def _joined(parts: Sequence[Any], kind: Any) -> Any:
    return np.concatenate(parts).astype(kind, copy=False) if parts else np.zeros(0, kind)
