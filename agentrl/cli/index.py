"""`agentrl index`."""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

from agentrl.cli import DONE, FAILED, shown
from agentrl.console import visible
from agentrl.errors import AgentRLError, UsageError

_LISTED = 20  # problems in the terminal


def index(
    run: Path,
    /,
    *,
    rebuild: Annotated[bool, Parameter(negative="")] = False,
    collect: Annotated[bool, Parameter(negative="")] = False,
    check: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Look after the index of a run's trajectories: how many it lists, or make it again.

    The segments hold everything; the index only finds it. Make it again after damage, or where a newer
    version of the framework says so. No process may be writing to the run meanwhile.

    Args:
        run: a run folder.
        rebuild: make the index from the segments.
        collect: be the run's collector: index what writers without an index append, until Ctrl-C.
        check: read all that the index names, pictures included, and say what is missing; exit code 1 if anything is.
    """
    from agentrl import store

    if not run.is_dir():
        raise UsageError(f"{run} is not a folder; name the folder of a run")
    asked = [name for name, given in (("--rebuild", rebuild), ("--collect", collect), ("--check", check)) if given]
    if len(asked) > 1:
        raise UsageError(f"{' and '.join(asked)} are different things to do; give one of them")
    console = Console(highlight=False)
    if collect:
        if not (run / "seg").is_dir():
            raise UsageError(f"{run} holds no segments (seg/*.bin) to collect from; name the folder of a run")
        stop = threading.Event()
        with store.Collector(run) as collector:
            for name in (signal.SIGINT, signal.SIGTERM):  # a shell's background processes ignore the first unless told
                signal.signal(name, lambda *_: stop.set())
            console.print("collecting; Ctrl-C ends it", markup=False)
            sys.stdout.flush()
            collector.follow(stop)
    if rebuild:
        before = _listed(run)
        count = store.rebuild(run)
        fewer = f"; {before - count} of the old one's are damaged and left out" if before > count else ""
        said = f"made the index of {shown(run.absolute())} from its segments: {count} trajectories{fewer}"
    else:
        with store.StoreReader(run) as reader:
            count = len(reader.ids())
        said = f"the index of {shown(run.absolute())} lists {count} trajectories"
    console.print(said, markup=False, soft_wrap=True)
    return _checked(run, console) if check else DONE


def _listed(run: Path) -> int:
    """How many trajectories the present index lists, attempts included; 0 where it cannot be read."""
    from agentrl import store

    try:
        with store.StoreReader(run) as reader:
            return reader.count(all_attempts=True)
    except AgentRLError:
        return 0


def _checked(run: Path, console: Console) -> int:
    """Say what of the run's store cannot be read."""
    from agentrl import store
    from agentrl.store.soundness import problems

    count = 0
    with store.StoreReader(run) as reader:
        for count, problem in enumerate(problems(reader, run), 1):
            if count <= _LISTED:
                console.print(f"  {visible(problem)}", markup=False, soft_wrap=True)
    if count > _LISTED:
        console.print(f"  and {count - _LISTED} more", markup=False)
    if not count:
        console.print("  all of it can be read", markup=False)
    return FAILED if count else DONE
