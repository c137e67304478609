"""`agentrl index`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

from agentrl.cli import shown
from agentrl.errors import UsageError


def index(run: Path, /, *, rebuild: Annotated[bool, Parameter(negative="")] = False) -> None:
    """Look after the index of a run's trajectories: how many it lists, or make it again.

    The segments hold everything; the index only finds it. Make it again after damage, or where a newer
    version of the framework says so. No process may be writing to the run meanwhile.

    Args:
        run: a run folder.
        rebuild: make the index from the segments.
    """
    from agentrl import store

    if not run.is_dir():
        raise UsageError(f"{run} is not a folder; name the folder of a run")
    if rebuild:
        count = store.rebuild(run)
        said = f"made the index of {shown(run.absolute())} from its segments: {count} trajectories"
    else:
        with store.StoreReader(run) as reader:
            count = len(reader.ids())
        said = f"the index of {shown(run.absolute())} lists {count} trajectories"
    Console(highlight=False).print(said, markup=False, soft_wrap=True)
