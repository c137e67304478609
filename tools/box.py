"""A box: one episode's sandbox, shared by the tools that work in it.

    box = Box(BoxOptions())
    tools = (Python(box), Shell(box), Files(box))

The template owns a pool; an episode takes a sandbox from it before its first call and lets go of it at the end. A
program that takes its sandbox down is the policy's own doing: it is told so, and the next call finds a fresh sandbox.
Where the machinery fails (`InfraError`) the rollout tries the episode again.
"""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Literal, Self, TypeVar

from pydantic import BaseModel, Field, model_validator

from agentrl.errors import InfraError, ToolError, UsageError
from agentrl.sandbox import Backend, Limits, Result, Sandbox, Unsupported
from agentrl.sandbox.pool import Pool
from agentrl.sandboxes import choose
from agentrl.sandboxes.jupyter import JupyterBackend
from agentrl.tool import Toolkit

TOOL_SECONDS = 30.0  # the timeout of every tool that works in a box
MARGIN = 5.0  # of it is left for a sandbox to start, and for a program that does not stop
PATIENCE = 30.0  # seconds that an episode waits for a sandbox before it fails and is tried again
Pools = weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, "asyncio.Future[Pool]"]
T = TypeVar("T")
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
        self.places = self.options.most
        self.call_seconds = self.options.limits.seconds + MARGIN
        self._sandbox: Sandbox | None = None
        self._lost = False  # the state, since the last program
        self._files: dict[str, bytes] = {}
        self._chosen: str | None = None
        self._pools: Pools = weakref.WeakKeyDictionary()

    async def setup(self) -> None:
        """Refuse early where there is no sandbox to be had (`UsageError`)."""
        await (await self._choose()).close()

    def spawn(self) -> Self:
        child = super().spawn()
        child._sandbox, child._lost, child._files = None, False, {}
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
        self.let_go()
        if self._template is None:
            pending = self._pools.pop(asyncio.get_running_loop(), None)
            if pending is not None:
                with contextlib.suppress(Exception):  # it never came to be
                    await (await pending).close()

    # -- for tools and environments --------------------------------------------------------------------

    async def ready(self) -> None:
        """Have a sandbox before a tool's clock starts: the policy does not pay for waiting in line."""
        await self.sandbox()

    async def run(self, program: Callable[[Sandbox], Awaitable[Result]]) -> Result:
        """Run something in the episode's sandbox. `lost` also where the state was lost before it began."""
        result = await self.use(program)
        lost, self._lost = self._lost, False
        return replace(result, lost=result.lost or lost)

    async def use(self, work: Callable[[Sandbox], Awaitable[T]]) -> T:
        """Do something with the episode's sandbox; one that does not survive is replaced at the next call.

        Raises `ToolError` where an earlier program turns out to have ended it, `InfraError` where something else did.
        """
        sandbox = await self.sandbox()
        try:
            return await work(sandbox)
        except InfraError as error:
            if not await sandbox.at_fault():
                raise
            raise ToolError("the sandbox was ended by what an earlier program did; a fresh one is ready") from error
        finally:
            if not sandbox.alive:
                self.let_go()
                self._lost = True

    async def sandbox(self) -> Sandbox:
        """The episode's sandbox, leased where there is none. Raises `InfraError` where it died while nothing ran."""
        if self._sandbox is not None and not self._sandbox.alive:
            if not await self._sandbox.at_fault():
                raise InfraError(f"the sandbox {self._sandbox.name} died between two calls")
            self.let_go()
            self._lost = True
        if self._sandbox is None:
            pool = await self.pool()
            try:
                sandbox = await pool.lease()
            except UsageError as error:  # it worked when the run began
                raise InfraError(str(error)) from error
            self._sandbox = sandbox
            for path, data in self._files.items():
                await sandbox.write(path, data)
        return self._sandbox

    def begin_with(self, files: Mapping[str, bytes]) -> None:
        """What every sandbox of this episode holds at first. For `Env.reset`."""
        self._files = dict(files)

    def let_go(self) -> None:
        """Give the episode's sandbox back. Before judges are leased: those who judge would wait for those judged."""
        if self._sandbox is not None:
            sandbox, self._sandbox = self._sandbox, None
            with contextlib.suppress(RuntimeError):  # no loop runs: the sandbox ends with its channel
                for pool in self._pools_made(asyncio.get_running_loop()):
                    pool.give_back(sandbox)

    @contextlib.asynccontextmanager
    async def fresh(self) -> AsyncIterator[Sandbox]:
        """A second sandbox that the policy never touched: where its work is judged. `let_go` of the first before."""
        pool = await self.pool()
        try:
            judge = await pool.lease()
        except UsageError as error:  # it worked when the run began
            raise InfraError(str(error)) from error
        try:
            yield judge
        finally:
            pool.give_back(judge)

    async def pool(self) -> Pool:
        """The template's pool in this event loop, made at the first call. Raises `InfraError` where none can be now."""
        pools, loop = self._shared(), asyncio.get_running_loop()
        made = pools.get(loop)
        if made is None or (made.done() and (made.cancelled() or made.exception() is not None)):
            pools[loop] = made = loop.create_task(self._open())
        try:
            return await asyncio.shield(made)
        except UsageError as error:  # it worked when the run began
            raise InfraError(str(error)) from error

    async def _open(self) -> Pool:
        backend = await self._choose()
        options = self.options
        pool = Pool(backend, options.limits, warm=options.warm, most=options.most, patience=PATIENCE)
        await pool.start()
        return pool

    async def _choose(self) -> Backend:
        options = self.options
        own = {"preload": options.preload} if options.preload else {}
        owner = self._template if isinstance(self._template, Box) else self
        walls = await choose(options.backend or owner._chosen, **own, **options._docker)
        owner._chosen = walls.name  # a run does not change walls on the way
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


def told(result: Result, limits: Limits) -> str:
    """What the policy reads of a program. Raises `ToolError` with it where the program did not run through."""
    parts = [part.rstrip("\n") for part in (result.stdout, result.stderr, result.value, result.error) if part]
    if result.status != "ok":
        parts.append(f"[{_ending(result, limits)}]")
        raise ToolError("\n".join(parts))
    if result.lost:
        parts.append("[the variables of earlier calls were lost before this one]")
    return "\n".join(parts) or "[no output]"


def _ending(result: Result, limits: Limits) -> str:
    state = "variables are lost" if result.lost else "variables are kept"
    if "memory" in result.hit:
        return f"stopped: out of memory, the limit is {limits.memory_mb} MB; {state}"
    if result.status == "error":
        how = "the program failed" if result.exit_code is None else f"exit code {result.exit_code}"
        return f"{how}; the variables of earlier calls were lost before this one" if result.lost else how
    if result.status.startswith("timeout"):
        return f"stopped: it ran longer than {limits.seconds:g} s; {state}"
    if result.status == "output_limit":
        return f"stopped: it wrote more than {limits.read_mb} MB; {state}"
    if result.status == "protocol":
        return "the sandbox was destroyed because a program wrote to its channel; variables and files are lost"
    how = SIGNALS.get(result.exit_code or 0, f"exit code {result.exit_code}" if result.exit_code is not None else "")
    return f"the session ended{f' ({how})' if how else ''}; {state}"
