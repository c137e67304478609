"""A group of processes to which this one, rank 0, broadcasts: where it meets, what it sends, and its end."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import secrets
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

from agentrl.errors import InfraError

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup


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
    away = [url for url in urls if not loopback(url)]
    if not away:
        return "127.0.0.1"
    parts = urlsplit(away[0])
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((parts.hostname, parts.port or 80))  # sends nothing
            return str(probe.getsockname()[0])
    except OSError as error:
        raise InfraError(f"there is no way to {away[0]}: {error}") from error


def loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300]
