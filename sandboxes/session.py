"""The host's side of a sandbox: requests over one socket to the session server inside (`sandboxes/server.py`).

Frames are a 4-byte big-endian length and a JSON object. One request is on its way at a time, each with a fresh nonce.
Everything that comes back is checked: a frame that is no reply to the last request means that a program in there writes
to the channel, and the sandbox is given up. A channel that ends, or stays silent, while a program runs is that
program's doing; one that is found so, that we ended ourselves, or that went with its backend is not. What a backend
built around the server is its `Vessel`.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import json
import logging
import re
import secrets
import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Protocol, get_args

from agentrl.content import Image
from agentrl.errors import InfraError, ToolError, UsageError
from agentrl.sandbox import Enforcement, LimitName, Limits, PathError, Result, Status, Unsupported

LENGTH = struct.Struct("!I")
MOST_ASKED = 8 << 20  # bytes of a request
MOST_TOLD = 2 << 20  # bytes of a reply, beside a program's texts
ESCAPED = 6  # bytes of JSON that one character may take
PIECE = 512 << 10  # bytes of a file in one frame
PATIENCE = 3.0  # seconds beyond a program's own limit after which the server must have answered
CHORE = 30.0  # seconds for everything that runs no program
MOST_IMAGES = 16
MOST_FILES = 5000
_STATUSES = frozenset(get_args(Status)) - {"protocol"}
KILLED = (-9, 137)  # exit codes, of a process and as a shell tells of its child
WANT = re.compile(
    r"MemoryError|SIGKILL|Killed|annot allocate|can't start new thread|temporarily unavailable|annot fork"
)
_PEEK = socket.MSG_PEEK | socket.MSG_DONTWAIT
log = logging.getLogger(__name__)


Cause = Literal["backend", "memory", "unknown"]
"""Why a sandbox ended: what it ran on did (a daemon), its processes took more memory than they may, or who knows."""


class Vessel(Protocol):
    """What a backend opened around the server."""

    @property
    def name(self) -> str: ...

    @property
    def enforcement(self) -> Enforcement: ...

    def hit(self) -> tuple[LimitName, ...]:
        """Limits that the kernel says were run into since this was asked last; () where it does not say."""
        ...

    async def cause(self) -> Cause:
        """Asked once, of a sandbox that has ended and is not destroyed yet: why, as far as can be told from outside."""
        ...

    async def destroy(self) -> None:
        """Kill everything in there and remove what was made for it. Idempotent."""
        ...


class _Gone(Exception):
    """The channel ended, or nobody answered in time."""


class _Garbage(Exception):
    """What came over the channel is not a reply."""


class _Channel(asyncio.Protocol):
    """Cuts the stream into frames of at most `most` bytes for whoever waits; what nobody waits for is garbage."""

    def __init__(self, connection: socket.socket, most: int) -> None:
        self.waiting: asyncio.Future[bytes] | None = None
        self.broken: Exception | None = None
        self.on_end: Callable[[Exception], None] = lambda _: None  # called where nobody waits for an answer
        self._connection = connection
        self._most = most
        self._buffer = bytearray()
        self._length = -1
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        self.fail(_Gone("the sandbox closed its channel"))

    def data_received(self, data: bytes) -> None:
        if self.broken is not None:
            return
        self._buffer += data
        if self._length < 0:
            if len(self._buffer) < LENGTH.size:
                return
            (self._length,) = LENGTH.unpack_from(self._buffer)
            if self._length > self._most:
                self.fail(_Garbage(f"a frame of {self._length} bytes"))
                return
        if len(self._buffer) < LENGTH.size + self._length:
            return
        if self.waiting is None or self.waiting.done() or len(self._buffer) > LENGTH.size + self._length:
            self.fail(_Garbage("more than was asked for"))
            return
        frame = bytes(self._buffer[LENGTH.size :])
        self._buffer.clear()
        self._length = -1
        self.waiting.set_result(frame)

    def fail(self, error: Exception) -> None:
        """The channel is of no use any more: whoever waits is told."""
        if self.broken is None:
            self.broken = error
            if self._transport is not None:
                self._transport.abort()
            if self.waiting is None:
                self.on_end(error)
            elif not self.waiting.done():
                self.waiting.set_exception(error)

    def look(self) -> None:
        """See what the event loop has not: that the channel has ended, or that somebody spoke out of turn."""
        if self.broken is None:
            try:
                self.fail(_Garbage("unasked") if self._connection.recv(1, _PEEK) else _Gone("it closed its channel"))
            except BlockingIOError:
                pass
            except OSError as error:
                self.fail(_Gone(str(error)))

    def send(self, body: bytes) -> None:
        assert self._transport is not None
        self._transport.write(LENGTH.pack(len(body)) + body)

    async def frame(self, loop: asyncio.AbstractEventLoop, seconds: float) -> bytes:
        """The next frame. Raises `_Gone` or `_Garbage`."""
        if self.broken is not None:
            raise self.broken
        self.waiting = loop.create_future()
        guard = loop.call_later(seconds, self.fail, _Gone(f"no answer within {seconds:g} s"))
        try:
            return await self.waiting
        finally:
            guard.cancel()
            self.waiting = None


class Session:
    """A live sandbox (`agentrl.sandbox.Sandbox`) over a connected socket. Made by `Session.start`."""

    def __init__(self, channel: _Channel, vessel: Vessel, limits: Limits) -> None:
        self.limits = limits
        self.python = ""
        self._channel = channel
        self._vessel = vessel
        self._turn = asyncio.Lock()
        self._loop = asyncio.get_running_loop()
        self._life = self._loop.call_later(limits.life, self._expire)
        self._over = ""  # why nothing more can be done here
        self._used = False  # a program has run
        self._programs_doing: asyncio.Future[bool] = self._loop.create_future()  # known once it is over
        self._leaving: asyncio.Task[None] | None = None
        channel.on_end = lambda error: self._doom(str(error), None)

    @classmethod
    async def start(
        cls, connection: socket.socket, vessel: Vessel, limits: Limits, ready_within: float = 20.0
    ) -> Session:
        """A session over `connection`, once its server has said hello. Where it raises, the vessel was destroyed.

        Raises `InfraError`, and `UsageError` where a module to preload cannot be imported in there.
        """
        connection.setblocking(False)
        loop = asyncio.get_running_loop()
        channel = _Channel(connection, MOST_TOLD + 4 * ESCAPED * limits.output_bytes)
        session = cls(channel, vessel, limits)
        try:
            await loop.create_unix_connection(lambda: channel, sock=connection)
            hello = json.loads(await channel.frame(loop, ready_within))
            session.python = str(hello["python"])[:40]
            absent = [str(name)[:300] for name in hello.get("absent", ())]
            networks = [str(name)[:40] for name in hello.get("networks", ())]
        except (_Gone, _Garbage, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            await session.close()
            raise InfraError(f"the sandbox {vessel.name} did not start: {error}") from error
        except asyncio.CancelledError:
            await session.close()
            raise
        if networks and "network" not in vessel.enforcement.missing:
            await session.close()
            raise UsageError(
                f"the sandbox has a network ({', '.join(networks)}) though {vessel.name} was opened without one; "
                "see what the container runtime does, or choose another backend"
            )
        if absent:
            await session.close()
            raise UsageError(
                f"preload: the sandbox's Python {session.python} cannot import {'; '.join(absent)}; "
                "install it where the sandbox's packages come from, or take it out of the list"
            )
        return session

    def __repr__(self) -> str:
        return f"Session({self.name}{'' if self.alive else ', ' + self._over})"

    @property
    def name(self) -> str:
        return self._vessel.name

    @property
    def alive(self) -> bool:
        return not self._over

    @property
    def enforcement(self) -> Enforcement:
        return self._vessel.enforcement

    async def at_fault(self) -> bool:
        return not self.alive and await asyncio.shield(self._programs_doing)

    # -- programs ------------------------------------------------------------------------------

    async def exec(self, code: str, seconds: float | None = None) -> Result:
        return await self._run({"op": "exec", "code": code}, seconds)

    async def shell(self, command: str, seconds: float | None = None) -> Result:
        return await self._run({"op": "shell", "command": command}, seconds)

    async def _run(self, request: dict[str, Any], seconds: float | None) -> Result:
        allowed = self.limits.seconds if seconds is None else min(seconds, self.limits.seconds)
        if not allowed > 0:
            raise UsageError(f"a program needs some time to run, not {seconds} seconds")
        begun = time.perf_counter()
        try:
            reply = await self._ask(request | {"seconds": allowed}, allowed + PATIENCE)
            return self._result(reply, time.perf_counter() - begun)
        except _Gone as gone:
            if self._over:  # by us, while it ran
                raise InfraError(f"the sandbox {self.name} is gone: {self._over}") from gone
            status: Status = "died"
            hit = self._vessel.hit()
            self._doom(str(gone), None, running=True)
            if not await self.at_fault():
                raise InfraError(f"the sandbox {self.name} went with its backend") from gone
        except ToolError as wrong:
            return Result("error", error=str(wrong))
        except _Garbage as garbage:
            status, hit = "protocol", self._vessel.hit()
            self._doom(f"a program wrote to its channel: {garbage}", True)
        return Result(status, hit=hit, lost=True, seconds=time.perf_counter() - begun)

    def _result(self, reply: Mapping[str, Any], seconds: float) -> Result:
        """A program's reply, every field checked. Raises `_Garbage`."""
        if "refused" in reply:
            return Result("error", error=_text(reply["refused"], 500), seconds=seconds)
        longest = self.limits.output_bytes + 100  # with the note of what was left out
        stdout, stderr, value, error = (
            None if reply.get(name) is None else _text(reply[name], longest)
            for name in ("stdout", "stderr", "value", "error")
        )
        code = reply.get("exit_code")
        found = _text(reply.get("status"), 40)
        if found not in _STATUSES:
            raise _Garbage("an unknown status")
        status: Status = found  # type: ignore[assignment]
        hit: tuple[LimitName, ...] = ("time",) if status.startswith("timeout") else ()
        if status == "output_limit":
            hit = ("output",)
        elif status != "ok":
            met = self._vessel.hit()  # since it was asked last: a program that only failed need not have met it
            hit += met if status != "error" or code in KILLED or WANT.search(f"{error} {stderr}") else ()
        return Result(
            status=status,
            stdout=stdout or "",
            stderr=stderr or "",
            value=value,
            error=error,
            exit_code=None if code is None else _number(code, -255, 255),
            images=_images(reply.get("images")),
            dropped=_number(reply.get("dropped"), 0, 1 << 62),
            hit=hit,
            lost=reply.get("lost") is True,
            seconds=seconds,
        )

    # -- files ---------------------------------------------------------------------------------

    async def read(self, path: str, most: int = 1_000_000) -> bytes:
        data = bytearray()
        while True:
            reply = await self._chore({"op": "read", "path": path, "offset": len(data), "size": PIECE})
            with self._believing():
                size = _number(reply.get("size"), 0, 1 << 62)
                piece = base64.b64decode(_text(reply.get("data"), 2 * PIECE), validate=True)
            data += piece
            if size > most or len(data) > most:
                raise PathError(f"{path}: {size} bytes, more than the {most} that may be read at once")
            if not piece or len(data) >= size:
                return bytes(data)

    async def write(self, path: str, data: bytes) -> None:
        draft = secrets.token_hex(8)
        for offset in range(0, max(1, len(data)), PIECE):
            text = base64.b64encode(data[offset : offset + PIECE]).decode()
            last = offset + PIECE >= len(data)
            request = {"op": "write", "path": path, "offset": offset, "data": text, "draft": draft, "last": last}
            await self._chore(request)

    async def files(self) -> dict[str, int]:
        reply = await self._chore({"op": "files"})
        with self._believing():
            found = reply.get("files")
            if not isinstance(found, dict) or len(found) > MOST_FILES:
                raise _Garbage("a list of files that is none")
            return {_text(path, 1 << 20): _number(size, 0, 1 << 62) for path, size in found.items()}

    # -- life ----------------------------------------------------------------------------------

    async def reset(self) -> None:
        try:
            await self._chore({"op": "reset"})
        except PathError as error:
            self._doom(f"it cannot be reset: {error}")
            raise InfraError(f"the sandbox {self.name} cannot be reset: {error}") from error

    async def snapshot(self) -> str:
        name = secrets.token_hex(4)
        try:
            await self._chore({"op": "snapshot", "name": name})
        except PathError as error:
            raise Unsupported(f"{self.name}: {error}") from None
        return name

    async def restore(self, snapshot: str) -> None:
        try:
            await self._chore({"op": "restore", "name": snapshot})
        except PathError as error:
            raise Unsupported(f"{self.name}: {error}") from None

    async def close(self) -> None:
        self._doom("closed")
        assert self._leaving is not None
        await asyncio.shield(self._leaving)

    # -- the channel ---------------------------------------------------------------------------

    async def _chore(self, request: dict[str, Any]) -> dict[str, Any]:
        """A request that runs no program. Raises `PathError` where it is refused, `InfraError` where nobody answers."""
        try:
            reply = await self._ask(request, CHORE)
        except (_Gone, _Garbage) as error:
            self._doom(str(error), True if isinstance(error, _Garbage) else None)
            raise InfraError(f"the sandbox {self.name} died: {error}") from error
        if "refused" in reply:
            raise PathError(str(reply["refused"])[:500])
        return reply

    async def _ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Send a request and return its reply. Raises `InfraError` for a sandbox that was dead before."""
        nonce = secrets.token_hex(16)
        body = json.dumps(request | {"id": nonce}).encode()
        if len(body) > MOST_ASKED:
            raise ToolError(f"the program is too long: {len(body)} bytes as JSON, more than {MOST_ASKED}")
        async with self._turn:
            self._channel.look()
            if not self.alive:
                raise InfraError(f"the sandbox {self.name} is gone: {self._over}")
            self._used = self._used or request["op"] in ("exec", "shell")
            self._channel.send(body)
            try:
                frame = await self._channel.frame(self._loop, seconds)
            except asyncio.CancelledError:  # the reply would come to whoever asks next
                self._doom("its program was cancelled", True)
                raise
        try:
            reply = json.loads(frame)
        except (ValueError, RecursionError):
            raise _Garbage("not JSON") from None
        if not isinstance(reply, dict) or reply.get("id") != nonce:
            raise _Garbage("an answer to nothing that was asked")
        return reply

    @contextlib.contextmanager
    def _believing(self) -> Iterator[None]:
        """Around what is read out of a chore's reply. Raises `InfraError` for what cannot be, the sandbox destroyed."""
        try:
            yield
        except (_Garbage, binascii.Error) as error:
            self._doom("a program wrote to its channel", True)
            raise InfraError(f"the sandbox {self.name} gave an impossible answer and was destroyed: {error}") from error

    def _expire(self) -> None:
        self._doom(f"its life of {self.limits.life:g} s is over")

    def _doom(self, reason: str, programs_doing: bool | None = False, *, running: bool = False) -> None:
        """Give the sandbox up; it is destroyed in the background. `programs_doing` None: what it ran on must tell, and
        `running` says that a program was."""
        if not self._over:
            self._over = reason
            self._life.cancel()
            self._channel.fail(_Gone(reason))
            ending = self._destroy(programs_doing, running)
            self._leaving = self._loop.create_task(ending, name=f"destroy {self.name}")

    async def _destroy(self, programs_doing: bool | None, running: bool) -> None:
        try:
            if programs_doing is None:
                cause = await self._vessel.cause()
                programs_doing = cause != "backend" if running else self._used and cause == "memory"
            self._programs_doing.set_result(programs_doing)
            await self._vessel.destroy()
        except InfraError as error:  # the reaper finds what was left
            log.warning("%s", error)
        except Exception:  # whatever else a backend meets
            log.exception("the sandbox %s could not be destroyed", self.name)
        finally:
            if not self._programs_doing.done():
                self._programs_doing.set_result(False)


def _text(found: object, longest: int) -> str:
    """The beginning of a text that can be encoded. Raises `_Garbage`."""
    if not isinstance(found, str):
        raise _Garbage("something else in place of a text")
    found = found[:longest]
    return found if found.isascii() else found.encode("utf-8", "replace").decode()


def _number(found: object, least: int, most: int) -> int:
    """An integer of that range. Raises `_Garbage`."""
    if not isinstance(found, int) or isinstance(found, bool) or not least <= found <= most:
        raise _Garbage("something else in place of a number")
    return found


def _images(found: object) -> tuple[Image, ...]:
    images = []
    for item in found[:MOST_IMAGES] if isinstance(found, list) else ():
        if isinstance(item, dict) and item.get("mime") in ("image/png", "image/jpeg"):
            with contextlib.suppress(ValueError, TypeError, KeyError):
                images.append(Image(base64.b64decode(item["data"], validate=True), str(item["mime"])))
    return tuple(images)
