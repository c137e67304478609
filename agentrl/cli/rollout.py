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
    n: Annotated[int, Parameter(name=("--tasks", "-n"))] = 16,
    json: inputs.Flag = False,
) -> None:
    """Play episodes with the policy of a configuration and record them, without training.

    Example: agentrl rollout run.yaml --out runs/look -n 32

    Args:
        words: the configuration, or a run folder.
        out: the folder to record into; it must be new or empty.
        n: how many tasks to play.
        json: print one JSON object an event.
    """
    if n < 1:
        raise UsageError(f"--tasks must be at least 1, not {n}")
    loaded = inputs.load(words, verb="rollout")
    tune()
    from agentrl import api

    reporter = make_reporter(as_json=json)
    try:
        with inputs.located(loaded):
            api.rollout(loaded, n=n, out=out, reporter=reporter)
    finally:
        reporter.close()
