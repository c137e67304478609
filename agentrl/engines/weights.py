"""How weights reach servers: by a folder, by handles of shared memory, by broadcast, or as adapters over a base model.

Servers are paused while they take whole weights, and take adapters while they serve. Whatever the way, after `send` all
of them serve the same version, or an error names the one that does not. A sync remembers what it sent last, so that a
server which was started again, and so has its first weights, can be brought to the present version alone (`catch_up`).
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import io
import ipaddress
import itertools
import secrets
import shutil
import socket
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar, cast, get_args
from urllib.parse import urlsplit

from agentrl.engines.options import Sync
from agentrl.engines.servers import Bucket, ModelServer, TakesAdapters, TakesTensors
from agentrl.errors import InfraError, UsageError

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

T = TypeVar("T")
Weights: TypeAlias = "Iterable[tuple[str, torch.Tensor]] | Mapping[str, torch.Tensor] | str"
"""All weights under the architecture's own names, or the folder that holds them."""
BUCKET_BYTES = 512 * 2**20
JOIN_SECONDS = 60.0
SEND_SECONDS = 300.0  # for one bucket
SETTLE_SECONDS = 30.0  # for what should be tidied up after a failure
_SHARING = threading.Lock()  # torch's sharing strategy is one for the whole process


class WeightSync(Protocol):
    """One way to bring weights to servers. Calls do not overlap."""

    async def send(self, servers: Sequence[ModelServer], weights: Weights, version: int) -> None:
        """Bring all servers to `version`. Raises `UsageError` for weights that do not fit, `InfraError` where a server
        did not take them; then servers may hold parts of two versions, until the next `send` that ends well."""
        ...

    async def catch_up(self, server: ModelServer) -> None:
        """Bring one server, which was started again, to what was sent last; nothing where nothing was."""
        ...

    async def close(self) -> None: ...


def sync_of(way: Sync, servers: Sequence[ModelServer], folder: Path) -> WeightSync:
    """The way called `way`. Raises `UsageError` where a server cannot take weights so.

    `folder`: where weights or adapters are written, seen by the servers too.
    """
    if way not in get_args(Sync):
        raise UsageError(f"engine.sync is {way!r}; it is one of {', '.join(get_args(Sync))}")
    needed = {"tensor": TakesTensors, "distributed": TakesTensors, "adapter": TakesAdapters}.get(way)
    for server in servers:
        if needed is not None and not isinstance(server, needed):
            raise UsageError(
                f"the vLLM server at {server.url} takes weights from a folder only: set engine.sync to disk"
            )
        if way == "tensor" and not _loopback(server.url):
            raise UsageError(
                f"engine.sync=tensor shares memory with the server, but {server.url} may be another machine; set "
                "engine.sync to distributed or disk"
            )
    if way == "disk":
        return DiskSync(folder)
    if way == "adapter":
        return AdapterSync(folder)
    return TensorSync() if way == "tensor" else DistributedSync()


class DiskSync:
    """Weights as safetensors in a folder that servers read. The folder of the version before stays until the next."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sent: tuple[Path, int] | None = None

    async def send(self, servers: Sequence[ModelServer], weights: Weights, version: int) -> None:
        folder = Path(weights) if isinstance(weights, str) else await asyncio.to_thread(self._write, weights, version)
        await _all(server.load(folder, version) for server in servers)
        self._sent = folder, version

    async def catch_up(self, server: ModelServer) -> None:
        if self._sent is not None:
            await server.load(*self._sent)

    async def close(self) -> None:
        """The folder is its owner's."""

    def _write(self, weights: Iterable[tuple[str, torch.Tensor]] | Mapping[str, torch.Tensor], version: int) -> Path:
        """The weights in a folder that no reader sees half-written."""
        from safetensors.torch import save_file

        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in named(weights)}
        folder = self._folder / f"version-{version}"
        draft = self._folder / f"draft-{version}"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        save_file(tensors, draft / "model.safetensors", metadata={"format": "pt"})
        (draft / "model.safetensors").chmod(0o644)  # servers may run as somebody else
        shutil.rmtree(folder, ignore_errors=True)
        draft.rename(folder)
        kept = {folder, *(() if self._sent is None else self._sent[:1])}
        for old in self._folder.glob("version-*"):
            if old not in kept:
                shutil.rmtree(old, ignore_errors=True)
        return folder


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
        await _all(taker.open_update() for taker in takers)
        try:
            pieces = buckets(weights, self._bytes, self._room)
            piece = await asyncio.to_thread(next, pieces, None)
            while piece is not None:
                after = await asyncio.to_thread(next, pieces, None)
                await self._pass_on(takers, *piece, version if after is None else None)
                piece = after
        except BaseException:
            await _settle(taker.close_update() for taker in takers)
            raise
        await _all(taker.close_update() for taker in takers)

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
        await _all(taker.take(pickle, version) for taker, pickle in zip(takers, made, strict=True))


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
            await _settle(member.leave(group.name) for member in members)


class AdapterSync:
    """LoRA adapters instead of weights: each version is one more adapter over the base model that servers loaded.

    `weights` is always a folder as peft writes it (`Policy.save_hf(folder, merge=False)`). Requests in flight end under
    the adapter that they began with; it is unloaded with the first update after its last request.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._loaded: dict[str, list[str]] = {}  # by server: names, the present one last
        self._takers: dict[str, TakesAdapters] = {}
        self._sent: tuple[Path, int] | None = None

    async def send(self, servers: Sequence[ModelServer], weights: Weights, version: int) -> None:
        if not isinstance(weights, str) or not (Path(weights) / "adapter_config.json").is_file():
            raise UsageError(
                "engine.sync=adapter takes a folder that peft wrote (with adapter_config.json): train with model.lora "
                "and hand over what Policy.save_hf(folder, merge=False) writes, or set engine.sync to disk"
            )
        name = _adapter_name(version)
        kept = self._folder / name
        await asyncio.to_thread(_copy_adapter, Path(weights), kept)
        takers = [cast(TakesAdapters, server) for server in servers]
        try:
            await _all(taker.load_adapter(name, kept) for taker in takers)
        except (InfraError, UsageError):
            await _settle(taker.unload_adapter(name) for taker in takers)
            await asyncio.to_thread(shutil.rmtree, kept, True)
            raise
        self._sent = kept, version
        for taker in takers:
            taker.use(name, version)
            self._takers[taker.url] = taker
            self._loaded.setdefault(taker.url, []).append(name)
            await self._sweep(taker)
        held = {name} | {old for names in self._loaded.values() for old in names}
        for folder in self._folder.glob("version-*"):
            if folder.name not in held:
                await asyncio.to_thread(shutil.rmtree, folder, True)

    async def catch_up(self, server: ModelServer) -> None:
        if self._sent is not None:
            folder, version = self._sent
            taker = cast(TakesAdapters, server)
            name = _adapter_name(version)  # a new one, should it know the old one after all
            await taker.load_adapter(name, folder)
            taker.use(name, version)
            self._takers[taker.url], self._loaded[taker.url] = taker, [name]

    async def close(self) -> None:
        """Servers that go on do so without our adapters."""
        await _settle(taker.unload_adapter(name) for url, taker in self._takers.items() for name in self._loaded[url])

    async def _sweep(self, taker: TakesAdapters) -> None:
        """Unload what no request uses."""
        *old, present = self._loaded[taker.url]
        free = [name for name in old if not taker.using(name)]
        self._loaded[taker.url] = [name for name in old if name not in free] + [present]
        for name in free:
            await taker.unload_adapter(name)


# -- pieces of weights -----------------------------------------------------------------------------------------------


def named(weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors, without gradients. A folder's are read one by one. Raises `UsageError` for one without any."""
    if isinstance(weights, str):
        yield from _read(Path(weights))
        return
    for name, tensor in weights.items() if isinstance(weights, Mapping) else weights:
        yield name, tensor.detach()


def new_room(size: int, device: torch.device) -> torch.Tensor:
    import torch

    return torch.empty(size, dtype=torch.uint8, device=device)


def buckets(
    weights: Iterable[tuple[str, torch.Tensor]],
    most: int,
    room: Callable[[int, torch.device], torch.Tensor] = new_room,
) -> Iterator[tuple[Bucket, torch.Tensor]]:
    """The weights in order, in arrays [bytes] of at most `most` bytes or of one tensor, each of one dtype and device.

    `room` gives the memory for so many bytes, never the trainer's own: that is not to be shared.
    """
    held: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, tensor in weights:
        first = held[0][1] if held else tensor
        differs = (tensor.dtype, tensor.device) != (first.dtype, first.device)
        if held and (differs or size + tensor.nbytes > most):
            yield _flat(held, room)
            held, size = [], 0
        held.append((name, tensor))
        size += tensor.nbytes
    if held:
        yield _flat(held, room)


def views(bucket: Bucket, flat: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """The tensors that `flat` holds, over its memory."""
    import torch

    dtype: torch.dtype = getattr(torch, bucket.dtype)
    sizes = [torch.Size(shape).numel() * dtype.itemsize for shape in bucket.shapes]
    return [
        (name, part.view(dtype).view(shape))
        for name, shape, part in zip(bucket.names, bucket.shapes, torch.split(flat, sizes), strict=True)
    ]


def handles(bucket: Bucket, flat: torch.Tensor) -> bytes:
    """A pickle of names and tensors that another process of this machine opens over the same memory.

    Tensors on a CPU go through files of shared memory: the default way passes file descriptors, which needs a socket
    between the two, and ends an SGLang server. CUDA devices are named by their id, for the other process may count
    them differently (it understands both). Nothing of the pickle names a class that is not torch's own.
    """
    import torch.multiprocessing as sharing

    sink = io.BytesIO()
    with _SHARING:
        before = sharing.get_sharing_strategy()  # type: ignore[no-untyped-call]
        sharing.set_sharing_strategy("file_system")  # type: ignore[no-untyped-call]
        try:
            _Pickler(sink).dump(views(bucket, flat))
        finally:
            sharing.set_sharing_strategy(before)  # type: ignore[no-untyped-call]
    return sink.getvalue()


class _Pickler(ForkingPickler):
    def reducer_override(self, value: Any) -> Any:
        import torch
        from torch.multiprocessing import reductions

        if not (isinstance(value, torch.Tensor) and value.is_cuda):
            return NotImplemented
        rebuild, made = reductions.reduce_tensor(value)  # type: ignore[no-untyped-call]
        device = 6  # where `rebuild_cuda_tensor` takes it
        return rebuild, (*made[:device], str(torch.cuda.get_device_properties(made[device]).uuid), *made[device + 1 :])


def _flat(
    held: Sequence[tuple[str, torch.Tensor]], room: Callable[[int, torch.device], torch.Tensor]
) -> tuple[Bucket, torch.Tensor]:
    import torch

    first = held[0][1]
    bucket = Bucket(
        tuple(name for name, _ in held),
        str(first.dtype).removeprefix("torch."),
        tuple(tuple(tensor.shape) for _, tensor in held),
    )
    flat = room(sum(tensor.nbytes for _, tensor in held), first.device)
    for (_, view), (_, tensor) in zip(views(bucket, flat), held, strict=True):
        view.copy_(tensor)
    if flat.is_cuda:
        torch.cuda.synchronize(flat.device)  # others read it outside this process's streams
    return bucket, flat


def _read(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors import safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UsageError(f"{folder} holds no safetensors; write the weights there first")
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no dictionary
                yield name, opened.get_tensor(name)


def _adapter_name(version: int) -> str:
    """Never the same twice: servers cache keys and values under it."""
    return f"version-{version}-{secrets.token_hex(4)}"


def _copy_adapter(source: Path, target: Path) -> None:
    """Only what a server reads; the trainer may write over its own folder."""
    target.mkdir(parents=True)
    for file in source.glob("adapter_*"):
        shutil.copy2(file, target / file.name)


# -- groups of processes ---------------------------------------------------------------------------------------------


class Group:
    """A group of processes of which this one is rank 0."""

    def __init__(self, name: str, group: ProcessGroup, store: object) -> None:
        self.name = name
        self._held: tuple[ProcessGroup, object] | None = (group, store)  # others ask the store as long as it lives

    def broadcast(self, flat: torch.Tensor, seconds: float) -> None:
        """Blocks until it is sent. Raises `InfraError` where that fails or takes longer than `seconds`."""
        from torch.distributed import BroadcastOptions

        if self._held is None:
            raise InfraError("the group that weights are broadcast to has ended")
        options = BroadcastOptions()
        options.rootRank = 0
        try:
            self._held[0].broadcast([flat], options).wait(datetime.timedelta(seconds=seconds))
        except RuntimeError as error:
            raise InfraError(f"weights could not be broadcast to the servers: {_first_line(error)}") from error

    def end(self) -> None:
        """Members that wait for a broadcast hear of it when the connections close, which the last reference does."""
        import torch.distributed as dist

        held, self._held = self._held, None
        if held is not None:
            with contextlib.suppress(RuntimeError, ValueError):  # it broke: nothing is left to end
                held[0].abort()
                dist.destroy_process_group(held[0])


class Door:
    """Where a group meets: a port of this machine. `name` is new each time, for old members may still know the last."""

    def __init__(self, host: str, backend: str, world: int, seconds: float) -> None:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        self.name = f"agentrl-{secrets.token_hex(6)}"
        self._backend, self._world = backend, world
        self._limit = datetime.timedelta(seconds=seconds)
        # Sockets of ours are bound to the address that servers know us by. The store's own would listen everywhere.
        with socket.create_server((host, 0)) as listening:
            self.port = int(listening.getsockname()[1])
            self._store: TCPStore | None = TCPStore(
                host,
                self.port,
                world,
                True,
                self._limit,
                wait_for_workers=False,
                master_listen_fd=listening.detach(),
            )

    def open(self) -> Group:
        """Blocks until all have joined. Raises `InfraError` where they do not."""
        from torch.distributed import distributed_c10d as c10d

        store, self._store, group = self._store, None, None
        assert store is not None, "a door is opened once"
        try:
            group, _ = c10d._new_process_group_helper(  # as servers do, whose own keys in the store it must match
                self._world,
                0,
                [],
                c10d.Backend(self._backend),
                c10d.PrefixStore(self.name, store),
                group_name=cast(Any, self.name),
                timeout=self._limit,
            )
        except RuntimeError as error:
            said = _first_line(error)
        if group is None:  # here, without the error: its traceback would hold the store, on which others still wait
            raise InfraError(f"servers did not join the group that weights are broadcast to: {said}")
        c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(self._world)}
        return Group(self.name, group, store)


def address_for(urls: Sequence[str]) -> str:
    """This machine's address as the servers see it: the loopback where all of them are here."""
    away = [url for url in urls if not _loopback(url)]
    if not away:
        return "127.0.0.1"
    parts = urlsplit(away[0])
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((parts.hostname, parts.port or 80))  # sends nothing
            return str(probe.getsockname()[0])
    except OSError as error:
        raise InfraError(f"there is no way to {away[0]}: {error}") from error


def _loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300]


# -- waiting ---------------------------------------------------------------------------------------------------------


async def in_thread(work: Callable[[], T]) -> T:
    """`work` in a thread of its own, which nobody waits for when the program ends: it may hang as long as it likes."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(cast(T, result))
        else:
            future.set_exception(error)

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except Exception as raised:  # whatever it is, whoever waits must hear of it
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop is over
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name="agentrl-weights", daemon=True).start()
    return await future


async def _all(calls: Iterable[Awaitable[None]]) -> None:
    """All of them to their end, and only then the first error: a server must not be left in the middle."""
    for outcome in await asyncio.gather(*calls, return_exceptions=True):
        if isinstance(outcome, BaseException):
            raise outcome


async def _settle(calls: Iterable[Coroutine[Any, Any, None]]) -> None:
    """All of them, for a while; servers that are gone, hang or refuse are no matter here."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    if tasks:
        done, late = await asyncio.wait(tasks, timeout=SETTLE_SECONDS)
        for task in late:
            task.cancel()
        for error in [task.exception() for task in done]:
            if error is not None and not isinstance(error, InfraError | UsageError):
                raise error
