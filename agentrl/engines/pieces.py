"""Weights in pieces, bucket by bucket: by handles of shared memory, or by broadcast."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

from agentrl.engines.broadcast import Door, Group, address_for
from agentrl.engines.buckets import buckets, handles, new_room
from agentrl.engines.servers import Bucket, ModelServer, TakesTensors
from agentrl.engines.waiting import all_of, in_thread, settle
from agentrl.engines.weights import Weights, named
from agentrl.errors import InfraError

if TYPE_CHECKING:
    import torch

BUCKET_BYTES = 512 * 2**20
JOIN_SECONDS = 60.0
SEND_SECONDS = 300.0  # for one bucket


class PieceSync:
    """What `TensorSync` and `DistributedSync` share: an update in buckets of at most `bucket_bytes` (or one tensor).

    A copy of what was sent last stays in the memory of this process, for servers that must catch up: as many bytes as
    the model has.
    """

    def __init__(self, bucket_bytes: int = BUCKET_BYTES) -> None:
        self._bytes = bucket_bytes
        self._copy: dict[str, torch.Tensor] = {}
        self._version: int | None = None
        self._ranks: dict[str, int] = {}  # by server
        self._memory: list[torch.Tensor] = []  # of two buckets: new memory costs more than copies

    async def send(self, servers: Sequence[ModelServer], weights: Weights, version: int) -> None:
        self._version = None  # the copy is a mixture until the end
        await self._send(servers, self._copied(weights), version)
        self._version = version

    async def catch_up(self, server: ModelServer) -> None:
        self._ranks.pop(server.url, None)  # it may have been started with others
        if self._version is not None:
            await self._send([server], self._copy.items(), self._version)

    async def close(self) -> None:
        self._copy, self._memory = {}, []

    async def _send(
        self, servers: Sequence[ModelServer], weights: Iterable[tuple[str, torch.Tensor]], version: int
    ) -> None:
        takers = [cast(TakesTensors, server) for server in servers]
        if not takers:  # all are lost for now: whoever comes back catches up from the copy
            for _ in weights:
                pass
            return
        for taker in takers:
            if taker.url not in self._ranks:
                self._ranks[taker.url] = await taker.ranks()
        await self._ready(takers)
        await all_of(taker.open_update() for taker in takers)
        try:
            pieces = buckets(weights, self._bytes, self._room)
            piece = await asyncio.to_thread(next, pieces, None)
            while piece is not None:
                after = await asyncio.to_thread(next, pieces, None)
                await self._pass_on(takers, *piece, version if after is None else None)
                piece = after
        except BaseException:
            await settle(taker.close_update() for taker in takers)
            raise
        await all_of(taker.close_update() for taker in takers)

    async def _ready(self, takers: Sequence[TakesTensors]) -> None:
        raise NotImplementedError

    async def _pass_on(
        self, takers: Sequence[TakesTensors], bucket: Bucket, flat: torch.Tensor, version: int | None
    ) -> None:
        raise NotImplementedError

    def _room(self, size: int, device: torch.device) -> torch.Tensor:
        """Memory of a bucket that was sent before, where it is large enough."""
        used = self._memory.pop(0) if len(self._memory) > 1 else None
        if used is None or used.device != device or used.numel() < size:
            used = new_room(size, device)
        self._memory.append(used)
        return used[:size]

    def _copied(self, weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights; on the way they are copied to `_copy`."""
        before, self._copy = self._copy, {}
        for name, tensor in named(weights):
            old = before.pop(name, None)
            fits = old is not None and old.shape == tensor.shape and old.dtype == tensor.dtype
            self._copy[name] = old.copy_(tensor) if old is not None and fits else tensor.detach().cpu().clone()
            yield name, tensor


class TensorSync(PieceSync):
    """Servers of this machine open the memory that a bucket stands in; only its handle travels."""

    async def _ready(self, takers: Sequence[TakesTensors]) -> None:
        """Nothing has to be made."""

    async def _pass_on(
        self, takers: Sequence[TakesTensors], bucket: Bucket, flat: torch.Tensor, version: int | None
    ) -> None:
        def pickles() -> list[list[bytes]]:
            # One for each process that opens it: torch counts them.
            return [[handles(bucket, flat) for _ in range(self._ranks[taker.url])] for taker in takers]

        made = await asyncio.to_thread(pickles)
        await all_of(taker.take(pickle, version) for taker, pickle in zip(takers, made, strict=True))


class DistributedSync(PieceSync):
    """One group of processes over this one, rank 0, and all ranks of all servers; buckets are broadcast in order.

    The group is this object's own and not torch's default one, which a trainer of several ranks needs for itself. It is
    made once, and anew after a failure, for other servers, and where a server no longer knows it.
    """

    def __init__(
        self, bucket_bytes: int = BUCKET_BYTES, *, join_seconds: float = JOIN_SECONDS, seconds: float = SEND_SECONDS
    ) -> None:
        super().__init__(bucket_bytes)
        self._join_seconds, self._seconds = join_seconds, seconds
        self._group: Group | None = None
        self._members: tuple[TakesTensors, ...] = ()
        self._backend = ""

    async def catch_up(self, server: ModelServer) -> None:
        """As the others do; the group of all servers is made anew with the next update."""
        await super().catch_up(server)
        await self._disband()

    async def close(self) -> None:
        await self._disband()
        await super().close()

    async def _ready(self, takers: Sequence[TakesTensors]) -> None:
        if self._members != tuple(takers):
            await self._disband()

    async def _pass_on(
        self, takers: Sequence[TakesTensors], bucket: Bucket, flat: torch.Tensor, version: int | None
    ) -> None:
        backend = "nccl" if flat.is_cuda else "gloo"
        known = self._group is not None and backend == self._backend
        try:
            if not known:
                await self._meet(takers, backend)
            await self._broadcast(takers, bucket, flat, version)
        except InfraError:
            await self._disband()
            if not known:
                raise
            await self._meet(takers, backend)  # one that was started again knows no group
            try:
                await self._broadcast(takers, bucket, flat, version)
            except InfraError:
                await self._disband()
                raise

    async def _broadcast(
        self, takers: Sequence[TakesTensors], bucket: Bucket, flat: torch.Tensor, version: int | None
    ) -> None:
        group = self._group
        assert group is not None
        sending = asyncio.ensure_future(in_thread(lambda: group.broadcast(flat, self._seconds)))
        receiving = [asyncio.ensure_future(taker.receive(bucket, group.name, version)) for taker in takers]
        await self._together(sending, *receiving)

    async def _meet(self, takers: Sequence[TakesTensors], backend: str) -> None:
        await self._disband()
        # All must be there before any is asked to wait for the others.
        for taker, ranks in zip(takers, await asyncio.gather(*(taker.ranks() for taker in takers)), strict=True):
            self._ranks[taker.url] = ranks
        world = 1 + sum(self._ranks[taker.url] for taker in takers)
        host = address_for([taker.url for taker in takers])
        door = Door(host, backend, world, self._join_seconds)
        firsts = itertools.accumulate((self._ranks[taker.url] for taker in takers[:-1]), initial=1)
        joining = [
            asyncio.ensure_future(taker.join(host, door.port, first, world, door.name, backend))
            for taker, first in zip(takers, firsts, strict=True)
        ]
        opening = asyncio.ensure_future(in_thread(door.open))
        await self._together(opening, *joining)
        self._group, self._members, self._backend = opening.result(), tuple(takers), backend

    async def _together(self, ours: asyncio.Future[Any], *theirs: asyncio.Future[Any]) -> None:
        """Our half of something that all do at once, and theirs. Where one fails the others cannot end: we leave."""
        everyone = {ours, *theirs}
        try:
            limit = self._seconds + self._join_seconds
            done, late = await asyncio.wait(everyone, timeout=limit, return_when="FIRST_EXCEPTION")
            for task in (*theirs, ours):  # a server's own words first
                if task in done:
                    task.result()
            if late:
                raise InfraError(f"the servers did not take the weights within {limit:g} s; see their logs")
        finally:
            for task in everyone:
                task.cancel()

    async def _disband(self) -> None:
        group, members = self._group, self._members
        self._group, self._members = None, ()
        if group is not None:
            await in_thread(group.end)  # first: a server that still waits for a broadcast hears of it
            await settle(member.leave(group.name) for member in members)
