"""Buckets of weights: many tensors in one array of bytes, and its handle for other processes of this machine."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING, Any

from agentrl.engines.servers import Bucket

if TYPE_CHECKING:
    import torch

_SHARING = threading.Lock()  # torch's sharing strategy is one for the whole process


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
