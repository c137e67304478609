"""`isolation = "process"`: an episode's environment in a worker process that can be killed.

A *nursery* process per template imports the environment (never torch), makes and sets up a template of
its own once, and then forks a worker per episode: what `setup` built is shared copy-on-write, and an
episode starts in milliseconds. The parent keeps a socket to each worker and one to the nursery; it
asks the nursery to kill (who knows its children, so that no other process can be hit). When the
parent dies, the nursery sees its socket close, kills every worker and ends.

Not a security boundary: it stops loops, crashes and leaks of trusted code. Sandboxes hold the policy's programs.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import pickle
import socket
import struct
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

from agentrl.effect import Effect
from agentrl.env import Env, Episode, Obs
from agentrl.errors import EnvError, InfraError, PolicyError, UsageError
from agentrl.instance import GRACE, Lost, Scored
from agentrl.task import Task
from agentrl.trajectory import ToolCall

COMMAND = struct.Struct("!cI")  # what to do (b"s" spawn, b"k" kill) and the worker's number
LENGTH = struct.Struct("!I")
_JUDGED = ("max_turns", "reward_range", "success_at", "reward_weights")  # what a configuration may set on a template
START_SECONDS = 60.0  # the nursery's imports and the environment's setup may take this long


class Nursery:
    """The process that forks a template's workers."""

    def __init__(self, template: Env) -> None:
        cls = type(template)
        if "<locals>" in cls.__qualname__:
            raise UsageError(
                f"{cls.__name__} is defined inside a function: isolation='process' needs a top-level class"
            )
        module = sys.modules[cls.__module__]
        order = {
            "path": list(sys.path),
            "module": cls.__module__,
            "file": getattr(module, "__file__", None),
            "class": cls.__qualname__,
            "options": template.options.model_dump(),
            "set": {name: value for name, value in vars(template).items() if name in _JUDGED},
        }
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "agentrl.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # a Ctrl-C in the terminal is the parent's to handle
                env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *_pythonpath()])},
            )
        self._socket = ours
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._end = weakref.finalize(self, _end, self._process, ours)
        body = pickle.dumps(order)
        self._send(LENGTH.pack(len(body)) + body)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def spawn(self) -> tuple[int, socket.socket]:
        """A new worker's number and the socket to it."""
        ours, theirs = socket.socketpair()
        number = next(self._numbers)
        with theirs:
            self._send(COMMAND.pack(b"s", number), theirs.fileno())
        ours.setblocking(False)
        return number, ours

    def kill(self, number: int) -> None:
        """End a worker, whatever it is doing."""
        with contextlib.suppress(InfraError):  # a dead nursery has killed its workers already
            self._send(COMMAND.pack(b"k", number))

    def _send(self, message: bytes, fd: int | None = None) -> None:
        try:
            with self._lock:
                if fd is None:
                    self._socket.sendall(message)
                else:
                    socket.send_fds(self._socket, [message], [fd])
        except OSError as error:
            raise InfraError(f"the worker nursery is gone: {error}") from error


def _pythonpath() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def _end(process: subprocess.Popen[bytes], control: socket.socket) -> None:
    control.close()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


_nurseries: weakref.WeakKeyDictionary[Env, Nursery] = weakref.WeakKeyDictionary()


def nursery_of(template: Env) -> Nursery:
    """The template's nursery, started on first use and again when it died."""
    found = _nurseries.get(template)
    if found is None or not found.alive:
        found = _nurseries[template] = Nursery(template)
    return found


class Remote:
    """An episode's environment in a worker of its own: the calls of `Local`, over a socket."""

    def __init__(self, template: Env) -> None:
        self._name = type(template).__name__
        self._nursery = nursery_of(template)
        self._number, self._socket = self._nursery.spawn()
        self._ids = itertools.count()
        self._waiting: dict[int, asyncio.Future[tuple[str, Any]]] = {}
        self._reader: asyncio.Task[None] | None = None
        self._dead = False
        self._outbox = asyncio.Lock()

    async def reset(self, task: Task, seed: tuple[int, ...], limit: float | None) -> Obs | None:
        await self._ask("ready", (), START_SECONDS)
        obs: Obs | None = await self._ask("reset", (task, seed), limit)
        return obs

    async def prepare(self, call: ToolCall, limit: float | None) -> None:
        await self._ask("prepare", (call,), limit)

    async def call(self, call: ToolCall, limit: float | None) -> Effect:
        effect: Effect = await self._ask("call", (call,), limit)
        return effect

    async def reply(self, text: str, limit: float | None) -> Obs | None:
        obs: Obs | None = await self._ask("reply", (text,), limit)
        return obs

    async def anchor(self, limit: float | None) -> str | None:
        key: str | None = await self._ask("anchor", (), limit)
        return key

    async def score(self, episode: Episode, limit: float | None) -> Scored:
        scored: Scored = await self._ask("score", (episode,), limit)
        return scored

    async def fork(self, limit: float | None) -> None:
        """A process is not copied: the host replays in a new one."""
        return None

    async def close(self, limit: float) -> None:
        if not self._dead:
            with contextlib.suppress(Lost, InfraError, EnvError):
                await self._ask("close", (limit,), limit + GRACE)
        self._kill()
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.wait({self._reader})
        self._socket.close()

    async def _ask(self, method: str, arguments: tuple[Any, ...], limit: float | None) -> Any:
        if self._dead:
            raise InfraError(f"{self._name}: the worker process ended while nothing was asked of it")
        loop = asyncio.get_running_loop()
        if self._reader is None:
            self._reader = loop.create_task(self._read())
        number = next(self._ids)
        future: asyncio.Future[tuple[str, Any]] = loop.create_future()
        self._waiting[number] = future
        try:
            body = pickle.dumps((number, method, arguments))
            async with asyncio.timeout(limit):
                async with self._outbox:
                    with contextlib.suppress(OSError):  # the reader reports a dead worker
                        await loop.sock_sendall(self._socket, LENGTH.pack(len(body)) + body)
                status, value = await future
        except TimeoutError:
            self._kill()
            raise Lost(f"no answer within {limit:g} s") from None
        except asyncio.CancelledError:
            self._kill()
            raise
        finally:
            self._waiting.pop(number, None)
        if status == "ok":
            return value
        if status == "died":
            if method == "ready":
                raise InfraError(f"{self._name}: {value}")
            raise Lost(value, kind="bug")
        raise {"infra": InfraError, "env": EnvError, "policy": PolicyError}[status](value)

    async def _read(self) -> None:
        """Hand each answer to whoever waits for it, until the worker is gone."""
        try:
            while True:
                (length,) = LENGTH.unpack(await self._exactly(LENGTH.size))
                number, status, value = pickle.loads(await self._exactly(length))
                waiting = self._waiting.get(number)
                if waiting is not None and not waiting.done():
                    waiting.set_result((status, value))
        except (OSError, EOFError):
            self._dead = True
            for future in self._waiting.values():
                if not future.done():
                    future.set_result(("died", "the worker process ended"))

    async def _exactly(self, size: int) -> bytes:
        loop, pieces = asyncio.get_running_loop(), bytearray()
        while len(pieces) < size:
            piece = await loop.sock_recv(self._socket, min(size - len(pieces), 1 << 20))
            if not piece:
                raise EOFError
            pieces += piece
        return bytes(pieces)

    def _kill(self) -> None:
        self._dead = True
        self._nursery.kill(self._number)
