"""`agentrl rollout`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from agentrl.cli import inputs
from agentrl.console import make_reporter
from agentrl.errors import UsageError
from agentrl.tuning import tune


def rollout(
    *words: inputs.Inputs,
    out: Path,
    checkpoint: str | None = None,
    n: Annotated[int, Parameter(name=("--tasks", "-n"))] = 16,
    chaos: str | None = None,
    json: inputs.Flag = False,
) -> None:
    """Play episodes with the policy of a run or a configuration and record them, without training.

    Example: agentrl rollout run.yaml --out runs/look -n 32

    Args:
        words: the configuration, or a run folder.
        out: the folder to record into; it must be new or empty.
        checkpoint: which checkpoint of the run: best, last, or a checkpoint's folder. Default: best.
        n: how many tasks to play.
        chaos: break things on purpose, such as tools=0.05,kill_every=500 (the keys of the section chaos).
        json: print one JSON object an event.
    """
    if n < 1:
        raise UsageError(f"--tasks must be at least 1, not {n}")
    loaded = inputs.load(words, verb="rollout", extra=inputs.chaos(chaos))
    folder = inputs.Given.of(words).run_folder
    if checkpoint is not None and folder is None:
        raise UsageError("--checkpoint belongs to a run; name a run folder")
    tune()
    from agentrl import api

    reporter = make_reporter(as_json=json)
    try:
        with inputs.located(loaded):
            api.rollout(
                folder or loaded,
                overrides=(*inputs.Given.of(words).overrides, *inputs.chaos(chaos)) if folder else (),
                checkpoint=checkpoint,
                n=n,
                out=out,
                reporter=reporter,
            )
    finally:
        reporter.close()
