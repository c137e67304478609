"""Stands for a server's process in `test_weights`: it joins groups of processes and opens handles of shared memory."""

from __future__ import annotations

import pickle
import socket
import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

LIMIT = timedelta(seconds=60)
weights: dict[str, torch.Tensor] = {}
groups: dict[str, Any] = {}


def join(host: str, port: int, rank: int, world: int, group: str, backend: str) -> None:
    store = dist.TCPStore(host, port, world, False, LIMIT)
    made, _ = c10d._new_process_group_helper(
        world, rank, [], c10d.Backend(backend), dist.PrefixStore(group, store), group_name=group, timeout=LIMIT
    )
    c10d._world.pg_group_ranks[made] = {n: n for n in range(world)}
    groups[group] = made, store


def receive(names: tuple[str, ...], dtype: str, shapes: tuple[tuple[int, ...], ...], group: str) -> None:
    kind = getattr(torch, dtype)
    sizes = [torch.Size(shape).numel() * kind.itemsize for shape in shapes]
    flat = torch.empty(sum(sizes), dtype=torch.uint8)
    dist.broadcast(flat, src=0, group=groups[group][0])
    for name, shape, part in zip(names, shapes, flat.split(sizes), strict=True):
        weights[name] = part.view(kind).view(shape).clone()


def take(pickle: bytes) -> None:
    for name, tensor in globals()["pickle"].loads(pickle):
        weights[name] = tensor.clone()


def leave(group: str) -> None:
    dist.destroy_process_group(groups.pop(group)[0])


def listed() -> list[tuple[str, Any, str]]:
    return [(name, tensor.tolist(), str(tensor.dtype).removeprefix("torch.")) for name, tensor in weights.items()]


def main() -> None:
    calls = {"join": join, "receive": receive, "take": take, "leave": leave, "weights": listed, "ranks": lambda: 1}
    pipe = socket.socket(socket.AF_UNIX)
    pipe.connect(sys.argv[1])
    with pipe.makefile("rwb") as stream:
        while True:
            words = pickle.load(stream)
            try:
                answer: Any = calls[words.pop("call")](**words)
            except Exception as error:
                answer = f"{type(error).__name__}: {error}"
            pickle.dump(answer, stream)
            stream.flush()


main()
