"""A box: one episode's sandbox, shared by the tools that work in it.

    box = Box(BoxOptions())
    tools = (Python(box), Shell(box), Files(box))

The template owns a pool; an episode takes a sandbox from it at its first call and lets go of it at the end. A program
that takes its sandbox down is the policy's own doing: it is told so, and the next call finds a fresh sandbox. Where the
machinery fails (`InfraError`) the rollout tries the episode again.
"""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Literal, Self

from pydantic import BaseModel, Field, model_validator

from agentrl.errors import ToolError
from agentrl.sandbox import Backend, Limits, Result, Sandbox, Unsupported
from agentrl.sandbox.pool import Pool
from agentrl.sandboxes import choose
from agentrl.sandboxes.jupyter import JupyterBackend
from agentrl.tool import Toolkit

TOOL_SECONDS = 30.0  # the timeout of every tool that works in a box
MARGIN = 5.0  # of it is left for a sandbox to start, and for a program that does not stop
Pools = weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, "asyncio.Future[Pool]"]
SIGNALS = {-9: "killed", -11: "segmentation fault", -6: "aborted", -7: "bus error", -4: "illegal instruction"}


class BoxOptions(BaseModel, extra="forbid", frozen=True):
    """Which sandbox, under which limits. `backend` None takes what holds best on this machine; `image` and `runtime`
    (such as runsc) are Docker's. `session` "jupyter" runs cells in an IPython kernel, with pictures. `warm` are kept
    ready, `most` exist at once. `preload`: modules that are imported before an episode begins."""

    session: Literal["python", "jupyter"] = "python"
    backend: Literal["docker", "bubblewrap", "unsafe_local"] | None = None
    image: str | None = None
    runtime: str | None = None
    limits: Limits = Limits.model_validate({})
    warm: int = Field(default=4, ge=0)
    most: int = Field(default=64, ge=1)
    preload: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.limits.seconds > TOOL_SECONDS - MARGIN:
            raise ValueError(
                f"limits.seconds {self.limits.seconds:g} leaves no time within a tool's {TOOL_SECONDS:g} s: "
                f"at most {TOOL_SECONDS - MARGIN:g}"
            )
        if self.backend != "docker" and (named := {"image", "runtime"} & self._docker.keys()):
            raise ValueError(f"{min(named)} belongs to backend: docker; name that, or leave {min(named)} out")
        if self.warm > self.most:
            raise ValueError(f"warm {self.warm} is more than most {self.most}: raise most, or lower warm")
        return self

    @property
    def _docker(self) -> dict[str, str]:
        """The options that only Docker takes."""
        return {key: value for key in ("image", "runtime") if (value := getattr(self, key)) is not None}


class Box(Toolkit):
    """An episode's sandbox. It has no tools of its own; toolkits hold it.

    A sandbox cannot be copied: `fork` raises, and the episode's host then replays the recorded calls in a fresh one.
    """

    def __init__(self, options: BoxOptions | None = None) -> None:
        self.options = options or BoxOptions()
        self.life = self.options.limits.life
        self.call_seconds = self.options.limits.seconds + MARGIN
        self._sandbox: Sandbox | None = None
        self._pools: Pools = weakref.WeakKeyDictionary()

    async def setup(self) -> None:
        """Refuse early where there is no sandbox to be had (`UsageError`)."""
        await (await self._choose()).close()

    def spawn(self) -> Self:
        child = super().spawn()
        child._sandbox = None
        return child

    def fork(self) -> Self:
        raise Unsupported("a sandbox is not copied: replay the episode")

    def metrics(self) -> dict[str, float]:
        """The pool's numbers, as `sandbox/<name>`."""
        values: dict[str, float] = {}
        for pool in self._pools_made():
            for name, value in pool.metrics().items():
                values[f"sandbox/{name}"] = values.get(f"sandbox/{name}", 0.0) + value
        return values

    async def close(self) -> None:
        """An episode gives its sandbox back; the template closes the pool."""
        self._let_go()
        if self._template is None:
            pending = self._pools.pop(asyncio.get_running_loop(), None)
            if pending is not None:
                with contextlib.suppress(Exception):  # it never came to be
                    await (await pending).close()

    # -- for tools and environments --------------------------------------------------------------------

    async def run(self, program: Callable[[Sandbox], Awaitable[Result]]) -> Result:
        """Run something in the episode's sandbox; one that did not survive is replaced at the next call."""
        result = await program(await self.sandbox())
        if self._sandbox is not None and not self._sandbox.alive:
            self._let_go()
        return result

    async def sandbox(self) -> Sandbox:
        """The episode's sandbox, leased at the first call. Raises `InfraError` where it died while nothing ran."""
        if self._sandbox is None:
            self._sandbox = await (await self.pool()).lease()
        return self._sandbox

    @contextlib.asynccontextmanager
    async def fresh(self) -> AsyncIterator[Sandbox]:
        """A second sandbox that the policy never touched: where its work is judged."""
        async with (await self.pool()).leased() as judge:
            yield judge

    async def pool(self) -> Pool:
        """The template's pool in this event loop, made at the first call."""
        pools = self._shared()
        loop = asyncio.get_running_loop()
        if loop not in pools:
            pools[loop] = loop.create_task(self._open())
        return await asyncio.shield(pools[loop])

    async def _open(self) -> Pool:
        backend = await self._choose()
        options = self.options
        pool = Pool(backend, options.limits, warm=options.warm, most=options.most)
        await pool.start()
        return pool

    async def _choose(self) -> Backend:
        options = self.options
        own = {"preload": options.preload} if options.preload else {}
        walls = await choose(options.backend, **own, **options._docker)
        return JupyterBackend(walls) if options.session == "jupyter" else walls

    def _shared(self) -> Pools:
        """The template's pools."""
        return self._template._pools if isinstance(self._template, Box) else self._pools

    def _pools_made(self, loop: asyncio.AbstractEventLoop | None = None) -> list[Pool]:
        """The template's pools that came to be, in `loop` or in any."""
        return [
            made.result()
            for home, made in self._shared().items()
            if loop in (None, home) and made.done() and not made.cancelled() and made.exception() is None
        ]

    def _let_go(self) -> None:
        if self._sandbox is not None:
            sandbox, self._sandbox = self._sandbox, None
            with contextlib.suppress(RuntimeError):  # no loop runs: the sandbox ends with its channel
                for pool in self._pools_made(asyncio.get_running_loop()):
                    pool.give_back(sandbox)


def told(result: Result, limits: Limits) -> str:
    """What the policy reads of a program. Raises `ToolError` with it where the program did not run through."""
    parts = [part.rstrip("\n") for part in (result.stdout, result.stderr, result.value, result.error) if part]
    if result.status != "ok":
        parts.append(f"[{_ending(result, limits)}]")
        raise ToolError("\n".join(parts))
    return "\n".join(parts) or "[no output]"


def _ending(result: Result, limits: Limits) -> str:
    state = "variables are lost" if result.lost else "variables are kept"
    if "memory" in result.hit:
        return f"stopped: out of memory, the limit is {limits.memory_mb} MB; {state}"
    if result.status == "error":
        return "the program failed" if result.exit_code is None else f"exit code {result.exit_code}"
    if result.status.startswith("timeout"):
        return f"stopped: it ran longer than {limits.seconds:g} s; {state}"
    if result.status == "output_limit":
        return f"stopped: it wrote more than {limits.read_mb} MB; {state}"
    if result.status == "protocol":
        return "the sandbox was destroyed because a program wrote to its channel; variables and files are lost"
    how = SIGNALS.get(result.exit_code or 0, f"exit code {result.exit_code}" if result.exit_code is not None else "")
    return f"the session ended{f' ({how})' if how else ''}; {state}"
