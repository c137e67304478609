"""Sandboxes: where a policy's programs run.

A *backend* (Docker, bubblewrap, …) opens *sandboxes* under *limits*; a sandbox runs Python cells whose state
persists, shell commands, and holds files in its workspace. What a program does to its sandbox is a `Result`, never an
exception: `status` says how it ended. Only the machinery's own failure raises `InfraError`. Nothing that comes out of
a sandbox is evidence: user code can forge every word of it, so rewards are computed from a second, fresh sandbox.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, Self, get_args

from pydantic import BaseModel, Field, model_validator

from agentrl.content import Image
from agentrl.errors import AgentRLError, ToolError

Status = Literal["ok", "error", "timeout_interrupted", "timeout_killed", "output_limit", "died", "protocol"]
"""How a program ended. `ok`: ran through. `error`: an exception, or an exit code that is not 0. `timeout_interrupted`:
SIGINT at the time limit ended it, the state is kept. `timeout_killed`: it ignored that; its worker was killed.
`output_limit`: it wrote more than is read. `died`: its process ended (crash, memory, `_exit`, the sandbox itself).
`protocol`: what came out of the sandbox is not a reply, so somebody in there writes to the channel."""

LimitName = Literal["time", "memory", "processes", "files", "disk", "inodes", "output", "network", "cpu", "syscalls"]
LIMITS: tuple[LimitName, ...] = get_args(LimitName)


class Limits(BaseModel, extra="forbid", frozen=True):
    """What one sandbox may use. A backend says which of these it enforces (`Enforcement`).

    `seconds`: of one program, wall-clock. `life`: seconds until the sandbox as a whole is ended. `memory_mb`: of all
    its processes together. `processes`: threads count. `open_files`: per process. `disk_mb` and `inodes`: of the
    workspace, and as much again of /tmp. `output_bytes`: kept of each stream; `read_mb`: read before the program is
    stopped. `cpus`: cores' worth of time. `network`: there is none. `strict`: refuse to open a sandbox where
    a limit cannot be enforced.
    """

    seconds: float = Field(10.0, gt=0, le=3600)
    life: float = Field(3600.0, gt=0)
    memory_mb: int = Field(512, ge=64)
    processes: int = Field(128, ge=8)
    open_files: int = Field(1024, ge=64)
    disk_mb: int = Field(64, ge=1)
    inodes: int = Field(10_000, ge=100)
    output_bytes: int = Field(20_000, ge=100, le=200_000)
    read_mb: int = Field(64, ge=1)
    cpus: float = Field(1.0, gt=0)
    strict: bool = False

    @model_validator(mode="after")
    def _life_outlasts_a_program(self) -> Self:
        if self.life <= self.seconds:
            raise ValueError(f"a sandbox's life ({self.life:g} s) must be longer than one program's {self.seconds:g} s")
        return self


@dataclass(frozen=True, slots=True)
class Enforcement:
    """Which limits hold on this machine: `missing` maps each one that does not to the reason, in one sentence."""

    missing: Mapping[LimitName, str] = field(default_factory=dict)

    @property
    def enforced(self) -> tuple[LimitName, ...]:
        return tuple(name for name in LIMITS if name not in self.missing)

    @property
    def level(self) -> Literal["full", "reduced", "none"]:
        if not self.missing:
            return "full"
        return "none" if "network" in self.missing else "reduced"  # what has the network is no wall


@dataclass(frozen=True, slots=True)
class Result:
    """What a program came to, as its sandbox tells it.

    `stdout` and `stderr` are the beginnings and ends of the streams, `dropped` the bytes left out between. `value`:
    repr of a cell's last expression. `error`: the exception's traceback. `exit_code`: a shell command's (negative:
    ended by that signal). `hit`: limits that the program ran into. `lost`: the Python state is gone. `seconds`: on
    the host's clock.
    """

    status: Status
    stdout: str = ""
    stderr: str = ""
    value: str | None = None
    error: str | None = None
    exit_code: int | None = None
    images: tuple[Image, ...] = ()
    dropped: int = 0
    hit: tuple[LimitName, ...] = ()
    lost: bool = False
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return self.status == "ok"


class Unsupported(AgentRLError):
    """This backend cannot do that; the sentence says why."""


class PathError(ToolError):
    """A path that leaves the workspace, does not exist, or is not what was asked for."""


class Sandbox(Protocol):
    """One live sandbox. Calls are served one after another.

    `exec`, `shell`, `read`, `write` and `reset` raise `InfraError` where the sandbox was found dead before they
    began or its backend is gone; a program that takes its sandbox down gets a `Result` with `status` "died".
    """

    @property
    def name(self) -> str:
        """Unique among this machine's sandboxes."""
        ...

    @property
    def alive(self) -> bool: ...

    @property
    def enforcement(self) -> Enforcement: ...

    async def at_fault(self) -> bool:
        """Of a sandbox that is no longer alive: whether a program in it is to blame. One that ended while it ran a
        program, or idle for want of memory after it had run one, is the program's; one that went with its backend or
        was found dead is not."""
        ...

    async def exec(self, code: str, seconds: float | None = None) -> Result:
        """Run a Python cell in the persistent session, for at most `seconds` (default and cap: the limit)."""
        ...

    async def shell(self, command: str, seconds: float | None = None) -> Result:
        """Run `sh -c command` in the workspace."""
        ...

    async def read(self, path: str, most: int = 1_000_000) -> bytes:
        """A regular file of the workspace; links are not followed. Raises `PathError`, also beyond `most` bytes."""
        ...

    async def write(self, path: str, data: bytes) -> None:
        """Create or replace a file of the workspace, with its folders. Raises `PathError`."""
        ...

    async def files(self) -> dict[str, int]:
        """Every regular file of the workspace (relative path -> bytes), at most a few thousand."""
        ...

    async def reset(self) -> None:
        """End everything that runs, forget the Python state, empty workspace and /tmp."""
        ...

    async def snapshot(self) -> str:
        """Keep the Python state and the workspace as they are; the name brings them back. Raises `Unsupported`."""
        ...

    async def restore(self, snapshot: str) -> None:
        """Go back to a snapshot of this sandbox, which stays. Raises `Unsupported` for one that is gone."""
        ...

    async def close(self) -> None:
        """Destroy the sandbox with everything in it. Idempotent; never raises for what it held."""
        ...


class Backend(Protocol):
    """Opens sandboxes. One per process and kind; safe to use from one event loop at a time."""

    @property
    def name(self) -> str: ...

    async def missing(self) -> str | None:
        """None where the backend works on this machine, else one sentence: what to install or to start."""
        ...

    async def enforcement(self, limits: Limits) -> Enforcement: ...

    async def open(self, limits: Limits) -> Sandbox:
        """A fresh sandbox, ready for its first program. Raises `InfraError`, or `UsageError` for what cannot work
        (a missing image, a limit that is not enforced though `limits.strict`)."""
        ...

    async def reap(self) -> int:
        """Remove what sandboxes of dead processes left on this machine; how many there were."""
        ...

    async def close(self) -> None:
        """Close every sandbox that is still open."""
        ...


@dataclass(slots=True)
class PoolStats:
    """Counted since the pool was made. `waited`: leases that found none ready; `waited_s`: summed over them."""

    opened: int = 0
    leased: int = 0
    closed: int = 0
    found_dead: int = 0
    failed: int = 0
    waited: int = 0
    waited_s: float = 0.0
    ready: int = 0
    live: int = 0
    extra: dict[str, float] = field(default_factory=dict)
