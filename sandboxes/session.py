"""The host's side of a sandbox: requests over one socket to the session server inside (`sandboxes/server.py`).

Frames are a 4-byte big-endian length and a JSON object. One request is on its way at a time, each with a fresh nonce.
Everything that comes back is checked: a frame that is no reply to the last request means that a program in there writes
to the channel, and the sandbox is given up. What a backend built around the server is its `Vessel`.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import json
import logging
import secrets
import socket
import struct
import time
from collections.abc import Mapping
from typing import Any, Protocol, get_args

from agentrl.content import Image
from agentrl.errors import InfraError
from agentrl.sandbox import Enforcement, LimitName, Limits, PathError, Result, Status, Unsupported

LENGTH = struct.Struct("!I")
MOST_FRAME = 8 << 20  # bytes from inside
PIECE = 512 << 10  # bytes of a file in one frame
PATIENCE = 3.0  # seconds beyond a program's own limit after which the server must have answered
CHORE = 30.0  # seconds for everything that runs no program
MOST_IMAGES = 16
_STATUSES = frozenset(get_args(Status)) - {"protocol"}
log = logging.getLogger(__name__)


class Vessel(Protocol):
    """What a backend opened around the server."""

    @property
    def name(self) -> str: ...

    @property
    def enforcement(self) -> Enforcement: ...

    def hit(self) -> tuple[LimitName, ...]:
        """Limits that the kernel says were run into since this was asked last; () where it does not say."""
        ...

    async def destroy(self) -> None:
        """Kill everything in there and remove what was made for it. Idempotent."""
        ...


class _Gone(Exception):
    """The channel ended, or nobody answered in time."""


class _Garbage(Exception):
    """What came over the channel is not a reply."""


class _Channel(asyncio.Protocol):
    """Cuts the stream into frames for whoever waits; a frame that nobody waits for is garbage."""

    def __init__(self) -> None:
        self.waiting: asyncio.Future[bytes] | None = None
        self.broken: Exception | None = None
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
            if self._length > MOST_FRAME:
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
        """The channel is of no use any more."""
        if self.broken is None:
            self.broken = error
            if self._transport is not None:
                self._transport.abort()
            if self.waiting is not None and not self.waiting.done():
                self.waiting.set_exception(error)

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
        self._leaving: asyncio.Task[None] | None = None

    @classmethod
    async def start(
        cls, connection: socket.socket, vessel: Vessel, limits: Limits, ready_within: float = 20.0
    ) -> Session:
        """A session over `connection`, once its server has said hello. Raises `InfraError`, the vessel destroyed."""
        connection.setblocking(False)
        loop = asyncio.get_running_loop()
        _, channel = await loop.create_unix_connection(_Channel, sock=connection)
        session = cls(channel, vessel, limits)
        try:
            hello = json.loads(await channel.frame(loop, ready_within))
            session.python = str(hello["python"])[:40]
        except (_Gone, _Garbage, ValueError, KeyError, TypeError) as error:
            await session.close()
            raise InfraError(f"the sandbox {vessel.name} did not start: {error}") from error
        except asyncio.CancelledError:
            await session.close()
            raise
        return session

    def __repr__(self) -> str:
        return f"Session({self.name}{'' if self.alive else ', ' + self._over})"

    @property
    def name(self) -> str:
        return self._vessel.name

    @property
    def alive(self) -> bool:
        return not self._over and self._channel.broken is None

    @property
    def enforcement(self) -> Enforcement:
        return self._vessel.enforcement

    # -- programs ------------------------------------------------------------------------------

    async def exec(self, code: str, seconds: float | None = None) -> Result:
        return await self._run({"op": "exec", "code": code}, seconds)

    async def shell(self, command: str, seconds: float | None = None) -> Result:
        return await self._run({"op": "shell", "command": command}, seconds)

    async def _run(self, request: dict[str, Any], seconds: float | None) -> Result:
        allowed = min(seconds or self.limits.seconds, self.limits.seconds)
        begun = time.perf_counter()
        try:
            reply = await self._ask(request | {"seconds": allowed}, allowed + PATIENCE)
            return self._result(reply, time.perf_counter() - begun)
        except _Gone as gone:
            status: Status = "died"
            self._doom(str(gone))
        except _Garbage as garbage:
            status = "protocol"
            self._doom(f"a program wrote to its channel: {garbage}")
        return Result(status, hit=self._vessel.hit(), lost=True, seconds=time.perf_counter() - begun)

    def _result(self, reply: Mapping[str, Any], seconds: float) -> Result:
        """A program's reply, every field checked. Raises `_Garbage`."""
        status: Status = reply.get("status", "protocol")
        code, dropped = reply.get("exit_code"), reply.get("dropped")
        texts = [reply.get(name) for name in ("stdout", "stderr", "value", "error")]
        if status not in _STATUSES or not all(text is None or isinstance(text, str) for text in texts):
            raise _Garbage("a reply with fields of the wrong type")
        if not isinstance(dropped, int) or not (code is None or isinstance(code, int)):
            raise _Garbage("a reply with fields of the wrong type")
        longest = self.limits.output_bytes + 100  # with the note of what was left out
        stdout, stderr, value, error = (None if text is None else text[:longest] for text in texts)
        hit: tuple[LimitName, ...] = ("time",) if status.startswith("timeout") else ()
        if status == "output_limit":
            hit = ("output",)
        elif status != "ok":
            hit += self._vessel.hit()
        return Result(
            status=status,
            stdout=stdout or "",
            stderr=stderr or "",
            value=value,
            error=error,
            exit_code=code,
            images=_images(reply.get("images")),
            dropped=max(0, dropped),
            hit=hit,
            lost=reply.get("lost") is True,
            seconds=seconds,
        )

    # -- files ---------------------------------------------------------------------------------

    async def read(self, path: str, most: int = 1_000_000) -> bytes:
        data = bytearray()
        while True:
            reply = await self._chore({"op": "read", "path": path, "offset": len(data), "size": PIECE})
            size, text = reply.get("size"), reply.get("data")
            if not isinstance(size, int) or not isinstance(text, str):
                raise self._lied()
            if size > most:
                raise PathError(f"{path}: {size} bytes, more than the {most} that may be read at once")
            try:
                piece = base64.b64decode(text, validate=True)
            except binascii.Error:
                raise self._lied() from None
            data += piece
            if len(data) > most:
                raise self._lied()
            if not piece or len(data) >= size:
                return bytes(data)

    async def write(self, path: str, data: bytes) -> None:
        nonce = secrets.token_hex(8)
        for offset in range(0, max(1, len(data)), PIECE):
            piece = data[offset : offset + PIECE]
            last = offset + PIECE >= len(data)
            text = base64.b64encode(piece).decode()
            await self._chore(
                {"op": "write", "path": path, "offset": offset, "data": text, "last": last, "draft": nonce}
            )

    async def files(self) -> dict[str, int]:
        found = (await self._chore({"op": "files"})).get("files")
        if not isinstance(found, dict) or not all(isinstance(size, int) for size in found.values()):
            raise self._lied()
        return {str(path): size for path, size in found.items()}

    # -- life ----------------------------------------------------------------------------------

    async def reset(self) -> None:
        await self._chore({"op": "reset"})

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
            self._doom(str(error))
            raise InfraError(f"the sandbox {self.name} died: {error}") from error
        if "refused" in reply:
            raise PathError(str(reply["refused"])[:500])
        return reply

    async def _ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Send a request and return its reply. Raises `InfraError` for a sandbox that was dead before."""
        async with self._turn:
            if not self.alive:
                raise InfraError(f"the sandbox {self.name} is gone: {self._over or self._channel.broken}")
            nonce = secrets.token_hex(16)
            self._channel.send(json.dumps(request | {"id": nonce}).encode())
            try:
                frame = await self._channel.frame(self._loop, seconds)
            except asyncio.CancelledError:  # the reply would come to whoever asks next
                self._doom("its program was cancelled")
                raise
        try:
            reply = json.loads(frame)
        except (ValueError, RecursionError):
            raise _Garbage("not JSON") from None
        if not isinstance(reply, dict) or reply.get("id") != nonce:
            raise _Garbage("an answer to nothing that was asked")
        return reply

    def _lied(self) -> InfraError:
        self._doom("a program wrote to its channel")
        return InfraError(f"the sandbox {self.name} gave an impossible answer and was destroyed")

    def _expire(self) -> None:
        self._doom(f"its life of {self.limits.life:g} s is over")

    def _doom(self, reason: str) -> None:
        """Give the sandbox up; it is destroyed in the background."""
        if self._leaving is None:
            self._over = reason
            self._life.cancel()
            self._channel.fail(_Gone(reason))
            self._leaving = self._loop.create_task(self._destroy(), name=f"destroy {self.name}")

    async def _destroy(self) -> None:
        try:
            await self._vessel.destroy()
        except Exception:  # whatever a backend meets: the reaper finds what was left
            log.exception("the sandbox %s could not be destroyed", self.name)


def _images(found: object) -> tuple[Image, ...]:
    images = []
    for item in found[:MOST_IMAGES] if isinstance(found, list) else ():
        if isinstance(item, dict) and item.get("mime") in ("image/png", "image/jpeg"):
            with contextlib.suppress(binascii.Error, TypeError, ValueError):
                images.append(Image(base64.b64decode(item["data"], validate=True), str(item["mime"])))
    return tuple(images)
