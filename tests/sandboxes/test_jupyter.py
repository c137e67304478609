"""Jupyter sessions on top of the walls: rich output, state, interrupts by signal."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from conftest import available

from agentrl.errors import InfraError, UsageError
from agentrl.sandbox import Limits, Unsupported
from agentrl.sandboxes import backend
from agentrl.sandboxes.images import rootfs
from agentrl.sandboxes.jupyter import JupyterBackend

LIMITS = Limits.model_validate({"seconds": 3})
PICTURE = """
import base64, struct, zlib
from IPython.display import Image, display
def chunk(kind, data): return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
png = b'\\x89PNG\\r\\n\\x1a\\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', 4, 3, 8, 0, 0, 0, 0))
png += chunk(b'IDAT', zlib.compress((b'\\0' + b'\\x80' * 4) * 3)) + chunk(b'IEND', b'')
display(Image(png))
"""


@pytest.fixture(params=["bubblewrap", "docker"])
def inner(request: Any) -> Any:
    available(request.param)
    if request.param == "bubblewrap" and rootfs() is None:
        pytest.skip("no root file system with ipykernel; agentrl sandbox build makes it")
    return backend(request.param)


def test_a_kernel_in_a_sandbox(inner: Any) -> None:
    async def life() -> None:
        made = JupyterBackend(inner)
        box = await made.open(LIMITS)
        try:
            first = await box.exec("x = 41\nprint('hi')\nx + 1")
            assert (first.status, first.stdout, first.value) == ("ok", "hi\n", "42")
            assert (await box.exec("%timeit -n1 -r1 x")).status == "ok", "magics work: it is IPython"
            wrong = await box.exec("1 / 0")
            assert (
                wrong.status == "error"
                and "ZeroDivisionError" in (wrong.error or "")
                and "\x1b" not in (wrong.error or "")
            )
            (picture,) = (await box.exec(PICTURE)).images
            assert picture.mime == "image/png" and picture.alt.startswith("[image 4x3")
            slow = await box.exec("import re; re.match(r'(a+)+$', 'a' * 40 + 'b')", 0.5)
            assert slow.status in ("timeout_interrupted", "timeout_killed") and "time" in slow.hit
            late = await box.exec("import time; x = 7; time.sleep(60)", 0.5)
            assert late.status in ("timeout_interrupted", "timeout_killed")
            assert (await box.exec("x")).value == ("7" if not late.lost else None)
            assert await box.files() == {}
            with pytest.raises(Unsupported):
                await box.snapshot()
            await box.exec("x = 1; open('f', 'w').close()")
            await box.reset()
            assert await box.files() == {} and (await box.exec("x")).status == "error"
            net = await box.exec("import socket; socket.create_connection(('1.1.1.1', 80), 1)")
            assert net.status == "error"
            # Another kernel would start among what this one has planted, so the whole sandbox goes.
            gone = await box.exec("open('random.py', 'w').write('1/0'); import os; os._exit(1)")
            assert gone.status == "died" and gone.lost and not box.alive and await box.at_fault()
            with pytest.raises(InfraError):
                await box.exec("1")
        finally:
            await box.close()
            await made.close()

    asyncio.run(life())


def test_without_ipykernel_the_sentence_says_so() -> None:
    async def life() -> None:
        made = JupyterBackend(backend("unsafe_local"))
        try:
            await (await made.open(LIMITS)).close()
        finally:
            await made.close()

    try:
        import ipykernel  # noqa: F401
    except ImportError:
        with pytest.raises(UsageError, match="needs ipykernel in the sandbox"):
            asyncio.run(life())
    else:
        asyncio.run(life())


FORGED = """
class Forged:
    class kernel:
        run = staticmethod(lambda code, longest: {said})
_agentrl_kernel = Forged
import builtins
builtins._agentrl_kernel = Forged
import sys
sys.modules["__main__"]._agentrl_kernel = Forged
"""


@pytest.mark.parametrize("said", ["'[' * 100_000", "'{}'", "b'x'", "'{\"value\": 1}'", "None"])
def test_a_forged_kernel_ends_the_sandbox_and_raises_nothing(inner: Any, said: str) -> None:
    """A cell reaches the worker that its kernel is a child of, and makes it say what it likes."""

    async def life() -> None:
        made = JupyterBackend(inner)
        box = await made.open(LIMITS)
        try:
            await box.box.exec(FORGED.format(said=said))
            result = await box.exec("1")
            assert result.lost and result.status in ("protocol", "died") and not box.alive and await box.at_fault()
        finally:
            await box.close()
            await made.close()

    asyncio.run(life())
