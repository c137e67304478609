"""`agentrl index`."""

from __future__ import annotations

import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

from agentrl.cli import shown
from agentrl.errors import UsageError


def index(
    run: Path,
    /,
    *,
    rebuild: Annotated[bool, Parameter(negative="")] = False,
    collect: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Look after the index of a run's trajectories: how many it lists, or make it again.

    The segments hold everything; the index only finds it. Make it again after damage, or where a newer
    version of the framework says so. No process may be writing to the run meanwhile.

    Args:
        run: a run folder.
        rebuild: make the index from the segments.
        collect: be the run's collector: index what writers without an index append, until Ctrl-C.
    """
    from agentrl import store

    if not run.is_dir():
        raise UsageError(f"{run} is not a folder; name the folder of a run")
    if rebuild and collect:
        raise UsageError("--rebuild and --collect are different things to do; give one of them")
    console = Console(highlight=False)
    if collect:
        if not (run / "seg").is_dir():
            raise UsageError(f"{run} holds no segments (seg/*.bin) to collect from; name the folder of a run")
        with store.Collector(run) as collector, suppress(KeyboardInterrupt):
            console.print("collecting; Ctrl-C ends it", markup=False)
            sys.stdout.flush()
            collector.follow(threading.Event())
    if rebuild:
        count = store.rebuild(run)
        said = f"made the index of {shown(run.absolute())} from its segments: {count} trajectories"
    else:
        with store.StoreReader(run) as reader:
            count = len(reader.ids())
        said = f"the index of {shown(run.absolute())} lists {count} trajectories"
    console.print(said, markup=False, soft_wrap=True)
