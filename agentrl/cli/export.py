"""`agentrl export hf`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter
from rich.console import Console

from agentrl.cli import shown

app = App(name="export", help="Write a trained policy in another format.", version_flags=[])


@app.command
def hf(run: Path, out: Path, /, *, merge: Annotated[bool, Parameter(negative="--no-merge")] = True) -> None:
    """Write a policy as a Hugging Face folder: weights, configuration, tokenizer and chat template.

    Example: agentrl export hf runs/quickstart ./my-agent

    Args:
        run: a run folder (its best checkpoint is taken) or one of its checkpoints.
        out: the folder to write; it must be new or empty.
        merge: merge LoRA adapters into the weights; --no-merge writes the adapters alone.
    """
    from agentrl import api

    api.export(run, out, merge=merge)
    Console(highlight=False).print(f"wrote {shown(out.absolute())}", markup=False)
