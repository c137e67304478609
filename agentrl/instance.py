"""One spawned environment and the calls into it: the user's code is run here, and nowhere else.

Every method of a user may be sync (run in a worker thread) or async (run on the loop), may raise
anything, and may never return. `invoke` turns all of that into a value, a `Caught` exception or
`Lost`; `Local` turns the environment's methods into plain data, so that the same class serves an
episode in this process and, behind a pipe, one in a worker process (`agentrl.process`).
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np

from agentrl.effect import Effect, cut, effect_of, first_line, key_of, unknown_tool
from agentrl.env import Env, Episode, Obs
from agentrl.errors import AgentRLError, EnvError, InfraError, PolicyError, ToolError
from agentrl.task import Task
from agentrl.threads import PATIENCE, WORKERS
from agentrl.tool import Tool, Toolkit, gathered
from agentrl.trajectory import ErrorKind, ToolCall

GRACE = 0.5  # seconds a cancelled coroutine has to end
MAX_CHARS = 16_384  # of an observation that no tool made (reset, reply)
Scored = tuple[dict[str, float | None], float | None, bool | None]
_METHODS = {name for name, value in vars(Env).items() if inspect.isfunction(value)} - {"__init__"}
log = logging.getLogger(__name__)


class Lost(AgentRLError):
    """A call did not come back in time (`kind` "timeout") or took its process down ("bug").

    `gone`: the instance can no longer be used, because the call may still be changing it.
    """

    def __init__(self, message: str, *, kind: ErrorKind = "timeout", gone: bool = True) -> None:
        super().__init__(message)
        self.kind: ErrorKind = kind
        self.gone = gone


@dataclass(frozen=True, slots=True)
class Caught:
    """An exception that the user's code raised, as a value: `SystemExit` must not end the loop."""

    error: BaseException


class Instance(Protocol):
    """An episode's environment, wherever it lives. All but `close` may raise `Lost`, `InfraError`, `EnvError`."""

    async def reset(self, task: Task, seed: tuple[int, ...], limit: float | None) -> Obs | None: ...
    async def prepare(self, call: ToolCall, limit: float | None) -> None: ...
    async def call(self, call: ToolCall, limit: float | None) -> Effect: ...
    async def reply(self, text: str, limit: float | None) -> Obs | None: ...
    async def anchor(self, limit: float | None) -> str | None: ...
    async def score(self, episode: Episode, limit: float | None) -> Scored: ...
    async def fork(self, limit: float | None) -> Instance | None: ...
    async def close(self, limit: float) -> None: ...


async def invoke(function: Callable[[], Any], limit: float | None, tool: Tool | None = None) -> Any:
    """Call `function`, sync or async, for at most `limit` seconds. Returns its value or `Caught`; raises `Lost`.

    A `tool` remembers whether it was brief last time, which decides how it is waited for.
    """
    if tool.is_async if tool is not None else inspect.iscoroutinefunction(function):
        return await _awaited(function(), limit)
    try:
        job = await WORKERS.run(function, limit, PATIENCE if tool is None or tool.brief else 0.0)
    except TimeoutError:
        raise Lost(f"no answer within {limit:g} s") from None
    if tool is not None:
        tool.brief = job.seconds < PATIENCE
    if job.error is not None:
        return Caught(job.error)
    return await _awaited(job.value, limit) if inspect.isawaitable(job.value) else job.value


async def _awaited(awaitable: Awaitable[Any], limit: float | None) -> Any:
    task = asyncio.ensure_future(_guarded(awaitable))
    try:
        done, _ = await asyncio.wait({task}, timeout=limit)
        if done:
            return task.result()
    finally:
        if not task.done():  # out of time, or the episode itself was cancelled
            task.cancel()
            await asyncio.wait({task}, timeout=GRACE)
    raise Lost(f"no answer within {limit:g} s", gone=not task.done())


async def _guarded(awaitable: Awaitable[Any]) -> Any:
    try:
        return await awaitable
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        return Caught(error)  # the tool's own doing: nobody cancelled it
    except BaseException as error:
        return Caught(error)


class Local:
    """An environment's spawn in this process."""

    def __init__(self, env: Env) -> None:
        self.env = env
        self._box = env.toolbox()

    @classmethod
    def spawn(cls, template: Env) -> Local:
        try:
            return cls(template.spawn())
        except Exception as error:
            raise EnvError(f"{type(template).__name__}.spawn failed with {first_line(error)}") from error

    async def reset(self, task: Task, seed: tuple[int, ...], limit: float | None) -> Obs | None:
        obs = await self._reset(task, seed, limit)
        hidden = sorted(_METHODS & vars(self.env).keys())
        if hidden:
            name = type(self.env).__name__
            raise EnvError(f"{name} sets self.{hidden[0]}, which hides the method Env.{hidden[0]}; choose another name")
        return obs

    async def _reset(self, task: Task, seed: tuple[int, ...], limit: float | None) -> Obs | None:
        for index, kit in enumerate(self.env.kits):
            if overrides(kit, "reset", Toolkit):
                await self._ask(f"{type(kit).__name__}.reset", partial(kit.reset, generator(seed, index + 1)), limit)
        if not overrides(self.env, "reset", Env):
            return None
        return self._obs("reset", await self._ask("reset", partial(self.env.reset, task, generator(seed)), limit))

    async def call(self, call: ToolCall, limit: float | None) -> Effect:
        found = self._box.get(call.name)
        if found is None:
            return Effect(unknown_tool(call.name, list(self._box)), "unknown_tool", ran=False)
        owner, tool = found
        longest = tool.options.max_chars
        try:
            arguments = tool.validate(call.arguments)
        except (ToolError, TypeError, ValueError, RecursionError) as error:
            return Effect(cut(f"Error: {error}", longest)[0], "arguments", ran=False)
        value = await invoke(partial(tool.function, owner, **arguments), limit, tool)
        if isinstance(value, Caught):
            if isinstance(value.error, InfraError | PolicyError):
                raise value.error
            if isinstance(value.error, ToolError):
                return Effect(cut(str(value.error) or "Error: the call failed", longest)[0], "tool")
            return Effect(f"Error: {first_line(value.error)}", "bug")
        return effect_of(value, tool.name, longest)

    async def prepare(self, call: ToolCall, limit: float | None) -> None:
        """Have what the call needs (`Toolkit.ready`)."""
        owner, _ = self._box.get(call.name, (None, None))
        for kit in gathered((owner,)) if isinstance(owner, Toolkit) else ():
            if overrides(kit, "ready", Toolkit):
                await self._ask(f"{type(kit).__name__}.ready", kit.ready, limit)

    async def reply(self, text: str, limit: float | None) -> Obs | None:
        if not overrides(self.env, "reply", Env):
            return None
        try:
            return self._obs("reply", await self._ask("reply", partial(self.env.reply, text), limit))
        except ToolError as error:  # the environment could not take what was said: the policy may try again
            return Obs(cut(str(error) or "Error: that cannot be answered", MAX_CHARS)[0])

    async def anchor(self, limit: float | None) -> str | None:
        if not overrides(self.env, "anchor", Env):
            return None
        key = await self._ask("anchor", self.env.anchor, limit)
        return None if key is None else key_of(key)

    async def score(self, episode: Episode, limit: float | None) -> Scored:
        verdict = await self._ask("score", partial(self.env.score, episode), limit)
        name = type(self.env).__name__
        try:
            parts, total, success = self.env.total(verdict)
        except (AgentRLError, TypeError, ValueError, AttributeError) as error:
            raise EnvError(f"{name}.score must return a float, a Score or None: {first_line(error)}") from error
        for label, part in (*parts.items(), ("total", total)):
            if part is not None and not math.isfinite(part):
                raise EnvError(
                    f"{name}.score gave {label} = {part}; return finite numbers, or None where it is missing"
                )
        low, high = self.env.reward_range
        if total is not None and not low - 1e-9 <= total <= high + 1e-9:
            raise EnvError(
                f"{name}.score gave {total:g}, outside its reward_range ({low:g}, {high:g}); "
                "declare the range it really has, or scale the score"
            )
        return parts, total, success

    async def fork(self, limit: float | None) -> Local | None:
        """A copy, or None where the state cannot be copied (the host then replays)."""
        forked = await invoke(self.env.fork, limit)
        if isinstance(forked, Caught):
            if isinstance(forked.error, InfraError):
                raise forked.error
            log.info("%s cannot be copied (%s); replaying", type(self.env).__name__, first_line(forked.error))
            return None
        return Local(forked)

    async def close(self, limit: float) -> None:
        """Close the environment and its toolkits, whatever they do, within `limit` seconds each."""
        owners: list[tuple[Env | Toolkit, type]] = [(self.env, Env), *((kit, Toolkit) for kit in self.env.kits)]
        for owner, base in owners:
            if not overrides(owner, "close", base):
                continue
            try:
                value = await invoke(owner.close, limit)
            except (Lost, InfraError) as error:
                value = Caught(error)
            if isinstance(value, Caught):
                log.warning("%s.close failed with %s", type(owner).__name__, first_line(value.error))

    async def _ask(self, name: str, method: Callable[[], Any], limit: float | None) -> Any:
        """Call one of the environment's own methods: what it raises is the environment's failure."""
        value = await invoke(method, limit)
        if not isinstance(value, Caught):
            return value
        if isinstance(value.error, InfraError) or (
            name == "reply" and isinstance(value.error, PolicyError | ToolError)
        ):
            raise value.error
        raise EnvError(f"{type(self.env).__name__}.{name} failed with {first_line(value.error)}") from value.error

    def _obs(self, name: str, value: Any) -> Obs | None:
        if value is None:
            return None
        effect = effect_of(value, name, MAX_CHARS)
        if effect.error not in (None, "oversize"):
            raise EnvError(f"{type(self.env).__name__}.{name} must return an Obs or None: {effect.content}")
        return Obs(effect.content, effect.reward, effect.done)


def generator(seed: tuple[int, ...], stream: int = 0) -> np.random.Generator:
    """The episode's random numbers: Philox keyed by `seed`; streams 1, 2, … belong to its toolkits."""
    key = np.random.SeedSequence(seed, spawn_key=(stream,) if stream else ())
    return np.random.Generator(np.random.Philox(key))


def overrides(owner: object, name: str, base: type) -> bool:
    """Whether `owner` brings its own `name`: what it did not write need not be called."""
    return getattr(type(owner), name) is not getattr(base, name) or name in vars(owner)
