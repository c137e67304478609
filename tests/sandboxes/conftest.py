"""The real backends, where this machine has them; a test that needs one that is missing skips and says why."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentrl.sandboxes import backend

sys.path.insert(0, str(Path(__file__).parent))  # importlib mode adds no path: the tests import `attacks`


def _why_not(name: str) -> str | None:
    async def ask() -> str | None:
        made = backend(name)
        try:
            return await made.missing()
        finally:
            await made.close()

    return asyncio.run(ask())


_REASONS: dict[str, str | None] = {}


def available(name: str) -> None:
    """Skip the test where the backend does not work here; fail it where AGENTRL_NEED_SANDBOXES names it."""
    if name not in _REASONS:
        _REASONS[name] = _why_not(name)
    if why := _REASONS[name]:
        if name in os.environ.get("AGENTRL_NEED_SANDBOXES", "").split():
            pytest.fail(why)
        pytest.skip(why)


@pytest.fixture(params=["bubblewrap", "docker"])
def walls(request: Any) -> Iterator[Any]:
    """A backend that is a boundary."""
    available(request.param)
    yield backend(request.param)


@pytest.fixture(params=["unsafe_local", "bubblewrap", "docker"])
def anyone(request: Any) -> Iterator[Any]:
    """Any backend: for what is the same in all of them."""
    available(request.param)
    yield backend(request.param)
