"""`agentrl export`: trajectories, and with `hf` a policy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter
from rich.console import Console

from agentrl.cli import shown
from agentrl.errors import UsageError

app = App(name="export", help="Write trajectories, or a trained policy, in another format.", version_flags=[])


@app.default
def trajectories(
    run: Path,
    out: Path,
    /,
    *,
    format: Literal["jsonl", "parquet", "html", "trl", "verl"],
    stage: str | None = None,
    step: int | None = None,
    split: str | None = None,
    group: str | None = None,
    success: bool | None = None,
    search: str | None = None,
    limit: Annotated[int | None, Parameter(name=("--limit", "-n"))] = None,
) -> None:
    """Write a run's trajectories in another format.

    Examples: agentrl export runs/quickstart all.jsonl --format jsonl ·
    agentrl export runs/quickstart look.html --format html --stage rl --step 3 -n 50 ·
    agentrl export runs/quickstart batches --format verl

    Args:
        run: a run folder.
        out: the file to write, a folder for trl and verl; it must be new.
        format: jsonl (one object a line), parquet (needs pyarrow), html (one file that opens anywhere), or
            training batches as safetensors for trl or verl, one file a step.
        stage: only this stage, such as rl.
        step: only this step.
        split: only this split.
        group: only this group.
        success: only successful ones, or with --no-success only the others.
        search: only those in which these words stand.
        limit: at most so many, oldest first.
    """
    from agentrl.store.export import export_trajectories
    from agentrl.store.query import Filter

    if not run.is_dir():
        raise UsageError(f"{run} is not a folder; name the folder of a run")
    others = {"--split": split, "--group": group, "--success": success, "--search": search, "--limit": limit}
    if format in ("trl", "verl") and any(value is not None for value in others.values()):
        given = ", ".join(name for name, value in others.items() if value is not None)
        raise UsageError(f"training batches are whole steps: choose them with --stage and --step, not {given}")
    asked = Filter(stage=stage, step=step, split=split, group=group, success=success, text=search)
    console = Console(highlight=False)

    def tell(line: str) -> None:
        console.print(f"warning: {line}", markup=False, soft_wrap=True)

    count = export_trajectories(run, out, format, asked, limit, tell)
    what = "steps" if format in ("trl", "verl") else "trajectories"
    console.print(f"wrote {count} {what} to {shown(out.absolute())}", markup=False, soft_wrap=True)


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
