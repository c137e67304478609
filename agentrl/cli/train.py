"""`agentrl train`."""

from __future__ import annotations

import shlex
from pathlib import Path

from agentrl.cli import Interrupted, inputs
from agentrl.console import make_reporter
from agentrl.errors import UsageError
from agentrl.tuning import tune


def train(
    *words: inputs.Inputs,
    resume: inputs.Flag = False,
    dry_run: inputs.Flag = False,
    out: Path | None = None,
    chaos: str | None = None,
    json: inputs.Flag = False,
) -> None:
    """Train a policy as a configuration says.

    Example: agentrl train configs/quickstart.yaml seed=1 stages.1.steps=50

    Args:
        words: the configuration.
        resume: go on with the run of this name (or the run folder that is named) where it stopped.
        dry_run: resolve and check everything, print the plan, train nothing.
        out: the folder that holds run folders; the same as out=DIR.
        chaos: break things on purpose, such as tools=0.05,kill_every=500 (the keys of the section chaos).
        json: print one JSON object an event instead of the live view.
    """
    folder = inputs.Given.of(words).run_folder
    if folder is not None and not (resume or dry_run):
        folder_command = shlex.join(["agentrl", "train", str(folder), "--resume"])
        raise UsageError(f"{folder} is a run that exists; go on with it: {folder_command}")
    if folder is not None:  # it may have been moved since
        extra = [inputs.setting("out", folder.absolute().parent), inputs.setting("name", folder.absolute().name)]
    else:
        extra = [inputs.setting("out", out)] if out is not None else []
    loaded = inputs.load(words, verb="train", extra=[*extra, *inputs.chaos(chaos)])
    tune()
    from agentrl import api

    reporter = make_reporter(as_json=json)
    try:
        with inputs.located(loaded):
            api.train(loaded, resume=resume, dry_run=dry_run, reporter=reporter)
    except KeyboardInterrupt:
        reporter.close()
        again = shlex.join(["agentrl", "train", *words, *(["--out", str(out)] if out else []), "--resume"])
        raise Interrupted(f"interrupted; what was recorded is kept, go on with: {again}") from None
    finally:
        reporter.close()
