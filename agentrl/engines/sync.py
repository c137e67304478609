"""How weights reach servers: by a folder, by handles of shared memory, by broadcast, or as adapters over a base model.

Servers are paused while they take whole weights, and take adapters while they serve. Whatever the way, after `send` all
of them serve the same version, or an error names the one that does not. A sync remembers what it sent last, so that a
server which was started again, and so has its first weights, can be brought to the present version alone (`catch_up`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, get_args

from agentrl.engines.adapters import AdapterSync
from agentrl.engines.broadcast import loopback
from agentrl.engines.disk import DiskSync
from agentrl.engines.options import Sync
from agentrl.engines.pieces import DistributedSync, TensorSync
from agentrl.engines.servers import ModelServer, TakesAdapters, TakesTensors
from agentrl.engines.weights import Weights
from agentrl.errors import UsageError


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
        if way == "tensor" and not loopback(server.url):
            raise UsageError(
                f"engine.sync=tensor shares memory with the server, but {server.url} may be another machine; set "
                "engine.sync to distributed or disk"
            )
    if way == "disk":
        return DiskSync(folder)
    if way == "adapter":
        return AdapterSync(folder)
    return TensorSync() if way == "tensor" else DistributedSync()
