"""Jupyter sessions: an IPython kernel inside any sandbox, for rich output (pictures, tables, magics).

The kernel runs behind the sandbox's own session (`sandboxes/kernel.py`), so the walls and limits are the backend's. It
takes about a second to start and a few milliseconds a cell: choose it where the policy is to see pictures.
"""

from __future__ import annotations

import ast
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from agentrl.content import Image
from agentrl.errors import InfraError, UsageError
from agentrl.sandbox import Backend, Enforcement, Limits, PathError, Result, Sandbox, Status, Unsupported
from agentrl.sandboxes import choose

BRIDGE = Path(__file__).with_name("kernel.py")
MODULE = ".agentrl-kernel.py"
START_SECONDS = 25.0
MOST_BYTES = 2_000_000  # of one picture
_LOAD = """
import importlib.util as _u, sys as _y
_y.dont_write_bytecode = True
_s = _u.spec_from_file_location("_agentrl_kernel", {path!r})
_agentrl_kernel = _u.module_from_spec(_s); _s.loader.exec_module(_agentrl_kernel)
import os as _o; _o.unlink({path!r})
_agentrl_kernel.ready({tmp!r})
"""


class JupyterBackend:
    """Opens Jupyter sessions in sandboxes of another backend.

    Args:
        inner: where they run; None for the best that works here. unsafe_local works where ipykernel is installed.
    """

    name = "jupyter"

    def __init__(self, inner: Backend | None = None) -> None:
        self.inner = inner

    async def missing(self) -> str | None:
        try:
            return await (await self._inner()).missing()
        except UsageError as error:
            return str(error)

    async def enforcement(self, limits: Limits) -> Enforcement:
        return await (await self._inner()).enforcement(limits)

    async def open(self, limits: Limits) -> JupyterSession:
        # The kernel's own start must not be cut off by the limit of one program.
        box = await (await self._inner()).open(
            limits.model_copy(update={"seconds": max(limits.seconds, START_SECONDS)})
        )
        session = JupyterSession(box, limits)
        try:
            await session.start()
        except BaseException:
            await box.close()
            raise
        return session

    async def reap(self) -> int:
        return await (await self._inner()).reap()

    async def close(self) -> None:
        if self.inner is not None:
            await self.inner.close()

    async def _inner(self) -> Backend:
        if self.inner is None:
            self.inner = await choose()
        return self.inner


class JupyterSession:
    """A sandbox whose cells run in an IPython kernel. `shell` and files are the sandbox's own."""

    def __init__(self, box: Sandbox, limits: Limits) -> None:
        self.box = box
        self.limits = limits
        self._lost = False

    async def start(self) -> None:
        """Start the kernel. Raises `UsageError` where the sandbox has no ipykernel."""
        await self.box.write(MODULE, BRIDGE.read_bytes())
        where = await self.box.exec("import os, tempfile; os.getcwd(), tempfile.gettempdir()")
        folder, tmp = ast.literal_eval(where.value or "('', '')")
        result = await self.box.exec(_LOAD.format(path=f"{folder}/{MODULE}", tmp=tmp), START_SECONDS)
        if result.status == "error" and "ModuleNotFoundError" in (result.error or ""):
            raise UsageError(
                "a Jupyter session needs ipykernel in the sandbox: build its image with agentrl sandbox build "
                "(bubblewrap without that image shares this machine's Python, which has none)"
            )
        if not result.ok:
            raise InfraError(f"the Jupyter kernel in {self.name} did not start: {result.status} {result.error or ''}")

    @property
    def name(self) -> str:
        return self.box.name

    @property
    def alive(self) -> bool:
        return self.box.alive and not self._lost

    @property
    def enforcement(self) -> Enforcement:
        return self.box.enforcement

    async def at_fault(self) -> bool:
        return self._lost or await self.box.at_fault()

    async def exec(self, code: str, seconds: float | None = None) -> Result:
        allowed = min(seconds or self.limits.seconds, self.limits.seconds)
        longest = self.limits.output_bytes // 4  # it comes back within JSON within a value
        result = await self.box.exec(f"_agentrl_kernel.kernel.run({code!r}, {longest})", allowed)
        if result.lost or result.value is None:
            return await self._give_up(result, "died" if result.status in ("ok", "error") else result.status)
        try:
            told = json.loads(ast.literal_eval(result.value))
            value, error, pictures = told["value"], told["error"], told["pictures"]
        except Exception:  # a program has changed the bridge, and may make it say whatever breaks a reader
            return await self._give_up(result, "protocol")
        status = "error" if result.status == "ok" and error else result.status
        return replace(
            result,
            status=status,
            value=value if isinstance(value, str) else None,
            error=error if isinstance(error, str) else None,
            images=await self._pictures(pictures),
        )

    async def _give_up(self, result: Result, status: Status) -> Result:
        """The kernel is gone. Another would start among files that a program may have planted, so the sandbox goes."""
        self._lost = True
        await self.box.close()
        return replace(result, status=status, value=None, lost=True)

    async def _pictures(self, told: Any) -> tuple[Image, ...]:
        found = []
        for item in told if isinstance(told, list) else ():
            try:
                data = await self.box.read(str(item["path"]), MOST_BYTES)
                if data and item["mime"] in ("image/png", "image/jpeg"):
                    found.append(Image(data, item["mime"]))
            except (PathError, KeyError, TypeError):  # too large, or never written
                continue
        return tuple(found)

    async def shell(self, command: str, seconds: float | None = None) -> Result:
        return await self.box.shell(command, min(seconds or self.limits.seconds, self.limits.seconds))

    async def read(self, path: str, most: int = 1_000_000) -> bytes:
        return await self.box.read(path, most)

    async def write(self, path: str, data: bytes) -> None:
        await self.box.write(path, data)

    async def files(self) -> dict[str, int]:
        return {path: size for path, size in (await self.box.files()).items() if not path.startswith(".agentrl-")}

    async def reset(self) -> None:
        await self.box.reset()
        await self.start()

    async def snapshot(self) -> str:
        raise Unsupported("a Jupyter kernel is not copied: replay the episode")

    async def restore(self, snapshot: str) -> None:
        raise Unsupported("a Jupyter kernel is not copied: replay the episode")

    async def close(self) -> None:
        await self.box.close()
