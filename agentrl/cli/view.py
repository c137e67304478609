"""`agentrl view`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

from agentrl.errors import UsageError


def view(
    *runs: Path,
    port: int = 7860,
    host: str = "127.0.0.1",
    token: str | None = None,
    browser: Annotated[bool, Parameter(negative="--no-browser")] = True,
) -> None:
    """Look at runs and their trajectories in the browser.

    Examples: agentrl view · agentrl view runs/quickstart · agentrl view runs --port 8080 --no-browser

    Args:
        runs: run folders, or folders that hold some. Default: ./runs, else the working directory.
        port: where to listen; a taken port picks the next free one.
        host: the address to listen on. Any but this machine's own needs --token.
        token: what a browser must know to be let in.
        browser: open the page in the browser.
    """
    from agentrl.viewer import server

    folders = runs or (Path("runs") if Path("runs").is_dir() else Path(),)
    missing = [str(folder) for folder in folders if not folder.exists()]
    if missing:
        raise UsageError(f"there is no folder {', '.join(missing)}; name a run folder, or one that holds runs")
    console = Console(highlight=False)

    def say(line: str) -> None:
        console.print(line, markup=False, soft_wrap=True)

    server.serve([folder.absolute() for folder in folders], port=port, host=host, token=token, browser=browser, say=say)
