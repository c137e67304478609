"""How the session server is started, in any sandbox: the files that must lie there, and the words after `python3`.

A third of the start would go into compiling `server.py`, so it comes with what this Python makes of it. A sandbox whose
Python has the same version takes that; any other does not find it and compiles the source.
"""

from __future__ import annotations

import importlib.util
import py_compile
import tempfile
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).with_name("server.py")


@cache
def files() -> dict[str, bytes]:
    """Path below the server's folder -> content."""
    compiled = Path(importlib.util.cache_from_source(SOURCE.name))
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, compiled.name)
        unchecked = py_compile.PycInvalidationMode.UNCHECKED_HASH  # times and sizes are not the same over there
        py_compile.compile(str(SOURCE), str(made), SOURCE.name, doraise=True, invalidation_mode=unchecked)
        return {SOURCE.name: SOURCE.read_bytes(), str(compiled): made.read_bytes()}


def words(folder: str) -> list[str]:
    """What follows `python3` where the files lie in `folder`; behind it come `--fd N` or `--connect PATH`, and JSON."""
    # The folder stands where `-c` put the working directory, from which nothing must be imported.
    return ["-S", "-s", "-c", f"import sys; sys.path[0] = {folder!r}; import server; server.main()"]
