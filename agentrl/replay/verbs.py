"""Replay from Python: `replay` checks, `rescore` judges anew, `fork` goes on from a turn. See docs/replay.md."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace as changed
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict, TypeVar, Unpack

from agentrl.errors import UsageError
from agentrl.tuning import tune

if TYPE_CHECKING:
    from agentrl.console import Reporter
    from agentrl.replay.check import Report
    from agentrl.replay.recorded import Recorded, Selection
    from agentrl.replay.rescore import Rescoring, Tools
    from agentrl.trajectory import Trajectory

T = TypeVar("T")


class Choice(TypedDict, total=False):
    """Which of a run's episodes; None, or left out, asks nothing (`agentrl.replay.recorded.Selection`)."""

    stage: str | None
    step: int | None
    split: str | None
    sample: int | None
    attempt: int | None
    n: int | None


def replay(
    source: str | Path,
    trajectory: str | None = None,
    *,
    overrides: Sequence[str] = (),
    tools: Literal["live", "recorded"] = "live",
    reporter: Reporter | None = None,
    **which: Unpack[Choice],
) -> Report:
    """Act recorded episodes out again and compare them with the record, turn by turn.

    `source` is a run folder, or RUN/TRAJECTORY; `trajectory` the id of one, or of a group; `which` chooses
    among the run's episodes (`Choice`). With `tools="recorded"` nothing is acted out:
    only the score of the record is asked for again. Raises `UsageError` where there is nothing to replay.
    """
    from agentrl.replay.check import Check

    chosen = _selection(trajectory, **which)
    return _on(source, overrides, chosen, lambda recorded: Check(recorded, tools, reporter).run(), reporter)


def rescore(
    source: str | Path,
    trajectory: str | None = None,
    *,
    overrides: Sequence[str] = (),
    tools: Tools = "auto",
    keep: bool = True,
    reporter: Reporter | None = None,
    **which: Unpack[Choice],
) -> Rescoring:
    """Score recorded episodes with the environment's present `score`; choose them as in `replay`.

    Where a score reads more than the record, the episode is acted out again (`tools`:
    `agentrl.replay.rescore.Rescore`). With `keep` the verdicts go to a new file in RUN/rescored.
    """
    from agentrl.replay.rescore import Rescore
    from agentrl.replay.rescore import keep as kept

    chosen = _selection(trajectory, **which)

    async def work(recorded: Recorded) -> Rescoring:
        found = await Rescore(recorded, tools, reporter).run()
        return changed(found, file=kept(recorded.folder, found)) if keep else found

    return _on(source, overrides, chosen, work, reporter)


def fork(
    source: str | Path,
    trajectory: str | None = None,
    *,
    turn: int,
    out: str | Path,
    overrides: Sequence[str] = (),
    say: str | None = None,
    checkpoint: str | None = None,
    model: str | Path | None = None,
    endpoint: str | None = None,
    endpoint_model: str | None = None,
    temperature: float | None = None,
    attempt: int | None = None,
    reporter: Reporter | None = None,
) -> Trajectory:
    """Act an episode out up to `turn` and go on live from there; the branch is recorded in the new folder `out`.

    Who speaks on: the run's policy at a `checkpoint` ("best", the default; "last"; a folder), a Hugging Face folder
    `model`, or an `endpoint` with `endpoint_model`. `say` is a person's message or tool call for turn `turn`; the
    branch then ends there, unless somebody is named who goes on.
    """
    from agentrl.replay.fork import Speaking, forked

    speaking = Speaking(say, checkpoint, model, endpoint, endpoint_model, temperature)
    chosen = _selection(trajectory, attempt=attempt)
    tune()
    return _on(source, overrides, chosen, lambda recorded: forked(recorded, turn, speaking, Path(out), reporter))


def _selection(id: str | None, **which: Unpack[Choice]) -> Selection:
    from agentrl.replay.recorded import Selection

    n = which.get("n")
    if n is not None and n < 1:
        raise UsageError(f"n must be at least 1, not {n}")
    return Selection(id, **which)


def _on(
    source: str | Path,
    overrides: Sequence[str],
    selection: Selection,
    work: Callable[[Recorded], Awaitable[T]],
    reporter: Reporter | None = None,
) -> T:
    """Open the record, choose, work on it, and let go."""
    from agentrl.replay.recorded import Recorded, located

    folder, id = located(str(source))
    if id is not None:
        if selection.id is not None:
            raise UsageError(f"{source} names a trajectory already; leave out {selection.id!r}")
        selection = changed(selection, id=id)

    async def run() -> T:
        recorded = Recorded.open(folder, overrides)
        try:
            await recorded.choose(selection)
            if reporter is not None and recorded.changed:
                reporter.warn(
                    f"{type(recorded.env).__name__} has changed since: its spec is {recorded.env.spec_hash}, "
                    f"the record has {', '.join(recorded.changed)}"
                )
            return await work(recorded)
        finally:
            await recorded.close()

    return asyncio.run(run())
