"""Backends by name, and the choice where none was named: what holds best on this machine, never an open one."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from agentrl.errors import UsageError
from agentrl.sandbox import Backend

DEFAULTS = ("docker", "bubblewrap")
NAMES = (*DEFAULTS, "unsafe_local")


def _docker(**options: Any) -> Backend:
    from agentrl.sandboxes.docker import DockerBackend

    return DockerBackend(**options)


def _bubblewrap(**options: Any) -> Backend:
    from agentrl.sandboxes.bubblewrap import BubblewrapBackend

    return BubblewrapBackend(**options)


def _unsafe_local(**options: Any) -> Backend:
    from agentrl.sandboxes.unsafe_local import UnsafeLocalBackend

    return UnsafeLocalBackend(**options)


_MAKERS: dict[str, Callable[..., Backend]] = {
    "docker": _docker,
    "bubblewrap": _bubblewrap,
    "unsafe_local": _unsafe_local,
}


def backend(name: str, **options: Any) -> Backend:
    """The backend called `name`, with its own options. Raises `UsageError` for an unknown name or option."""
    if name not in _MAKERS:
        near = difflib.get_close_matches(name, NAMES, 1)
        raise UsageError(
            f"no sandbox backend is called {name!r}{f'; did you mean {near[0]}?' if near else ''}; "
            f"the backends are {', '.join(NAMES)}"
        )
    try:
        return _MAKERS[name](**options)
    except TypeError as error:
        raise UsageError(f"the sandbox backend {name} does not take these options: {error}") from error


async def choose(name: str | None = None, **options: Any) -> Backend:
    """The backend called `name`, or the first of docker and bubblewrap that works here.

    Raises `UsageError`, with the remedies, where it does not work. `options` go to a named backend; a chosen one gets
    `preload` only.
    """
    if name is not None:
        named = backend(name, **options)
        if why := await named.missing():
            raise UsageError(why)
        return named
    common = {key: value for key, value in options.items() if key == "preload"}
    reasons = []
    for candidate in DEFAULTS:
        made = backend(candidate, **common)
        why = await made.missing()
        if why is None:
            return made
        reasons.append(f"{candidate}: {why}")
        await made.close()
    raise UsageError(
        "there is no sandbox to run programs in. " + "; ".join(reasons) + ". (agentrl sandbox doctor tells more)"
    )
